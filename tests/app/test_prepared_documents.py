"""Documents made ready elsewhere, over HTTP: who may send them, and what is said of those that are none."""

from collections.abc import AsyncIterator

import httpx
import pytest

from retrieval.cutting import cut
from retrieval.embedder import HashingEmbedder
from retrieval.parsers import parse
from retrieval.preparing import PREPARED, Prepared
from retrieval.splitting import split
from tests.fake_tgi import FakeTGI
from tests.routes import assert_envelope
from tests.service import Service, live_service

TEXT = b"# Gold\n\nA hallmark is a stamp on gold.\n"


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with FakeTGI() as tgi, live_service(tmp_path_factory.mktemp("prepared"), engine_url=tgi.url) as service:
        yield service


async def ready(service: Service) -> bytes:
    """What a node of a cluster makes of `TEXT` for the service's index."""
    async with service.client() as client:
        (index,) = (await client.get("/v1/indexes")).json()["data"]
    embedder = HashingEmbedder()
    parsed = await parse(TEXT, name="gold.md")
    passages = cut(
        split,
        parsed,
        passage_tokens=index["made_of"]["passage_tokens"],
        count_tokens=embedder.count_tokens,
    )
    made = Prepared.of(TEXT, "text/markdown", index["id"], parsed, passages)
    async with embedder:
        return (await made.embedded(embedder)).to_bytes()


async def send(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    return await client.post("/v1/documents?wait=20", files={"file": ("gold.md", content, PREPARED)})


async def test_who_may_manage_indexes_may_send_what_was_made_for_one(service: Service) -> None:
    content = await ready(service)
    clerk = await service.new_key(scopes=("documents:read", "documents:write"))
    async with service.client(clerk) as client:
        assert_envelope(await send(client, content), 403, "insufficient_scope")
        assert (await client.get("/v1/documents")).json()["data"] == []
    async with service.client() as client:
        made = await send(client, content)
        assert (made.status_code, made.json()["outcome"], made.json()["embedded_passages"]) == (201, "created", 0)
        found = await client.post("/v1/search", json={"query": "stamp on gold"})
        assert found.json()["hits"][0]["passage"]["text"] in TEXT.decode()
        assert (await client.post("/v1/documents?wait=20", files={"file": ("gold.md", TEXT)})).status_code == 200


async def test_one_that_is_none_is_refused_with_what_is_wrong(service: Service) -> None:
    async with service.client() as client:
        refused = await send(client, b"not at all")
        assert refused.status_code == 422, refused.text
        assert "no prepared document" in refused.json()["error"]["message"]
