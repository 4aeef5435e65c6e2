"""Keys are made by one process and admitted by another; nothing but the right, live key gets in."""

import asyncio
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from app.access import SCOPES, Access, Caller, create_key, list_keys, revoke_key
from app.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated, Unavailable


@pytest.fixture
def database_path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "hallmark.db"


def _bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


async def test_a_key_names_its_caller(database_path):
    record, key = create_key(database_path, name="web shop", tenant="acme", scopes=["documents:read", "chat"])
    async with Access(database_path) as access:
        caller = access.authenticate(_bearer(key))
        assert caller == access.authenticate(f"bearer  {key} ")
    assert caller == Caller(
        key_id=record.id, tenant="acme", scopes=frozenset({"chat", "documents:read"}), name="web shop"
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "needs an API key"),
        (b"", "needs an API key"),
        (b"Bearer", "holds no API key"),
        (b"Bearer sk-123", "holds no API key"),
        (b"Bearer hm_abc", "holds no API key"),
        (b"Bearer hm_abc_", "holds no API key"),
        (b"Basic aG1fYTpi", "holds no API key"),
        (b"Bearer hm_abc_\xff\xfe", "no such API key"),
        ("Bearer hm_abc_\udcff", "no such API key"),
    ],
)
async def test_what_is_not_a_key_is_refused_with_the_way_to_send_one(database_path, header, message):
    async with Access(database_path, impatient_seconds=0.01) as access:
        for attempt in (access.admit, _synchronous(access)):
            with pytest.raises(Unauthenticated, match=message) as refusal:
                await attempt(header)
            assert "Authorization: Bearer hm_" in refusal.value.message


def _synchronous(access: Access):
    async def authenticate(header):
        return access.authenticate(header)

    return authenticate


async def test_every_other_secret_is_refused(database_path):
    _, key = create_key(database_path, name="a")
    _, other = create_key(database_path, name="b")
    prefix, key_id, secret = key.split("_")
    forged = [f"{prefix}_{key_id}_{other.split('_')[2]}", key[:-1], key + "a", f"{prefix}_{key_id}_{secret.upper()}"]
    async with Access(database_path) as access:
        assert access.authenticate(_bearer(key)).name == "a"
        for wrong in forged:
            with pytest.raises(Unauthenticated, match="no such API key"):
                access.authenticate(_bearer(wrong))


def test_no_secret_is_in_the_database(database_path):
    record, key = create_key(database_path, name="a")
    secret = key.split("_")[2]
    assert len(secret) * 5 >= 256
    for file in database_path.parent.iterdir():
        content = file.read_bytes()
        assert secret.encode() not in content
        assert key.encode() not in content
    assert list_keys(database_path) == [record]


async def test_a_key_made_while_the_service_runs_is_admitted_at_its_first_use(database_path):
    async with Access(database_path, refresh_seconds=60.0, impatient_seconds=0.01) as access:
        program = "import sys, pathlib, app.access as a; print(a.create_key(pathlib.Path(sys.argv[1]), name='cli')[1])"
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", program, database_path], capture_output=True, text=True, check=True
        )
        caller = await access.admit(_bearer(done.stdout.strip()))
    assert (caller.name, caller.tenant) == ("cli", "default")


async def test_a_miss_has_the_keys_read_again_soon(database_path):
    async with Access(database_path, refresh_seconds=60.0, impatient_seconds=0.01) as access:
        _, key = await asyncio.to_thread(create_key, database_path, name="late")
        assert await _until(lambda: _accepted(access, key))


async def test_a_revoked_key_is_refused_within_the_refresh_time_and_says_so(database_path):
    record, key = create_key(database_path, name="a")
    async with Access(database_path, refresh_seconds=0.05, impatient_seconds=0.01) as access:
        assert access.authenticate(_bearer(key))
        revoked = await asyncio.to_thread(revoke_key, database_path, record.id)
        assert await _until(lambda: not _accepted(access, key))
        with pytest.raises(Unauthenticated, match="was revoked"):
            access.authenticate(_bearer(key))
    assert revoked.revoked_at
    assert revoke_key(database_path, record.id).revoked_at == revoked.revoked_at


async def test_a_key_is_refused_after_its_expiry(database_path):
    now = time.time_ns() // 1_000_000
    _, past = create_key(database_path, name="past", expires_at=now - 1)
    _, future = create_key(database_path, name="future", expires_at=now + 3_600_000)
    async with Access(database_path) as access:
        assert access.authenticate(_bearer(future))
        with pytest.raises(Unauthenticated, match="has expired"):
            access.authenticate(_bearer(past))


async def test_with_the_database_gone_known_keys_stay_valid_and_unknown_ones_are_not_called_wrong(database_path):
    _, key = create_key(database_path, name="a")
    async with Access(database_path, refresh_seconds=0.05, impatient_seconds=0.01) as access:
        with closing(sqlite3.connect(database_path)) as connection:
            connection.execute("ALTER TABLE api_keys RENAME TO elsewhere")
        unknown = _bearer("hm_new_secret")
        with pytest.raises(Unavailable) as refusal:
            await access.admit(unknown)
        assert refusal.value.retry_after_seconds
        assert (await access.admit(_bearer(key))).name == "a"
        with closing(sqlite3.connect(database_path)) as connection:
            connection.execute("ALTER TABLE elsewhere RENAME TO api_keys")
        with pytest.raises(Unauthenticated):
            await access.admit(unknown)


async def test_opening_without_a_usable_database_is_unavailable(tmp_path):
    broken = tmp_path / "hallmark.db"
    broken.write_bytes(b"not a database, and long enough that nobody takes it for an empty one" * 20)
    with pytest.raises(Unavailable, match="cannot be"):
        async with Access(broken):
            pass
    with pytest.raises(Unavailable, match="cannot be"):
        create_key(broken, name="a")


async def test_when_a_key_was_used_is_saved_to_the_minute(database_path):
    create_key(database_path, name="idle")
    _, key = create_key(database_path, name="busy")
    before = time.time_ns() // 1_000_000
    async with Access(database_path) as access:
        access.authenticate(_bearer(key))
    used = {record.name: record.last_used_at for record in list_keys(database_path)}
    assert used["idle"] is None
    assert used["busy"] % 60_000 == 0
    assert 0 <= before - used["busy"] < 120_000


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
    ("arguments", "param"),
    [
        ({"scopes": ["chat", "dance"]}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"name": " "}, "name"),
        ({"tenant": ""}, "tenant"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(database_path, arguments, param):
    with pytest.raises(InvalidRequest) as refusal:
        create_key(database_path, **{"name": "a", **arguments})
    assert refusal.value.param == param
    assert list_keys(database_path) == []


def test_revoking_an_unknown_key_says_so(database_path):
    with pytest.raises(NotFound, match="nobody"):
        revoke_key(database_path, "nobody")


def _accepted(access: Access, key: str) -> bool:
    try:
        access.authenticate(_bearer(key))
    except Unauthenticated:
        return False
    return True


async def _until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True
