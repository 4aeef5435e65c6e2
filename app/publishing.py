"""The way of a trained adapter to its canary: verified, put where engines look, registered, named by a release, tried.

The main rule: nothing is taken on trust. The folder is held against its manifest, the manifest against the engine, and
the dataset against what is registered, before anything is changed. Every step may be done again: it then changes
nothing. All goes by the public API but one step, which needs the file system: putting the adapter's folder in place.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from app.client import Client, ServiceFailure

MANIFEST = "manifest.json"
FORMAT = "hallmark-adapter/1"
FILES = ("adapter_config.json", "adapter_model.safetensors", MANIFEST)
SPLITS = ("train", "heldout")

Tell = Callable[[str], object]
SHOWN_DIGITS = 16
"""So many of a digest's digits are in the name of its adapter: 64 bits, so that no two meet."""


class NotPublished(ServiceFailure):
    """What was found keeps the adapter from being published; the message says what, and what to do."""


class NeedsRestart(ServiceFailure):
    """The engine takes adapters at its start only; the message has the arguments."""


class DatasetName(msgspec.Struct, frozen=True):
    """Which version of which dataset an adapter was trained on."""

    name: str
    version: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What of an adapter's manifest is needed here."""

    run: str
    adapter_digest: str
    base_model: str
    format: str = ""
    base_revision: str | None = None
    dataset_digest: str | None = None
    dataset: DatasetName | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A folder that is what its manifest says."""

    folder: Path
    manifest: Manifest
    written: Mapping[str, Any]
    """The manifest, all of it."""

    def name_for(self, release: str) -> str:
        """What the engine calls it: the release's name, and enough of its digest to be of this adapter alone."""
        return f"{release}-{self.manifest.adapter_digest[:SHOWN_DIGITS]}"


def read_adapter(folder: Path) -> Adapter:
    """Read a folder that `hallmark-train` wrote, and verify it.

    Raises:
        NotPublished: it is none, is not finished, or its files are not those that were trained.
    """
    from app.vetting import folder_digest

    try:
        content = (folder / MANIFEST).read_bytes()
        written = msgspec.json.decode(content, type=dict[str, Any])
        manifest = msgspec.convert(written, Manifest)
        found = folder_digest(folder)
    except OSError as error:
        raise NotPublished(f"{error.filename}: {error.strerror}. Name the folder of a finished run.") from error
    except msgspec.DecodeError as error:
        raise NotPublished(f"{folder / MANIFEST}: {error}. Name the folder of a finished run.") from error
    if manifest.format != FORMAT:
        raise NotPublished(f"{folder / MANIFEST}: its format is {manifest.format!r}; {FORMAT!r} is read.")
    if found != manifest.adapter_digest:
        raise NotPublished(
            f"{folder}: its files have the digest {found}; the manifest says {manifest.adapter_digest}. They were "
            "changed after training: train again."
        )
    return Adapter(folder, manifest, written)


def stable_release(client: Client, name: str, *, for_canary: bool = False) -> dict[str, Any]:
    """The release that answers for a name.

    Raises:
        NotPublished: a canary is wanted, and one is being tried already.
        ServiceFailure: there is no such rollout, or the service does not answer.
    """
    rollout = client.call("GET", f"/v1/rollouts/{name}")
    if for_canary and rollout["canary"]:
        raise NotPublished(
            f"{rollout['canary']} is being tried already. Promote it or roll it back first: `hallmark rollouts`."
        )
    return client.call("GET", f"/v1/releases/{rollout['stable']}")


def engine_group(client: Client, release: Mapping[str, Any]) -> dict[str, Any]:
    """The engine group of a release.

    Raises:
        ServiceFailure: it cannot be asked at present.
    """
    name = release["content"]["engine"]
    groups: list[dict[str, Any]] = client.call("GET", "/v1/engines")["data"]
    found = next((group for group in groups if group["name"] == name), None)
    if found is None:
        raise ServiceFailure(f"{release['id']} names the engine {name!r}, which the service does not have any more.")
    if found["problem"]:
        raise ServiceFailure(f"The engine {name!r} cannot be asked at present: {found['problem']}.")
    return found


