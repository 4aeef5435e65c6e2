"""The document store by itself: one truth, one owner, nothing left of what was deleted."""

import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from retrieval.documents import Block, Document, Page, ParsedDocument, Passage, Scope
from retrieval.errors import DocumentNotFound, IndexUnavailable
from retrieval.store import DocumentStore, StoredDocument

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
SOURCE = "Grüße aus Paris. Das Wort ist xyzzy."
PARSED = ParsedDocument(SOURCE, "A title", (Block(0, 16, "paragraph", ("A", "B")),), (Page(1, 0, len(SOURCE)),))


def document(**changes: object) -> Document:
    facts = Document(
        id="d1",
        tenant="acme",
        name="a.txt",
        version="v1",
        media_type="text/plain",
        title="A title",
        length=len(SOURCE),
        size_bytes=len(SOURCE.encode()),
        passages=2,
        pages=1,
        index_version="i1",
        metadata={"year": 2024, "deep": {"x": [None, 1.5]}},
        created_at=NOW,
        updated_at=NOW,
    )
    return replace(facts, **changes)


def passages(of: Document) -> list[Passage]:
    return [
        Passage(of.id, of.version, 1, SOURCE[:16], 0, 16, 1, ("A", "B"), of.name, of.title),
        Passage(of.id, of.version, 2, SOURCE[17:], 17, len(SOURCE), None, (), of.name, of.title),
    ]


async def put(store: DocumentStore, generation: int, of: Document) -> None:
    await store.put(StoredDocument(of, generation), PARSED, passages(of))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DocumentStore]:
    store = DocumentStore(tmp_path / "deep" / "documents.db")
    await store.open()
    yield store
    await store.close()


async def test_what_was_put_comes_back_unchanged(store: DocumentStore) -> None:
    await put(store, 7, document())
    assert await store.find(Scope.whole("acme"), "d1") == StoredDocument(document(), 7)
    assert await store.passages(7) == passages(document())
    assert await store.source(7) == SOURCE
    assert await store.parsed(7) == PARSED
    assert await store.generations() == {7: ("acme", "d1", 2, ())}
    assert await store.passages_of([(7, 2), (7, 3), (8, 1)]) == {(7, 2): passages(document())[1]}


async def test_a_new_generation_takes_the_old_ones_place(store: DocumentStore) -> None:
    await put(store, 1, document())
    await put(store, 2, document(version="v2"))
    assert await store.generations() == {2: ("acme", "d1", 2, ())}
    assert (await store.passages(1), await store.source(1)) == ([], None)
    assert {passage.document_version for passage in await store.passages(2)} == {"v2"}


async def test_a_put_that_fails_changes_nothing(store: DocumentStore) -> None:
    await put(store, 1, document())
    twice = [passages(document())[0]] * 2
    with pytest.raises(IndexUnavailable, match="failed"):
        await store.put(StoredDocument(document(version="v2"), 2), PARSED, twice)
    assert await store.find(Scope.whole("acme"), "d1") == StoredDocument(document(), 1)
    assert len(await store.passages(1)) == 2


async def test_a_tenants_documents_are_its_own(store: DocumentStore) -> None:
    await put(store, 1, document())
    await put(store, 2, document(tenant="other", name="b.txt"))
    assert [one.name for one in await store.documents(Scope.whole("other"), limit=9, after=None)] == ["b.txt"]
    with pytest.raises(DocumentNotFound):
        await store.remove(Scope.whole("third"), "d1")
    await store.remove(Scope.whole("other"), "d1")
    assert await store.find(Scope.whole("other"), "d1") is None
    assert await store.find(Scope.whole("acme"), "d1") is not None


async def test_a_deletion_leaves_a_tombstone_without_content(store: DocumentStore) -> None:
    await put(store, 1, document())
    removed, cuts = await store.remove(Scope.whole("acme"), "d1")
    assert (removed.generation, cuts) == (1, {1: 2})
    (tombstone,) = await store.tombstones("acme")
    assert (tombstone.tenant, tombstone.id, tombstone.version) == ("acme", "d1", "v1")
    assert abs((datetime.now(UTC) - tombstone.deleted_at).total_seconds()) < 60
    assert await store.tombstones("other") == []
    assert (await store.passages(1), await store.source(1), await store.generations()) == ([], None, {})
    with pytest.raises(DocumentNotFound, match="'d1'"):
        await store.remove(Scope.whole("acme"), "d1")


async def test_content_and_identity_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "documents.db"
    first = DocumentStore(path)
    await first.open()
    await put(first, 1, document())
    await first.close()
    await first.close()
    second = DocumentStore(path)
    await second.open()
    assert second.store_id == first.store_id != ""
    assert await second.find(Scope.whole("acme"), "d1") == StoredDocument(document(), 1)
    await second.close()
    with pytest.raises(IndexUnavailable, match="not open"):
        await second.generations()


async def test_two_stores_have_different_identities(tmp_path: Path, store: DocumentStore) -> None:
    other = DocumentStore(tmp_path / "other.db")
    await other.open()
    assert other.store_id != store.store_id
    await other.close()


HOLDER = """
import asyncio, sys
from pathlib import Path
from retrieval.store import DocumentStore

async def main():
    await DocumentStore(Path(sys.argv[1])).open()
    print("open", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


async def test_ownership_ends_with_the_process_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "documents.db"
    holder = start_holder(path)
    store = DocumentStore(path)
    try:
        with pytest.raises(IndexUnavailable, match="Another process has"):
            await store.open()
    finally:
        holder.kill()
        holder.communicate()
    await store.open()
    await store.close()


def start_holder(path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "open\n"
    return holder


async def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "documents.db"
    path.write_bytes(b"not a database, but long enough to be read as one" * 100)
    store = DocumentStore(path)
    with pytest.raises(IndexUnavailable, match=r"documents\.db failed: file is not a database"):
        await store.open()
