"""What is kept of a prediction is decided before it is written, and what was sealed is gone with its key."""

import shutil
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.database import Database
from app.predictions import History, Prediction, PredictionLog, uuid7
from app.predictions.keeping import Keeper
from app.privacy.policies import Policy, strictest
from app.privacy.redaction import redact
from app.privacy.rings import FileRing
from app.privacy.sealing import MasterKeys, is_pseudonym, new_key
from app.privacy.subject_keys import SubjectKeys
from app.privacy_wiring import BadPrivacy, open_privacy
from app.settings import PrivacySettings
from tests.migrated import migrated

MASTERS = MasterKeys.parse(new_key())
SAID = "My card 4716 4245 2151 1864 was refused, write to anna@mail.example"
SECRETS = ("4716 4245 2151 1864", "anna@mail.example", "sapphire")


def _prediction(**facts) -> Prediction:
    answer = "Dear anna@mail.example, sapphire is refused [1]."
    said = {
        "id": uuid7(),
        "tenant": "acme",
        "outcome": "finished",
        "user": "anna@mail.example",
        "conversation": "c1",
        "request": msgspec.json.encode({"user": "anna@mail.example", "messages": [{"role": "user", "content": SAID}]}),
        "question": SAID,
        "answer": answer,
        "metadata": {"note": "of anna@mail.example"},
        "passages": [{"id": "p1", "document_id": "d1", "score": 0.5}],
        "citations": [
            {"n": 1, "status": "supported", "answer_start": 24, "answer_end": len(answer) - 5, "quote": "sapphire"}
        ],
    }
    return Prediction(**said | facts)


# --- how much is kept ---


def test_the_strictest_wish_holds():
    policy = Policy(level="redacted", tenants={"open": "full", "closed": "metadata"})
    assert policy.level_of("acme", "s") == "redacted"
    assert policy.level_of("acme", "s", "full") == "redacted"
    assert policy.level_of("open", "s", "redacted") == "redacted"
    assert policy.level_of("closed", "s", "full") == "metadata"
    assert strictest("metadata", "full", "redacted") == "metadata"


def test_a_share_keeps_the_content_of_whole_sessions():
    policy = Policy(share=0.25)
    levels = {f"s{n}": policy.level_of("acme", f"s{n}") for n in range(2000)}
    assert levels == {session: policy.level_of("acme", session) for session in levels}
    assert 400 < list(levels.values()).count("full") < 600
    assert set(levels.values()) == {"full", "metadata"}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        Policy(share=share)


@pytest.mark.parametrize(
    "policy", [Policy(), Policy(kinds=["email"]), Policy(tenants={"acme": "full"})], ids=["default", "kinds", "tenants"]
)
def test_where_all_is_kept_nothing_is_copied(policy):
    prediction = _prediction()
    assert Keeper(policy).keep(prediction) is prediction


def test_by_default_a_service_keeps_all_and_copies_nothing(tmp_path):
    prediction = _prediction()
    assert open_privacy(PrivacySettings(), tmp_path).keeper.keep(prediction) is prediction


@pytest.mark.parametrize("policy", [Policy(level="redacted"), Policy(tenants={"b": "metadata"}), Policy(share=0.9)])
def test_where_somebodys_content_is_not_kept_everybody_is_asked_for(policy):
    assert not policy.keeps_all


def test_redacted_content_has_nothing_personal_in_it_and_its_citations_where_they_were():
    citation = _prediction().citations[0] | {"quote": "sapphire of anna@mail.example"}
    prediction = _prediction(question_embedding=b"as it was said", citations=[citation])
    kept = Keeper(Policy(level="redacted")).keep(prediction)
    assert kept.question_embedding is None
    written = msgspec.json.encode(kept.as_dict() | {"user": None, "request": None})
    assert b"4716" not in written
    assert b"anna@" not in written
    assert kept.question == redact(SAID)
    (before,), (after,) = prediction.citations, kept.citations
    said = prediction.answer[before["answer_start"] : before["answer_end"]]
    assert said == "sapphire is refused"[: len(said)]
    assert kept.answer[after["answer_start"] : after["answer_end"]] == said
    assert "anna@mail.example" in prediction.answer  # What the caller gets is as it was.


