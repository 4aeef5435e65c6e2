"""Measures retrieval on judged sets: `python -m retrieval.evaluate --data DIR --sets NAME... [--gate SET=NDCG...]`.

Each set is a folder in BEIR's form (corpus.jsonl, queries.jsonl, qrels.tsv), itself or under `beir/`. Its documents go
through the service's own splitting, embedding and index into a temporary directory; a document scores as its best
passage. Printed are nDCG@10, recall@10 and MRR@10 of the dense leg, the BM25 leg and their fusion, then one line of
JSON. The exit code is 1 when the fusion is below a gate, or more than .01 below its better leg.
"""

import argparse
import asyncio
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from retrieval.documents import ParsedDocument, Scope, SearchMode
from retrieval.edge import EdgeIndex
from retrieval.embedder import PACKAGED_MODEL, Embedder, SentenceTransformerEmbedder
from retrieval.fusion import Fusion
from retrieval.retriever import Retriever

CUTOFF = 10
MODES: tuple[SearchMode, ...] = ("dense", "sparse", "hybrid")
MAX_LOSS_TO_BETTER_LEG = 0.01
_PASSAGES_PER_QUESTION = 50
_AT_ONCE = 32
_SCOPE = Scope("evaluation")

Judgements = Mapping[str, Mapping[str, int]]
"""Per question the relevant documents and how relevant they are, 1 and up."""


