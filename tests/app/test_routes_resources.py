"""Search, models, embeddings, predictions and identity over HTTP."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.fake_tgi import FakeTGI
from tests.service import NO_TLS, Api, Service, live_service

GOLD = "A hallmark is a stamp on gold that says who made it."
TEA = "Green tea is brewed at eighty degrees for two minutes."


@pytest.fixture(scope="module")
async def service(tmp_path_factory) -> AsyncIterator[Service]:
    async with (
        FakeTGI() as tgi,
        live_service(tmp_path_factory.mktemp("resources"), engine_url=tgi.url, tenants=60) as service,
    ):
        yield service


@pytest.fixture
async def api(service: Service) -> AsyncIterator[Api]:
    async with service.tenant() as api:
        yield api


@pytest.fixture(scope="module")
async def library(service: Service) -> AsyncIterator[Api]:
    """A tenant with documents, which no test changes."""
    async with service.tenant() as api:
        await api.add("gold.txt", GOLD, topic="metal", year=1478, draft=False)
        await api.add("tea.txt", TEA, topic="tea", year=2024, draft=True)
        await api.add("silver.txt", "A sterling mark says that silver is 92.5 percent pure.", topic="metal", year=1544)
        yield api


async def search(api: Api, **body: Any) -> httpx.Response:
    return await api.client.post("/v1/search", json=body)


def names(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [hit["passage"]["document_name"] for hit in response.json()["hits"]]


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    return str(error["message"])


# --- search ---


async def test_a_hit_shows_what_each_leg_thought_of_it(library):
    found = (await search(library, query="hallmark stamp on gold")).json()
    hit = found["hits"][0]
    assert hit["passage"]["text"] == GOLD
    assert (hit["dense_rank"], hit["sparse_rank"]) == (1, 1)
    assert -1 <= hit["dense_score"] <= 1
    assert hit["sparse_score"] > 0
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert found["index_version"].startswith("hashing-d64")
    assert found["embed_seconds"] >= 0
    assert found["search_seconds"] > 0
    # Words that a passage does not have leave it to the other leg.
    assert {hit["sparse_rank"] for hit in found["hits"] if hit["passage"]["document_name"] == "tea.txt"} <= {None}


@pytest.mark.parametrize(("mode", "silent"), [("dense", "sparse"), ("sparse", "dense")])
async def test_one_leg_alone_says_nothing_of_the_other(library, mode, silent):
    hit = (await search(library, query="hallmark gold", mode=mode)).json()["hits"][0]
    assert hit["passage"]["document_name"] == "gold.txt"
    assert hit[f"{mode}_rank"] == 1
    assert hit[f"{silent}_rank"] is hit[f"{silent}_score"] is None


async def test_a_hit_s_url_opens_its_passage(library):
    hit = (await search(library, query="hallmark gold")).json()["hits"][0]
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as browser:
        assert (await browser.get(hit["url"])).json() == hit["passage"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"topic": "tea"}, {"tea.txt"}),
        ({"topic": ["tea", "metal"]}, {"tea.txt", "gold.txt", "silver.txt"}),
        ({"topic": "metal", "year": 1478}, {"gold.txt"}),
        ({"year": 1478.0}, {"gold.txt"}),
        ({"draft": True}, {"tea.txt"}),
        ({"year": "1478"}, set()),
        ({"nothing": 1}, set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # The same in every process.
)
async def test_a_filter_keeps_what_has_the_facts(library, condition, expected):
    found = names(await search(library, query="hallmark tea silver", filter=condition, mode="dense", top_k=10))
    assert set(found) == expected


@pytest.mark.parametrize(
    ("condition", "param"),
    [
        ({"a": {"b": 1}}, "filter.a"),
        ({"a": None}, "filter.a"),
        ({"a": []}, "filter.a"),
        ({"a": ["x"] * 101}, "filter.a"),
        ({"a": [["x"]]}, "filter.a"),
        ({"": 1}, "filter."),
        ("topic", "filter"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_filter_of_another_form_is_refused_by_name(library, condition, param):
    assert "`filter" in refused(await search(library, query="x", filter=condition), 400, "invalid_request", param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "query"),
        ({"query": ""}, "query"),
        ({"query": "x" * 8_193}, "query"),
        ({"query": ["x"]}, "query"),
        ({"query": "x", "top_k": 0}, "top_k"),
        ({"query": "x", "top_k": 101}, "top_k"),
        ({"query": "x", "top_k": 10**30}, "top_k"),
        ({"query": "x", "top_k": True}, "top_k"),
        ({"query": "x", "mode": "fuzzy"}, "mode"),
        ({"query": "x", "tenant": "other"}, "tenant"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_wrong_field_of_a_search_is_named(library, body, param):
    assert f"`{param}`" in refused(await search(library, **body), 400, "invalid_request", param)


@pytest.mark.parametrize(
    "part", ['"query": "\\ud800"', '"query": "x", "filter": {"a": "\\ud800"}'], ids=["query", "filter"]
)
async def test_half_a_surrogate_pair_is_refused(library, part):
    headers = {"content-type": "application/json"}
    response = await library.client.post("/v1/search", content=f"{{{part}}}".encode(), headers=headers)
    refused(response, 400, "invalid_request", "filter.a" if "filter" in part else "query")


async def test_an_endless_field_name_is_told_in_part(library):
    message = refused(await search(library, query="x", **{"y" * 5_000: 1}), 400, "invalid_request", "y" * 256)
    assert len(message) <= 2_000


async def test_a_field_name_that_cannot_be_sent_back_is_refused(library):
    headers = {"content-type": "application/json"}
    for body in (b'{"query": "x", "\\ud800": 1}', b'{"query": "x", "filter": {"\\ud800": 1}}'):
        response = await library.client.post("/v1/search", content=body, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_request"


async def test_odd_questions_are_answered(library):
    for query in ("\0", "   ", "🫖" * 2_000, "' OR 1=1 --", "{}[]^~*?:\\/"):
        assert (await search(library, query=query)).status_code == 200


async def test_a_tenant_without_documents_finds_nothing(api):
    assert names(await search(api, query="hallmark gold")) == []


# --- models and embeddings ---


async def test_a_release_answers_to_its_name_and_to_its_label(api):
    (listed,) = (await api.client.get("/v1/models")).json()["data"]
    assert (listed["id"], listed["release"], listed["object"]) == ("hallmark", "hallmark@1", "model")
    assert len(listed["digest"]) == 64
    for name in ("hallmark", "hallmark@1"):
        assert (await api.client.get(f"/v1/models/{name}")).json() == {**listed, "id": name}


@pytest.mark.parametrize("name", ["gpt-4", "hallmark@2", "%00", "%ff", "Hallmark"])
async def test_an_unknown_release_is_not_found_and_the_known_ones_are_named(api, name):
    message = refused(await api.client.get(f"/v1/models/{name}"), 404, "model_not_found", "model")
    assert "'hallmark'" in message


@pytest.mark.parametrize("model", ["hashing", "all-minilm-l6-v2"])
async def test_embeddings_answer_with_the_name_asked_for(api, model):
    body = {"model": model, "input": ["a stamp", "on gold, twice"]}
    answer = (await api.client.post("/v1/embeddings", json=body)).json()
    assert (answer["model"], answer["object"]) == (model, "list")
    assert [(each["index"], len(each["embedding"])) for each in answer["data"]] == [(0, 64), (1, 64)]
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}


@pytest.mark.parametrize(
    "texts",
    ["", [], [""], ["x"] * 257, "x" * 100_001, [1, 2], [[1, 2]], None, {"a": 1}],
    ids=["empty", "none", "an empty one", "257", "long", "token ids", "lists of token ids", "null", "object"],
)
async def test_embeddings_refuse_what_they_cannot_take(api, texts):
    response = await api.client.post("/v1/embeddings", json={"model": "hashing", "input": texts})
    assert refused(response, 400, "invalid_request", response.json()["error"]["param"]).startswith("`input")


async def test_embeddings_without_a_wish_are_plain_numbers(api):
    body = {"model": "hashing", "input": "a stamp"}
    plain, null = [
        (await api.client.post("/v1/embeddings", json=each)).json()["data"][0]["embedding"]
        for each in (body, {**body, "encoding_format": None})
    ]
    assert isinstance(plain, list)
    assert null == plain


async def test_as_many_embeddings_as_the_limit_says_are_made(api):
    response = await api.client.post("/v1/embeddings", json={"model": "hashing", "input": ["x"] * 256})
    assert len(response.json()["data"]) == 256


# --- predictions ---


async def test_a_prediction_says_what_was_asked_of_what_and_what_came_of_it(library):
    asked_at = datetime.now(UTC)
    answer = await library.answer("What is a hallmark?", metadata={"ticket": 7}, user="ada")
    record = (await library.client.get(f"/v1/predictions/{answer['id']}")).json()
    assert record["id"] == answer["id"]
    assert abs(datetime.fromisoformat(record["created_at"]) - asked_at) < timedelta(seconds=5)
    assert (record["outcome"], record["tenant"], record["user"]) == ("finished", library.name, "ada")
    assert (record["release_name"], record["release_digest"]) == ("hallmark@1", answer["system_fingerprint"])
    assert record["request"]["messages"][0]["content"] == "What is a hallmark?"
    assert record["metadata"] == {"ticket": 7}
    assert {passage["id"] for passage in record["passages"]}
    assert record["answer"] == answer["choices"][0]["message"]["content"]
    assert record["total_seconds"] >= record["retrieve_seconds"] > 0


async def test_without_store_the_record_has_no_content(library):
    answer = await library.answer("What is a hallmark?", store=False)
    record = (await library.client.get(f"/v1/predictions/{answer['id']}")).json()
    assert record["outcome"] == "finished"
    for field in ("request", "messages", "question", "answer"):
        assert record[field] is None


async def test_predictions_are_listed_in_pages_newest_first(api):
    ids = [(await api.answer(f"Question {n}?"))["id"] for n in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = (await api.client.get("/v1/predictions", params=query)).json()
        seen += [row["id"] for row in page["data"]]
        if page["next"] is None:
            break
        query["before"] = page["next"]
    assert seen == ids[::-1]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "before=x", "before=%00"])
async def test_a_wrong_page_of_predictions_is_refused(api, query):
    refused(await api.client.get(f"/v1/predictions?{query}"), 400, "invalid_request", query.partition("=")[0])


async def test_what_is_no_prediction_is_not_found(api):
    refused(await api.client.get("/v1/predictions/x"), 400, "invalid_request", "prediction_id")
    unknown = "01900000-0000-7000-8000-000000000000"
    assert unknown in refused(await api.client.get(f"/v1/predictions/{unknown}"), 404, "not_found")


# --- identity ---


async def test_a_key_is_told_whose_it_is(service):
    key = await service.new_key(tenant="acme", scopes=("chat", "metrics"))
    async with service.client(key) as client:
        me = (await client.get("/v1/me")).json()
    assert me == {
        "key_id": key.split("_")[1],
        "name": "test",
        "tenant": "acme",
        "groups": [],
        "user": None,
        "scopes": ["chat", "metrics"],
        "priority": "normal",
        "requests_per_minute": None,
        "tokens_per_minute": None,
    }