@pytest.mark.parametrize("answer", ["Nothing personal [1].", None])
def test_a_quote_is_redacted_also_where_the_answer_says_nothing_personal(answer):
    citation = {"n": 1, "answer_start": 0, "answer_end": 7, "quote": "Ask anna@mail.example."}
    kept = Keeper(Policy(level="redacted")).keep(_prediction(answer=answer, citations=[citation]))
    assert kept.citations == [citation | {"quote": "Ask [email]."}]


@pytest.mark.parametrize("level", ["redacted", "metadata"])
def test_numbers_are_looked_through_as_texts_are(level):
    metadata = {"card": 4716424521511864, "cards": [[4716424521511864]], "age": 47, "is_new": True, "at": 1732795200000}
    kept = Keeper(Policy(level=level)).keep(_prediction(metadata=metadata))
    assert kept.metadata == metadata | {"card": "[card]", "cards": [["[card]"]]}
    if level == "redacted":
        request = msgspec.json.encode({"metadata": metadata})
        assert Keeper(Policy(level=level)).keep(_prediction(request=request)).request == {"metadata": kept.metadata}


@given(st.lists(st.sampled_from(["anna@mail.example", "10.0.0.1", "4716424521511864", "word ", "é ", ", "])), st.data())
def test_a_span_of_an_answer_says_the_same_after_redaction(parts, data):
    answer = " ".join(parts) + " The end."
    start = data.draw(st.integers(0, len(answer)))
    end = data.draw(st.integers(start, len(answer)))
    citation = {"n": 1, "answer_start": start, "answer_end": end}
    kept = Keeper(Policy(level="redacted")).keep(_prediction(answer=answer, citations=[citation]))
    (after,) = kept.citations
    assert 0 <= after["answer_start"] <= after["answer_end"] <= len(kept.answer)
    said = answer[start:end]
    if redact(answer[:start]) + redact(said) + redact(answer[end:]) == redact(answer):
        assert kept.answer[after["answer_start"] : after["answer_end"]] == redact(said)


def test_a_user_goes_by_a_pseudonym_in_the_request_too():
    kept = Keeper(pseudonym=MASTERS.pseudonym).keep(_prediction())
    assert is_pseudonym(kept.user)
    assert msgspec.json.decode(kept.request)["user"] == kept.user if isinstance(kept.request, bytes) else True
    assert kept.request["user"] == kept.user


FEATURES = [
    {"feature": "person:note", "entity": "anna@mail.example", "value": "sapphire of anna@mail.example", "state": "read",
     "event_at": "2026-11-01T00:00:00.000Z", "created_at": "2026-11-01T00:00:00.000Z"},
    {"feature": "person:age", "entity": "anna@mail.example", "value": 4716, "state": "missing"},
]  # fmt: skip
AGES = [
    {name: each[name] for name in ("feature", "state", "event_at", "created_at") if name in each} for each in FEATURES
]


def test_of_features_what_was_said_is_redacted_and_the_user_goes_by_the_pseudonym():
    kept = Keeper(Policy(level="redacted")).keep(_prediction(features=FEATURES))
    assert [(each["entity"], each["value"]) for each in kept.features] == [
        ("[email]", "sapphire of [email]"),
        ("[email]", 4716),
    ]
    assert kept.features[0]["event_at"] == FEATURES[0]["event_at"]
    request = {"user": "anna@mail.example", "features": {"entity": {"user": "anna@mail.example", "customer": "c-1"}}}
    prediction = _prediction(features=FEATURES, request=msgspec.json.encode(request))
    named = Keeper(pseudonym=MASTERS.pseudonym).keep(prediction)
    assert {each["entity"] for each in named.features} == {named.user}
    assert named.request["features"]["entity"] == {"user": named.user, "customer": "c-1"}


