"""What a build decides without a database: what is right, which side a row is on, what repeats, what is left out."""

import json
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.datasets import sieve
from app.datasets.candidates import Fact
from app.datasets.examples import Unusable, example, line_of, turns_of
from app.datasets.opinions import Opinion, resolved, row_of
from app.datasets.recipes import Balance, Recipe, Splitting, read_recipe
from app.datasets.sessions import session_of, split_of
from app.datasets.similarity import Texts, bare
from app.errors import InvalidRequest
from app.lineage import canonical, row_digest
from app.predictions import Prediction, uuid7
from tests.lineage_world import digest_of
from tests.properties import examples

CLASSIFY = Recipe(task="classify")
ANSWER = Recipe(task="answer")


def opinion(said_at: int = 1, **facts) -> Opinion:
    return Opinion(**{"said_at": said_at, "id": uuid7(), "source": "reviewer", **facts})


def prediction(**facts) -> Prediction:
    request = json.dumps({"messages": [{"role": "user", "content": "What is it?"}]}).encode()
    return Prediction(**{"id": uuid7(), "tenant": "acme", "request": request, "answer": "It is A.", **facts})


def fact(n: int, **facts) -> Fact:
    known = {"split": "train", "session": str(n), "conversation": None, "class_name": "a", "prediction_id": f"{n:04d}"}
    return Fact(**{"digest": digest_of(str(n)), "content_digest": "", "label_id": None, "subject": None, "at": 0,
                   "size": 0, **known, **facts})  # fmt: skip


# --- recipes ---


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"task": "extract"}, "schema"),
        ({"task": "classify", "schema": {"type": "object"}}, "schema"),
        ({"task": "answer", "classes": ["a", "b"]}, "classes"),
        ({"task": "classify", "classes": ["a", "a"]}, "classes"),
        ({"task": "classify", "labels": {"confirming": ["right"]}}, "labels.confirming"),
        ({"task": "classify", "template": "Sort {question}"}, "template"),
        ({"task": "classify", "query": {"relase": "support"}}, "query.relase"),
        ({"task": "classify", "split": {"heldout": 2}}, "split.heldout"),
        ({"task": "rank"}, "task"),
    ],
)
def test_a_recipe_that_no_row_could_be_made_by_is_refused_by_field(recipe, field):
    with pytest.raises(InvalidRequest) as refused:
        read_recipe(recipe)
    assert refused.value.param == field


# --- sessions and splits ---


@given(st.lists(st.uuids(version=4).map(str), min_size=1, max_size=40, unique=True), st.sampled_from(["0", "seed"]))
def test_no_session_moves_when_others_come(ids, seed):
    plan = Splitting(seed=seed, heldout=0.3)
    alone = {each: split_of(session_of("acme", each, None, None), plan) for each in ids[:1]}
    together = {each: split_of(session_of("acme", each, None, None), plan) for each in ids}
    assert alone.items() <= together.items()


def test_the_share_that_is_held_out_is_about_the_one_asked_for():
    sides = [split_of(session_of("acme", str(n), None, None), Splitting(heldout=0.2)) for n in range(4_000)]
    assert 0.17 < sides.count("heldout") / 4_000 < 0.23  # Four standard deviations.


def test_a_conversation_is_one_session_whatever_else_is_known():
    assert session_of("a", "1", "c", "u") == session_of("a", "2", "c", "v") != session_of("b", "1", "c", "u")
    assert session_of("a", "1", "c", "u", by="user") == session_of("a", "2", "d", "u", by="user")
    assert session_of("a", "1", None, None) != session_of("a", "2", None, None)


# --- similarity ---


def test_what_differs_in_case_and_marks_alone_repeats():
    texts = Texts()
    texts.add(["Where is my card?", "I want a refund", "where is my CARD", "", " ", "Who opened it?"])
    assert texts.near(0.8) == [None, None, 0, None, 3, None]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("मेरा दिन कब आएगा?", "मेरा दान कब आएगा?"),
        ("क्या मुझे पैसे मिले?", "कया मझ पस मल"),
        ("ข้าว", "ขาว"),
        ("👍", "👎"),
        ("👍", "???"),
        ("", "!!"),
    ],
)
def test_texts_that_differ_in_vowel_signs_or_have_no_words_are_not_the_same(left, right):
    assert bare(left) != bare(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Café", "CAFE\u0301!"),
        ("①  ﬁne", "1 fine"),
        ("Danke \u2764\ufe0f sehr", "danke sehr"),
        ("मेरा दिन कब आएगा?", "मेरा, दिन कब आएगा"),
        (" 👍\n", "👍"),
    ],
)
def test_texts_that_are_the_same_word_for_word_are_equal(left, right):
    assert bare(left) == bare(right)


