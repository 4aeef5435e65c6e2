"""What a client saw complete is on record though the service was killed a moment later, once and whole."""

import asyncio
import contextlib
import json
import random
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from tests.fake_tgi import FakeTGI, Tokens
from tests.service import CHAT
from tests.service_process import service_process

CLIENTS = 30


@dataclass
class Seen:
    """The ids of answers, as clients saw them."""

    complete: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)


async def ask_for_ever(client: httpx.AsyncClient, seen: Seen, *, stream: bool) -> None:
    """Ask until the service is gone, noting what was seen complete and no more than that."""
    body = {"model": "hallmark", "messages": [{"role": "user", "content": "What is a release?"}], "stream": stream}
    with contextlib.suppress(httpx.TransportError):
        while True:
            async with client.stream("POST", CHAT, json=body) as response:
                assert response.status_code == 200
                prediction_id = response.headers["x-prediction-id"]
                seen.begun.add(prediction_id)
                content = b"".join([part async for part in response.aiter_bytes()])
            if not stream:
                assert json.loads(content)["id"] == prediction_id
            elif not content.endswith(b"data: [DONE]\n\n"):
                continue
            seen.complete.add(prediction_id)


async def run_and_kill(data_dir: Path, engine_url: str, after_seconds: float, seen: Seen) -> None:
    async with service_process(data_dir, engine_url) as process, process.client(connections=CLIENTS) as client:
        asking = [asyncio.create_task(ask_for_ever(client, seen, stream=i % 2 == 0)) for i in range(CLIENTS)]
        await asyncio.sleep(after_seconds)  # The random moment: nothing to wait for.
        process.kill()
        await asyncio.gather(*asking)


def outcomes(data_dir: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(data_dir / "hallmark.db")) as connection:
        rows = connection.execute("SELECT id, outcome FROM predictions").fetchall()
    return [(str(UUID(bytes=key)), outcome) for key, outcome in rows]


@pytest.mark.timeout(180)
@pytest.mark.slow
async def test_kill_9_under_load_loses_and_doubles_no_answer_that_a_client_saw_complete(tmp_path):
    seen = Seen()
    shapes = [Tokens("A", " release", ".", delay_seconds=delay) for delay in (0, 0, 0.002, 0.02)]
    async with FakeTGI(default=lambda body: random.choice(shapes)) as tgi:
        for _ in range(20):
            await run_and_kill(tmp_path, tgi.url, random.uniform(0.05, 0.4), seen)
        # One more start settles what the last kill left open.
        async with service_process(tmp_path, tgi.url) as process, process.client() as client:
            assert (await client.get("/healthz")).status_code == 200
            rows = await asyncio.to_thread(outcomes, tmp_path)
    by_id = dict(rows)
    assert len(by_id) == len(rows), "a prediction has two rows"
    assert len(seen.complete) > 200, "too little was asked for the test to mean anything"
    assert {by_id.get(each) for each in seen.complete} == {"finished"}
    assert {by_id.get(each) for each in seen.begun - seen.complete} <= {"finished", "interrupted"}
    assert set(by_id.values()) == {"finished", "interrupted"}
