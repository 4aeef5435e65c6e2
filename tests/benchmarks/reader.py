"""Trains the head that the embedded engine rates texts with, and says how well it tells answers from near misses.

Texts are sentences of SQuAD 2's paragraphs (CS224N half), as the service would rate them: the likeliest of five
passages that it finds for a question. One that holds the gold answer is right; wrong are the likeliest others, and
all that is found for questions that have no answer: SQuAD's own, and answerable ones with a word swapped. Every fifth
article is for testing only.

    python -m tests.benchmarks.reader [--write] [--layer 20] [--data ../shared/data]

`--write` puts the head where the engine finds it. The last line is JSON.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from app.engines.local import DEFAULT_MODEL, EngineSettings, reader
from app.engines.local.model import load
from app.engines.local.weights import find_weights
from retrieval.support import Evidence
from tests.benchmarks.support import Corpus, Question, read_questions, swap_a_word

CANDIDATES = 12
NEGATIVES = 4
REGULARISATION = 0.005
"""scikit-learn's C, for standardised states; from 0.001 to 0.01 the figures differ by .01."""


@dataclass
class Found:
    """What was found for one question: a state for each sentence, and which of them hold the answer."""

    group: str
    article: str
    right: list[bool]
    states: np.ndarray

    @property
    def tests(self) -> bool:
        """Whether its article is kept for testing."""
        return crc32(self.article.encode()) % 5 == 0


async def collect(data: Path, counts: dict[str, int], rated_by: reader.Reader) -> list[Found]:
    """Search for every question and read what is found."""
    answerable, unanswerable = read_questions(data / "squad2_cs224n_dev")
    corpus = Corpus(data / "squad2_cs224n_dev")
    known = {passage.text for passage in corpus.passages}
    answerable = [each for each in answerable if each.paragraph in known]
    groups = {
        "answerable": answerable[: counts["answerable"]],
        "unanswerable": unanswerable[: counts["unanswerable"]],
        "swapped": swap_a_word(answerable[-counts["swapped"] :], answerable),
    }
    async with corpus.embedder:
        await corpus.prepare()
        found = [
            await _read(corpus, group, question, rated_by)
            for group, questions in groups.items()
            for question in questions
        ]
    return [each for each in found if each is not None]


async def _read(corpus: Corpus, group: str, question: Question, rated_by: reader.Reader) -> Found | None:
    hits = await corpus.search(question.text)
    evidence = Evidence(question.text, hits)
    right, wrong = [], []
    for each in evidence.candidates()[:CANDIDATES]:
        passage = hits[each.hit].passage
        said = passage.text[each.start : each.end]
        holds = passage.text == question.paragraph and any(answer in said for answer in question.answers)
        (right if holds else wrong).append(evidence.in_context(each))
    texts = [*right[:1], *wrong[:NEGATIVES]]
    if not texts:
        return None
    with torch.inference_mode():
        states = rated_by.states([rated_by.prompt(question.text, text) for text in texts])
    marks = [True] * len(right[:1]) + [False] * len(wrong[:NEGATIVES])
    return Found(group, hits[0].passage.document_title, marks, states.numpy())


def train(found: Sequence[Found], layer: int, model_id: str, revision: str) -> reader.Head:
    """Fit a logistic regression, and fold the standardising of the states into it."""
    states = np.vstack([each.states for each in found])
    right = np.concatenate([each.right for each in found])
    mean, scale = states.mean(0), states.std(0) + 1e-6
    fitted = LogisticRegression(C=REGULARISATION, max_iter=500, class_weight="balanced")
    fitted.fit((states - mean) / scale, right)
    weights = fitted.coef_[0] / scale
    bias = float(fitted.intercept_[0] - weights @ mean)
    return reader.Head(model_id, revision, layer, [round(float(each), 5) for each in weights], round(bias, 4))


def measure(found: Sequence[Found], head: reader.Head) -> dict[str, Any]:
    """Say how well the head tells right sentences from others, and questions with an answer from those without."""
    ratings = [each.states @ np.array(head.weights) + head.bias for each in found]
    pairs = list(zip(found, ratings, strict=True))
    right = [rating for each, rated in pairs for mark, rating in zip(each.right, rated, strict=True) if mark]
    wrong = [rating for each, rated in pairs for mark, rating in zip(each.right, rated, strict=True) if not mark]
    best = {
        group: [max(rated) for each, rated in pairs if each.group == group]
        for group in ("answerable", "unanswerable", "swapped")
    }
    first = [int(np.argmax(rated)) == 0 for each, rated in pairs if any(each.right)]
    return {
        "questions": {group: len(values) for group, values in best.items()},
        "sentence_auc": _auc(right, wrong),
        "right_sentence_first_of_five": round(sum(first) / len(first), 3),
        "unanswerable_auc": _auc(best["answerable"], best["unanswerable"]),
        "swapped_auc": _auc(best["answerable"], best["swapped"]),
    }


def _auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    one, other = np.array(positive)[:, None], np.array(negative)[None]
    return round(float((one > other).mean() + (one == other).mean() / 2), 3)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--answerable", type=int, default=1000)
    parser.add_argument("--unanswerable", type=int, default=900)
    parser.add_argument("--swapped", type=int, default=400)
    parser.add_argument("--write", action="store_true", help="put the head beside the engine")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    base = load(find_weights(DEFAULT_MODEL, EngineSettings().cache_dir), "bf16")
    blank = reader.Head(base.model_id, base.revision or "", chosen.layer, [0.0] * base.model.config.hidden_size, 0.0)
    counts = {name: getattr(chosen, name) for name in ("answerable", "unanswerable", "swapped")}
    found = asyncio.run(collect(chosen.data, counts, reader.Reader(base, blank)))
    head = train([each for each in found if not each.tests], chosen.layer, blank.model_id, blank.revision)
    figures = measure([each for each in found if each.tests], head)
    if chosen.write:
        path = Path(reader.__file__).with_suffix(".json")
        path.write_bytes(msgspec.json.encode(head) + b"\n")
    print(json.dumps({"layer": chosen.layer, "seconds": round(time.monotonic() - began), **figures}))


if __name__ == "__main__":
    main()
