"""Texts are rated by how likely they answer a question, beside the answers that are being written."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from app.engines.local.model import LoadedModel
from app.engines.local.reader import Head, Reader
from tests.app.engines.local.tiny_engine import chat, running_service, until

LAYER = 1
QUESTION = "What jumps?"
TEXTS = ["The fox jumps.", "Köln", "The lazy dog of the user is quick, and brown as a fox over there.", "日本語"]


@pytest.fixture(scope="module")
def head() -> Head:
    torch.manual_seed(3)
    return Head("tiny-llama", "r1", LAYER, (torch.randn(64) / 4).tolist(), 0.1)


@pytest.fixture(scope="module")
def reading(tiny: LoadedModel, head: Head) -> Iterator[httpx.Client]:
    with running_service(tiny, reader=Reader(tiny, head)) as client:
        yield client


def rated(client: httpx.Client, texts: list[str] = TEXTS, **fields: Any) -> dict[int, float]:
    response = client.post("/v1/rerank", json={"query": QUESTION, "documents": texts, **fields})
    assert response.status_code == 200, response.text
    return {each["index"]: each["relevance_score"] for each in response.json()["results"]}


def test_every_text_is_rated_and_the_likeliest_comes_first(reading: httpx.Client) -> None:
    scores = rated(reading)
    assert sorted(scores) == list(range(len(TEXTS)))
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert all(0 < score < 1 for score in scores.values())
    assert len(set(scores.values())) == len(TEXTS)
    best = next(iter(scores))
    assert rated(reading, top_n=1) == {best: pytest.approx(scores[best])}


def test_a_rating_is_the_head_s_view_of_the_state_after_the_question(tiny: LoadedModel, head: Head) -> None:
    reader = Reader(tiny, head)
    prompts = [reader.prompt(QUESTION, text) for text in TEXTS]
    assert tiny.vocabulary.decode(prompts[0]) == f"{TEXTS[0]}\n\nQuestion: {QUESTION}\nAnswer:"
    expected = []
    with torch.inference_mode():
        for prompt in prompts:
            states = tiny.model.model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
            state = states[LAYER][0, -1].float()
            expected.append(float(torch.sigmoid(state @ torch.tensor(head.weights) + head.bias)))
        assert reader.rate(prompts) == pytest.approx(expected, abs=1e-4)
        # The layers are shared and none of them is gone: the model itself is as it was.
        assert len(tiny.model.model.layers) == 2


def test_a_rating_does_not_depend_on_the_other_texts(reading: httpx.Client) -> None:
    together = rated(reading, TEXTS * 10)
    for index, text in enumerate(TEXTS):
        alone = rated(reading, [text])[0]
        assert [together[index + len(TEXTS) * n] for n in range(10)] == pytest.approx([alone] * 10, abs=1e-4)


def test_a_very_long_text_is_read_from_its_start(reading: httpx.Client) -> None:
    assert rated(reading, ["fox " * 5_000]) == pytest.approx(rated(reading, ["fox " * 6_000]))


def test_texts_are_rated_while_an_answer_is_written(reading: httpx.Client) -> None:
    with reading.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=200)) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert len(rated(reading, TEXTS * 4)) == 16
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_many_callers_get_their_own_ratings(reading: httpx.Client) -> None:
    alone = {text: rated(reading, [text])[0] for text in TEXTS}
    got: dict[int, float] = {}

    def ask(n: int) -> None:
        got[n] = rated(reading, [TEXTS[n % len(TEXTS)]])[0]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert got == {n: pytest.approx(alone[TEXTS[n % len(TEXTS)]], abs=1e-4) for n in range(12)}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"documents": TEXTS}, 422),
        ({"query": "", "documents": TEXTS}, 422),
        ({"query": QUESTION, "documents": []}, 422),
        ({"query": QUESTION, "documents": ["a"] * 65}, 422),
        ({"query": QUESTION, "documents": TEXTS, "top_n": -1}, 422),
    ],
)
def test_a_bad_body_is_refused(reading: httpx.Client, body: dict[str, Any], status: int) -> None:
    response = reading.post("/v1/rerank", json=body)
    assert (response.status_code, response.json()["error_type"]) == (status, "validation")


def test_a_model_without_a_head_says_so(engine: httpx.Client, tiny: LoadedModel) -> None:
    assert Reader.of(tiny) is None
    response = engine.post("/v1/rerank", json={"query": QUESTION, "documents": TEXTS})
    assert (response.status_code, response.json()["error_type"]) == (501, "unsupported")
    assert "tiny-llama" in response.json()["error"]


def test_who_leaves_is_not_worked_for_and_makes_room(tiny: LoadedModel, head: Head) -> None:
    with running_service(tiny, reader=Reader(tiny, head), max_batch=1, max_queue=0) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/rerank", json={"query": QUESTION, "documents": ["fox " * 500] * 64}, timeout=0.05)
        until(lambda: client.post("/v1/rerank", json={"query": QUESTION, "documents": TEXTS}).status_code == 200)
