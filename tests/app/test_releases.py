"""A release's digest is what it is made of, and its number belongs to the digest for ever."""

import hashlib
import json
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import ModelNotFound
from app.releases import BadRelease, Prompt, Release, Releases, RetrievalPlan, enroll
from retrieval.citations import CheckPolicy

RELEASE = Release("hallmark", 1, "tgi", Prompt("answer-1", "{sources} {question}"), base_model="org/base")

CHANGES = {
    "name": {"name": "other"},
    "engine": {"engine": "vllm"},
    "prompt version": {"prompt": Prompt("answer-2", "{sources} {question}")},
    "prompt text": {"prompt": Prompt("answer-1", "{question} {sources}")},
    "retrieval": {"retrieval": RetrievalPlan(top_k=6)},
    "thresholds": {"retrieval": RetrievalPlan(policy=CheckPolicy(supported_share=0.9))},
    "served model": {"served_model": "tuned"},
    "base model": {"base_model": "org/other"},
    "base revision": {"base_revision": "abc"},
    "adapter": {"adapter": "support"},
    "adapter digest": {"adapter_digest": "0" * 64},
    "max tokens": {"max_tokens": 255},
    "temperature": {"temperature": 0.1},
    "notes": {"notes": "first"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_makes_another_digest(change):
    assert msgspec.structs.replace(RELEASE, **change).digest != RELEASE.digest


def test_every_part_of_a_release_is_among_those_changes():
    changed = {name for change in CHANGES.values() for name in change}
    assert changed == set(Release.__struct_fields__) - {"number"}


@pytest.mark.parametrize("template", ["Only {question}", "Only {sources}", ""])
def test_a_prompt_that_would_hide_the_passages_or_the_question_is_refused(template):
    with pytest.raises(BadRelease, match=r"\{(sources|question)\}"):
        Prompt("p", template)


@given(st.integers(1, 10**6))
def test_the_number_is_no_part_of_the_digest(number):
    assert msgspec.structs.replace(RELEASE, number=number).digest == RELEASE.digest


@given(st.text(max_size=40), st.text(max_size=40), st.floats(0, 2), st.integers(1, 50))
def test_whoever_holds_the_parts_can_verify_the_digest(template, notes, temperature, top_k):
    release = msgspec.structs.replace(
        RELEASE,
        prompt=Prompt("p", f"{template}{{sources}}{{question}}"),
        notes=notes,
        temperature=temperature,
        retrieval=RetrievalPlan(top_k=top_k),
    )
    parts = json.loads(release.canonical)
    assert parts["retrieval"]["top_k"] == top_k
    assert parts["max_tokens"] == 256  # Defaults are written out: changing one later does not change the past.
    written = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert msgspec.json.decode(written) == msgspec.json.decode(release.canonical)
    assert list(parts) == sorted(parts)
    assert release.digest == hashlib.sha256(release.canonical).hexdigest()


def test_a_bare_name_means_the_last_release_and_a_label_its_own():
    second = msgspec.structs.replace(RELEASE, number=2, notes="second")
    other = msgspec.structs.replace(RELEASE, name="other")
    releases = Releases(RELEASE, second, other)
    assert releases.resolve("hallmark") is second
    assert releases.resolve("hallmark@1") is RELEASE
    assert releases.resolve("hallmark@2") is second
    assert releases.serving == [second, other]


@pytest.mark.parametrize("model", ["", "hallmark@3", "Hallmark", "gpt-4o", "x" * 1000])
def test_an_unknown_name_is_refused_with_those_there_are(model):
    with pytest.raises(ModelNotFound, match="'hallmark', 'hallmark@1'") as raised:
        Releases(RELEASE).resolve(model)
    assert raised.value.param == "model"
    assert len(raised.value.message) < 400


def test_a_release_keeps_its_number_and_a_changed_one_gets_the_next(tmp_path: Path):
    path = tmp_path / "hallmark.db"
    changed = msgspec.structs.replace(RELEASE, notes="changed")
    assert enroll(path, RELEASE).label == "hallmark@1"
    assert enroll(path, changed).label == "hallmark@2"
    assert enroll(path, RELEASE).label == "hallmark@1"  # Going back is going back, not a third release.
    assert enroll(path, msgspec.structs.replace(RELEASE, name="other")).label == "other@1"


def test_releases_enrolled_at_once_get_one_number_each(tmp_path: Path):
    path = tmp_path / "hallmark.db"
    enroll(path, RELEASE)
    found: list[tuple[str, int]] = []

    def enroll_one(note: int) -> None:
        release = enroll(path, msgspec.structs.replace(RELEASE, notes=str(note)))
        found.append((release.notes, release.number))

    threads = [threading.Thread(target=enroll_one, args=(i // 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert sorted(number for _, number in set(found)) == [2, 3, 4, 5]
