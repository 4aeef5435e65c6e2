"""`hallmark ingest --ray`: documents made ready on a cluster of two nodes, and written by the service."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from retrieval.embedder import SentenceTransformerEmbedder
from tests.fake_tgi import FakeTGI
from tests.ray_cluster import ray_cluster
from tests.service import Api, Service, live_service

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass
class World:
    """A tenant nobody was before of a service, a cluster, and a folder that all of them see."""

    service: Service
    cluster: str
    folder: Path
    api: Api

    async def ingest(self, *options: str, place: str = "", key: str = "") -> tuple[int, str, str]:
        """Run the command for the folder, or another place; gives its exit code and what it said."""
        where = ("--url", self.service.url, "--key", key or self.api.key, "--ray", self.cluster)
        command = (sys.executable, "-m", "app", "ingest", place or str(self.folder), *options, *where)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=pipe)
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Service, str]]:
    async with (
        ray_cluster() as cluster,
        FakeTGI() as tgi,
        live_service(
            tmp_path_factory.mktemp("cluster"), engine_url=tgi.url, embedder=SentenceTransformerEmbedder(), tenants=6
        ) as service,
    ):
        yield service, cluster


@pytest.fixture
async def world(served: tuple[Service, str], tmp_path: Path) -> AsyncIterator[World]:
    service, cluster = served
    for number in range(40):
        sections = "\n\n".join(f"## Part {part}\n\nThe harbour {number}.{part} opens at nine." for part in range(3))
        (tmp_path / f"{number:02}.md").write_text(f"# Harbour {number}\n\n{sections}\n")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing more")
    async with service.tenant() as api:
        yield World(service, cluster, tmp_path, api)


async def test_documents_are_made_ready_on_both_nodes_and_are_what_the_service_makes(world: World) -> None:
    code, out, err = await world.ingest()
    assert (code, out) == (1, "40 created, 1 refused\n"), err
    assert "broken.pdf" in err
    assert "Made ready on 2 of the cluster's nodes" in err
    client = world.api.client
    async with world.service.tenant() as other:
        jobs = (await client.get("/v1/jobs?limit=100")).json()["data"]
        assert sum(job["embedded_passages"] for job in jobs) == 0
        name = "07.md"
        ours = await other.client.post(
            "/v1/documents?wait=60", files={"file": (name, (world.folder / name).read_bytes())}
        )
        assert ours.json()["embedded_passages"] == 1
        (theirs,) = [each for each in (await client.get("/v1/documents")).json()["data"] if each["name"] == name]
        assert theirs["version"] == ours.json()["document"]["version"]
        asked = {"query": "When does harbour 7 open?", "top_k": 1, "filter": {}}
        found = [(await each.post("/v1/search", json=asked)).json()["hits"][0] for each in (client, other.client)]
        assert [hit["passage"]["document_name"] for hit in found] == [name, name]
        assert found[0]["passage"]["text"] == found[1]["passage"]["text"]
        assert found[0]["dense_score"] == pytest.approx(found[1]["dense_score"], abs=1e-4)


async def test_what_is_there_as_it_is_is_not_made_again_and_what_changed_is(world: World) -> None:
    for path in sorted(world.folder.iterdir())[4:-1]:
        path.unlink()
    code, out, err = await world.ingest()
    assert (code, out) == (1, "4 created, 1 refused\n"), err
    (world.folder / "03.md").write_text("# Harbour 3\n\nIt is closed.\n")
    code, out, err = await world.ingest("--sync", "--source", "papers")
    assert (code, "~ 03.md" in out, "1 failed" in out) == (1, True, True), out + err
    code, out, err = await world.ingest()
    assert (code, out) == (1, "1 refused, 4 unchanged\n"), err


async def test_a_key_that_may_not_write_into_an_index_is_refused(world: World) -> None:
    key = await world.service.new_key(scopes=("documents:read", "documents:write"))
    code, _, err = await world.ingest(key=key)
    assert (code, "indexes:manage" in err) == (1, True), err


async def test_no_cluster_at_an_address_is_said(world: World) -> None:
    code, _, err = await replace(world, cluster="127.0.0.1:9").ingest()
    assert (code, "No Ray cluster answers" in err) == (1, True), err
    code, _, err = await world.ingest(place="git+https://example.org/papers.git")
    assert (code, "folders that every node" in err) == (2, True), err
