"""Small datasets, and a tiny model to train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.dataset import write_dataset
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-base"))


def class_row(n: int, label: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Ticket {n}"}, {"role": "assistant", "content": label}]
    return {"task": "classify", "label": label, "messages": turns, **more}


def preference_row(n: int) -> dict[str, Any]:
    return {
        "task": "preference",
        "prompt": [{"role": "user", "content": f"Question {n}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as an exported dataset and return its folder."""

    def written(train: list[Any] = [], heldout: list[Any] = [], **manifest: Any) -> Path:  # noqa: B006 - not changed.
        folder = tmp_path / "dataset"
        given = {"name": "tickets", "version": "1", "task": "classify", "labels": ["red", "blue"], **manifest}
        write_dataset(folder, {"train": train, "heldout": heldout}, **given)
        return folder

    return written
