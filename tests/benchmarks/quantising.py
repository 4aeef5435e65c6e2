"""What the embedder's backend `onnx-int8` changes and gains beside `torch`, in one process, by turns.

Every question and passage of a judged set is embedded by both. Agreement: the cosine of the two vectors of a text, the
part of torch's ten best passages that are among the other's, and nDCG@10 of each backend by itself (dense search only,
whole texts as passages). Speed: single questions, and batches of 32 passages, by turns; medians of the ratios of CPU,
which hold on a busy machine, and of seconds. One thread each.

    python -m tests.benchmarks.quantising --data ../shared/data [--set squad2_cs224n_dev] [--rounds 20]
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.embedder import SentenceTransformerEmbedder
from retrieval.evaluation.sets import load

BATCH = 32
DEPTH = 10


def loaded(backend: str) -> SentenceTransformerEmbedder:
    embedder = SentenceTransformerEmbedder(backend=backend)
    embedder.load()
    return embedder


def vectors(embedder: SentenceTransformerEmbedder, texts: list[str], kind: str) -> np.ndarray:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    made = np.empty((len(texts), embedder.dimension), np.float32)
    for start in range(0, len(texts), BATCH):
        rows = order[start : start + BATCH]
        made[rows] = embedder.encode([texts[i] for i in rows], kind)
    return made


def ndcg(best: np.ndarray, relevant: list[dict[int, float]]) -> float:
    values = []
    for row, grades in zip(best, relevant, strict=True):
        gain = sum(grades.get(int(each), 0.0) / math.log2(place + 2) for place, each in enumerate(row))
        ideal = sum(grade / math.log2(place + 2) for place, grade in enumerate(sorted(grades.values())[::-1][:DEPTH]))
        values.append(gain / ideal)
    return float(np.mean(values))


def agreement(embedders: dict[str, SentenceTransformerEmbedder], data: Path, name: str) -> dict[str, Any]:
    judged = load(data / name)
    numbers = {each.name: i for i, each in enumerate(judged.texts)}
    asked = judged.judged
    relevant = [{numbers[name]: float(grade) for name, grade in question.documents.items()} for question in asked]
    best, made = {}, {}
    for backend, embedder in embedders.items():
        passages = vectors(embedder, [each.text for each in judged.texts], "document")
        questions = vectors(embedder, [question.text for question in asked], "query")
        best[backend] = np.argsort(-(questions @ passages.T), axis=1, kind="stable")[:, :DEPTH]
        made[backend] = np.concatenate([passages, questions])
    cosines = np.sum(made["torch"] * made["onnx-int8"], axis=1)
    overlap = [len(set(a) & set(b)) / DEPTH for a, b in zip(best["torch"], best["onnx-int8"], strict=True)]
    return {
        "set": name,
        "passages": len(judged.texts),
        "questions": len(asked),
        "cosine_mean": round(float(cosines.mean()), 4),
        "cosine_least": round(float(cosines.min()), 4),
        "overlap_at_10": round(statistics.mean(overlap), 4),
        "ndcg_at_10": {backend: round(ndcg(found, relevant), 4) for backend, found in best.items()},
    }


def speed(embedders: dict[str, SentenceTransformerEmbedder], data: Path, name: str, rounds: int) -> dict[str, Any]:
    judged = load(data / name)
    works = {
        "one question": [[question.text] for question in judged.questions[: rounds * 10]],
        "32 passages": [[each.text for each in judged.texts[at : at + BATCH]] for at in range(0, rounds * 8, 8)],
    }
    found: dict[str, Any] = {}
    for label, batches in works.items():
        taken: dict[str, list[tuple[float, float]]] = {backend: [] for backend in embedders}
        for batch in batches:
            for backend, embedder in embedders.items():
                wall, cpu = time.perf_counter(), time.process_time()
                embedder.encode(batch, "query")
                taken[backend].append((time.perf_counter() - wall, time.process_time() - cpu))
        pairs = list(zip(taken["onnx-int8"], taken["torch"], strict=True))
        found[label] = {
            "batches": len(batches),
            "cpu_ms": {backend: round(statistics.median(t[1] for t in ts) * 1000, 2) for backend, ts in taken.items()},
            "cpu_ratio": round(statistics.median(new[1] / old[1] for new, old in pairs), 3),
            "seconds_ratio": round(statistics.median(new[0] / old[0] for new, old in pairs), 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", default="squad2_cs224n_dev")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    embedders = {backend: loaded(backend) for backend in ("torch", "onnx-int8")}
    facts: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    facts["speed"] = speed(embedders, given.data, given.set, given.rounds)
    print(json.dumps(facts["speed"]), file=sys.stderr)
    facts["agreement"] = agreement(embedders, given.data, given.set)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
