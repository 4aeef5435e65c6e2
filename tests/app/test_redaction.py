"""Personal data and secrets are found by form and check digits, in linear time, and nothing else is."""

import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.privacy.redaction import KINDS, find, redact

CARD = "4716 4245 2151 1864"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"


SAID = [
    ("email", "anna.maier+work@mail.example.co.uk"),
    ("email", "müller@bücher.example"),
    ("card", CARD),
    ("card", "5210402405591275"),
    ("card", "3782-822463-10005"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "gb82west12345698765432"),
    ("national_id", "205-46-4452"),
    ("national_id", "AB 12 34 56 C"),
    ("national_id", "12345678Z"),
    ("national_id", "2 69 05 49 588 157 80"),
    ("national_id", "RSSMRA85T10A562S"),
    ("ip", "10.218.6.131"),
    ("ip", "2001:db8::8a2e:370:7334"),
    ("ip", "::ffff:10.1.2.3"),
    ("phone", "+49 30 1234567"),
    ("phone", "(978) 645-9740"),
    ("phone", "001-748-088-2851x818"),
    ("phone", "089 72 63 41 22"),
    ("api_key", "sk-proj-AbCdEf0123456789xyzw"),
    ("api_key", "AKIAIOSFODNN7EXAMPLE"),
    ("api_key", "ghp_0123456789abcdefghijABCDEFGHIJ012345"),
    ("jwt", JWT),
    ("private_key", KEY),
]


@pytest.mark.parametrize(("kind", "said"), SAID)
def test_what_is_personal_or_secret_is_replaced_by_its_kind(kind: str, said: str) -> None:
    assert redact(f"Please note {said}, and thanks.") == f"Please note [{kind}], and thanks."
    assert redact(said) == f"[{kind}]"


@pytest.mark.parametrize(
    "said",
    [
        "The answer is 42, on page 1,234 of 5,678.",
        "On 2024-11-28 at 12:30:15 version 3.11.7 came out (2024-11-29 in Tokyo).",
        "4716 4245 2151 1865 has a wrong check digit, and so has GB83 WEST 1234 5698 7654 32.",
        "std::vector<int> and a ratio of 16:9:4",
        "Order 20240117 of 1999-2004 costs 12 500 000 euros.",
        "300.1.2.3 is no address, and 1.2.3 a version",
        "Ask @anna or a@b, or see user@localhost.",
        "The key is in the door, and the token ring is old.",
        "eyJ and a BEGIN PRIVATE KEY without its line",
    ],
)
def test_what_only_looks_like_it_stays(said: str) -> None:
    assert redact(said) == said


def test_a_secret_is_taken_out_by_its_name() -> None:
    assert redact('{"api_key": "correct-horse-9"}') == '{"api_key": "[api_key]"}'
    assert redact("password=hunter2hunter2; user=anna") == "password=[api_key]; user=anna"
    assert redact("Authorization: Bearer abcdefghij0123456789") == "Authorization: Bearer [api_key]"
    assert redact(f"client-secret :  '{'x' * 500}' a=b") == "client-secret :  '[api_key]' a=b"


def test_a_key_that_was_cut_off_is_taken_out_to_the_end() -> None:
    assert redact(KEY[:40]) == "[private_key]"


def test_what_is_behind_a_number_is_not_part_of_it() -> None:
    assert redact("pay GB82 WEST 1234 5698 7654 32 now or else") == "pay [iban] now or else"
    assert redact("DE89 3704 0044 0532 0130 00 GB82 WEST 1234 5698 7654 32") == "[iban] [iban]"
    assert redact(f"89 {CARD} 12/27 123") == "89 [card] 12/27 123"


@pytest.mark.parametrize(("kind", "said"), SAID)
def test_what_stands_beside_it_hides_nothing(kind: str, said: str) -> None:
    marks = ("", "_", "__", "*", '"', "'", "é ", "- ")
    before, behind = (*marks, "("), (*marks, ")", ",", ".", "?", "-", "--she")
    if kind in ("email", "card", "iban", "api_key", "jwt"):
        before += ("2 ", "3-", "exp 12 27 ", "order 4521 ", "AB12 ", "for FY24 ", "our_", "--", "10:")
        behind += (" 2", " 4521", " AB12", "-9", ":", "/")
    for left, right in product(before, behind):
        found = [each for each in find(f"{left}{said}{right}") if each.kind == kind]
        assert any(each.start <= len(left) and each.end >= len(left + said) for each in found), (left, right)


def test_both_ends_of_a_range_of_addresses_are_found() -> None:
    assert redact("10.0.0.7-10.0.0.9, and release-10.0.0.7 or 10.0.0.7-beta") == (
        "[ip]-[ip], and release-10.0.0.7 or 10.0.0.7-beta"
    )


def test_behind_other_numbers_a_card_is_one_that_is_written_as_cards_are() -> None:
    assert redact("89 47 16 42 45 21 51 18 64") == "89 [card]"
    assert redact(f"25 89 {CARD}") == "25 89 [card]"
    assert redact("25 89 47 16 42 45 21 51 18 64") == "25 89 47 16 42 45 21 51 18 64"


def test_only_the_kinds_asked_for_are_looked_for() -> None:
    text = f"anna@mail.example {CARD}"
    assert redact(text, ["card"]) == "anna@mail.example [card]"
    assert redact(text, []) == text


@given(
    st.lists(st.sampled_from([CARD, "anna@mail.example", "+49 30 1234567", JWT, "10.0.0.1", "x", " ", "@", ":", "1-"]))
)
def test_findings_are_in_order_and_do_not_overlap(parts: list[str]) -> None:
    text = "".join(parts)
    ends = 0
    for finding in find(text):
        assert ends <= finding.start < finding.end <= len(text)
        ends = finding.end


@given(st.text())
def test_any_text_can_be_looked_through(text: str) -> None:
    for finding in find(text):
        assert finding.kind in KINDS


HOSTILE = ("@", "a", "a@", "1", "1 ", "a.", "eyJ", KEY[:31], "::", "1.", "GB12 ", "ABCDEF12", "api_key=", "(", "1-")
HOSTILE += (
    "AA11 ",
    "4539 ",
    "GB12-",
    "2 85 01 ",
    "a@b-",
    "a@b.c-",
    "_",
    "1_",
    "bearer ",
    "call 1234567 ",
    "+1",
    "password:   ",
    "a@b.",
    "AA00 a ",
    "::1 ",
    f"GB12{'a' * 40} ",
    "a=",
)
PLAIN = "What the contract says of notice is on its last page. "


@pytest.mark.parametrize("part", HOSTILE)
def test_time_grows_with_the_length_and_with_nothing_else(part: str) -> None:
    def seconds(part: str, length: int) -> float:
        text = (part * length)[:length]
        rounds = []
        for _ in range(3):
            started = time.process_time()
            find(text)
            rounds.append(time.process_time() - started)
        return min(rounds)

    hostile = seconds(part, 40_000)
    assert hostile < 12 * seconds(part, 10_000) + 0.02
    assert hostile < 150 * seconds(PLAIN, 40_000)
