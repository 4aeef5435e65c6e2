"""Keys are made by one process and admitted by others; nothing but the right, live key gets in, database or not."""

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import pytest

from app.access import SCOPES, Access, ApiKey, Caller, KeyStore, create_key, list_keys, revoke_key, update_key
from app.access.keys import make_key
from app.database import Database
from app.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated, Unavailable
from tests.migrated import migrated
from tests.postgres import Postgres
from tests.service import until
from tests.stopwatch import Stopwatch


@contextlib.asynccontextmanager
async def gateway(url: str, *, timeout_seconds: float = 5.0, **options: Any) -> AsyncIterator[Access]:
    """What one of several gateways knows of the keys."""
    async with Database(url, timeout_seconds=timeout_seconds) as database, Access(database, **options) as access:
        yield access


@pytest.fixture
async def store(database_url) -> AsyncIterator[KeyStore]:
    async with Database(database_url) as database:
        yield KeyStore(database)


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


async def is_admitted(access: Access, key: str) -> bool:
    try:
        await access.admit(bearer(key))
    except Unauthenticated:
        return False
    return True


# --- what a key is ---


async def test_a_key_names_its_caller(database_url, store):
    made, key = await store.create(
        name="web shop", tenant="acme", scopes=["documents:read", "chat"], priority="high", requests_per_minute=60
    )
    async with gateway(database_url) as access:
        caller = await access.admit(bearer(key))
        assert caller == await access.admit(f"bearer  {key} ")
    assert caller == Caller(
        key_id=made.id,
        tenant="acme",
        scopes=frozenset({"chat", "documents:read"}),
        name="web shop",
        priority="high",
        requests_per_minute=60,
    )


NO_KEYS = {
    None: "needs an API key",
    b"": "needs an API key",
    b"Bearer": "holds no API key",
    b"Bearer sk-123": "holds no API key",
    b"Bearer hm_abc": "holds no API key",
    b"Bearer hm_abc_": "holds no API key",
    b"Basic aG1fYTpi": "holds no API key",
    b"Bearer hm_abc_\xff\xfe": "no such API key",
    "Bearer hm_abc_\udcff": "no such API key",
}


async def test_what_is_not_a_key_is_refused_with_the_way_to_send_one(tmp_path):
    async with gateway(f"sqlite:///{migrated(tmp_path / 'a.db')}", impatient_seconds=0.01) as access:
        for header, message in NO_KEYS.items():
            with pytest.raises(Unauthenticated, match=message) as refusal:
                await access.admit(header)
            assert "Authorization: Bearer hm_" in refusal.value.message


async def test_every_other_secret_is_refused(database_url, store):
    _, key = await store.create(name="a")
    _, other = await store.create(name="b")
    prefix, key_id, secret = key.split("_")
    forged = [f"{prefix}_{key_id}_{other.split('_')[2]}", key[:-1], key + "a", f"{prefix}_{key_id}_{secret.upper()}"]
    async with gateway(database_url) as access:
        assert (await access.admit(bearer(key))).name == "a"
        for wrong in forged:
            with pytest.raises(Unauthenticated, match="no such API key"):
                await access.admit(bearer(wrong))


async def test_no_secret_is_on_the_disk(tmp_path):
    record, key = await asyncio.to_thread(create_key, migrated(tmp_path / "hallmark.db"), name="a")
    async with gateway(f"sqlite:///{tmp_path / 'hallmark.db'}", memory=tmp_path / "keys.json") as access:
        await access.admit(bearer(key))
    secret = key.split("_")[2]
    assert len(secret) * 5 >= 256
    assert {file.name for file in tmp_path.iterdir()} >= {"hallmark.db", "keys.json"}
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert secret.encode() not in content
        assert key.encode() not in content
    assert record.id in (tmp_path / "keys.json").read_text()


async def test_a_key_is_refused_after_its_expiry(database_url, store):
    now = time.time_ns() // 1_000_000
    _, past = await store.create(name="past", expires_at=now - 1)
    _, future = await store.create(name="future", expires_at=now + 3_600_000)
    async with gateway(database_url) as access:
        assert await access.admit(bearer(future))
        with pytest.raises(Unauthenticated, match="has expired"):
            await access.admit(bearer(past))


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_a_scope_opens_only_itself_and_admin_opens_all(scope):
    caller = Caller(key_id="k", tenant="t", scopes=frozenset({scope}))
    for wanted in SCOPES:
        if scope in (wanted, "admin"):
            caller.require(wanted)
        else:
            with pytest.raises(Forbidden, match=wanted):
                caller.require(wanted)