def test_many_texts_that_are_the_same_take_little_memory_and_are_settled_without_comparing():
    texts = Texts()
    tracemalloc.start()
    try:
        texts.add("Ping!" if n % 2 else "ping" for n in range(20_000))
        texts.add(f"Where is my card, asks number {n % 500} of us, please?" for n in range(2_000))
        near = texts.near(0.8)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert near[:20_000] == [None] + [0] * 19_999
    assert near[20_500:] == [20_000 + n % 500 if near[20_000 + n % 500] is None else near[20_000 + n % 500]
                             for n in range(1_500)]  # fmt: skip


def test_a_text_repeats_a_kept_one_and_not_one_that_was_dropped():
    words = [f"word{n}" for n in range(40)]
    chain = [" ".join(words[n : n + 30]) for n in range(0, 10, 2)]
    texts = Texts()
    texts.add(chain)
    near = texts.near(0.8)
    assert near[0] is None
    for at, original in enumerate(near):
        if original is not None:
            assert near[original] is None
            assert texts.overlap(at, original) >= 0.8
    assert near[-1] != 0


def test_those_to_be_kept_are_kept():
    texts = Texts()
    texts.add(["the same text here", "the same text here", "the same text here"])
    assert texts.near(0.9, keeping=2) == [None, None, 0]


@given(st.lists(st.sampled_from(["a b c d e f", "A, b, c, d, e, f!", "a b c d e g", "", "x", "quite another"])),
       st.integers(0, 4))  # fmt: skip
def test_what_is_near_is_what_comparing_each_with_all_before_finds(given_texts, keeping):
    texts = Texts()
    texts.add(given_texts)
    expected: list[int | None] = []
    for at in range(len(given_texts)):
        overlap = {n: texts.overlap(n, at) for n in range(at) if expected[n] is None}
        same = [n for n, share in overlap.items() if share == 1.0]
        near = [n for n, share in overlap.items() if share >= 0.6]
        expected.append(min(same or near, default=None) if at >= keeping else None)
    assert texts.near(0.6, keeping=keeping) == expected


def test_pairs_well_above_the_threshold_are_found():
    chance = random.Random(7)
    words = [f"w{n}" for n in range(2_000)]
    originals = [" ".join(chance.choice(words) for _ in range(30)) for _ in range(200)]
    copies = [f"{text} indeed" for text in originals]
    texts = Texts()
    texts.add(originals + copies)
    assert texts.near(0.8)[200:] == list(range(200))


# --- what is right ---


def test_the_newest_word_or_the_majority_is_right():
    said = [opinion(1, class_name="a"), opinion(2, class_name="a"), opinion(3, class_name="b")]
    assert resolved(CLASSIFY, None, said).value == "b"
    majority = read_recipe({"task": "classify", "labels": {"resolve": "majority"}})
    found = resolved(majority, None, said)
    assert (found.value, found.said.said_at, found.agreeing, found.opinions) == ("a", 2, 2, 3)


@pytest.mark.parametrize(
    ("policy", "said", "reason"),
    [
        ({}, [], "unlabelled"),
        ({"min_opinions": 2}, ["a"], "too_few_opinions"),
        ({"min_agreement": 0.7}, ["a", "b"], "disagreement"),
        ({"resolve": "majority"}, ["a", "b"], "disagreement"),
    ],
)
def test_where_too_few_agree_nothing_is_right(policy, said, reason):
    recipe = read_recipe({"task": "classify", "labels": policy})
    with pytest.raises(Unusable, match=reason):
        resolved(recipe, None, [opinion(n, class_name=name) for n, name in enumerate(said)])


