"""The architecture as import-linter checks it: the contracts hold, they bite, and the service starts light."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "retrieval", "finetune", "observability")

# One import that breaks each contract: the file it is written into, and the line.
VIOLATIONS = {
    "packages": ("observability/metrics.py", "import retrieval.documents"),
    "training-apart": ("finetune/__init__.py", "import observability.logs"),
    "serving-apart": ("retrieval/retriever.py", "import datasets"),
    "app-layers": ("app/releases.py", "import app.gateway"),
    "training-layers": ("finetune/dataset.py", "import finetune.config"),
    "training-libraries": ("finetune/cli.py", "import trl"),
    "settings": ("app/gateway.py", "import app.settings"),
    "embedded-engine": ("app/gateway.py", "import app.engines.local.weights"),
    "cycles": ("retrieval/documents.py", "import retrieval.retriever"),
    "statistics": ("observability/drift.py", "import observability.metrics"),
    "home-huggingface": ("app/gateway.py", "import huggingface_hub"),
    "home-torch": ("app/prompts.py", "import torch"),
    "home-wire": ("app/engines/tgi.py", "import httptools"),
    "home-http": ("app/gateway.py", "import fastapi"),
    "home-database": ("app/links.py", "import sqlalchemy"),
    "home-limits": ("app/access/ring.py", "import limits"),
    "home-settings": ("observability/logs.py", "import pydantic_settings"),
    "home-terminal": ("app/routes/chat.py", "import typer"),
    "home-qdrant": ("app/grounding.py", "import qdrant_client"),
    "home-embedder": ("retrieval/support.py", "import sentence_transformers"),
    "home-onnx": ("retrieval/embedder.py", "import onnxruntime"),
    "home-parsers": ("retrieval/parsers.py", "import pypdf"),
    "home-feast": ("app/gateway.py", "import feast"),
    "home-cryptography": ("app/links.py", "import cryptography"),
    "home-jwt": ("app/access/keys.py", "import jwt"),
    "home-schemas": ("app/chat.py", "import jsonschema_rs"),
    "home-parquet": ("app/predictions/history.py", "import pyarrow"),
    "home-ray": ("app/sources/opening.py", "import ray"),
    "home-buckets": ("app/sources/opening.py", "import obstore"),
    "home-fetching": ("app/alerts/webhook.py", "import httpcore"),
    "home-names": ("app/feedback/words.py", "import spacy"),
    "home-plots": ("app/quality/answers.py", "import matplotlib"),
    "home-telemetry": ("app/gateway.py", "import opentelemetry"),
    "home-prometheus": ("observability/logs.py", "import prometheus_client"),
}


def contracts() -> dict[str, str]:
    """The configured contracts' names by id."""
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {contract["id"]: contract["name"] for contract in configured}


def lint(tree: Path, *, width: int = 400) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages in `tree`, whatever is installed."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": str(width)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=50, check=False)


def test_the_code_keeps_every_contract() -> None:
    linted = lint(ROOT)
    assert linted.returncode == 0, linted.stdout


def test_every_contract_is_broken_by_an_import_it_forbids(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, line in VIOLATIONS.values():
        with (tmp_path / file).open("a", encoding="utf-8") as module:
            module.write(f"\n{line}\n")
    linted = lint(tmp_path)
    assert VIOLATIONS.keys() == contracts().keys()
    kept = [id_ for id_, name in contracts().items() if f"{name} BROKEN" not in linted.stdout]
    assert kept == [], linted.stdout


def test_a_module_without_a_layer_is_refused(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "app" / "helpers.py").write_text('"""Nowhere in particular."""\n')
    linted = lint(tmp_path)
    assert linted.returncode == 1
    assert "app.helpers" in linted.stdout


def test_importing_the_service_loads_no_model_library() -> None:
    code = "import app.main, app.cli, sys; print(*sorted(module.partition('.')[0] for module in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=True
    )
    heavy = {
        "torch",
        "transformers",
        "peft",
        "sentence_transformers",
        "trl",
        "datasets",
        "accelerate",
        "matplotlib",
        "pandas",
        "sklearn",
        "scipy",
        "finetune",
    }
    assert heavy.isdisjoint(done.stdout.split())
