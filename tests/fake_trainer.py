"""A program in place of `hallmark-train`: the same arguments, files of the same form, and nothing is trained.

What it does besides is in `control.json` in the folder that is its first argument: `fail` and `kill` name commands that
end with an error, or end whoever started them, the first time; `outcome`, `value` and `needed` are what it finds;
`answered` and `failures` are what answered in an arm's place, and how often which failure came. Its calls are in
`calls.jsonl`.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.adapter_folder import write_adapter

BASE = {"base_model": "org/base"}


def main() -> None:
    folder, command, *arguments = sys.argv[1:]
    control: dict[str, Any] = json.loads((Path(folder) / "control.json").read_text())
    with (Path(folder) / "calls.jsonl").open("a") as calls:
        calls.write(
            json.dumps({"command": command, "arguments": arguments, "key": os.environ["HALLMARK_API_KEY"]}) + "\n"
        )
    told = sum(json.loads(line)["command"] == command for line in (Path(folder) / "calls.jsonl").open())
    if control.get("kill") == command and told == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit(1)
    if control.get("fail") == command and told == 1:
        sys.exit(1)
    {"train": train, "evaluate": evaluate, "compare": compare}[command](arguments, control)


def train(arguments: list[str], control: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?")
    for name in ("--dataset", "--output", "--base"):
        parser.add_argument(name)
    given = parser.parse_args(arguments)
    manifest = json.loads((Path(given.dataset) / "manifest.json").read_text())
    said = {
        **BASE,
        "dataset": {"name": manifest["name"], "version": manifest["version"]},
        **control.get("manifest", {}),
    }
    digest = said.pop("dataset_digest", manifest["digest"])
    write_adapter(Path(given.output), digest, weights=control.get("weights", "w") + manifest["digest"], **said)


def evaluate(arguments: list[str], control: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", action="append")
    for name in ("--dataset", "--split", "--output", "--limit"):
        parser.add_argument(name)
    given = parser.parse_args(arguments)
    manifest = json.loads((Path(given.dataset) / "manifest.json").read_text())
    arms = dict(arm.split(",")[0].split("=") for arm in given.arm)
    answered = {**arms, **control.get("answered", {})}
    figure = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 100, "effective_n": 100.0}
    found = {
        "format": "hallmark-evaluation/1",
        "dataset_digest": manifest["digest"],
        "rows": 100,
        "arms": [
            {
                "name": name,
                "releases": [answered[name]],
                "figures": {"score": figure},
                "failures": control.get("failures", {}).get(name, {}),
                "seconds": {"p50": 1.0},
            }
            for name in arms
        ],
    }
    Path(given.output).mkdir(parents=True, exist_ok=True)
    (Path(given.output) / "evaluation.json").write_text(json.dumps(found))


def compare(arguments: list[str], control: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results")
    for name in ("--output", "--margin", "--reference"):
        parser.add_argument(name)
    given = parser.parse_args(arguments)
    value = control.get("value", -0.02)
    tested = {
        "arm": "candidate",
        "outcome": control.get("outcome", "passes"),
        "drop": {"value": value, "low": value - 0.05, "high": value + 0.05, "upper": value + 0.04},
        "rows_needed": control.get("needed"),
    }
    Path(given.output).mkdir(parents=True, exist_ok=True)
    (Path(given.output) / "recommendation.json").write_text(json.dumps({"tested": [tested]}))


if __name__ == "__main__":
    main()
