"""Evaluation over HTTP: what is sent, what is counted, and what ends it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.asking import ask_all
from finetune.compare import compare
from finetune.dataset import read_dataset
from finetune.errors import BadConfig, BadDataset, Unreachable
from finetune.evaluate import evaluate
from finetune.evaluations import Arm, EvaluateConfig, load_evaluation, read_results
from finetune.probe import probe
from tests.finetune.conftest import class_row, preference_row
from tests.finetune.openai_stub import Act, completion, openai_stub

Write = Callable[..., Path]


def serves(act: Act) -> Any:
    return openai_stub(act)


def knows(share: int) -> Act:
    """Answer right for all but each `share`-th ticket; the model `base` never does."""

    def act(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        n = int(body["messages"][-1]["content"].split()[-1])
        right = body["model"] != "base" and n % share
        return completion("red" if (n % 2 == 0) == bool(right) else "blue")

    return act


def tickets(count: int) -> list[dict[str, Any]]:
    return [class_row(n, ("red", "blue")[n % 2], slice=("red", "blue")[n % 2]) for n in range(count)]


def test_two_arms_are_measured_on_the_same_rows_and_compared(write: Write, tmp_path: Path) -> None:
    folder = write(heldout=tickets(40))
    with serves(knows(10)) as (url, seen):
        arms = (Arm(name="base", model="base", url=url), Arm(name="tuned", model="tuned", url=url, retrieval="off"))
        config = EvaluateConfig(dataset=folder, output=tmp_path / "out", arms=arms)
        found = evaluate(config, key="secret")
    base, tuned = found.arms
    assert (base.figures["score"].value, tuned.figures["score"].value) == (0, 0.9)
    assert tuned.figures["score"].low < 0.9 < tuned.figures["score"].high
    assert tuned.figures["macro_f1"].value == pytest.approx(0.9, abs=0.02)
    assert tuned.slices.keys() == {"red", "blue"}
    assert tuned.releases == ("digest-1",)
    assert tuned.tokens == {"prompt": 10, "completion": 2}
    (comparison,) = found.comparisons
    assert (comparison.arm, comparison.against) == ("tuned", "base")
    assert comparison.difference.low > 0.5
    assert {body["authorization"] for body in seen} == {"Bearer secret"}
    assert [body.get("retrieval") for body in seen if body["model"] == "tuned"] == [{"mode": "off"}] * 40
    assert all("retrieval" not in body and body["temperature"] == 0 for body in seen if body["model"] == "base")
    again, facts = read_results(tmp_path / "out")
    assert again == found
    assert len(facts) == 40
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| tuned | 90.0% (" in report
    assert (tmp_path / "out" / "arms.png").read_bytes().startswith(b"\x89PNG")
    answers = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert json.loads(answers[0])["arm"] == "base"


@pytest.mark.parametrize(("rows", "told"), [(40, True), (12, False)])
def test_an_average_over_classes_has_an_interval_only_where_each_has_rows_enough(
    rows: int, told: bool, write: Write, tmp_path: Path
) -> None:
    folder = write(heldout=tickets(rows))
    with serves(knows(10)) as (url, _):
        config = EvaluateConfig(dataset=folder, output=tmp_path / "o", arms=(Arm(name="a", model="tuned", url=url),))
        found = evaluate(config).arms[0].figures["macro_f1"]
    assert ((found.low, found.high) != (0, 1)) == told
    assert found.low < found.value < found.high


def test_four_arms_are_base_and_adapter_with_and_without_retrieval(write: Write, tmp_path: Path) -> None:
    row = {"task": "answer", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "50 MB"}],
           "passages": [{"id": "d/1", "document_id": "d", "text": "Up to 50 MB."}], "citations": ["d/1"]}  # fmt: skip
    unanswerable = {
        **row,
        "answerable": False,
        "citations": [],
        "messages": [*row["messages"][:1], {"role": "assistant", "content": "I don't know."}],
    }
    write(
        heldout=[{**row, "n": n} for n in range(20)] + [{**unanswerable, "n": n} for n in range(20)],
        task="answer",
        labels=[],
    )

    def act(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        if body["retrieval"]["mode"] == "off":
            return completion("Maybe 3 GB.")
        citations = [
            {"document_id": "d", "passage": 1, "quote": "Up to 50 MB."},
            {"document_id": "d", "passage": 7, "quote": "x"},
        ]
        return completion("50 MB [1]", citations=citations, verdict={"abstained": False})

    with serves(act) as (url, _):
        file = tmp_path / "evaluation.toml"
        file.write_text(
            f'dataset = "dataset"\noutput = "out"\nurl = "{url}"\n[four]\nbase = "base@1"\nadapter = "tuned@1"'
        )
        found = evaluate(load_evaluation(file, {}))
    assert [arm.name for arm in found.arms] == ["base", "base + retrieval", "adapter", "adapter + retrieval"]
    with_retrieval = found.arms[3].figures
    assert with_retrieval["score"].value == 0.5
    assert with_retrieval["citation_precision"].value == 0.25  # One of two is right, for the half with an answer.
    assert with_retrieval["citation_recall"].value == 1
    assert (with_retrieval["abstained_right"].value, with_retrieval["abstained_wrong"].value) == (0, 0)
    assert found.arms[0].figures["citation_precision"].value is None
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Retrieval on top of the adapter changes the score by +5" in report
    assert "The index: the adapter adds nothing" in report


def test_who_is_told_to_wait_waits_and_asks_again(write: Write) -> None:
    folder, told, waited = write(heldout=tickets(3)), iter([429, 503, 200, 200, 200]), list[float]()

    def act(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        status = next(told)
        return completion("red") if status == 200 else (status, {"error": {"code": "overloaded"}}, {"retry-after": "7"})

    answers = list(ask(folder, act, sleep=waited.append))
    assert [answer.failure for answer in answers] == [None] * 3
    assert waited == [7, 7]


def test_an_answer_that_does_not_come_is_counted_and_not_left_out(write: Write, tmp_path: Path) -> None:
    def act(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        if body["messages"][-1]["content"] == "Ticket 1":
            return 502, {"error": {"code": "unfit_answer", "message": "no label"}}, {}
        return completion("red")

    folder = write(heldout=tickets(4))
    with serves(act) as (url, _):
        config = EvaluateConfig(dataset=folder, output=tmp_path / "out", arms=(Arm(name="a", model="m", url=url),))
        (arm,) = evaluate(config).arms
    assert arm.failures == {"unfit_answer": 1}
    assert arm.figures["score"].value == 0.5
    assert arm.figures["score"].n == 4


@pytest.mark.parametrize(
    "garbage",
    [
        {"choices": []},
        {"choices": [{"message": {"content": [{"type": "text", "text": "red"}]}}]},
        {"choices": [{"message": {"content": "half of a character: \ud83d"}}]},
        {"choices": [{"message": {"content": "red"}}], "usage": "none"},
        {"choices": [{"message": {"content": "red"}}], "verdict": "good"},
        [1],
    ],
)
def test_garbage_is_a_failure(garbage: Any, write: Write, tmp_path: Path) -> None:
    def act(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        return (200, garbage, {}) if body["messages"][-1]["content"] == "Ticket 1" else completion("red")

    folder = write(heldout=tickets(3))
    with serves(act) as (url, _):
        config = EvaluateConfig(dataset=folder, output=tmp_path / "out", arms=(Arm(name="a", model="m", url=url),))
        (arm,) = evaluate(config).arms
    assert (arm.failures, arm.figures["score"].value) == ({"unreadable": 1}, pytest.approx(2 / 3))


def test_a_server_that_counts_no_tokens_is_measured_in_all_else(write: Write, tmp_path: Path) -> None:
    folder = write(heldout=tickets(2))
    with serves(lambda *_: completion("red", usage={"prompt_tokens": None})) as (url, _):
        config = EvaluateConfig(dataset=folder, output=tmp_path / "out", arms=(Arm(name="a", model="m", url=url),))
        (arm,) = evaluate(config).arms
    assert (arm.failures, arm.tokens) == ({}, {"prompt": 0, "completion": 0})


@pytest.mark.parametrize("status", [400, 422])
def test_a_row_that_is_refused_is_a_failure_of_its_own_also_where_it_is_the_first(write: Write, status: int) -> None:
    folder = write(heldout=tickets(8))
    first, *_, last = (row.asked[-1].content for row in read_dataset(folder).split("heldout"))
    refusal = (status, {"error": {"message": "9,012 tokens", "code": "context_length_exceeded"}}, {})

    def act(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        return refusal if body["messages"][-1]["content"] in (first, last) else completion("red")

    found = [answer.failure for answer in ask(folder, act)]
    assert found == ["context_length_exceeded", *[None] * 6, "context_length_exceeded"]


@pytest.mark.parametrize(("rows", "asked"), [(9, 3), (1, 1)])
def test_requests_that_are_all_refused_end_the_evaluation(write: Write, rows: int, asked: int) -> None:
    seen = list[dict[str, Any]]()

    def act(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        seen.append(body)
        return 422, {"error": {"message": "`choice` is not known."}}, {}

    with pytest.raises(Unreachable, match=r"refuses with 422: `choice` is not known\."):
        list(ask(write(heldout=tickets(rows)), act))
    assert len(seen) == asked


def test_an_evaluation_that_is_cut_off_leaves_its_answers_and_no_results(write: Write, tmp_path: Path) -> None:
    folder, out = write(heldout=tickets(4)), tmp_path / "out"
    with serves(lambda *_: completion("red")) as (url, _):
        config = EvaluateConfig(dataset=folder, output=out, arms=(Arm(name="a", model="m", url=url),))
        evaluate(config)
        (out / "report.md").unlink()
        (out / "report.md").mkdir()  # What ends the next one before it has written its results.
        (out / "answers.jsonl").unlink()
        with pytest.raises(OSError, match=r"report\.md"):
            evaluate(config)
    assert len((out / "answers.jsonl").read_text().splitlines()) == 4
    with pytest.raises(BadDataset, match="name a folder that `evaluate` wrote"):
        read_results(out)


def test_scores_of_another_evaluation_than_the_results_are_told(write: Write, tmp_path: Path) -> None:
    folder, out = write(heldout=tickets(4)), tmp_path / "out"
    with serves(lambda *_: completion("red")) as (url, _):
        evaluate(EvaluateConfig(dataset=folder, output=out, arms=(Arm(name="a", model="m", url=url),)))
    scores = out / "scores.jsonl"
    scores.write_bytes(scores.read_bytes().replace(b'"score":1.0', b'"score":0.0', 1))
    with pytest.raises(BadDataset, match=r"scores\.jsonl is not that of evaluation\.json; evaluate anew"):
        read_results(out)


def test_an_arm_may_have_any_name(write: Write, tmp_path: Path) -> None:
    folder = write(heldout=tickets(4))
    with serves(lambda *_: completion("red")) as (url, _):
        arms = (Arm(name=r"$\frac$", model="m", url=url, cost=1), Arm(name="tuned $5_$", model="n", url=url, cost=2))
        evaluate(EvaluateConfig(dataset=folder, output=tmp_path / "out", arms=arms))
    assert (tmp_path / "out" / "arms.png").read_bytes().startswith(b"\x89PNG")
    compare([tmp_path / "out"], tmp_path / "compared", margin=0.05)
    assert (tmp_path / "compared" / "recommendation.png").read_bytes().startswith(b"\x89PNG")


def test_a_key_that_is_refused_ends_the_evaluation_with_the_servers_words(write: Write) -> None:
    refused = (401, {"error": {"message": "The API key is unknown.", "code": "unauthorized"}}, {})
    with pytest.raises(Unreachable, match=r"a: .* refuses with 401: The API key is unknown\."):
        list(ask(write(heldout=tickets(9)), lambda *_: refused))


def test_a_server_that_is_not_there_is_told(write: Write) -> None:
    arm = Arm(name="a", model="m", url="http://127.0.0.1:9/v1")
    dataset = read_dataset(write(heldout=tickets(2)))
    with pytest.raises(Unreachable, match=r"does not answer .*; is it running\?"):
        list(ask_all(arm, dataset.split("heldout"), dataset.manifest, key=None, concurrency=2, sleep=lambda _: None))


def test_an_engine_that_is_asked_directly_is_given_the_prompt_and_the_labels(write: Write) -> None:
    seen = list[dict[str, Any]]()

    def act(_: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        seen.append(body)
        return completion("red")

    list(ask(write(heldout=tickets(1)), act, prompt="Which of\n{labels}?\n{question}", choices=True))
    assert seen[0]["messages"][-1]["content"] == "Which of\n- red\n- blue?\nTicket 0"
    assert seen[0]["structured_outputs"] == {"choice": ["red", "blue"]}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"arms": ()}, "arms: there are none"),
        ({"arms": ({"name": "a", "model": "m"}, {"name": "a", "model": "n"})}, "arms: each name once, not a, a"),
        ({"arms": ({"name": "a"},)}, r"arms\.0\.model: Field required"),
        ({"split": None, "concurrency": 0}, "concurrency: .*greater than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_told_by_name(given: dict[str, Any], told: str) -> None:
    arms = ({"name": "a", "model": "m"},)
    with pytest.raises(BadConfig, match=told):
        load_evaluation(None, {"dataset": "d", "output": "o", "arms": arms} | given)


def test_pairs_of_preferences_are_not_evaluated_by_answers(write: Write, tmp_path: Path) -> None:
    folder = write(heldout=[preference_row(1)], task="preference")
    with pytest.raises(BadConfig, match="pairs of preferences have no right answer"):
        evaluate(EvaluateConfig(dataset=folder, output=tmp_path / "o", arms=(Arm(name="a", model="m"),)))


def test_a_linear_probe_is_an_arm_like_others(write: Write, tmp_path: Path) -> None:
    import base64

    import numpy as np

    def act(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        assert path == "/v1/embeddings"
        vectors = [np.array([int(text.split()[-1]) % 2, 1.0], "<f4") for text in body["input"]]
        return 200, {"data": [{"embedding": base64.b64encode(each.tobytes()).decode()} for each in vectors]}, {}

    folder = write(tickets(20), [class_row(n, ("red", "blue")[n % 2]) for n in range(20, 30)])
    with serves(act) as (url, _):
        arm = Arm(name="linear probe", model="mini", url=url)
        found = probe(EvaluateConfig(dataset=folder, output=tmp_path / "out", arms=(arm,)))
    assert found.arms[0].figures["score"].value == 1
    assert found.arms[0].seconds["mean"] > 0


def test_a_probe_of_one_class_is_refused_before_anything_is_asked(write: Write, tmp_path: Path) -> None:
    folder = write([class_row(n, "red") for n in range(4)], tickets(4))
    arm = Arm(name="probe", model="mini", url="http://127.0.0.1:9/v1")
    with pytest.raises(BadDataset, match="all rows of `train` are 'red'; a probe needs two classes"):
        probe(EvaluateConfig(dataset=folder, output=tmp_path / "out", arms=(arm,)))


def ask(folder: Path, act: Act, *, sleep: Any = lambda _: None, **arm: Any) -> Iterator[Any]:
    dataset = read_dataset(folder)
    with serves(act) as (url, _):
        asked = Arm(name="a", model="m", url=url, **arm)
        yield from ask_all(asked, dataset.split("heldout"), dataset.manifest, key=None, concurrency=1, sleep=sleep)