# --- on the disk ---


async def test_values_of_features_are_content_and_sealed_and_dropped_like_it(path):
    prediction = _prediction(features=FEATURES)
    with closing(SubjectKeys(path.parent / "keys.db", MASTERS)) as keys:
        ring = FileRing(path.parent / "keys.db", MASTERS)
        await _write(path, prediction, keeper=Keeper(pseudonym=MASTERS.pseudonym, keys=keys), ring=ring)
        none = _prediction(features=FEATURES)
        await _write(path, none, keeper=Keeper(Policy(level="metadata"), pseudonym=MASTERS.pseudonym))
    assert not any(secret.encode() in _on_disk(path.parent) for secret in SECRETS)
    async with Database.of_file(path) as database:
        found = await History(database, keys=ring).get("acme", prediction.id)
        assert [each["value"] for each in found.features] == [each["value"] for each in FEATURES]
        for blind in (await History(database).get("acme", prediction.id), await History(database).get("acme", none.id)):
            assert blind.features == AGES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return migrated(tmp_path / "data" / "hallmark.db")


async def _write(path: Path, *predictions: Prediction, keeper: Keeper, ring: FileRing | None = None) -> None:
    async with PredictionLog(path, keeper=keeper, keys=ring) as log:
        for prediction in predictions:
            log.open(prediction)
            await log.close(prediction)
            if ring is not None and prediction.store:
                assert (await log.get("acme", prediction.id)).answer == prediction.answer


def _on_disk(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file())


async def test_metadata_keeps_what_happened_and_nothing_that_was_said(path):
    prediction = _prediction(user=None, metadata=None)
    await _write(path, prediction, keeper=Keeper(Policy(level="metadata"), pseudonym=MASTERS.pseudonym))
    assert not any(secret.encode() in _on_disk(path.parent) for secret in SECRETS)
    async with Database.of_file(path) as database:
        found = await History(database).get("acme", prediction.id)
    assert (found.kept, found.store, found.answer, found.outcome) == ("metadata", False, None, "finished")


async def test_a_request_can_have_less_kept_than_the_policy_and_not_more(path):
    less, more = _prediction(kept="metadata"), _prediction(kept="full")
    await _write(path, less, more, keeper=Keeper(Policy(level="redacted")))
    async with Database.of_file(path) as database:
        history = History(database)
        assert (await history.get("acme", less.id)).kept == "metadata"
        assert (await history.get("acme", more.id)).kept == "redacted"


async def test_sealed_content_is_on_no_disk_and_opens_with_the_key(path):
    prediction = _prediction()
    with closing(SubjectKeys(path.parent / "keys.db", MASTERS)) as keys:
        ring = FileRing(path.parent / "keys.db", MASTERS)
        await _write(path, prediction, keeper=Keeper(pseudonym=MASTERS.pseudonym, keys=keys), ring=ring)
    assert not any(secret.encode() in _on_disk(path.parent) for secret in SECRETS)
    async with Database.of_file(path) as database:
        found = await History(database, keys=ring).get("acme", prediction.id)
        assert found.answer == prediction.answer
        assert found.citations == prediction.citations
        assert found.metadata == prediction.metadata
        assert (found.kept, found.sealed) == ("full", None)
        blind = await History(database).get("acme", prediction.id)
        assert (blind.kept, blind.answer) == ("unreadable", None)
        # Figures and lineage need no key.
        assert blind.passages == prediction.passages
        assert blind.citations[0]["status"] == "supported"


async def test_an_answer_without_passages_is_sealed_as_well(path):
    prediction = _prediction(passages=[], citations=[])
    with closing(SubjectKeys(path.parent / "keys.db", MASTERS)) as keys:
        ring = FileRing(path.parent / "keys.db", MASTERS)
        await _write(path, prediction, keeper=Keeper(keys=keys), ring=ring)
    async with Database.of_file(path) as database:
        found = await History(database, keys=ring).get("acme", prediction.id)
    assert (found.answer, found.passages, found.citations) == (prediction.answer, [], [])


