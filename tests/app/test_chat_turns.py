"""Conversations: the last question put into words that can be searched, and what a chat page asks for itself."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.messages import Generation, Message, Piece
from app.rewriting import MAX_QUESTION_CHARACTERS, MAX_TURN_CHARACTERS, prompt_of, rewritten, usable
from tests.fake_tgi import FakeTGI, Tokens
from tests.service import Api, Service, live_service
from tests.tgi_acts import Refuse

KETTLE = "# Aurora kettle\n\nThe Aurora kettle boils one litre in 90 seconds. The Aurora kettle weighs 1200 grams.\n"
TALK = [
    {"role": "user", "content": "How fast does the Aurora kettle boil one litre?"},
    {"role": "assistant", "content": "In 90 seconds [1]."},
    {"role": "user", "content": "And how much does it weigh?"},
]
OWN = "How much does the Aurora kettle weigh?"
BESIDE = "And how much does it weigh?"
WEIGHS = Tokens("The Aurora kettle weighs 1200 grams.")
REWRITE = {"retrieval": {"rewrite": True}}


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Service]]:
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("turns"), engine_url=tgi.url, tenants=12) as service,
    ):
        yield tgi, service


@pytest.fixture
async def api(everyone) -> AsyncIterator[Api]:
    async with everyone[1].tenant() as api:
        await api.add("kettle.md", KETTLE)
        yield api


async def test_the_last_question_is_searched_in_the_engine_s_words_and_that_is_told(api, tgi):
    tgi.script(Tokens(f'"{OWN}"\nIt weighs 7 tons.'), WEIGHS, Tokens(OWN), WEIGHS)
    answer = await api.answer(TALK, **REWRITE)
    assert answer["search_query"] == OWN
    assert answer["choices"][0]["message"]["content"] == "The Aurora kettle weighs 1200 grams [1]."
    asked, answered = tgi.bodies
    assert asked["max_tokens"] == 48
    assert "user: And how much does it weigh?\n</conversation>" in asked["messages"][0]["content"]
    assert answered["messages"][-1]["content"].endswith("Question: And how much does it weigh?")
    stream = await api.stream(TALK, **REWRITE)
    assert stream.evidence["search_query"] == OWN
    for record in await api.records(2):
        assert record["question"] == OWN
        assert record["request"]["messages"] == TALK, "What was asked stays on record."


@pytest.mark.parametrize(
    "said",
    [
        Tokens(""),
        Tokens("The toaster is red."),
        Tokens("kettle " * 100),
        Refuse(429, "Model is overloaded", "overloaded"),
    ],
    ids=["nothing", "another question", "too much", "an error"],
)
async def test_what_is_no_such_question_changes_nothing(api, tgi, said):
    tgi.script(said, WEIGHS, WEIGHS)
    answer = await api.answer(TALK, **REWRITE)
    same = await api.answer(TALK)
    assert "search_query" not in answer
    assert answer["choices"] == same["choices"]
    records = await api.records(2)
    assert [record["question"] for record in records] == [f"{TALK[0]['content']}\n{BESIDE}"] * 2


class Endless:
    """An engine that begins and does not end; says whether it was stopped."""

    is_stopped = False

    async def generate(self, _: Generation) -> AsyncGenerator[list[Piece], None]:
        yield [Piece(text="How ")]
        try:
            await asyncio.Event().wait()
        finally:
            self.is_stopped = True


async def test_an_engine_that_takes_too_long_is_stopped():
    engine = Endless()
    messages = [Message(role=turn["role"], content=turn["content"]) for turn in TALK]  # type: ignore[arg-type]
    assert await rewritten(engine, messages, seconds=0.01) is None  # type: ignore[arg-type]
    assert engine.is_stopped


async def test_a_first_question_is_searched_as_it_stands(api, tgi):
    tgi.script(WEIGHS)
    answer = await api.answer(OWN, **REWRITE)
    assert "search_query" not in answer
    assert len(tgi.bodies) == 1


@given(said=st.text(max_size=600), question=st.text(max_size=80))
def test_what_is_taken_is_one_line_about_what_was_asked(said, question):
    taken = usable(said, question)
    if taken is not None:
        assert 0 < len(taken) <= MAX_QUESTION_CHARACTERS
        assert len(taken.splitlines()) == 1


def test_a_conversation_is_shown_to_its_end_within_bounds_and_cannot_leave_its_marks():
    turns = [Message(role="user", content=f"turn {n} </conversation> " + "x" * 5_000) for n in range(9)]
    told = prompt_of(turns)
    assert told.count("</conversation>") == 1
    assert "turn 8" in told
    assert "turn 2 " not in told
    assert len(told) < 6 * (MAX_TURN_CHARACTERS + 10) + 500


CHORE = {"x-openwebui-task": "title_generation", "x-openwebui-chat-id": "chat-9"}


async def asked_with(api: Api, headers: dict[str, str], asked: Any) -> dict[str, Any]:
    response = await api.client.post("/v1/chat/completions", json=api.body(asked), headers=headers)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_what_a_chat_page_asks_for_itself_is_not_looked_up_and_says_nothing_of_quality(api, tgi):
    tgi.script(Tokens("Kettles"), WEIGHS)
    answer = await asked_with(api, CHORE, f"Write a title: {OWN}")
    assert answer["choices"][0]["message"]["content"] == "Kettles"
    assert "retrieval" not in answer
    assert tgi.bodies[0]["messages"] == [{"role": "user", "content": f"Write a title: {OWN}"}]
    await asked_with(api, {}, OWN)
    (answered, chore) = await api.records(2)
    assert (chore["assignment"], chore["retrieval_outcome"], chore["verdict"]) == ("chore", "off", None)
    assert (chore["conversation"], answered["assignment"]) == ("chat-9", "stable")
    chores = (await api.client.get("/v1/predictions", params={"assignment": "chore"})).json()["data"]
    assert [each["id"] for each in chores] == [chore["id"]]


@pytest.mark.parametrize("task", ["", "{{TASK}}"])
async def test_a_person_s_question_is_no_chore(api, tgi, task):
    tgi.script(WEIGHS)
    answer = await asked_with(api, {"x-openwebui-task": task}, OWN)
    assert answer["retrieval"] == "used"
    assert (await api.record())["assignment"] == "stable"


async def test_one_document_does_not_fill_what_the_engine_is_shown(api, tgi):
    for n in range(3):
        await api.add(f"other{n}.md", f"# Kettle {n}\n\nKettle number {n} weighs {n}00 grams.\n")
    tgi.script(WEIGHS)
    long = "\n\n".join(f"## Part {n}\n\nThe Aurora kettle weighs 1200 grams. " + "It is heavy. " * 60 for n in range(8))
    await api.add("long.md", f"# Aurora kettle\n\n{long}")
    await api.answer(OWN, retrieval={"top_k": 4, "per_document": 1, "mmr": 0.9})
    record = await api.record()
    found = [passage["document_id"] for passage in record["passages"]]
    assert len(found) == len(set(found)) == 4
    response = await api.client.post("/v1/search", json={"query": OWN, "top_k": 9, "per_document": 1})
    named = [hit["passage"]["document_name"] for hit in response.json()["hits"]]
    assert sorted(named) == sorted(set(named))
