"""The process that embeds what is ingested: when there is one, what becomes of it, and of what was sent to it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from retrieval.embedder import HashingEmbedder, SentenceTransformerEmbedder
from retrieval.embedding_process import EmbeddingProcess, Recipe
from retrieval.errors import EmbeddingFailed, IndexUnavailable
from tests.ingestion_world import opened
from tests.retrieval.test_parsers_hostile import is_running

CHILD = str(Path(__file__).parents[1] / "hashing_child.py")
MANY = [f"the passage of number {n}" for n in range(100)]


def embedder_with(model: str = "8", *command: str, idle_seconds: float = 60.0) -> HashingEmbedder:
    """A stand-in whose many documents go to a process of the same kind, or to what `command` runs."""
    process = EmbeddingProcess(
        Recipe(model, 1), idle_seconds=idle_seconds, command=(sys.executable, *(command or (CHILD,)))
    )
    return HashingEmbedder(8, process=process)


@pytest.fixture(scope="module")
async def shared(anyio_backend: str) -> AsyncIterator[HashingEmbedder]:
    async with embedder_with() as embedder:
        yield embedder


async def gone(pid: int | None) -> None:
    async with asyncio.timeout(60):
        while pid and is_running(pid):
            await asyncio.sleep(0.005)


async def test_many_documents_are_embedded_apart_and_alike(shared: HashingEmbedder) -> None:
    before = shared.encoded_texts
    vectors = await shared.embed(MANY, "document", bulk=True)
    assert shared.encoded_texts == before
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, shared.encode(MANY, "document"))


async def test_questions_stay_here(shared: HashingEmbedder) -> None:
    before = shared.encoded_texts
    await shared.embed(MANY, "query")
    assert shared.encoded_texts == before + len(MANY)


async def test_a_few_documents_start_no_process_and_a_few_and_again_a_few_do() -> None:
    async with embedder_with() as embedder:
        first = embedder.encoded_texts
        for _ in range(3):
            await embedder.embed(MANY[:10], "document", bulk=True)
        assert (embedder.encoded_texts, embedder.process.pid) == (first + 30, None)
        await embedder.embed(MANY[:10], "document", bulk=True)
        assert embedder.encoded_texts == first + 30
        assert embedder.process.pid


async def test_callers_of_the_api_with_a_little_to_embed_start_no_process(tmp_path: Path) -> None:
    embedder = embedder_with()
    async with opened(tmp_path, embedder=embedder) as world:
        for text in MANY:
            await world.retriever.embed([text])
        assert embedder.process.pid is None
        await world.retriever.embed([text * 10 for text in MANY])
        assert embedder.process.pid


async def test_an_idle_process_ends_and_the_next_documents_start_another() -> None:
    async with embedder_with(idle_seconds=0.01) as embedder:
        await embedder.embed(MANY, "document", bulk=True)
        async with asyncio.timeout(60):
            while embedder.process.pid:
                await asyncio.sleep(0.005)
        assert len(await embedder.embed(MANY, "document", bulk=True)) == len(MANY)


async def test_a_process_that_ends_over_texts_is_started_once_more(shared: HashingEmbedder, tmp_path: Path) -> None:
    texts = [f"crash {tmp_path / 'crashed'}", *MANY]
    assert len(await shared.embed(texts, "document", bulk=True)) == len(texts)
    assert (tmp_path / "crashed").exists()


async def test_texts_that_end_it_twice_fail_alone(shared: HashingEmbedder) -> None:
    await shared.embed(MANY, "document", bulk=True)
    pid = shared.process.pid
    bad, good = await asyncio.gather(
        shared.embed(["crash"], "document", bulk=True),
        shared.embed(MANY, "document", bulk=True),
        return_exceptions=True,
    )
    assert isinstance(bad, EmbeddingFailed)
    assert "ended 2 times over the same 1 passages" in str(bad)
    assert len(good) == len(MANY)
    await gone(pid)


async def test_an_error_of_the_model_fails_its_texts_only(shared: HashingEmbedder) -> None:
    await shared.embed(MANY, "document", bulk=True)
    pid = shared.process.pid
    with pytest.raises(IndexUnavailable, match="failed: TypeError"):
        await shared.embed(["fail"], "document", bulk=True)
    assert len(await shared.embed(["fine"], "document", bulk=True)) == 1
    assert shared.process.pid == pid


async def test_callers_who_leave_leave_the_next_answers_in_place(shared: HashingEmbedder) -> None:
    leavers = [asyncio.create_task(shared.embed(MANY, "document", bulk=True)) for _ in range(3)]
    await asyncio.sleep(0)
    for leaver in leavers:
        leaver.cancel()
    await asyncio.gather(*leavers, return_exceptions=True)
    vectors = await shared.embed(MANY[::-1], "document", bulk=True)
    np.testing.assert_array_equal(vectors, shared.encode(MANY[::-1], "document"))


async def test_a_model_that_cannot_be_loaded_is_told() -> None:
    async with embedder_with("absent") as embedder:
        with pytest.raises(IndexUnavailable, match="'absent' cannot be loaded"):
            await embedder.embed(MANY, "document", bulk=True)
        assert embedder.process.pid is None


@pytest.mark.parametrize(
    "child",
    [
        ["print('no answer of ours')"],
        ["import sys; sys.stdout.buffer.write((3).to_bytes(8) + b'odd'); sys.stdout.flush(); sys.stdin.read()"],
    ],
    ids=["its length is wrong", "its form is wrong"],
)
async def test_an_answer_that_is_none_counts_as_an_end(child: list[str]) -> None:
    async with embedder_with("8", "-c", *child) as embedder:
        with pytest.raises(EmbeddingFailed):
            await embedder.embed(MANY, "document", bulk=True)


async def test_a_model_that_is_another_by_now_is_refused() -> None:
    async with embedder_with("changed") as embedder:
        with pytest.raises(IndexUnavailable, match="has changed since the service started"):
            await embedder.embed(MANY, "document", bulk=True)


async def test_closing_fails_what_waits_and_leaves_no_process() -> None:
    async with embedder_with() as embedder:
        await embedder.embed(MANY, "document", bulk=True)
        pid = embedder.process.pid
        os.kill(pid, signal.SIGSTOP)
        works = [asyncio.create_task(embedder.embed(MANY, "document", bulk=True)) for _ in range(2)]
        await asyncio.sleep(0)
    for work in works:
        with pytest.raises(IndexUnavailable, match="closed"):
            await work
    await gone(pid)
    with pytest.raises(IndexUnavailable, match="not open"):
        await embedder.process.embed(MANY, "document")


async def test_too_much_waiting_is_refused() -> None:
    process = EmbeddingProcess(Recipe("8", 1), command=(sys.executable, CHILD))
    async with HashingEmbedder(8, max_waiting_texts=150, process=process) as embedder:
        waiting = asyncio.create_task(embedder.embed(MANY, "document", bulk=True))
        await asyncio.sleep(0)
        with pytest.raises(IndexUnavailable, match="100 texts waiting"):
            await embedder.embed(MANY, "document", bulk=True)
        assert len(await waiting) == len(MANY)


async def test_a_document_that_ends_the_process_fails_visibly_and_the_next_does_not(tmp_path: Path) -> None:
    async with opened(tmp_path, embedder=embedder_with()) as world:
        job = await world.done("bad.txt", "\n".join(["crash", *MANY[:40]]).encode())
        assert (job.state, job.counts) == ("failed", {"failed": 1})
        assert [(item.error, item.attempts) for item in job.failures] == [("EmbeddingFailed", 1)]
        assert (await world.done("good.txt", "\n".join(MANY[:40]).encode())).embedded == 40


def test_the_process_ends_with_the_service_whatever_it_is_doing() -> None:
    service = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, os, signal\n"
            "from tests.retrieval.test_embedding_process import MANY, embedder_with\n"
            "async def main():\n"
            "    async with embedder_with() as embedder:\n"
            "        await embedder.embed(MANY, 'document', bulk=True)\n"
            "        os.kill(embedder.process.pid, signal.SIGSTOP)\n"
            "        print(embedder.process.pid, flush=True)\n"
            "        await asyncio.sleep(60)\n"
            "asyncio.run(main())\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(CHILD).parents[1],
    )
    child = int(service.stdout.readline())
    service.kill()
    service.wait()
    service.stdout.close()
    until = time.monotonic() + 60
    while time.monotonic() < until and is_running(child):
        time.sleep(0.005)
    assert not is_running(child)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no such class")
def test_it_gives_way_to_everything_else() -> None:
    # Looked at from outside: on a busy machine it would not get to say anything itself.
    code = "import signal; from retrieval.embedding_child import give_way; give_way(); signal.pause()"
    child = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while time.monotonic() < until and os.sched_getscheduler(child.pid) != os.SCHED_IDLE:
        time.sleep(0.005)
    found = os.sched_getscheduler(child.pid), os.getpriority(os.PRIO_PROCESS, child.pid)
    child.kill()
    child.wait()
    assert found == (os.SCHED_IDLE, 19)


@pytest.mark.slow
async def test_the_packaged_model_makes_the_same_vectors_in_both_processes() -> None:
    texts = [f"Passage {n}: {text}" for n, text in enumerate(["short", "of middling length, with a comma"] * 20)]
    process = EmbeddingProcess(
        Recipe("all-minilm-l6-v2", 1),
        command=(sys.executable, "-c", "from retrieval.embedding_child import load, serve; serve(load)"),
    )
    async with SentenceTransformerEmbedder(process=process) as embedder:
        apart = await embedder.embed(texts, "document", bulk=True)
        assert process.pid
        here = await embedder.embed(texts, "document")
    np.testing.assert_allclose(apart, here, atol=0.02)
