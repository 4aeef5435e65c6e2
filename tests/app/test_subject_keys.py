"""A subject has one key, and once that is destroyed nothing opens what it sealed, wherever copies lie."""

import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.privacy.sealing import CannotOpen, MasterKeys, new_key
from app.privacy.subject_keys import SubjectKeys
from tests.small_disk import SmallDisk

MASTERS = MasterKeys.parse(new_key())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "subject-keys.db"


@pytest.fixture
def keys(path: Path) -> Iterator[SubjectKeys]:
    made = SubjectKeys(path, MASTERS)
    yield made
    made.close()


def test_a_subject_has_one_key_for_ever_and_others_have_others(keys, path):
    with keys.making():
        anna, ben, other = keys.of_subject("acme", "anna"), keys.of_subject("acme", "ben"), keys.of_subject("b", "anna")
    assert len({anna.id, ben.id, other.id}) == 3
    again = SubjectKeys(path, MASTERS)
    assert again.of_subject("acme", "anna").id == anna.id
    assert again.opening([anna.id, "none"])[anna.id].open(anna.seal(b"said", b"1"), b"1") == b"said"
    again.close()


def test_keys_made_in_a_block_that_fails_are_not_there(keys, path):
    def make_and_fail() -> None:
        with keys.making():
            keys.of_subject("acme", "anna")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        make_and_fail()
    with keys.making():
        anna = keys.of_subject("acme", "anna")
    assert list(keys.opening([anna.id])) == [anna.id]


def test_a_key_that_a_full_disk_did_not_take_seals_nothing(tmp_path):
    with SmallDisk(tmp_path / "disk", megabytes=4) as disk:
        keys, others = (SubjectKeys(disk.folder / "keys.db", MASTERS) for _ in range(2))
        disk.fill()
        with pytest.raises(sqlite3.OperationalError, match="full"):
            keys.made_for("acme", "anna")
        disk.free()
        anna = keys.made_for("acme", "anna")
        assert list(others.opening([anna.id])) == [anna.id]
        others.close()
        keys.close()


def test_a_destroyed_key_is_gone_from_the_file_and_its_log(keys, path):
    with keys.making():
        anna, ben = keys.of_subject("acme", "anna"), keys.of_subject("acme", "ben")
    wrapped = keys.of_ids([anna.id])[anna.id].wrapped
    assert _is_on_disk(wrapped, path)
    assert keys.destroy("acme", ["anna", "nobody"]) == 1
    assert list(keys.of_ids([anna.id, ben.id])) == [ben.id]
    assert not _is_on_disk(wrapped, path)


def test_after_it_was_destroyed_a_subject_gets_another_key_also_in_other_processes(keys, path):
    with keys.making():
        before = keys.of_subject("acme", "anna")
    other = SubjectKeys(path, MASTERS)
    assert other.of_subject("acme", "anna").id == before.id
    keys.destroy("acme", ["anna"])
    with other.making():
        assert other.of_subject("acme", "anna").id != before.id
    other.close()


def test_two_processes_that_meet_a_subject_at_once_make_one_key(path):
    def make(_: int) -> str:
        keys = SubjectKeys(path, MASTERS)
        with keys.making():
            made = keys.of_subject("acme", "anna").id
        keys.close()
        return made

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(make, range(12)))) == 1


def test_a_copy_of_the_file_is_of_no_use_without_the_master_key(keys, path, tmp_path):
    with keys.making():
        anna = keys.of_subject("acme", "anna")
    stolen = tmp_path / "stolen.db"
    shutil.copy(path, stolen)
    shutil.copy(f"{path}-wal", f"{stolen}-wal")
    thief = SubjectKeys(stolen, MasterKeys.parse(new_key()))
    with pytest.raises(CannotOpen):
        thief.opening([anna.id])
    thief.close()


def test_only_its_owner_may_read_the_file(keys, path):
    assert path.stat().st_mode & 0o077 == 0


def _is_on_disk(content: bytes, path: Path) -> bool:
    return any(content in file.read_bytes() for file in path.parent.iterdir())