def test_a_class_that_is_none_of_the_recipes_makes_no_row():
    recipe = read_recipe({"task": "classify", "classes": ["a", "b"]})
    with pytest.raises(Unusable, match="unknown_class"):
        resolved(recipe, None, [opinion(class_name="c")])
    corrected = opinion(answer="b", is_label=False)
    assert resolved(recipe, None, [corrected]).value == "b"


def test_data_must_fit_the_schema():
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    recipe = read_recipe({"task": "extract", "schema": schema})
    assert resolved(recipe, None, [opinion(answer='{"n": 1}')]).value == '{"n": 1}'
    with pytest.raises(Unusable, match="unfit"):
        resolved(recipe, None, [opinion(answer='{"n": "one"}')])


def test_a_class_may_confirm_the_answer():
    recipe = read_recipe({"task": "answer", "labels": {"confirming": ["right"]}})
    row = row_of(recipe, prediction(), [opinion(class_name="right")])
    assert json.loads(row.content)["messages"][-1]["content"] == "It is A."
    with pytest.raises(Unusable, match="unlabelled"):
        row_of(recipe, prediction(), [opinion(class_name="wrong")])


def test_a_correction_and_the_answer_make_a_pair():
    recipe = Recipe(task="preference")
    made = row_of(recipe, prediction(), [opinion(answer="It is B.", is_label=False)])
    content = json.loads(made.content)
    assert [content[side][0]["content"] for side in ("chosen", "rejected")] == ["It is B.", "It is A."]
    assert content["prompt"] == [{"role": "user", "content": "What is it?"}]
    assert made.label_id is None
    assert "feedback_id" in content["meta"]
    with pytest.raises(Unusable, match="same_answer"):
        row_of(recipe, prediction(), [opinion(answer=" It is A. ")])


def test_an_answer_comes_with_its_passages_and_what_it_should_cite():
    passages = [{"id": "d/1", "document_id": "d", "document_version": "v", "start": 0, "end": 4},
                {"id": "d/2", "document_id": "d", "document_version": "v", "start": 4, "end": 9}]  # fmt: skip
    asked = prediction(passages=passages, citations=[{"passage_id": "d/1"}])
    content = json.loads(row_of(ANSWER, asked, [opinion(answer="It is A.")], _text).content)
    assert [each["text"] for each in content["passages"]] == ["text", None]
    assert (content["citations"], content["answerable"]) == (["d/1"], True)
    content = json.loads(row_of(ANSWER, asked, [opinion(answer="It is B.", passages=["d/2"])]).content)
    assert content["citations"] == ["d/2"]
    content = json.loads(row_of(ANSWER, asked, [opinion(answer="I cannot tell.", passages=[])]).content)
    assert (content["citations"], content["answerable"]) == ([], False)


def _text(passage):
    return {"d/1": "text"}.get(passage["id"])


def test_the_weight_is_how_many_a_row_stands_for():
    recipe = read_recipe({"task": "classify", "labels": {"weights": "inverse_probability"}})
    row = row_of(recipe, prediction(), [opinion(class_name="a", sampling_probability=0.05, policy="q/uniform")])
    content = json.loads(row.content)
    assert content["weight"] == 20.0
    assert content["meta"]["sampling_probability"] == 0.05
    with pytest.raises(Unusable, match="no_probability"):
        row_of(recipe, prediction(), [opinion(class_name="a")])


def test_the_prompt_is_the_engines_or_the_callers():
    asked = prediction(messages=[{"role": "user", "content": "Read the sources. What is it?"}])
    said = [opinion(answer="It is B.")]
    prompts = {}
    for prompt in ("engine", "caller"):
        row = row_of(read_recipe({"task": "answer", "prompt": prompt}), asked, said)
        prompts[prompt] = json.loads(row.content)["messages"][0]["content"]
        assert row.question == "What is it?"
    assert prompts == {"engine": "Read the sources. What is it?", "caller": "What is it?"}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"store": False, "request": None, "answer": None}, "not_stored"),
        ({"shadow_of": uuid7()}, "shadow"),
        ({"assignment": "chore"}, "chore"),
        ({"request": None}, "no_question"),
        ({"request": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'}, "not_plain_text"),
        ({"request": b'{"messages": [{"role": "tool", "content": "x"}]}'}, "not_plain_text"),
    ],
)
def test_what_holds_no_plain_conversation_makes_no_row(facts, reason):
    with pytest.raises(Unusable, match=reason):
        row_of(CLASSIFY, prediction(**facts), [opinion(class_name="a")])


