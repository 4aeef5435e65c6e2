"""After an erasure nothing of the subject can be read in any file: of the whole running service, on either database.

Byte for byte: the data directory with its write-ahead logs and vectors, PostgreSQL's own files once it has cleaned up
(docs/privacy.md says how), exports made afterwards, and, where content is sealed, everything as it was before.
"""

import asyncio
import secrets
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, select

from app.database import Database, subject_keys
from app.predictions.embeddings import pack
from app.privacy.sealing import new_key
from retrieval.embedder import HashingEmbedder
from tests.fake_tgi import FakeTGI
from tests.postgres import Postgres
from tests.service import Api, live_service, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

TOKEN = secrets.token_hex(6)
DOCUMENT = "The Aurora kettle boils one litre in 90 seconds. Its warranty lasts 24 months."


def canary(number: int, whose: str) -> str:
    return f"canary-{whose}-{number:03}-{TOKEN}"


def question(whose: str) -> str:
    asked = {"anna": "How fast does the Aurora kettle boil one litre", "ben": "Until when is a broken lid replaced"}
    return f"{asked[whose]}, asks {canary(1, whose)}?"


async def needles(whose: str) -> dict[str, bytes]:
    """All that was planted of a person, by its name."""
    words = [canary(number, whose) for number in range(1, 8)] + [f"{whose}-{TOKEN}@mail.example"]
    async with HashingEmbedder() as embedder:
        (vector,) = await embedder.embed([question(whose)], "query")
    return {word: word.encode() for word in words} | {"the embedding": pack(vector, embedder.model_id)}


def traces(wanted: dict[str, bytes], places: Iterable[Path | bytes]) -> set[str]:
    """What of it is found, and in what."""
    found = set()
    for place in places:
        files = [place] if isinstance(place, bytes) else [each for each in place.rglob("*") if each.is_file()]
        for file in files:
            content = file if isinstance(file, bytes) else file.read_bytes()
            for name, needle in wanted.items():
                if needle in content or needle.hex().encode() in content:
                    found.add(name if isinstance(file, bytes) else f"{name} in {file.name}")
    return found


async def live(api: Api, whose: str) -> None:
    """Leave something of a person wherever the service keeps something."""
    user = f"{whose}-{TOKEN}@mail.example"
    answer = await api.answer(question(whose), user=user, metadata={"note": canary(2, whose)})
    about = {"prediction_id": answer["id"]}
    given = {**about, "author": user, "comment": canary(3, whose), "correction": canary(4, whose), "rating": False}
    assert (await api.client.post("/v1/feedback", json=given)).status_code == 201
    stated = {**about, "author": "rita", "class": whose, "answer": canary(5, whose), "comment": canary(6, whose)}
    assert (await api.client.post("/v1/labels", json=stated)).status_code == 201
    third = await api.client.post("/v1/feedback", json={**about, "author": "bot", "source": "reviewer", "rating": True})
    amended = {"author": "bot", "comment": canary(7, whose)}
    done = await api.client.patch(f"/v1/feedback/{third.json()['id']}", json=amended)
    assert done.status_code == 200, done.text


async def dataset_of(api: Api) -> str:
    """Build a version and give what it exports."""
    recipe = {"task": "classify", "split": {"heldout": 0.3}}
    started = await api.client.post("/v1/datasets/faq/builds", json={"recipe": recipe})
    assert started.status_code == 202, started.text

    async def built() -> Any:
        build = (await api.client.get(f"/v1/datasets/faq/builds/{started.json()['id']}")).json()
        return build if build["state"] not in ("waiting", "running") else None

    assert (await until(built))["state"] == "done"
    return await export(api)


async def export(api: Api) -> str:
    path = "/v1/datasets/faq/versions/1/files"
    return "".join([(await api.client.get(f"{path}/{split}.jsonl")).text for split in ("train", "heldout")])


async def erase(api: Api, user: str) -> dict[str, Any]:
    asked = await api.client.post("/v1/erasures", json={"user": user})
    assert asked.status_code == 202, asked.text

    async def done() -> Any:
        found = (await api.client.get(f"/v1/erasures/{asked.json()['id']}")).json()
        return found if found["state"] == "done" else None

    return dict(await until(done, seconds=90))


def wrapped_in(data: Path) -> dict[str, bytes]:
    """The keys of subjects in a data directory, as they are stored."""
    with closing(sqlite3.connect(data / "subject-keys" / "subject-keys.db")) as connection:
        return dict(connection.execute("SELECT id, wrapped FROM subject_keys"))


async def wrapped_at(url: str) -> dict[str, bytes]:
    """Those in a shared database."""
    async with Database(url) as database, database.reading() as connection:
        rows = await connection.execute(select(subject_keys.c.id, subject_keys.c.wrapped))
        return {row.id: bytes(row.wrapped) for row in rows}


@asynccontextmanager
async def served(data: Path, **settings: Any) -> AsyncIterator[Api]:
    given = {"retrieval": {"passage_tokens": 32}, **settings}
    async with (
        FakeTGI() as tgi,
        live_service(data, engine_url=tgi.url, settings=given) as service,
        service.client() as client,
    ):
        yield Api(client, "default", service.key)


