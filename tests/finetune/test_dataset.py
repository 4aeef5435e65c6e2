"""Exported datasets: what is read is what its digests say, and what is wrong is told with file and line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.lineage import provenance
from finetune.dataset import canonical, content_digest, dataset_digest, read_dataset, row_digest
from finetune.errors import BadDataset
from finetune.tickets import HELDOUT, TEAMS, TRAIN, write_tickets
from tests.finetune.conftest import class_row, preference_row

Write = Callable[..., Path]


def test_a_written_dataset_is_read_as_it_was(write: Write) -> None:
    folder = write([class_row(1, "red", slice="a", session="s"), class_row(2, "blue")], [class_row(3, "red")])
    dataset = read_dataset(folder)
    assert {row.target for row in dataset.split("train")} == {"red", "blue"}
    assert {row.slice for row in dataset.split("train")} == {"a", None}
    assert [row.row for row in dataset.split("train")] == sorted(row.row for row in dataset.split("train"))
    assert dataset.split("heldout")[0].asked[-1].content == "Ticket 3"


def test_digests_are_those_that_lineage_verifies(write: Write) -> None:
    row = class_row(1, "red", prediction_id="0190b2c3-0000-7000-8000-000000000001")
    dataset = read_dataset(write([row], [class_row(2, "blue", meta={"x": 0.1, "ü": [1, None]})]))
    written = [json.loads(line) for split in ("train", "heldout") for line in lines(dataset.folder / f"{split}.jsonl")]
    for each in written:
        assert each["content_digest"] == content_digest(each)
        assert each["row"] == provenance.row_digest(each["content_digest"], each["prediction_id"], each["label_id"])
        assert each["row"] == row_digest(each["content_digest"], each["prediction_id"], each["label_id"])
    digests = [each["row"] for each in written]
    assert dataset.manifest.digest == provenance.dataset_digest(digests) == dataset_digest(reversed(digests))
    assert canonical({"b": 1.5, "a": "ü"}) == provenance.canonical({"b": 1.5, "a": "ü"})


def test_a_changed_file_is_told(write: Write) -> None:
    folder = write([class_row(1, "red")])
    file = folder / "train.jsonl"
    file.write_bytes(file.read_bytes().replace(b"Ticket 1", b"Ticket 9"))
    with pytest.raises(BadDataset, match=r"train\.jsonl: its SHA-256 is"):
        read_dataset(folder)


def test_a_changed_row_is_told_with_its_line_even_if_the_file_agrees(write: Write) -> None:
    folder = write([class_row(1, "red"), class_row(2, "red")])
    changed = [
        line.replace(b"Ticket", b"Locket") if n else line for n, line in enumerate(lines(folder / "train.jsonl"))
    ]
    resign(folder, changed)
    with pytest.raises(BadDataset, match=r"train\.jsonl line 2: `content_digest` is .*, its content has"):
        read_dataset(folder)


def test_a_missing_row_is_told(write: Write) -> None:
    folder = write([class_row(1, "red"), class_row(2, "red")])
    resign(folder, lines(folder / "train.jsonl")[:1])
    with pytest.raises(BadDataset, match=r"the manifest's digest is .*, its rows have"):
        read_dataset(folder)


def test_rows_that_were_erased_are_part_of_the_digest(write: Write) -> None:
    folder = write([class_row(1, "red"), class_row(2, "red")])
    kept, gone = lines(folder / "train.jsonl")
    resign(folder, [kept], erased=[json.loads(gone)["row"]])
    assert len(read_dataset(folder).split("train")) == 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**class_row(1, "red"), "label": "blue"}, "`label` is 'blue'; it is the assistant's answer"),
        (class_row(1, "green"), "one of the manifest's labels"),
        ({"task": "classify", "label": "red", "messages": []}, "`messages` ends with the assistant's answer"),
        ({**class_row(1, "red"), "task": "answer"}, "`task` is 'answer', the dataset's is 'classify'"),
        ({**class_row(1, "red"), "weight": 0}, r"`float` > 0\.0 - at `\$\.weight`"),
        ({**class_row(1, "red"), "messages": [{"role": "robot", "content": "x"}]}, "'robot'"),
    ],
)
def test_a_row_that_is_no_example_of_its_task_is_told(write: Write, row: dict[str, Any], told: str) -> None:
    with pytest.raises(BadDataset, match=rf"train\.jsonl line 1: .*{told}"):
        read_dataset(write([row]))


def test_a_pair_needs_one_answer_each(write: Write) -> None:
    with pytest.raises(BadDataset, match="`chosen` and `rejected` are one assistant's message each"):
        read_dataset(write([{**preference_row(1), "rejected": []}], task="preference"))


def test_a_folder_without_a_manifest_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match="name the folder that a dataset was exported to"):
        read_dataset(tmp_path)


def test_a_split_without_rows_is_told_with_those_there_are(write: Write) -> None:
    with pytest.raises(BadDataset, match=r"'heldout' has no rows; it has heldout \(0 rows\), train \(1 rows\)"):
        read_dataset(write([class_row(1, "red")])).split("heldout")


def test_tickets_are_the_same_bytes_for_the_same_seed_and_share_no_sentence(tmp_path: Path) -> None:
    digests = [write_tickets(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert digests[0] == digests[1] != digests[2]
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    dataset = read_dataset(tmp_path / "a")
    counts = {team: sum(row.label == team for row in dataset.split("train")) for team in TEAMS}
    assert counts == dict.fromkeys(TEAMS, 80)
    assert not {text for texts in TRAIN.values() for text in texts} & {
        text for texts in HELDOUT.values() for text in texts
    }


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines()


def resign(folder: Path, rows: list[bytes], **more: Any) -> None:
    """Write other rows, and a manifest whose digest of the file agrees."""
    import hashlib

    data = b"".join(row + b"\n" for row in rows)
    (folder / "train.jsonl").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"] = {"rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest | more))
