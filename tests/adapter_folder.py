"""The folders that training leaves behind, with small files in place of real weights."""

import hashlib
import json
from pathlib import Path
from typing import Any


def write_dataset(folder: Path, *contents: str, name: str = "tickets") -> str:
    """An exported dataset as far as registering it needs one; gives its digest."""
    from app.lineage import canonical, dataset_digest, row_digest  # The fake trainer starts often, without it.

    folder.mkdir(parents=True)
    rows = []
    for content in contents:
        digest = hashlib.sha256(content.encode()).hexdigest()
        origin = {"prediction_id": None, "label_id": None}
        rows.append({"row": row_digest(digest, None, None), "content_digest": digest, "task": "answer", **origin})
    (folder / "train.jsonl").write_text("".join(canonical(row) + "\n" for row in rows))
    (folder / "heldout.jsonl").write_text("")
    digest = dataset_digest(row["row"] for row in rows)
    manifest = {"format": "hallmark-dataset/1", "name": name, "version": "-".join(contents), "digest": digest}
    (folder / "manifest.json").write_text(canonical(manifest))
    return digest


def write_adapter(folder: Path, trained_on: str | None, *, weights: str = "weights", **said: Any) -> str:
    """A finished run's adapter; gives its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}\n')
    (folder / "adapter_model.safetensors").write_text(weights)
    files = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    manifest = {
        "format": "hallmark-adapter/1",
        "run": f"run-{digest[:8]}",
        "adapter_digest": digest,
        "base_model": "org/base",
        "base_revision": None,
        "dataset_digest": trained_on,
        "dataset": {"name": "tickets", "version": "1"},
        "metrics": {"heldout_loss": 0.125},
        **said,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True))
    return digest
