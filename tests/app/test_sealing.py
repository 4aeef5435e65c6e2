"""What is sealed opens by its key and in its place only, and a pseudonym tells nothing."""

import os
from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.privacy.sealing import BadKey, CannotOpen, DataKey, MasterKeys, is_pseudonym, new_key

SECRET = bytes(range(32))


@given(st.binary(), st.binary(max_size=32))
def test_what_was_sealed_opens(content: bytes, context: bytes) -> None:
    key = DataKey("a", SECRET)
    assert key.open(key.seal(content, context), context) == content


def test_it_opens_in_no_other_place_by_no_other_key_and_not_when_changed() -> None:
    key = DataKey("a", SECRET)
    sealed = key.seal(b"what anna said", b"row 1")
    assert b"anna" not in sealed
    with pytest.raises(CannotOpen):
        key.open(sealed, b"row 2")
    with pytest.raises(CannotOpen):
        DataKey("b", os.urandom(32)).open(sealed, b"row 1")
    for at in range(len(sealed)):
        with pytest.raises(CannotOpen):
            key.open(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :], b"row 1")
    with pytest.raises(CannotOpen):
        key.open(b"", b"row 1")


def test_the_same_content_is_sealed_differently_each_time() -> None:
    key = DataKey("a", SECRET)
    assert key.seal(b"yes", b"") != key.seal(b"yes", b"")


def test_a_data_key_is_unwrapped_by_the_master_key_that_wrapped_it_also_when_a_new_one_came() -> None:
    old = new_key()
    wrapped = MasterKeys.parse(old).wrap(SECRET, b"anna")
    both = MasterKeys.parse(f"{new_key()}\n# the one before\n{old}\n")
    assert both.unwrap(wrapped, b"anna", by=old.split(":")[0]) == SECRET
    with pytest.raises(CannotOpen):
        both.unwrap(wrapped, b"ben", by=old.split(":")[0])
    with pytest.raises(CannotOpen, match="not configured"):
        MasterKeys.parse(new_key()).unwrap(wrapped, b"anna", by=old.split(":")[0])


def test_a_pseudonym_is_the_same_for_the_same_subject_of_a_tenant_only() -> None:
    old = new_key()
    keys = MasterKeys.parse(old)
    name = keys.pseudonym("acme", "anna@mail.example")
    assert is_pseudonym(name)
    assert "anna" not in name
    assert name == keys.pseudonym("acme", "anna@mail.example")
    assert len({name, keys.pseudonym("acme", "ben"), keys.pseudonym("other", "anna@mail.example")}) == 3
    assert keys.pseudonym("ab", "c") != keys.pseudonym("a", "bc")
    assert MasterKeys.parse(f"{new_key()},{old}").pseudonym("acme", "anna@mail.example") == name
    assert MasterKeys.parse(new_key()).pseudonym("acme", "anna@mail.example") != name


KEY = b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "there is no key"),
        ("# nothing\n", "there is no key"),
        (KEY, "line 1 is not `id:base64`"),
        (f"{KEY}:", "line 1 is not `id:base64`"),
        (f"{KEY}:k1", "line 1 is not `id:base64`"),
        (f":{KEY}", "line 1 is not `id:base64`"),
        (f"k 1:{KEY}", "line 1 is not `id:base64`"),
        (f"{KEY.rstrip('=')}:{KEY}", "line 1 is not `id:base64`"),
        (f"# the first\nk1:{KEY[:-1]}", "line 2 is not `id:base64`"),
        (f"k1:{KEY}\nk2:{KEY[:-2]}é=", "line 2 is not `id:base64`"),
        (f"k1:{KEY[:-4]}", "the key in line 1 has 30 bytes and not 32"),
        (f"{KEY[:32]}:{KEY[:-4]}", "the key in line 1 has 30 bytes and not 32"),
        (f"k1:{KEY},k1:{KEY}", "line 2 has the id of a line before it"),
    ],
)
def test_a_bad_master_key_is_refused_by_its_line_without_being_repeated(given: str, says: str) -> None:
    with pytest.raises(BadKey) as told:
        MasterKeys.parse(given)
    assert says in str(told.value)
    assert not any(given[at : at + 8] in str(told.value) for at in range(len(given) - 7))


@pytest.mark.parametrize("subject", ["anna", "sub_anna", "sub_" + "A" * 32, "a" * 36, "sub_" + "1" * 32])
def test_other_names_are_no_pseudonyms(subject: str) -> None:
    assert not is_pseudonym(subject)
