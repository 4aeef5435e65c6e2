"""What a token costs the embedder, in batches of questions and of passages as a service makes them.

Texts are words of the example documents, so many that each batch has another number of tokens: a library that prepares
itself for every shape it meets is as slow here as in a service, and fast where one shape comes again and again. A
process has one version; two take turns, and the medians of the rounds' ratios of CPU are reported.

    python -m tests.benchmarks.embedding [--rounds 12] [--against ../another-checkout]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCHES = 40
"""Of each kind in a round: half a second of one core for questions, three for passages."""
KINDS = {"questions": ((1, 8), (5, 22)), "passages": ((3, 6), (90, 190))}
"""How many texts a batch has, and how many words a text: a word is 1.3 tokens."""


def batches(kind: str, seed: str) -> list[list[str]]:
    chance = random.Random(seed)
    words = " ".join(page.read_text("utf-8") for page in sorted(Path("examples").rglob("*.md"))).split()
    texts, lengths = KINDS[kind]

    def text() -> str:
        length = chance.randint(*lengths)
        start = chance.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    return [[text() for _ in range(chance.randint(*texts))] for _ in range(BATCHES)]


def serve() -> None:
    """Be one version: a line with a kind and a seed is answered by the microseconds of CPU that a token took."""
    from retrieval.embedder import SentenceTransformerEmbedder

    embedder = SentenceTransformerEmbedder()
    embedder.load()
    embedder.settle()
    for line in sys.stdin:
        kind, seed = line.split()
        asked = batches(kind, seed)
        tokens = sum(embedder.count_tokens([text for texts in asked for text in texts]))
        before = time.process_time()
        for texts in asked:
            embedder.encode(texts, "query" if kind == "questions" else "document")
        print((time.process_time() - before) / tokens * 1e6, flush=True)


def started(checkout: Path) -> subprocess.Popen[str]:
    # By its path, since the checkout may be older than it; what it imports is the checkout's.
    command = [sys.executable, "-P", __file__, "--serve"]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def measured(process: subprocess.Popen[str], kind: str, seed: str) -> float:
    assert process.stdin
    assert process.stdout
    print(kind, seed, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def compare(versions: dict[str, subprocess.Popen[str]], rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        took: dict[str, list[float]] = {name: [] for name in versions}
        for number in range(rounds):
            for name in list(versions)[:: 1 if number % 2 else -1]:
                took[name].append(measured(versions[name], kind, f"{kind}-{number}"))
        later = {name: of_name[rounds // 3 :] for name, of_name in took.items()}  # The first ones warm it up.
        found[kind] = {name: round(statistics.median(of_name), 1) for name, of_name in later.items()}
        if "against" in later:
            ratios = [ours / theirs for ours, theirs in zip(later["this"], later["against"], strict=True)]
            found[kind]["ratio"] = round(statistics.median(ratios), 3)
        print(kind, found[kind], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--against", type=Path, help="another checkout, to be measured in turn with this one")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    versions = {"this": started(Path.cwd())}
    if given.against:
        versions["against"] = started(given.against.resolve())
    try:
        found = compare(versions, given.rounds)
    finally:
        for process in versions.values():
            process.terminate()
    print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], "us_per_token": found}))


if __name__ == "__main__":
    main()