async def test_with_its_key_content_is_gone_from_copies_made_before_too(path, tmp_path):
    annas, bens = _prediction(), _prediction(user="ben", answer="for ben")
    with closing(SubjectKeys(path.parent / "keys.db", MASTERS)) as keys:
        await _write(path, annas, bens, keeper=Keeper(pseudonym=MASTERS.pseudonym, keys=keys))
    backup = tmp_path / "backup"
    shutil.copytree(path.parent, backup, ignore=shutil.ignore_patterns("keys.db*"))
    ring = FileRing(path.parent / "keys.db", MASTERS)
    assert await ring.destroy("acme", [MASTERS.pseudonym("acme", "anna@mail.example")]) == 1
    for where in (path, backup / path.name):
        async with Database.of_file(where) as database:
            history = History(database, keys=ring)
            gone = await history.get("acme", annas.id)
            assert (gone.kept, gone.answer, gone.request, gone.question) == ("erased", None, None, None)
            assert (await history.get("acme", bens.id)).answer == "for ben"


async def test_a_row_cannot_be_passed_off_as_another(path):
    one, two = _prediction(answer="one"), _prediction(answer="two")
    with closing(SubjectKeys(path.parent / "keys.db", MASTERS)) as keys:
        await _write(path, one, two, keeper=Keeper(keys=keys))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE predictions SET sealed = (SELECT sealed FROM predictions ORDER BY id DESC LIMIT 1)")
    async with Database.of_file(path) as database:
        history = History(database, keys=FileRing(path.parent / "keys.db", MASTERS))
        assert (await history.get("acme", one.id)).kept == "unreadable"
        assert (await history.get("acme", two.id)).answer == "two"


async def test_whose_key_cannot_be_opened_is_recorded_without_content_and_others_as_ever(path):
    with closing(SubjectKeys(path.parent / "keys.db", MasterKeys.parse(new_key()))) as keys:
        keys.made_for("acme", "anna")
    annas, bens = _prediction(user="anna", metadata=None), _prediction(user="ben")
    with closing(SubjectKeys(path.parent / "keys.db", MASTERS)) as keys:
        await _write(path, annas, bens, keeper=Keeper(keys=keys))
    async with Database.of_file(path) as database:
        history = History(database, keys=FileRing(path.parent / "keys.db", MASTERS))
        poor = await history.get("acme", annas.id)
        assert (poor.user, poor.outcome, poor.error_code, poor.answer) == (
            "anna",
            "finished",
            "record_incomplete",
            None,
        )
        assert (await history.get("acme", bens.id)).answer == bens.answer


async def test_a_master_key_without_which_a_key_cannot_be_opened_must_be_there(tmp_path):
    old, new = new_key(), new_key()
    with ExitStack() as parts:
        keys = open_privacy(PrivacySettings(master_key=old), tmp_path, parts).ring
        await keys.sealing("acme", ["anna"])
    missing = rf"`privacy.master_key`: keys in .* are wrapped by {old.partition(':')[0]}, which is not there"
    with ExitStack() as parts, pytest.raises(BadPrivacy, match=missing):
        open_privacy(PrivacySettings(master_key=new), tmp_path, parts)
    with ExitStack() as parts:
        open_privacy(PrivacySettings(master_key=f"{new},{old}"), tmp_path, parts)


async def test_content_that_cannot_be_written_leaves_its_row_and_no_name(path):
    prediction = _prediction(request=b"{not json", metadata=None)
    await _write(path, prediction, keeper=Keeper(Policy(level="redacted"), pseudonym=MASTERS.pseudonym))
    assert b"anna@" not in _on_disk(path.parent)
    async with Database.of_file(path) as database:
        found = await History(database).get("acme", prediction.id)
    assert found.outcome == "finished"
    assert is_pseudonym(found.user)
