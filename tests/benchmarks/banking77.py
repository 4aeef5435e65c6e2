"""A tuned small model beside a linear probe on sentence vectors: banking77's intents, and what each costs.

Three arms answer the same held-out rows over HTTP: the base model and the adapter on the embedded engine, held to the
labels as a release that classifies holds them; and logistic regression on MiniLM vectors from `/v1/embeddings` of the
service. All 77 classes take hours on a small CPU, so the classes are drawn by a seed, and the result says how many.

    python -m tests.benchmarks.banking77 --data ../shared/data --work DIR [--classes 77] [--per-class N] [--held-out N]

`--only train|measure|probe` does a part; training goes on where it was cut off, and the probe alone is cheap for all 77
classes with all rows (`--classes 77 --per-class 1000 --held-out 1000`). The last line is JSON.
"""

import argparse
import asyncio
import csv
import json
import random
import resource
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from app.engines.local import DEFAULT_MODEL
from app.engines.local.weights import find_weights
from finetune.compare import compare
from finetune.config import TrainConfig
from finetune.dataset import write_dataset
from finetune.evaluate import evaluate
from finetune.evaluations import Arm, EvaluateConfig
from finetune.probe import probe
from finetune.train import train
from retrieval.embedder import SentenceTransformerEmbedder
from tests.embedded_engine import embedded_engine
from tests.service import live_service

SYSTEM = {"role": "system", "content": "Name the customer's intent."}
PROMPT = "{question}\n\nIntent:"


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with banking77/")
    parser.add_argument("--work", type=Path, required=True, help="where everything is written")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=20, help="held-out rows of each class")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("train", "measure", "probe"))
    given = parser.parse_args()
    dataset = given.work / "dataset"
    digest = prepare(given, dataset)
    if given.only == "probe":
        print(json.dumps({"dataset_digest": digest, **asyncio.run(measure_probe(given.work, dataset))}))
        return
    model = find_weights(DEFAULT_MODEL, Path.home() / ".cache" / "hallmark").location
    report: dict[str, Any] = {"dataset_digest": digest}
    if given.only != "measure":
        manifest = train(
            TrainConfig(
                dataset=dataset,
                base=model,
                output=given.work / "adapter",
                prompt=PROMPT,
                epochs=given.epochs,
                max_tokens=160,
                check_every_steps=20,
                patience=0,
                check_rows=8,
            ),
            watch=lambda told: print(told, flush=True),
        )
        report |= {"train": manifest["metrics"], "rows": manifest["rows"], "train_seconds": manifest["seconds"]}
        report["cpu_seconds"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    if given.only != "train":
        report |= asyncio.run(measure(given.work, dataset, model))
    print(json.dumps(report))


def prepare(given: argparse.Namespace, folder: Path) -> str:
    """Write the classes that the seed draws as a dataset; return its digest."""
    by_class: dict[str, dict[str, list[str]]] = {}
    for split, file in (("train", "train.csv"), ("heldout", "test.csv")):
        by_class[split] = defaultdict(list)
        with (given.data / "banking77" / file).open(encoding="utf-8", newline="") as opened:
            for row in csv.DictReader(opened):
                by_class[split][row["category"]].append(row["text"].strip())
    draw = random.Random(given.seed)
    labels = sorted(draw.sample(sorted(by_class["train"]), given.classes))
    splits = {}
    held_out = {text for label in labels for text in by_class["heldout"][label]}
    for split, count in (("train", given.per_class), ("heldout", given.held_out)):
        # A few sentences stand in both files: they are no training rows.
        left_out = held_out if split == "train" else set()
        texts = {label: sorted(set(by_class[split][label]) - left_out) for label in labels}
        chosen = [
            (label, text) for label in labels for text in draw.sample(texts[label], min(count, len(texts[label])))
        ]
        splits[split] = [
            {
                "task": "classify",
                "label": label,
                "messages": [SYSTEM, {"role": "user", "content": text}, {"role": "assistant", "content": label}],
            }
            for label, text in chosen
        ]
    return write_dataset(
        folder,
        splits,
        name="banking77",
        version=f"{given.classes}-classes-{given.per_class}-seed{given.seed}",
        task="classify",
        labels=labels,
        recipe={"made_by": "tests.benchmarks.banking77"},
        parent=None,
        licence="CC BY 4.0",
    )


async def measure(work: Path, dataset: Path, model: str) -> dict[str, Any]:
    """Ask all arms, and put them beside each other."""
    with embedded_engine(model, {"banking": work / "adapter"}) as url:
        common: dict[str, Any] = {"url": f"{url}/v1", "prompt": PROMPT, "choices": True}
        arms = (Arm(name="base", model="tgi", **common), Arm(name="tuned", model="banking", **common))
        config = EvaluateConfig(dataset=dataset, output=work / "served", arms=arms, concurrency=4)
        await asyncio.to_thread(evaluate, config, tell=_tell)
    await measure_probe(work, dataset)
    found = compare([work / "served", work / "probe"], work / "comparison", margin=0.05)
    print((work / "served" / "report.md").read_text(encoding="utf-8"))
    print((work / "comparison" / "recommendation.md").read_text(encoding="utf-8"))
    return {"recommended": found.recommended, "reason": found.reason}


async def measure_probe(work: Path, dataset: Path) -> dict[str, Any]:
    """Ask the linear probe, whose vectors come from a service as they would be served; it needs no engine."""
    embedder = SentenceTransformerEmbedder()
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    async with live_service(work / "data", engine_url="http://127.0.0.1:9", embedder=embedder) as service:
        arm = Arm(name="linear probe on MiniLM", model=embedder.model_id, url=f"{service.url}/v1")
        config = EvaluateConfig(dataset=dataset, output=work / "probe", arms=(arm,))
        found = await asyncio.to_thread(probe, config, key=service.key, tell=_tell)
    print((work / "probe" / "report.md").read_text(encoding="utf-8"))
    seconds = round(resource.getrusage(resource.RUSAGE_SELF).ru_utime - started)
    return {"rows": found.rows, "probe": msgspec.to_builtins(found.arms[0]), "cpu_seconds": seconds}


def _tell(arm: str, done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        print(arm, done, "of", total, flush=True)


if __name__ == "__main__":
    main()
