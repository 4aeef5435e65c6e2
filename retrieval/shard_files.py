"""Which shards are in the directory of an embedded index, and what says so.

<directory>/current.json      which shard is named, and its schema; replaced in one step
<directory>/0001/             a shard: segments and a write-ahead log
<directory>/0001.json         its schema; written last, so that a shard without one was never whole
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from retrieval.index import IndexSchema

POINTER = "current.json"


def shards(directory: Path) -> dict[Path, IndexSchema]:
    """The whole shards there are; the pointer tells of one that was made before each had its own file."""
    pointer = read(directory / POINTER)
    found = {directory / pointer["shard"]: IndexSchema.of(pointer["schema"])} if pointer else {}
    for file in directory.glob("[0-9]*.json"):
        if stored := read(file):
            found[file.with_suffix("")] = IndexSchema.of(stored["schema"])
    return {path: schema for path, schema in found.items() if path.is_dir()}


def remove(path: Path) -> None:
    """Remove a shard; one without its file is removed by whoever makes the next."""
    path.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def read(file: Path) -> dict[str, Any] | None:
    """What such a file says; None where there is none."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    return found


def replace(file: Path, content: dict[str, Any]) -> None:
    """Write a file in one step: after an outage it is the old one or the new one."""
    replacement = file.with_suffix(".new")
    with replacement.open("w") as target:
        json.dump(content, target, indent=1)
        target.flush()
        os.fsync(target.fileno())
    replacement.replace(file)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
