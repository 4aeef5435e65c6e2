"""The measures by hand-made rankings, and the command on judged sets."""

import json
import math
from pathlib import Path

import pytest

from retrieval.edge import EdgeIndex
from retrieval.embedder import HashingEmbedder
from retrieval.evaluate import Scores, TitledText, evaluate, failures, load_set, main, score
from retrieval.retriever import Retriever

DATA = Path(__file__).parents[3] / "shared" / "data"


def write_set(folder: Path) -> Path:
    files = folder / "tiny" / "beir"
    files.mkdir(parents=True)
    documents = [
        {"_id": "cats", "title": "Cats", "text": "They sleep most of the day and hunt at night."},
        {"_id": "dogs", "title": "Dogs", "text": "They bark and guard the house."},
        {"_id": "tower", "title": "", "text": "The tower is 330 metres tall. " * 60},
    ]
    questions = [{"_id": "q1", "text": "Do cats sleep?"}, {"_id": "q2", "text": "Unjudged"}]
    questions.append({"_id": "q3", "text": "How tall is the tower in metres?"})
    (files / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    (files / "queries.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    (files / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tcats\t1\nq1\tdogs\t0\nq3\ttower\t2\n")
    return folder / "tiny"


def test_a_perfect_ranking_scores_one() -> None:
    assert score({"q": ["a", "b", "c"]}, {"q": {"a": 2, "b": 1}}) == Scores(1.0, 1.0, 1.0, 1)


def test_gains_are_linear_and_discounted_by_log_two() -> None:
    scores = score({"q": ["x", "b", "a"]}, {"q": {"a": 2, "b": 1}})
    best = 2 / math.log2(2) + 1 / math.log2(3)
    assert scores.ndcg == pytest.approx((1 / math.log2(3) + 2 / math.log2(4)) / best)
    assert (scores.recall, scores.mrr) == (1.0, 0.5)


def test_only_the_first_ten_count_and_an_unanswered_question_scores_zero() -> None:
    ranking = [str(n) for n in range(10)] + ["a"]
    assert score({"q": ranking}, {"q": {"a": 1}, "r": {"b": 1}}) == Scores(0.0, 0.0, 0.0, 2)
    assert score({"q": ["a"]}, {"q": {"a": 1}, "r": {"b": 1}}) == Scores(0.5, 0.5, 0.5, 2)


def test_a_set_is_read_without_its_unjudged_questions(tmp_path: Path) -> None:
    judged = load_set(write_set(tmp_path))
    assert judged.questions.keys() == {"q1", "q3"}
    assert judged.judgements == {"q1": {"cats": 1}, "q3": {"tower": 2}}
    assert [document[0] for document in judged.documents] == ["cats", "dogs", "tower"]


async def test_documents_are_ranked_by_their_best_passage(tmp_path: Path) -> None:
    judged = load_set(write_set(tmp_path))
    index = EdgeIndex(tmp_path / "index")
    async with Retriever(
        tmp_path, embedder=HashingEmbedder(256), index=index, parser=TitledText(), passage_tokens=60
    ) as retriever:
        scores = await evaluate(judged, retriever)
        assert len(await index.ids()) > 3
    assert scores.keys() == {"dense", "sparse", "hybrid"}
    assert scores["hybrid"] == Scores(1.0, 1.0, 1.0, 2)


def test_a_fusion_below_its_gate_or_its_better_leg_fails() -> None:
    results = {
        "set": {mode: Scores(ndcg, 0, 0, 1) for mode, ndcg in (("dense", 0.5), ("sparse", 0.4), ("hybrid", 0.485))}
    }
    assert failures(results, {}) == ["set: fused nDCG@10 0.485 is more than .01 below its better leg's 0.500"]
    results["set"]["hybrid"] = Scores(0.495, 0, 0, 1)
    assert failures(results, {"set": 0.49}) == []
    assert failures(results, {"set": 0.5}) == ["set: fused nDCG@10 0.495 is below its gate 0.500"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the judged sets beside the project, in ../shared/data")
@pytest.mark.parametrize(("name", "gate"), [("squad2_cs224n_dev", 0.88), ("cranfield", 0.42), ("cisi", 0.44)])
def test_retrieval_is_good_on_judged_sets(name: str, gate: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(DATA), "--sets", name, "--gate", f"{name}={gate}"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert json.loads(table[-1])[name]["hybrid"]["ndcg"] >= gate


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the judged sets beside the project, in ../shared/data")
def test_the_command_fails_below_a_gate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(DATA), "--sets", "adi", "--gate", "adi=.99"]) == 1
    assert "FAILED adi: fused nDCG@10" in capsys.readouterr().out