async def lived_and_erased(api: Api, before: Any) -> dict[str, Any]:
    """Two people use the service, and one is erased; `before` is called between."""
    await api.add("kettle.md", DOCUMENT)
    for whose in ("anna", "ben"):
        await live(api, whose)
    await api.records(2)  # A version is built of what has reached the shared database.
    exported = await dataset_of(api)
    assert canary(1, "anna") in exported
    assert canary(1, "ben") in exported
    await before()
    erased = await erase(api, f"anna-{TOKEN}@mail.example")
    assert erased["counts"]["predictions"] == 1
    assert erased["counts"]["dataset_rows"] == 1
    assert erased["trained"]["datasets"]
    exported = await export(api)
    assert canary(1, "anna") not in exported
    assert canary(1, "ben") in exported
    return erased


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
async def test_with_sqlite_nothing_is_left_in_any_file(tmp_path: Path, sealed: bool) -> None:
    data, backup = tmp_path / "data", tmp_path / "backup"
    privacy = {"privacy": {"master_key": new_key()}} if sealed else {}
    annas, bens = await needles("anna"), await needles("ben")
    keys: dict[str, bytes] = {}

    async def before() -> None:
        keys.update(wrapped_in(data) if sealed else {})
        shutil.copytree(data, backup, ignore=shutil.ignore_patterns("subject-keys", "*.lock"))
        # Where it is not sealed it is there: so it would be found.
        found = {each.partition(" in ")[0] for each in traces(annas, [data])}
        assert found == (set() if sealed else set(annas))

    async with served(data, **privacy) as api:
        await lived_and_erased(api, before)
        assert traces(annas, [data]) == set()
    assert traces(annas, [data]) == set()
    if sealed:
        assert traces(annas | bens, [data, backup]) == set()
        gone = {key: wrapped for key, wrapped in keys.items() if key not in wrapped_in(data)}
        assert len(gone) == 2  # Anna's, and that of what others said of her prediction.
        assert traces(gone, [data, backup]) == set()
    else:
        assert len(traces(annas, [backup])) >= len(annas)
        assert {each.partition(" in ")[0] for each in traces(bens, [data])} == set(bens)


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
async def test_with_postgresql_nothing_is_left_once_it_has_cleaned_up(tmp_path: Path, sealed: bool) -> None:
    data = tmp_path / "data"
    annas, bens = await needles("anna"), await needles("ben")
    with Postgres() as server:
        url = server.create_database()
        name = str(make_url(url).database)
        dump, files = server.folder / "dump.sql", server.folder / "data"

        # In a thread: a transaction that the service has open could not end otherwise, and be waited for in vain.
        async def psql(*statements: str) -> None:
            commands = [part for each in statements for part in ("-c", each)]
            address = "-h", server.folder, "-U", "postgres", "-d", name
            await asyncio.to_thread(server.run, "psql", *address, "-q", *commands)

        async def dumped(*options: str) -> bytes:
            to = "-h", server.folder, "-U", "postgres", "-f", dump
            await asyncio.to_thread(server.run, "pg_dump", *to, *options, name)
            content = dump.read_bytes()
            dump.unlink()
            return content

        taken: list[bytes] = []
        keys: dict[str, bytes] = {}

        async def before() -> None:
            keys.update(await wrapped_at(url))
            taken.append(await dumped("--exclude-table-data=subject_keys"))
            found = {each.partition(" in ")[0] for each in traces(annas, [taken[0]])}
            assert found == (set() if sealed else set(annas))

        settings: dict[str, Any] = {"database_url": url}
        if sealed:
            settings["privacy"] = {"master_key": new_key()}
        async with served(data, **settings) as api:
            await lived_and_erased(api, before)
            # The tables have nothing of it at once; neither has the replica's own outbox.
            assert traces(annas, [await dumped()]) == set()
            assert await until(lambda: _nothing(annas, data))
            if not sealed:
                assert {each.partition(" in ")[0] for each in traces(bens, [await dumped()])} == set(bens)
                # Old versions of rows are in the tables' files until these are written anew.
                await psql("CHECKPOINT")
                assert traces(annas, [files / "base"]) != set()
            await psql("VACUUM FULL", "CHECKPOINT")
            assert traces(annas, [files / "base"]) == set()
            # And what was written is in the write-ahead log, until its files are removed and not used again.
            await psql("ALTER SYSTEM SET wal_recycle = off", "SELECT pg_reload_conf()")
            await psql("SELECT pg_switch_wal()", "CHECKPOINT", "SELECT pg_switch_wal()", "CHECKPOINT")
            assert traces(annas, [server.folder, data]) == set()
        if sealed:
            assert traces(annas | bens, [server.folder, data, *taken]) == set()
            left = await wrapped_at(url)
            gone = {key: wrapped for key, wrapped in keys.items() if key not in left}
            assert len(gone) in (2, 3)  # Of Anna herself one may come from the replica, and one be made for her words.
            assert left
            assert traces(gone, [server.folder, data, *taken]) == set()


async def _nothing(wanted: dict[str, bytes], folder: Path) -> bool:
    return not traces(wanted, [folder])
