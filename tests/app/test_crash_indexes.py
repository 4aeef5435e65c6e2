"""Kill -9 while an index version is built, switched to and dropped: it goes on, and what answers is one, whole."""

import asyncio
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_tgi import FakeTGI
from tests.service_process import service_process

DOCUMENTS = 16
GIVEN = {"retrieval": {"next_passage_tokens": 60}, "ingestion": {"max_attempts": 100}}


def text(n: int) -> str:
    """Every passage of it, however it is cut, has its mark."""
    return "\n\n".join(f"Paragraph {m}. " + f"Mark{n} goes on. " * 25 for m in range(12))


async def listed(client: httpx.AsyncClient, path: str) -> list[dict[str, Any]]:
    return list((await client.get(path)).json()["data"])


async def check_one_answers(client: httpx.AsyncClient, data_dir: Path) -> str:
    """One version is live, and the documents, the search and the index's own pointer are of it; gives its id."""
    (live,) = [each for each in await listed(client, "/v1/indexes") if each["state"] == "live"]
    documents = await listed(client, "/v1/documents?limit=200")
    assert {each["index_version"] for each in documents} == {live["id"]}
    assert sum(each["passages"] for each in documents) == live["passages"]
    for n in (0, DOCUMENTS - 1):
        body = {"query": f"Mark{n}", "top_k": 100, "mode": "sparse"}
        found = (await client.post("/v1/search", json=body)).json()
        assert found["index_version"] == live["id"]
        named = [hit["passage"]["n"] for hit in found["hits"] if hit["passage"]["document_name"] == f"{n}.txt"]
        whole = next(each["passages"] for each in documents if each["name"] == f"{n}.txt")
        assert sorted(named) == list(range(1, whole + 1))
    pointer = json.loads((data_dir / "retrieval" / "index" / "hallmark" / "current.json").read_text())
    assert pointer["schema"]["passage_tokens"] == live["made_of"]["passage_tokens"]
    return str(live["id"])


async def switch_for_ever(client: httpx.AsyncClient, done: list[str]) -> None:
    """Go from version to version until the service is gone."""
    with suppress(httpx.TransportError):
        while True:
            ids = [each["id"] for each in await listed(client, "/v1/indexes") if each["state"] != "live"]
            response = await client.post(f"/v1/indexes/{ids[0]}/switch", json={"uncompared": True})
            assert response.status_code == 200, response.text
            done.append(ids[0])


@pytest.mark.timeout(600)
@pytest.mark.slow
async def test_kill_9_while_a_version_is_built_switched_to_and_dropped(tmp_path: Path) -> None:
    async with FakeTGI() as tgi:
        async with service_process(tmp_path, tgi.url, GIVEN) as process, process.client() as client:
            for n in range(DOCUMENTS):
                added = await client.post("/v1/documents?wait=20", json={"name": f"{n}.txt", "text": text(n)})
                assert added.status_code == 201, added.text
            job = (await client.post("/v1/indexes")).json()["job"]["id"]
            await asyncio.sleep(random.uniform(0, 0.2))  # The random moment: nothing to wait for.
            process.kill()
        for _ in range(2):
            async with (
                service_process(tmp_path, tgi.url, GIVEN, key=process.key) as process,
                process.client() as client,
            ):
                await check_one_answers(client, tmp_path)
                await asyncio.sleep(random.uniform(0, 0.2))
                process.kill()
        async with service_process(tmp_path, tgi.url, GIVEN, key=process.key) as process, process.client() as client:
            async with asyncio.timeout(60):
                while not (await client.get(f"/v1/jobs/{job}")).json()["finished_at"]:
                    await asyncio.sleep(0.02)
            assert (await client.get(f"/v1/jobs/{job}")).json()["outcomes"]["built"] == 1
            assert [each["missing_documents"] for each in await listed(client, "/v1/indexes")] == [0, 0]
        switched: list[str] = []
        for _ in range(4):
            async with (
                service_process(tmp_path, tgi.url, GIVEN, key=process.key) as process,
                process.client() as client,
            ):
                await check_one_answers(client, tmp_path)
                before = len(switched)
                switching = asyncio.create_task(switch_for_ever(client, switched))
                while len(switched) == before and not switching.done():
                    await asyncio.sleep(0.005)
                await asyncio.sleep(random.uniform(0, 0.2))
                process.kill()
                await switching
        async with service_process(tmp_path, tgi.url, GIVEN, key=process.key) as process, process.client() as client:
            live = await check_one_answers(client, tmp_path)
            (other,) = [each["id"] for each in await listed(client, "/v1/indexes") if each["id"] != live]
            with suppress(httpx.TransportError, TimeoutError):
                async with asyncio.timeout(random.uniform(0.001, 0.05)):
                    await client.delete(f"/v1/indexes/{other}")
            process.kill()
        async with service_process(tmp_path, tgi.url, GIVEN, key=process.key) as process, process.client() as client:
            assert await check_one_answers(client, tmp_path) == live
            kept = await listed(client, "/v1/indexes")
            assert {each["state"] for each in kept} <= {"live", "retired"}
            shards = [path for path in (tmp_path / "retrieval" / "index" / "hallmark").iterdir() if path.is_dir()]
            assert len(shards) == len(kept)
    assert len(switched) >= 4