def test_system_turns_become_one_and_come_first():
    turns = turns_of([{"role": "developer", "content": "a"}, {"role": "system", "content": "b"},
                      {"role": "user", "content": [{"type": "text", "text": "c"}]}])  # fmt: skip
    assert turns == [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "c"}]


@given(st.text(max_size=40), st.text(max_size=10), st.floats(0.01, 1e6))
@examples(50)
def test_a_line_can_be_verified_by_itself(question, name, weight):
    content = {"messages": [{"role": "user", "content": question}], "label": name, "weight": weight}
    row = example(CLASSIFY, content, session="s", question=question, prediction_id=uuid7())
    line = json.loads(line_of(row.digest, row.content_digest, row.content, row.prediction_id, row.label_id))
    said = {field: line.pop(field) for field in ("row", "content_digest", "prediction_id", "label_id")}
    assert digest_of(canonical(line)) == said["content_digest"]
    assert row_digest(said["content_digest"], said["prediction_id"], said["label_id"]) == said["row"]


# --- the sieve ---


def test_a_cap_holds_for_what_is_trained_on_and_picks_by_chance_alone():
    facts = [fact(n, class_name="a" if n % 4 else "b", split="heldout" if n % 5 == 0 else "train") for n in range(100)]
    kept, dropped = sieve.balanced(facts, Balance(max_per_class=10), "0")
    assert sieve.composition(kept)["train"] == {"a": 10, "b": 10}
    assert sieve.composition(kept)["heldout"] == sieve.composition(facts)["heldout"]
    assert dropped == {"over_cap": 60}
    again, _ = sieve.balanced(facts[::-1], Balance(max_per_class=10), "0")
    assert {each.digest for each in again} == {each.digest for each in kept}
    other, _ = sieve.balanced(facts, Balance(max_per_class=10), "1")
    assert {each.digest for each in other} != {each.digest for each in kept}


def test_what_is_held_out_stays_and_is_not_trained_on():
    facts = [fact(n, split="heldout" if n < 2 else "train") for n in range(5)]
    asks = ["a", "a", "a", "b", "b"]
    kept, dropped = sieve.apart(facts, {each.digest: question for each, question in zip(facts, asks, strict=True)})
    assert kept == [*facts[:2], *facts[3:]]
    assert dropped == {"held_out": 1}


def test_a_leak_takes_its_conversation_along_unless_it_tells_nothing():
    facts = [fact(1, session="s"), fact(2, session="s"), fact(3, session="t"), fact(4, session="t"), fact(5)]
    leaking = {facts[0].digest: "leak_near", facts[2].digest: "leak_exact"}
    telling = {each.digest: each is not facts[2] for each in facts}
    kept, dropped = sieve.without_leaks(facts, leaking, telling)
    assert kept == facts[3:]
    assert dropped == {"leak_near": 1, "leaking_session": 1, "leak_exact": 1}


def test_sessions_come_in_the_order_in_which_they_began():
    facts = [fact(3, session="s"), fact(1, session="t"), fact(2, session="s"), fact(9, prediction_id=None)]
    order = [[each.prediction_id for each in session] for session in sieve.sessions_of(facts)]
    assert order == [["0001"], ["0002", "0003"], [None]]


@given(st.randoms(use_true_random=False), st.integers(2, 40))
@examples(50)
def test_no_step_minds_the_order_that_rows_came_in(chance, count):
    facts = [
        fact(n, session=str(n // 3), class_name="ab"[n % 2], prediction_id=None if n % 5 == 0 else f"{n:04d}")
        for n in range(count)
    ]
    shuffled = chance.sample(facts, count) + facts[:1]
    assert sieve.sessions_of(shuffled[:-1]) == sieve.sessions_of(facts)
    assert set(map(_digest, sieve.once(shuffled)[0])) == set(map(_digest, facts))
    for step in (
        lambda rows: sieve.balanced(rows, Balance(max_per_class=3), "0"),
        lambda rows: sieve.limited(rows, 4, "0"),
    ):
        assert step(shuffled[:-1]) == step(facts)


def _digest(row: Fact) -> str:
    return row.digest
