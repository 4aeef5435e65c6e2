"""What is written beside an adapter, so that anybody can say what it was made of, and make it again.

The main rule: an adapter is its two files, written so that the same run gives the same bytes. Its digest is the one
that releases name it by, and the manifest is what the service's lineage takes for a training run.
"""

import hashlib
import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.config import TrainConfig
from finetune.dataset import canonical, sha256
from finetune.errors import BadConfig, BadOutput

MANIFEST = "manifest.json"
FORMAT = "hallmark-adapter/1"
ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
_OPTIONAL = ("bitsandbytes", "deepspeed", "flash-attn")


class Base:
    """The base model: where it is loaded from, what the engine calls it, and which it is exactly.

    Raises:
        BadConfig: there is no such model.
    """

    def __init__(self, config: TrainConfig) -> None:
        folder = Path(config.base).expanduser()
        self.digest: str | None = None
        """Of the model's files, where they lie here; on a hub the revision says which it is."""
        self.revision_on_hub: str | None = None
        if not folder.is_dir():
            self.location = config.base
            self.model = config.base_model or config.base
            self.revision = self.revision_on_hub = _revision_on_hub(config)
            return
        if not (folder / "config.json").is_file():
            raise BadConfig(f"base: {folder} has no config.json; name a folder in Hugging Face's layout")
        said = _read(folder / "hallmark.json")  # What the embedded engine writes beside the weights it converted.
        self.location = str(folder.resolve())
        self.model = config.base_model or said.get("model_id") or folder.resolve().name
        self.revision = config.base_revision or said.get("gguf_sha256")
        self.digest = folder_sha256(folder)


def _revision_on_hub(config: TrainConfig) -> str | None:
    """The commit that a name and a revision stand for today, so that all is loaded from it and it can be named."""
    if config.base.startswith((".", "/", "~")):
        raise BadConfig(f"base: there is no folder {config.base}; name a folder or an id on a model hub")
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.base, revision=config.base_revision)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadConfig(f"base: {config.base} is no folder, and cannot be had from the hub: {reason}") from error
    return getattr(found, "_commit_hash", None) or config.base_revision


def folder_sha256(folder: Path) -> str:
    """The digest of a model's folder: of the digests and names of its weights, its configuration and its tokenizer."""
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".jinja", ".model"}
    )
    return sha256("".join(f"{_file_sha256(folder / name)}  {name}\n" for name in names))


def adapter_digest(folder: Path) -> str:
    """The digest of an adapter, as `sha256sum adapter_config.json adapter_model.safetensors | sha256sum`."""
    return sha256("".join(f"{_file_sha256(folder / name)}  {name}\n" for name in (ADAPTER_CONFIG, WEIGHTS)))


def write_adapter(saved: Path, output: Path, base: Base) -> None:
    """Copy what peft saved to where it belongs, its configuration in one form and without this machine's paths.

    peft keeps `target_modules` as a set, whose order differs from process to process, and the base model's folder.
    """
    config = json.loads((saved / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base.model, "revision": base.revision}
    for name, value in config.items():
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            config[name] = sorted(value)
    text = json.dumps(config, sort_keys=True, indent=2, ensure_ascii=False)
    (output / ADAPTER_CONFIG).write_text(f"{text}\n", encoding="utf-8")
    shutil.copyfile(saved / WEIGHTS, output / WEIGHTS)


def library_versions() -> dict[str, str]:
    """The versions of what computes the adapter."""
    found = {name: version(name) for name in LIBRARIES}
    for name in _OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def hardware(device: str, processes: int) -> dict[str, Any]:
    """What the adapter is computed on."""
    import torch

    found: dict[str, Any] = {
        "device": device,
        "processes": processes,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    return found


def why_bytes_may_differ(config: TrainConfig, processes: int) -> list[str]:
    """The settings because of which the same inputs, twice on this machine, may give other bytes."""
    reasons = []
    if not config.deterministic:
        reasons.append("deterministic = false: operators may add numbers up in another order each time")
    if config.quantize != "none":
        reasons.append(f"quantize = {config.quantize!r}: bitsandbytes does not promise deterministic kernels")
    if processes > 1:
        reasons.append(f"{processes} processes: the order in which their gradients are added up is not fixed")
    return reasons


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, last of all and by one rename: where it is, the adapter is whole."""
    partial = output / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, sort_keys=True, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(output / MANIFEST)


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of a finished run; empty where there is none."""
    return _read(output / MANIFEST)


def verify_files(output: Path, manifest: dict[str, Any]) -> None:
    """Hold the adapter's files against its manifest.

    Raises:
        BadOutput: one is missing, or they are not those of the manifest.
    """
    try:
        found = adapter_digest(output)
    except OSError as error:
        raise BadOutput(f"{error.filename}: {error.strerror}; put it back, or train into another folder") from error
    wanted = manifest.get("adapter_digest")
    if found != wanted:
        raise BadOutput(
            f"{output}: its files have the digest {found}, the manifest says {wanted}; put back what was changed, or "
            "train into another folder"
        )


def registration(output: Path) -> dict[str, Any]:
    """The body with which the run is registered at `POST /v1/lineage/training-runs`.

    Raises:
        BadOutput: the folder holds no finished adapter, or not the one of its manifest.
    """
    manifest = read_manifest(output)
    if manifest.get("format") != FORMAT:
        raise BadOutput(f"{output / MANIFEST}: there is no manifest of a finished run; train the adapter first")
    verify_files(output, manifest)
    return {"id": manifest["run"], "manifest": manifest, "digest": sha256(canonical(manifest))}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