@pytest.mark.parametrize(
    ("facts", "param"),
    [
        ({"scopes": ["chat", "dance"]}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"name": " "}, "name"),
        ({"tenant": ""}, "tenant"),
        ({"priority": "urgent"}, "priority"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"tokens_per_minute": 10**10}, "tokens_per_minute"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(facts, param):
    with pytest.raises(InvalidRequest) as refusal:
        make_key(**{"name": "a", **facts})
    assert refusal.value.param == param


async def test_what_is_not_changed_stays_and_a_limit_of_0_is_none(store):
    made, _ = await store.create(name="a", requests_per_minute=60, tokens_per_minute=0)
    assert (made.priority, made.requests_per_minute, made.tokens_per_minute) == ("normal", 60, None)
    changed = await store.update(made.id, priority="low", tokens_per_minute=9_000)
    assert (changed.priority, changed.requests_per_minute, changed.tokens_per_minute) == ("low", 60, 9_000)
    lifted = await store.update(made.id, requests_per_minute=0)
    assert (lifted.priority, lifted.requests_per_minute, lifted.tokens_per_minute) == ("low", None, 9_000)
    assert await store.all() == [lifted]
    with pytest.raises(InvalidRequest, match="low, normal, high"):
        await store.update(made.id, priority="urgent", requests_per_minute=5)
    assert await store.all() == [lifted]


async def test_what_is_done_to_an_unknown_key_says_so(store):
    for attempt in (store.revoke("nobody"), store.update("nobody", priority="low")):
        with pytest.raises(NotFound, match="nobody"):
            await attempt


# --- several gateways ---


async def test_a_key_made_elsewhere_is_admitted_at_its_first_use(database_url):
    async with gateway(database_url, refresh_seconds=60.0, impatient_seconds=0.01) as access:
        program = "import sys, app.access as a; print(a.create_key(sys.argv[1], name='cli')[1])"
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", program, database_url], capture_output=True, text=True, check=True
        )
        caller = await access.admit(bearer(done.stdout.strip()))
    assert (caller.name, caller.tenant) == ("cli", "default")


async def test_a_key_that_is_revoked_or_changed_elsewhere_is_so_everywhere_within_a_second(database_url, store):
    made, key = await store.create(name="a")
    async with gateway(database_url) as one, gateway(database_url) as other:
        for access in (one, other):
            assert (await access.admit(bearer(key))).priority == "normal"
        await store.update(made.id, priority="high", requests_per_minute=7)
        watch = Stopwatch()
        for access in (one, other):
            await until(lambda access=access: _has(access, key, "high", 7))
        revoked = await store.revoke(made.id)
        changing_seconds, watch = watch.seconds, Stopwatch()
        for access in (one, other):
            await until(lambda access=access: _is_refused(access, key))
        # Half a second, and generous for a busy machine.
        assert max(changing_seconds, watch.seconds) < 2
        with pytest.raises(Unauthenticated, match="was revoked"):
            await one.admit(bearer(key))
    assert revoked.revoked_at
    assert (await store.revoke(made.id)).revoked_at == revoked.revoked_at


async def _has(access: Access, key: str, priority: str, requests_per_minute: int) -> bool:
    caller = await access.admit(bearer(key))
    return (caller.priority, caller.requests_per_minute) == (priority, requests_per_minute)


async def _is_refused(access: Access, key: str) -> bool:
    return not await is_admitted(access, key)


async def test_when_a_key_was_used_is_saved_to_the_minute_and_the_latest_word_holds(database_url, store):
    await store.create(name="idle")
    made, key = await store.create(name="busy")
    before = time.time_ns() // 1_000_000
    async with gateway(database_url) as access:
        await access.admit(bearer(key))
    await store.note_uses({made.id: 60_000})
    used = {record.name: record.last_used_at for record in await store.all()}
    assert used["idle"] is None
    assert used["busy"] % 60_000 == 0
    assert 0 <= before - used["busy"] < 120_000


# --- without the database ---


class Flaky(Database):
    """A database that is away while it is told so, at once or after a while."""

    away = False
    hangs = False

    def reading(self) -> Any:
        if self.hangs:
            return _hanging()
        if self.away:
            raise Unavailable("The database does not answer.")
        return super().reading()

    async def number(self, query: Any) -> int:
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise Unavailable("The database does not answer.")
        return await super().number(query)


@contextlib.asynccontextmanager
async def _hanging() -> AsyncIterator[None]:
    await asyncio.Event().wait()
    yield