@dataclass(frozen=True, slots=True)
class JudgedSet:
    """Documents (id, title, text), questions (id to text) and judgements; questions without any are left out."""

    name: str
    documents: tuple[tuple[str, str, str], ...]
    questions: Mapping[str, str]
    judgements: Judgements


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over `n` questions, 0 to 1."""

    ndcg: float
    recall: float
    mrr: float
    n: int


def score(rankings: Mapping[str, Sequence[str]], judgements: Judgements) -> Scores:
    """Score rankings of document ids, best first; a question without a ranking scores 0.

    nDCG is trec_eval's `ndcg_cut_10` (linear gain, log2 discount), recall its `recall_10`.
    """
    ndcg = recall = mrr = 0.0
    for question, relevant in judgements.items():
        gains = [relevant.get(document, 0) for document in rankings.get(question, ())[:CUTOFF]]
        best = sorted(relevant.values(), reverse=True)[:CUTOFF]
        ndcg += _discounted(gains) / _discounted(best)
        recall += sum(gain > 0 for gain in gains) / len(relevant)
        mrr += next((1 / rank for rank, gain in enumerate(gains, 1) if gain > 0), 0.0)
    n = len(judgements)
    return Scores(ndcg / n, recall / n, mrr / n, n)


def load_set(folder: Path) -> JudgedSet:
    """Read a set in BEIR's form.

    Raises:
        FileNotFoundError: The folder lacks one of the three files.
    """
    files = folder / "beir" if (folder / "beir").is_dir() else folder
    judgements: dict[str, dict[str, int]] = {}
    for line in (files / "qrels.tsv").read_text().splitlines()[1:]:
        question, document, relevance = line.split("\t")
        if int(relevance) > 0:
            judgements.setdefault(question, {})[document] = int(relevance)
    documents = tuple((row["_id"], row.get("title", ""), row["text"]) for row in _rows(files / "corpus.jsonl"))
    questions = {row["_id"]: row["text"] for row in _rows(files / "queries.jsonl") if row["_id"] in judgements}
    return JudgedSet(folder.name, documents, questions, judgements)


async def evaluate(judged: JudgedSet, retriever: Retriever, modes: Sequence[SearchMode] = MODES) -> dict[str, Scores]:
    """Ingest a set into an open, empty retriever made with `TitledText`, and score each way of searching it."""
    await _at_once([_add(retriever, *document) for document in judged.documents])
    scores: dict[str, Scores] = {}
    for mode in modes:
        rankings = await _at_once([_rank(retriever, text, mode) for text in judged.questions.values()])
        scores[mode] = score(dict(zip(judged.questions, rankings, strict=True)), judged.judgements)
    return scores


class TitledText:
    """A parser of what `evaluate` adds: JSON with a title and a text."""

    async def parse(self, content: bytes, *, name: str, media_type: str | None = None) -> ParsedDocument:  # noqa: ARG002 - the protocol's
        """Return the text under its title."""
        fields = json.loads(content)
        return ParsedDocument(fields["text"], fields["title"] or None)


def failures(results: Mapping[str, Mapping[str, Scores]], gates: Mapping[str, float]) -> list[str]:
    """Say what is below its gate, or further below its better leg than allowed."""
    found = []
    for name, scores in results.items():
        fused = scores["hybrid"].ndcg
        better = max(scores["dense"].ndcg, scores["sparse"].ndcg)
        if fused < gates.get(name, 0.0):
            found.append(f"{name}: fused nDCG@10 {fused:.3f} is below its gate {gates[name]:.3f}")
        if fused < better - MAX_LOSS_TO_BETTER_LEG:
            found.append(f"{name}: fused nDCG@10 {fused:.3f} is more than .01 below its better leg's {better:.3f}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = _options(arguments)
    gates = dict(options.gate)
    results = asyncio.run(_run(options))
    failed = failures(results, gates)
    for message in failed:
        print(f"FAILED {message}")  # noqa: T201 - a command's output
    print(json.dumps({name: {mode: asdict(s) for mode, s in scores.items()} for name, scores in results.items()}))  # noqa: T201
    return 1 if failed else 0


async def _run(options: argparse.Namespace) -> dict[str, dict[str, Scores]]:
    results = {}
    heads = [f"{mode} nDCG@10 / R@10 / MRR" for mode in MODES]
    print(f"{'set':<20}{'questions':>10}   " + "   ".join(f"{head:<30}" for head in heads))  # noqa: T201
    for name in options.sets:
        judged = await asyncio.to_thread(load_set, options.data / name)
        embedder = SentenceTransformerEmbedder(options.model, threads=options.threads)
        results[name] = await _evaluate_in_temporary_directory(judged, embedder, options.fusion)
        cells = [f"{s.ndcg:.3f} / {s.recall:.3f} / {s.mrr:.3f}" for s in results[name].values()]
        print(f"{name:<20}{results[name]['hybrid'].n:>10}   " + "   ".join(f"{cell:<30}" for cell in cells), flush=True)  # noqa: T201
    return results


async def _evaluate_in_temporary_directory(judged: JudgedSet, embedder: Embedder, fusion: Fusion) -> dict[str, Scores]:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        index = EdgeIndex(directory / "index")
        async with Retriever(
            directory, embedder=embedder, index=index, parser=TitledText(), fusion=fusion
        ) as retriever:
            return await evaluate(judged, retriever)


async def _add(retriever: Retriever, document_id: str, title: str, text: str) -> None:
    content = json.dumps({"title": title, "text": text}).encode()
    await retriever.add(_SCOPE, name=document_id, content=content, media_type="text/plain", document_id=document_id)


async def _rank(retriever: Retriever, question: str, mode: SearchMode) -> list[str]:
    result = await retriever.search(_SCOPE, question, top_k=_PASSAGES_PER_QUESTION, mode=mode)
    return list(islice(dict.fromkeys(hit.passage.document_id for hit in result.hits), CUTOFF))


async def _at_once(work: Sequence[Any]) -> list[Any]:
    """Await all, 32 at a time, results in order."""
    turns = asyncio.Semaphore(_AT_ONCE)

    async def in_turn(one: Any) -> Any:
        async with turns:
            return await one

    return await asyncio.gather(*map(in_turn, work))


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _gate(text: str) -> tuple[str, float]:
    name, _, least = text.partition("=")
    return name, float(least)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m retrieval.evaluate", description="Measure retrieval on judged sets."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets' folders")
    parser.add_argument("--sets", nargs="+", required=True, help="names of the sets' folders")
    parser.add_argument("--gate", nargs="*", type=_gate, default=[], metavar="SET=NDCG", help="least fused nDCG@10")
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the embedder")
    parser.add_argument("--fusion", choices=get_args(Fusion), default="dbsf")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
