"""An answer to a task is exactly what the task asks for, or it is none; pure."""

import contextlib
import json
from functools import reduce
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.tasks import BadTask, Misfit, Task
from tests.stopwatch import Stopwatch

ROUTER = Task("classify", ("billing", "billing dispute", "Cancel Subscription", "C++", "+"))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "total": {"type": "number", "minimum": 0},
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"item": {"enum": ["chair", "table"]}},
}
ORDER = Task("extract", (), SCHEMA)


# --- classify ---


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("billing", "billing"),
        (" billing\n", "billing"),
        ("Billing.", "billing"),
        ('**"BILLING"**', "billing"),
        ("billing dispute", "billing dispute"),
        ("Billing dispute: the amount is wrong", "billing dispute"),
        ("cancel subscription\n\nThe customer wants to leave.", "Cancel Subscription"),
        ("C++", "C++"),
        ("+", "+"),
        ("- billing", "billing"),
    ],
)
def test_a_label_is_known_whatever_stands_around_it(text, label):
    assert ROUTER.read(text) == label


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "none"),
        ("?!", "none"),
        ("refund", "none"),
        ("billings", "none"),
        ("not billing", "none"),
        ("It is billing", "none"),
        ("billing or cancel subscription", "more than one"),
        ("Billing. Or is it a billing dispute?", "more than one"),
    ],
)
def test_what_is_no_label_or_several_is_none(text, why):
    with pytest.raises(Misfit, match=why):
        ROUTER.read(text)


def test_of_labels_that_differ_by_case_the_exact_one_is_meant():
    task = Task("classify", ("US", "us"))
    assert [task.read(" US"), task.read("us ")] == ["US", "us"]
    with pytest.raises(Misfit, match="more than one"):
        task.read("Us")


@given(st.text(), st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=6, unique=True))
def test_whatever_is_said_the_class_is_a_label_or_there_is_none(text, labels):
    try:
        task = Task("classify", tuple(labels))
    except BadTask:
        return
    for label in labels:
        assert task.read(f"\n {label} ") == label
    with contextlib.suppress(Misfit):
        assert task.read(text) in labels


# --- extract ---


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ann", "total": 3.50, "items": ["chair"]}',
        '\n {"name":"Ann"}\n',
        '```json\n{"name": "Ann", "code": "AT"}\n```',
        'Here it is: {"name": "Ann"} - as you asked.',
    ],
)
def test_json_that_fits_is_given_alone_and_as_it_was_written(text):
    found = ORDER.read(text)
    assert found in text
    assert json.loads(found)["name"] == "Ann"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON object"),
        ("[]", "no JSON object"),
        ('"Ann"', "no JSON object"),
        ("null", "no JSON object"),
        ('{"name": "Ann"', "no JSON object"),
        ('{"name": NaN}', "no JSON object"),
        ("{" * 100_000, "no JSON object"),
        ('{"a":' * 5_000 + "1" + "}" * 5_000, "no JSON object|nested too deeply"),
        ("{}", '"name" is a required property'),
        ('{"name": ""}', "at `name`"),
        ('{"name": "Ann", "total": -1}', "at `total`"),
        ('{"name": "Ann", "items": ["chair", "sofa"]}', r"at `items\.1`"),
        ('{"name": "Ann", "code": "at"}', "at `code`"),
        ('{"name": "Ann", "age": 5}', "Additional properties"),
        ('{"name": "\ud800"}', "no JSON object"),
        ('{"name": "Ann", "items": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
    ],
)
def test_what_does_not_fit_is_told_by_its_place(text, why):
    with pytest.raises(Misfit, match=why):
        ORDER.read(text)


def test_why_an_answer_does_not_fit_quotes_nothing_of_it():
    for text in ('{"name": "Ann", "total": "secret"}', '{"name": "Ann", "code": "secret"}', "secret"):
        with pytest.raises(Misfit) as misfit:
            ORDER.read(text)
        assert "secret" not in str(misfit.value)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)
OBJECTS = st.dictionaries(st.sampled_from(["name", "total", "code", "items", "age"]), VALUES)


@given(OBJECTS | st.builds(lambda rest: {"name": "Ann", **rest}, OBJECTS))
def test_what_fits_is_decided_as_by_another_validator(data: Any):
    fits = jsonschema.Draft202012Validator(SCHEMA).is_valid(data)
    try:
        assert json.loads(ORDER.read(json.dumps(data))) == data
    except Misfit:
        assert not fits
    else:
        assert fits


def test_a_pattern_that_would_take_for_ever_does_not():
    task = Task("extract", (), {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}})
    watch = Stopwatch()
    with pytest.raises(Misfit):
        task.read(json.dumps({"a": "a" * 50_000 + "!"}))
    assert watch.seconds < 2


# --- tasks that cannot be ---


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "required": 1},
        {"type": "object", "properties": {"a": {"pattern": "("}}},
        {"type": "object", "properties": {"a": {"pattern": "(?=a)b"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}},
        {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema.json"}}},
        {"type": "object", "$schema": "http://127.0.0.1:1/draft"},
        {"type": ["object", "null"]},
        {},
        {"type": "object", "not": reduce(lambda inner, _: {"not": inner}, range(300), {})},
    ],
)
def test_a_schema_that_no_answer_could_be_held_against_is_refused(schema):
    with pytest.raises(BadTask, match="`schema`"):
        Task("extract", (), schema)


@pytest.mark.parametrize("label", [" a", "a ", "a\nb", "a\tb", "a\0"])
def test_a_label_that_no_answer_could_be_is_refused(label):
    with pytest.raises(BadTask, match="not one line"):
        Task("classify", (label, "other"))


def test_a_plain_answer_is_whatever_it_is():
    assert Task().is_answer
    assert Task().read(" So. ") == " So. "