async def test_while_the_database_is_away_known_keys_stay_valid_and_unknown_ones_are_not_called_wrong(
    database_url, store, caplog
):
    _, key = await store.create(name="a")
    async with Flaky(database_url) as database, Access(database, impatient_seconds=0.01) as access:
        database.away = True
        with pytest.raises(Unavailable) as refusal:
            await access.admit(bearer("hm_new_secret"))
        assert refusal.value.retry_after_seconds
        assert (await access.admit(bearer(key))).name == "a"
        with pytest.raises(Unauthenticated):
            await access.admit(bearer(key + "x"))
        database.away = False
        with pytest.raises(Unauthenticated):
            await access.admit(bearer("hm_new_secret"))
    told = [entry.message for entry in caplog.records if entry.name == "app.access.ring"]
    assert [line.split(";")[0] for line in told] == ["API keys cannot be read", "API keys are read again"]


async def test_while_the_database_hangs_an_unknown_key_is_answered_soon_and_not_called_wrong(database_url, store):
    _, key = await store.create(name="a")
    options = {"impatient_seconds": 0.01, "patience_seconds": 0.2}
    async with Flaky(database_url) as database, Access(database, **options) as access:
        database.hangs = True
        async with asyncio.timeout(30):
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await access.admit(bearer("hm_new_secret"))
        assert (await access.admit(bearer(key))).name == "a"


async def test_a_start_while_the_database_is_away_knows_the_keys_that_were_known_last(tmp_path):
    memory = tmp_path / "keys.json"
    options = {"memory": memory, "impatient_seconds": 0.01, "timeout_seconds": 1.0}
    with Postgres() as server:
        url = server.create_database()
        (_, key), (gone, revoked) = [await asyncio.to_thread(create_key, url, name=name) for name in ("a", "gone")]
        await asyncio.to_thread(revoke_key, url, gone.id)
        async with gateway(url, **options) as access:
            assert await is_admitted(access, key)
        await asyncio.to_thread(server.stop)
        async with gateway(url, **options) as access:
            assert (await access.admit(bearer(key))).name == "a"
            assert not await is_admitted(access, revoked)
            with pytest.raises(Unavailable):
                await access.admit(bearer("hm_new_secret"))
            await asyncio.to_thread(server.start)
            _, new = await asyncio.to_thread(create_key, url, name="b")

            async def follows() -> bool:
                with contextlib.suppress(Unavailable):
                    return (await access.admit(bearer(new))).name == "b"
                return False

            await until(follows)
            assert not await is_admitted(access, "hm_new_secret")


async def test_a_start_with_a_database_that_hangs_does_not_wait_for_it(database_url, store, tmp_path):
    _, key = await store.create(name="a")
    memory = tmp_path / "keys.json"
    async with gateway(database_url, memory=memory):
        pass
    async with asyncio.timeout(30), Flaky(database_url) as database:
        database.hangs = True
        async with Access(database, memory=memory, patience_seconds=0.1) as access:
            assert await is_admitted(access, key)


@pytest.mark.parametrize("content", [b"", b"{", b'[{"key": 5}]', b"\xff\xfe"])
async def test_a_file_of_known_keys_that_is_damaged_is_told_and_the_database_asked(tmp_path, content, caplog):
    path, memory = migrated(tmp_path / "hallmark.db"), tmp_path / "keys.json"
    _, key = await asyncio.to_thread(create_key, path, name="a")
    memory.write_bytes(content)
    async with gateway(f"sqlite:///{path}", memory=memory) as access:
        assert await is_admitted(access, key)
    assert "cannot be read from" in caplog.text
    assert len(json.loads(memory.read_text())) == 1


# --- commands ---


def test_commands_work_on_either_kind_of_database(database_url):
    made, _ = create_key(database_url, name="a")
    assert isinstance(made, ApiKey)
    changed = update_key(database_url, made.id, priority="high")
    assert list_keys(database_url) == [changed]
    assert revoke_key(database_url, made.id).revoked_at


def test_a_command_on_a_database_that_cannot_be_used_says_why(tmp_path):
    broken = tmp_path / "hallmark.db"
    broken.write_bytes(b"not a database, and long enough that nobody takes it for an empty one" * 20)
    with pytest.raises(Unavailable, match=r"cannot be used.*not a database"):
        create_key(broken, name="a")
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE predictions (id TEXT)")
    with pytest.raises(Unavailable, match=r"cannot be used.*already exists"):
        list_keys(tmp_path / "other.db")
    with pytest.raises(Unavailable, match="cannot be used"):
        list_keys(f"postgresql://postgres@/test?host={tmp_path}")
