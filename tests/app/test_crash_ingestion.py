"""Kill -9 while documents are ingested, replaced and deleted: nothing accepted is lost, nothing is seen by halves."""

import asyncio
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_tgi import FakeTGI
from tests.service_process import service_process

NAMES = [f"{n}.txt" for n in range(6)]
PARAGRAPHS = 40
ROUNDS = 8


def text(name: str, edition: int) -> str:
    return "\n\n".join(f"Edition {edition} of {name}, paragraph {n}. " + "It goes on. " * 40 for n in range(PARAGRAPHS))


async def change_for_ever(client: httpx.AsyncClient, accepted: dict[str, set[int]], editions: list[int]) -> None:
    """Add, replace and delete documents until the service is gone, noting what may be there of each: 0 is nothing."""
    with suppress(httpx.TransportError):
        while True:
            name = random.choice(NAMES)
            known = accepted[name]
            if random.random() < 0.25:
                found = (await client.get("/v1/documents?limit=100")).json()["data"]
                for document in (each for each in found if each["name"] == name):
                    before = set(known)
                    known.add(0)
                    response = await client.delete(f"/v1/documents/{document['id']}")
                    assert response.status_code in (200, 404), response.text
                    known.clear()
                    known |= {0} if response.status_code == 200 else before
            else:
                editions[0] += 1
                edition = editions[0]
                known.add(edition)
                response = await client.post("/v1/documents", json={"name": name, "text": text(name, edition)})
                if response.status_code == 202:
                    known.clear()
                    known.add(edition)
                else:
                    assert response.status_code == 429, response.text
                    known.discard(edition)


async def look(client: httpx.AsyncClient) -> dict[str, int]:
    """The edition that is there of each document, once no job is open; every one of them whole."""
    async with asyncio.timeout(60):
        while (await client.get("/v1/jobs?ended=false")).json()["data"]:
            await asyncio.sleep(0.02)
    found: dict[str, int] = {}
    for document in (await client.get("/v1/documents?limit=100")).json()["data"]:
        passages = (await client.get(f"/v1/documents/{document['id']}/passages")).json()["data"]
        said = {passage["text"].split()[1] for passage in passages}
        assert len(said) == 1, "passages of two editions"
        assert len(passages) == document["passages"] > 1
        found[document["name"]] = int(said.pop())
    for name in NAMES:
        body = {"query": f"edition of {name} paragraph", "top_k": 100, "mode": "sparse"}
        hits = (await client.post("/v1/search", json=body)).json()["hits"]
        for hit in hits:
            words: list[Any] = hit["passage"]["text"].split()
            assert found[hit["passage"]["document_name"]] == int(words[1]), "a hit of an edition that is not there"
    return found


@pytest.mark.timeout(240)
@pytest.mark.slow
async def test_kill_9_during_ingestion_and_deletion_loses_nothing_and_shows_nothing_by_halves(tmp_path: Path) -> None:
    accepted: dict[str, set[int]] = {name: {0} for name in NAMES}
    editions = [0]
    given = {"ingestion": {"max_waiting_documents": 6, "max_attempts": 100}}
    async with FakeTGI() as tgi:
        for _ in range(ROUNDS):
            async with service_process(tmp_path, tgi.url, given) as process, process.client() as client:
                before = editions[0]
                changing = asyncio.create_task(change_for_ever(client, accepted, editions))
                while editions[0] < before + 6 and not changing.done():
                    await asyncio.sleep(0.005)
                await asyncio.sleep(random.uniform(0, 0.3))  # The random moment: nothing to wait for.
                process.kill()
                await changing
        async with service_process(tmp_path, tgi.url, given) as process, process.client() as client:
            found = await look(client)
            failed = (await client.get("/v1/failed-documents")).json()["data"]
    assert failed == []
    for name in NAMES:
        assert found.get(name, 0) in accepted[name], (name, found.get(name, 0), accepted[name])
    assert editions[0] >= 6 * ROUNDS
    assert list((tmp_path / "retrieval" / "spool").iterdir()) == []