def check_base(adapter: Adapter, group: Mapping[str, Any]) -> None:
    """Refuse an adapter of another base model, or of another revision of it."""
    manifest = adapter.manifest
    if group["base_models"] and manifest.base_model not in group["base_models"]:
        raise NotPublished(
            f"The adapter was trained on {manifest.base_model!r}; the engine {group['name']!r} serves "
            f"{' or '.join(map(repr, group['base_models']))}. Train on that, or set `base_model` to what it calls it."
        )
    theirs, ours = group["base_revision"], manifest.base_revision
    if theirs and ours and theirs != ours:
        raise NotPublished(
            f"The adapter was trained on the revision {ours} of {manifest.base_model}; the engine serves {theirs}."
        )


def register(client: Client, adapter: Adapter, dataset: Path | None = None) -> None:
    """Make the adapter's training run and its dataset known to lineage; the dataset from its export if it is not yet.

    Raises:
        NotPublished: the dataset is not registered, or its export is of another.
    """
    manifest = adapter.manifest
    if manifest.dataset_digest is None:
        raise NotPublished(f"{adapter.folder / MANIFEST}: it names no `dataset_digest`, so nothing could be traced.")
    if not _is_registered(client, manifest.dataset_digest):
        if dataset is None:
            raise NotPublished(
                f"The dataset {manifest.dataset_digest} is not registered. Give the folder of its export (--dataset)."
            )
        client.call("POST", "/v1/lineage/datasets", json=_described(dataset, manifest.dataset_digest))
    body = {"id": manifest.run, "manifest": adapter.written, "digest": _digest(adapter.written)}
    client.call("POST", "/v1/lineage/training-runs", json=body)


