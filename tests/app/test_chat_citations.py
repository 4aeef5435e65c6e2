"""Answers from documents: what is cited, what is withheld, and that every link and quote holds."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from app.prompts import fence_word
from retrieval.documents import Scope, SearchMode, SearchResult
from retrieval.errors import IndexUnavailable
from retrieval.links import LinkFilter
from tests.fake_tgi import FakeTGI, Tokens
from tests.properties import examples
from tests.service import CHAT, NO_TLS, Api, Service, live_gateway, live_service

KETTLE = """# Aurora kettle

The Aurora kettle boils one litre in 90 seconds. It holds 1.7 litres – “enough for six cups” – and weighs 1200 grams.

## Descaling

Descale the Aurora kettle every 30 days with citric acid. Never use vinegar: it attacks the seal of the lid.

## Warranty

The warranty of the Aurora kettle lasts 24 months from the date of purchase. It does not cover limescale 🫖 damage.
"""
TOASTER = """# Borealis toaster

The Borealis toaster has four slots and weighs 2300 grams. Its crumb tray slides out at the back.

## Warranty

The warranty of the Borealis toaster lasts 36 months from the date of purchase.
"""
SPEED = "How fast does the Aurora kettle boil one litre?"
FAST = "The Aurora kettle boils one litre in 90 seconds"
WRONG = "The moon is made of green cheese and weighs 77 tons."
ABSTENTION = "I can't answer that from the documents I have."


@pytest.fixture(scope="module")
async def everyone(tmp_path_factory) -> AsyncIterator[tuple[FakeTGI, Service]]:
    async with FakeTGI() as tgi:
        directory = tmp_path_factory.mktemp("citations")
        async with live_service(
            directory, engine_url=tgi.url, tenants=60, settings={"retrieval": {"passage_tokens": 32}}
        ) as service:
            yield tgi, service


@pytest.fixture
async def nobody(everyone) -> AsyncIterator[Api]:
    """A tenant without documents."""
    async with everyone[1].tenant() as api:
        yield api


@pytest.fixture(scope="module")
async def api(everyone) -> AsyncIterator[Api]:
    """A tenant with two documents."""
    async with everyone[1].tenant() as api:
        await api.add("kettle.md", KETTLE, kind="kettle")
        await api.add("toaster.md", TOASTER, kind="toaster")
        yield api


@pytest.fixture
async def owner(everyone) -> AsyncIterator[Api]:
    """A tenant with the same documents, which the test may change."""
    async with everyone[1].tenant() as api:
        await api.add("kettle.md", KETTLE, kind="kettle")
        await api.add("toaster.md", TOASTER, kind="toaster")
        yield api


def words(text: str) -> Tokens:
    """An engine that writes this text, word by word."""
    return Tokens(*re.findall(r"\s*\S+\s*$|\s*\S+", text))


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def _assert_evidence_holds(
    api: Api, text: str, citations: list[dict[str, Any]], annotations: list[dict[str, Any]], record: dict[str, Any]
) -> None:
    """Every citation was retrieved in this request, quotes its source exactly, and stands where it says."""
    retrieved = {passage["id"] for passage in record["passages"]}
    sources = {each["document_id"]: await api.source(each["document_id"]) for each in citations}
    for each in citations:
        assert f"{each['document_id']}/{each['passage']}" in retrieved
        assert each["quote"] == sources[each["document_id"]][each["source_start"] : each["source_end"]] != ""
        assert 0 <= each["answer_start"] < each["answer_end"] <= len(text)
    assert [each["url_citation"]["url"] for each in annotations] == [each["url"] for each in citations]
    recorded = [(each["n"], each["passage_id"], each["quote"]) for each in record["citations"]]
    assert recorded == [(each["n"], f"{each['document_id']}/{each['passage']}", each["quote"]) for each in citations]


async def _record_of(api: Api, prediction_id: str) -> dict[str, Any]:
    return dict((await api.client.get(f"/v1/predictions/{prediction_id}")).json())


async def test_a_supported_sentence_is_cited_with_the_source_s_own_words(api, tgi):
    tgi.script(words(f"{FAST}."))
    answer = await api.answer(SPEED)
    assert content(answer) == f"{FAST} [1]."
    assert (answer["retrieval"], answer["verdict"]["status"]) == ("used", "answered")
    (citation,) = answer["citations"]
    assert citation["quote"] == f"{FAST}."
    assert (citation["status"], citation["document_name"], citation["title"]) == (
        "supported",
        "kettle.md",
        "Aurora kettle",
    )
    (annotation,) = answer["choices"][0]["message"]["annotations"]
    span = annotation["url_citation"]
    assert content(answer)[span["start_index"] : span["end_index"]] == "[1]"
    record = await _record_of(api, answer["id"])
    assert (record["answer"], record["verdict"], record["retrieval_outcome"]) == (content(answer), "answered", "used")
    await _assert_evidence_holds(
        api, content(answer), answer["citations"], answer["choices"][0]["message"]["annotations"], record
    )


async def test_the_engine_is_shown_the_passages_as_data_before_the_question(api, tgi):
    await api.answer(SPEED)
    (body,) = tgi.bodies
    prompt = body["messages"][-1]["content"]
    fence = re.search(r"<(sources [a-z]{6})>", prompt)
    assert fence is not None
    assert prompt.index(f"<{fence[1]}>") < prompt.index(FAST) < prompt.index(f"</{fence[1]}>") < prompt.index(SPEED)
    (passage,) = re.findall(rf"<{fence[1]}>\n(.*)\n</{fence[1]}>", prompt, re.DOTALL)
    guessed = fence_word(passage, b"")
    assert fence[1] != f"sources {guessed}", "The word is made with a secret of the service."


async def test_an_invented_number_is_dropped_and_the_right_one_put_in(api, tgi):
    tgi.script(words(f"{FAST} [9]."))
    answer = await api.answer(SPEED)
    assert content(answer) == f"{FAST} [1]."


@pytest.mark.parametrize(
    ("fallback", "status", "text"),
    [("extract", "replaced", f"{FAST} [1]."), ("abstain", "abstained", ABSTENTION), ("keep", "answered", WRONG)],
)
async def test_an_unsupported_answer_is_replaced_withheld_or_kept_as_asked(api, tgi, fallback, status, text):
    tgi.script(words(WRONG))
    answer = await api.answer(SPEED, retrieval={"fallback": fallback})
    assert content(answer) == text
    assert (answer["verdict"]["status"], answer["verdict"]["reason"]) == (status, "unsupported_answer")
    assert answer["verdict"]["abstained"] is (status == "abstained")
    assert [each["quote"] for each in answer["citations"]] == ([f"{FAST}."] if fallback == "extract" else [])
    assert (await _record_of(api, answer["id"]))["verdict"] == f"{status}:unsupported_answer"


async def test_a_sentence_is_sent_as_soon_as_it_is_complete(api, tgi):
    gate = asyncio.Event()
    tgi.script(Tokens(FAST, ". ", "It holds ", "1.7 litres.", gates={3: gate}))
    async with api.streaming(SPEED) as (stream, events):
        async for _ in events:
            if stream.text:
                break
        assert stream.text.strip() == f"{FAST} [1]."
        gate.set()
        async for _ in events:
            pass
    assert stream.done


async def test_raw_tokens_pass_at_once_and_their_citations_come_at_the_end(api, tgi):
    gate = asyncio.Event()
    tgi.script(Tokens("The Aurora", " kettle boils one litre in 90 seconds [1]", ".", gates={1: gate}))
    async with api.streaming(SPEED, retrieval={"check": "end"}) as (stream, events):
        async for _ in events:
            if stream.text:
                break
        assert stream.text == "The Aurora"
        assert not stream.evidence
        gate.set()
        async for _ in events:
            pass
    assert stream.text == f"{FAST} [1]."
    assert stream.done
    (citation,) = stream.evidence["citations"]
    assert citation["quote"] == f"{FAST}."
    (annotation,) = stream.annotations
    span = annotation["url_citation"]
    assert stream.text[span["start_index"] : span["end_index"]] == "[1]"


async def test_nothing_is_checked_when_the_request_says_so(api, tgi):
    tgi.script(words(WRONG))
    answer = await api.answer(SPEED, retrieval={"check": "off"})
    assert (content(answer), answer["retrieval"], answer["citations"]) == (WRONG, "used", [])


TEXTS = st.lists(
    st.sampled_from(
        [
            f"{FAST}.",
            f"{FAST} [1].",
            f"{FAST} [2][1].",
            f"{FAST} [9].",
            "It holds 1.7 litres [1, 2] and weighs 1200 grams [3].",
            "Descale the Aurora kettle every 30 days with citric acid【2†source】.",
            "The warranty of the Aurora kettle lasts 24 months [[1]](https://evil.example/x).",
            "According to [1], the kettle boils one litre in 90 seconds.",
            "It boils one litre in 45 seconds [1].",
            WRONG,
            "Use `items[1]` for that.",
            "```\nitems[1] = [2]\n```\n",
            "[", "]", "[1", "[1]", "1]", "[0]", "[12]", "[-1]", "[1-3]", "[a](b)", "🫖", "\n\n", "- ", "…", "See:",
        ]
    )
    | st.text(alphabet="[]12349,-( )\n.ä🫖`", min_size=1, max_size=12),
    min_size=1,
    max_size=6,
).map(" ".join)  # fmt: skip


@examples(50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, cuts=st.sets(st.integers(1, 200), max_size=12), check=st.sampled_from(["sentence", "end"]))
async def test_whatever_an_engine_writes_every_citation_was_retrieved_and_streams_say_the_same(
    api, tgi, text, cuts, check
):
    options = {"retrieval": {"check": check, "top_k": 3}}
    tgi.script(Tokens(text))
    answer = await api.answer(SPEED, **options)
    record = await _record_of(api, answer["id"])
    message = answer["choices"][0]["message"]
    assert record["answer"] == message["content"]
    await _assert_evidence_holds(api, message["content"], answer["citations"], message.get("annotations", []), record)
    numbers = {each["n"] for each in answer["citations"]}
    if check == "sentence":
        assert numbers == set(range(1, len(numbers) + 1))
        for annotation in message.get("annotations", []):
            span = annotation["url_citation"]
            marker = message["content"][span["start_index"] : span["end_index"]]
            assert marker == "" or re.fullmatch(r"\[\d+\]", marker)
    else:
        assert message["content"] == LinkFilter([KETTLE, TOASTER]).whole(text)

    ends = sorted({cut for cut in cuts if cut < len(text)} | {len(text)})
    tgi.script(Tokens(*(text[start:end] for start, end in zip([0, *ends], ends, strict=False))))
    stream = await api.stream(SPEED, **options)
    assert stream.done
    assert stream.text == message["content"]
    assert stream.evidence["citations"] == answer["citations"]
    assert stream.evidence["verdict"] == answer["verdict"]
    assert stream.annotations == message.get("annotations", [])


# --- How citations are written.


def _shown_by_open_webui(stream: Any) -> list[str]:
    """The source that Open WebUI shows for [1], [2], ...: the unique `metadata.source`s in the order they arrive."""
    shown: list[str] = []
    for chunk in stream.chunks:
        if "event" in chunk:
            assert chunk["event"]["type"] == "source"
            data = chunk["event"]["data"]
            assert "type" not in data  # It would be taken for a code execution.
            assert len(data["document"]) == len(data["metadata"]) == len(data["distances"])
            shown += [each["source"] for each in data["metadata"] if each["source"] not in shown]
    return shown


BOTH = f"Descale it every 30 days with citric acid. {FAST}. Its warranty lasts 24 months from the date of purchase."
ALL = "How long is the warranty of the Aurora kettle, how often to descale it, and how fast does it boil one litre?"


@pytest.mark.parametrize("told_by", ["style", "header"])
async def test_open_webui_shows_the_right_source_for_every_number(api, tgi, told_by):
    tgi.script(words(BOTH))
    options = {"retrieval": {"style": "openwebui"}} if told_by == "style" else {}
    if told_by == "header":
        api.client.headers["x-openwebui-chat-id"] = "chat-7"
    try:
        stream = await api.stream(ALL, **options)
    finally:
        api.client.headers.pop("x-openwebui-chat-id", None)
    shown = _shown_by_open_webui(stream)
    assert len(shown) >= 2
    assert {int(n) for n in re.findall(r"\[(\d)\]", stream.text)} == set(range(1, len(shown) + 1))
    for citation in stream.evidence["citations"]:
        assert shown[citation["n"] - 1] == citation["url"]
    assert not stream.annotations  # With both, the page would count every source twice.
    record = await _record_of(api, stream.response.headers["x-prediction-id"])
    assert record["conversation"] == ("chat-7" if told_by == "header" else None)


async def test_open_webui_shows_the_right_source_for_the_engine_s_own_numbers(api, tgi):
    first = await api.answer(ALL)
    given = (await _record_of(api, first["id"]))["passages"]
    (n,) = [
        i
        for i, passage in enumerate(given, start=1)
        if "every 30 days" in (await api.source(passage["document_id"]))[passage["start"] : passage["end"]]
    ]
    tgi.script(words(f"Descale the Aurora kettle every 30 days with citric acid [{n}]."))
    stream = await api.stream(ALL, retrieval={"style": "openwebui", "check": "end"})
    shown = _shown_by_open_webui(stream)
    (citation,) = stream.evidence["citations"]
    assert citation["n"] == n
    assert shown[n - 1] == citation["url"]


async def test_markdown_citations_are_links_that_open(api, tgi):
    tgi.script(words(f"{FAST}."))
    stream = await api.stream(SPEED, retrieval={"style": "markdown"})
    found = re.fullmatch(rf"{FAST} \[\[1\]\]\((http\S+)\)\.", stream.text)
    assert found
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as anybody:
        assert (await anybody.get(found[1])).status_code == 200


# --- Links.


@pytest.fixture
async def url(owner, tgi) -> str:
    tgi.script(words(f"{FAST}."))
    return str((await owner.answer(SPEED))["citations"][0]["url"])


@pytest.fixture
async def anybody() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as client:
        yield client


async def test_a_citation_opens_without_a_key_as_json_and_in_a_browser(anybody, url):
    passage = (await anybody.get(url)).json()
    assert FAST in passage["text"]
    page = await anybody.get(url, headers={"accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/plain")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert FAST in page.text


@pytest.mark.parametrize(
    ("what", "replacement"),
    [
        (r"signature=.", "signature=z"),
        (r"&signature=.*", ""),
        (r"&signature=.*", "&signature="),
        (r"passages/\d+", "passages/2"),
        (r"passages/\d+", ""),
        (r"/passages/\d+", "/source"),
        (r"tenant=[\w-]+", "tenant=default"),
        (r"version=[0-9a-f]+", "version=" + "0" * 16),
        (r"\?", "?tenant=default&"),
    ],
)
async def test_a_link_opens_nothing_but_its_own_passage(anybody, url, what, replacement):
    changed = re.sub(what, replacement, url, count=1)
    if changed == url:  # The passage was number 2 to begin with.
        changed = re.sub(what, "passages/1", url, count=1)
    response = await anybody.get(changed)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


async def test_a_link_changes_nothing(anybody, url):
    assert (await anybody.delete(url)).status_code == 401
    assert (await anybody.get(url)).status_code == 200


async def test_a_link_is_gone_with_the_version_it_quotes(owner, anybody, url):
    await owner.add("kettle.md", KETTLE.replace("90 seconds", "80 seconds"))
    response = await anybody.get(url)
    assert (response.status_code, response.json()["error"]["code"]) == (410, "gone")
    await owner.add("kettle.md", KETTLE)
    assert (await anybody.get(url)).status_code == 200
    document_id = re.findall(r"documents/([^/]+)/", url)[0]
    assert (await owner.client.delete(f"/v1/documents/{document_id}")).status_code == 200
    assert (await anybody.get(url)).status_code == 404


# --- What is searched.


async def test_a_follow_up_is_searched_in_the_context_of_the_conversation(api, tgi):
    turns = [
        {"role": "user", "content": "How fast does the Aurora kettle boil?"},
        {"role": "assistant", "content": "In 90 seconds."},
        {"role": "user", "content": "And how long is its warranty?"},
    ]
    tgi.script(words("Its warranty lasts 24 months from the date of purchase."))
    answer = await api.answer(turns)
    assert content(answer) == "Its warranty lasts 24 months from the date of purchase [1]."
    assert answer["citations"][0]["document_name"] == "kettle.md"
    (body,) = tgi.bodies
    assert body["messages"][:2] == turns[:2]
    assert "Question: And how long is its warranty?" in body["messages"][2]["content"]


async def test_a_filter_limits_what_is_found(api, tgi):
    answer = await api.answer("How long does the warranty last?", retrieval={"filter": {"kind": "toaster"}})
    record = await _record_of(api, answer["id"])
    toaster = [each for each in (await api.client.get("/v1/documents")).json()["data"] if each["name"] == "toaster.md"]
    assert {passage["document_id"] for passage in record["passages"]} == {toaster[0]["id"]}


async def test_a_filter_that_nothing_passes_is_an_abstention_and_asks_no_engine(api, tgi):
    answer = await api.answer(SPEED, retrieval={"filter": {"kind": "fridge"}})
    assert (content(answer), answer["retrieval"]) == (ABSTENTION, "irrelevant")
    assert tgi.bodies == []


async def test_a_filter_of_an_unknown_form_is_a_400_that_names_it(api, tgi):
    response = await api.ask(SPEED, retrieval={"filter": {"kind": {"$gt": 1}}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "retrieval.filter")
    assert tgi.bodies == []


@pytest.mark.parametrize("top_k", [1, 2])
async def test_top_k_bounds_what_is_found_and_shown(api, tgi, top_k):
    answer = await api.answer(SPEED, retrieval={"top_k": top_k})
    assert len((await _record_of(api, answer["id"]))["passages"]) == top_k


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_relevant_is_an_abstention_and_asks_no_engine(api, tgi, stream):
    asked = "Who won the football final in Madrid yesterday?"
    if stream:
        streamed = await api.stream(asked)
        text, evidence, prediction_id = streamed.text, streamed.evidence, streamed.response.headers["x-prediction-id"]
        assert (streamed.done, streamed.finish_reason) == (True, "stop")
    else:
        evidence = await api.answer(asked)
        text, prediction_id = content(evidence), evidence["id"]
    assert text == ABSTENTION
    assert (evidence["retrieval"], evidence["citations"]) == ("irrelevant", [])
    assert (evidence["verdict"]["status"], evidence["verdict"]["reason"]) == ("abstained", "nothing_relevant")
    assert tgi.bodies == []
    record = await _record_of(api, prediction_id)
    assert (record["outcome"], record["verdict"]) == ("finished", "abstained:nothing_relevant")


async def test_without_documents_it_is_a_plain_chat(nobody, tgi):
    tgi.script(words(WRONG))
    answer = await nobody.answer(SPEED)
    assert (content(answer), answer["retrieval"], answer["citations"]) == (WRONG, "empty", [])
    assert tgi.bodies[0]["messages"] == [{"role": "user", "content": SPEED}]


async def test_without_documents_required_retrieval_abstains(nobody, tgi):
    answer = await nobody.answer(SPEED, retrieval={"mode": "required"})
    assert (content(answer), answer["retrieval"]) == (ABSTENTION, "irrelevant")
    assert tgi.bodies == []


async def test_nobody_is_shown_another_tenant_s_passages(api, nobody, tgi):
    assert (await api.answer(SPEED))["retrieval"] == "used"
    assert (await nobody.answer(SPEED))["retrieval"] == "empty"
    assert (await nobody.client.post("/v1/search", json={"query": SPEED})).json()["hits"] == []


async def test_retrieval_off_leaves_the_answer_and_the_prompt_alone(api, tgi):
    tgi.script(words(WRONG))
    answer = await api.answer(SPEED, retrieval={"mode": "off"})
    assert content(answer) == WRONG
    assert not {"retrieval", "citations", "verdict"} & set(answer)
    assert tgi.bodies[0]["messages"] == [{"role": "user", "content": SPEED}]


# --- The index is down.


class SearchThatIsDown:
    async def search(
        self, scope: Scope, query: str, *, top_k: int = 5, mode: SearchMode = "hybrid", **_: Any
    ) -> SearchResult:
        raise IndexUnavailable("the index is down")

    async def similarity(self, text: str, texts: list[str]) -> list[float]:
        raise IndexUnavailable("the embedder is down")


@pytest.mark.parametrize("stream", [False, True])
async def test_without_its_index_auto_answers_and_says_so_and_required_refuses(tmp_path, stream):
    async with FakeTGI() as tgi, live_gateway(tmp_path, engine_url=tgi.url, search=SearchThatIsDown()) as live:
        if stream:
            streamed = await live.api.stream(SPEED)
            assert streamed.done
            text, evidence = streamed.text, streamed.evidence
        else:
            evidence = await live.api.answer(SPEED)
            text = content(evidence)
        assert text == "Hello world."
        assert (evidence["retrieval"], evidence["citations"]) == ("unavailable", [])
        assert tgi.bodies[0]["messages"] == [{"role": "user", "content": SPEED}]

        response = await live.api.ask(SPEED, stream=stream, retrieval={"mode": "required"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "retrieval_unavailable")
        assert "retry-after" in response.headers
        assert len(tgi.bodies) == 1
        refused, answered = await live.records(2)
        assert (refused.outcome, refused.error_code) == ("failed", "retrieval_unavailable")
        assert (answered.outcome, answered.retrieval_outcome) == ("finished", "unavailable")


# --- What is kept of them.


async def test_a_quote_is_kept_redacted_like_the_answer_that_it_is_in_and_still_verifies(nobody, tgi):
    told = "The support desk of Aurora is reached by mail at desk@example.com"
    await nobody.add("support.md", f"# Support\n\n{told}.\n", kind="support")
    tgi.script(words(f"{told}."))
    body = nobody.body("How is the support desk of Aurora reached by mail?")
    answer = (await nobody.client.post(CHAT, json=body, headers={"x-hallmark-keep": "redacted"})).json()
    assert [each["quote"] for each in answer["citations"]] == [f"{told}."]
    kept = (await nobody.client.get(f"/v1/predictions/{answer['id']}")).json()
    assert kept["kept"] == "redacted"
    assert [each["quote"] for each in kept["citations"]] == [f"{told}.".replace("desk@example.com", "[email]")]
    assert "desk@" not in str(kept)
    trace = (await nobody.client.get(f"/v1/predictions/{answer['id']}/lineage")).json()
    assert [each["verified"] for each in trace["documents"]] == [True]