def place(adapter: Adapter, name: str, folder: Path) -> Path:
    """Copy the adapter into a folder under its name, whole or not at all; one that is there stays as it is.

    Raises:
        NotPublished: something else has the name, or the folder is not on this machine.
    """
    if not folder.is_dir() and not folder.parent.is_dir():
        raise NotPublished(
            f"The engine's adapters lie in {folder} on the service's machine, which is not here. Run this there, or "
            "mount it and name it with --adapters."
        )
    target = folder / name
    if target.exists():
        return _verified(adapter, target)
    folder.mkdir(exist_ok=True)
    draft = folder / f".{name}.{os.getpid()}.partial"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for each in FILES:
            _copy(adapter.folder / each, draft / each)
        _verified(adapter, draft)
        draft.rename(target)
    except OSError as error:
        if target.exists():  # Another was quicker.
            return _verified(adapter, target)
        raise NotPublished(f"{error.filename}: {error.strerror}; the adapter could not be put there.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def draft_release(
    client: Client, adapter: Adapter, stable: Mapping[str, Any], group: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Create the release that is the stable one but for its adapter, and have it vetted.

    Raises:
        NeedsRestart: the engine has to be started with the adapter first.
        NotPublished: it cannot serve, for another reason.
    """
    manifest, content = adapter.manifest, stable["content"]
    trained_on = f"{manifest.dataset.name} {manifest.dataset.version}" if manifest.dataset else manifest.dataset_digest
    given = {
        **content,
        "adapter": name,
        "adapter_digest": manifest.adapter_digest,
        "base_model": content["base_model"] or manifest.base_model,
        "base_revision": manifest.base_revision or content["base_revision"],
        "lineage": {"training_run": manifest.run, "dataset_digest": manifest.dataset_digest},
        "notes": f"{stable['id']} with the adapter of the run {manifest.run}, trained on {trained_on}.",
    }
    made = client.call("POST", "/v1/releases", json=given)
    if not made["problems"]:
        return made
    told = " ".join(made["problems"])
    if group["loads_adapters"] or name in group["adapters"]:
        raise NotPublished(f"{made['id']} cannot serve: {told}")
    raise NeedsRestart(f"{restart_arguments(group, name)}\n\n{made['id']} waits for that: {told}")


def restart_arguments(group: Mapping[str, Any], name: str) -> str:
    """What to start the engine with, and the service, so that both know the adapter."""
    names = [*group["adapters"], *([] if name in group["adapters"] else [name])]
    folder = group["adapter_folder_on_engine"] or group["adapter_folder"]
    paths = [f"{each}={folder}/{each}" for each in names]
    arguments = {
        "tgi": f"LORA_ADAPTERS={','.join(paths)}",
        "sglang": f"--enable-lora --lora-paths {' '.join(paths)}",
    }
    engine = [arguments.get(dialect, f"its adapters: {' '.join(paths)}") for dialect in group["dialects"]]
    listed = msgspec.json.encode(names).decode()
    return (
        f"The engine {group['name']!r} takes adapters at its start only. Start it again with\n\n    "
        + "\n    ".join(engine)
        + f"\n\nand the service with these in the setting `adapters` of that engine:\n\n    {listed}"
    )


def publish(
    client: Client,
    adapter: Adapter,
    stable: Mapping[str, Any],
    *,
    adapters: Path | None = None,
    dataset: Path | None = None,
    tell: Tell,
) -> dict[str, Any]:
    """Do all up to the release: check, register, put in place, and have a release made, vetted, its adapter loaded.

    adapters: the engine's folder of adapters, if this machine has it elsewhere than the service says.
    dataset: the dataset's export, if it is not registered.

    Raises:
        NeedsRestart: the engine has to be started with the adapter; then this goes on where it was.
        NotPublished: what was found keeps it from being published.
    """
    group = engine_group(client, stable)
    check_base(adapter, group)
    folder = adapters or (Path(group["adapter_folder"]) if group["adapter_folder"] else None)
    if folder is None:
        raise NotPublished(
            f"The service does not know where the adapters of its engine {group['name']!r} lie: set `adapter_folder` "
            "of that engine (HALLMARK_ENGINE_ADAPTER_FOLDER), or name the folder with --adapters."
        )
    register(client, adapter, dataset)
    tell(f"registered the run {adapter.manifest.run}")
    name = adapter.name_for(stable["name"])
    tell(f"put into {place(adapter, name, folder)}")
    return draft_release(client, adapter, stable, group, name)


def start_canary(
    client: Client, label: str, share: float, *, why: str = "", plan: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Try the release on a share of the conversations, watched by its plan."""
    body = {"release": label, "share": share, "why": why[:2_000], **({"plan": plan} if plan else {})}
    return client.call("POST", f"/v1/rollouts/{label.partition('@')[0]}/canary", json=body)


def _is_registered(client: Client, digest: str) -> bool:
    try:
        client.call("GET", f"/v1/lineage/datasets/{digest}", params={"limit": 1})
    except ServiceFailure as error:
        if error.status == 404:
            return False
        raise
    return True


def _described(folder: Path, digest: str) -> dict[str, Any]:
    """What of an exported dataset is registered: its manifest, and its rows' digests and origins."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=dict[str, Any])
        rows = [row for split in SPLITS for row in _rows(folder / f"{split}.jsonl")]
    except OSError as error:
        raise NotPublished(f"{error.filename}: {error.strerror}. Name the folder of an exported dataset.") from error
    except (msgspec.DecodeError, KeyError) as error:
        raise NotPublished(f"{folder}: it is no exported dataset: {error}.") from error
    if manifest.get("digest") != digest:
        raise NotPublished(f"{folder}: its digest is {manifest.get('digest')}; the adapter was trained on {digest}.")
    return {"manifest": manifest, "manifest_digest": _digest(manifest), "rows": rows}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    for line in file.read_bytes().splitlines():
        row = msgspec.json.decode(line, type=dict[str, Any])
        origin = {name: row.get(name) for name in ("prediction_id", "label_id")}
        yield {"digest": row["row"], "content_digest": row["content_digest"], **origin}


def _digest(manifest: Mapping[str, Any]) -> str:
    from app.lineage import canonical  # With the database behind it, which no other command needs.

    return sha256(canonical(manifest).encode()).hexdigest()


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write)
        write.flush()
        os.fsync(write.fileno())


def _verified(adapter: Adapter, folder: Path) -> Path:
    """The folder, if it holds this adapter."""
    from app.vetting import folder_digest

    try:
        found: str | None = folder_digest(folder)
    except OSError:
        found = None
    if found != adapter.manifest.adapter_digest:
        raise NotPublished(
            f"{folder} is there and holds another adapter ({found}). Nothing is written over: move it away."
        )
    return folder
