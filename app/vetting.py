"""Whether a release would answer as it says, asked before it may serve.

The main rule: what an engine passes over in silence is looked for here. TGI answers for an adapter it does not have
from its base model; so the adapter must be among those the engine is known to serve, and on TGI its first token must
not be exactly what the base model gives.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.engines import Engine, EngineInfo
from app.engines.dialects import DIALECTS, adapter_name
from app.errors import EngineRejected, InvalidRequest, ServiceError
from app.messages import Generation, Message, Sampling
from app.prompts import compose
from app.releases import Release

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What of an adapter's folder decides what it does."""

TEMPLATE_TOKENS = 32
"""What a chat template may add around one question, generously."""

PROBE_SECONDS = 30.0

SAMPLE_VALUE = "a value of a feature"


@dataclass(frozen=True, slots=True)
class Site:
    """What this service has, and a release must agree with."""

    engine: str
    """What releases call the engine group."""
    dialect: str = "tgi"
    served_model: str | None = None
    collection: str = "hallmark"
    fusion: str = "dbsf"
    passage_tokens: int = 200
    base_model: str | None = None
    """What the settings call the engine's base model, beside what the engine calls it."""
    adapter_folder: Path | None = None
    """Where adapters lie on this machine, each in a folder of its name."""
    adapter_folder_on_engine: Path | None = None
    """What the engine's machine calls that folder, where it is not the same."""


async def vet(release: Release, engine: Engine, site: Site) -> list[str]:
    """Say what keeps a release from serving here; nothing does if the list is empty.

    Raises:
        ServiceError: the engine cannot be asked at present.
    """
    problems = disagreements(release, await engine.describe(), site)
    if release.adapter and site.adapter_folder:
        problems += await asyncio.to_thread(_digest_problems, release, site.adapter_folder / release.adapter)
    if problems:
        return problems
    problems = await _context_problems(release, engine, site) + await _task_problems(release, engine)
    if release.adapter and site.dialect == "tgi" and await _answers_alike(engine, release.adapter):
        problems.append(
            f"`adapter`: the engine answers for {release.adapter!r} exactly as its base model does, which is what TGI "
            "does for an adapter it was not started with. Start it with `--lora-adapters`."
        )
    return problems


def disagreements(release: Release, info: EngineInfo, site: Site) -> list[str]:
    """What the release says otherwise than the engine and the settings, as far as both say it."""
    here = (
        ("engine", release.engine, site.engine, "it is held against the engine"),
        ("served_model", release.served_model, site.served_model, "this service asks that engine for"),
    )
    problems = [f"`{field}` is {said!r}; {by} {found!r}." for field, said, found, by in here if said != found]
    plan = release.retrieval
    if plan.mode != "off":
        here = (("collection", plan.collection, site.collection, ""), ("fusion", plan.fusion, site.fusion, ""))
        problems += [f"`retrieval.{field}` is {said!r}; here it is {found!r}." for field, said, found, _ in here
                     if said != found]  # fmt: skip
    known = [name for name in (info.model_id, site.base_model) if name]
    if release.base_model and known and release.base_model not in known:
        problems.append(f"`base_model` is {release.base_model!r}; the engine serves {info.model_id!r}.")
    if release.base_revision and info.revision and release.base_revision != info.revision:
        problems.append(f"`base_revision` is {release.base_revision!r}; the engine serves {info.revision!r}.")
    adapter = release.adapter and adapter_name(DIALECTS[site.dialect], release.adapter, release.adapter_digest)
    if adapter and adapter not in info.adapters:
        served = ", ".join(info.adapters) or "none"
        if adapter == release.adapter:
            how = (
                "Load it, and where the engine cannot list its adapters name it in the setting `adapters` of its group "
                "(HALLMARK_ENGINE_ADAPTERS)."
            )
        else:
            how = (
                "By that name, which holds its digest, it is loaded out of the `adapter_folder` of its group: have it "
                "there, and an engine that loads adapters while it runs; or start the engine with it by that name."
            )
        problems.append(f"`adapter`: the engine is not known to serve {adapter!r}, but {served}. {how}")
    return problems


def folder_digest(folder: Path) -> str:
    """The digest of an adapter's folder, as `sha256sum adapter_config.json adapter_model.safetensors | sha256sum`.

    Raises:
        OSError: one of the two files cannot be read.
    """
    lines = []
    for name in ADAPTER_FILES:
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class FolderDigests:
    """Looks after adapters' folders, and reads one again only when its files have changed."""

    def __init__(self) -> None:
        self._found: dict[tuple[Path, str | None], tuple[object, list[str]]] = {}

    def problems(self, release: Release, folder: Path) -> list[str]:
        """Say what the folder of a release's adapter is otherwise than the release says."""
        stamp = [_stamp(folder / name) for name in ADAPTER_FILES]
        key = (folder, release.adapter_digest)
        if key not in self._found or self._found[key][0] != stamp:
            self._found[key] = (stamp, _digest_problems(release, folder))
        return self._found[key][1]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None where it cannot be read."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _digest_problems(release: Release, folder: Path) -> list[str]:
    if not folder.is_dir():
        return []  # The adapter lies with its engine, on another machine.
    try:
        found = folder_digest(folder)
    except OSError as error:
        return [f"`adapter`: its folder {str(folder)!r} cannot be read: {error.strerror}."]
    if release.adapter_digest is None:
        return [f"`adapter_digest` is missing: the adapter's folder is on this machine, and its digest is {found}."]
    if release.adapter_digest != found:
        return [f"`adapter_digest` is {release.adapter_digest}; the folder {str(folder)!r} has {found}."]
    return []


async def _context_problems(release: Release, engine: Engine, site: Site) -> list[str]:
    """Whether the prompt has room for one passage and an answer of the default length."""
    info = await engine.describe()
    limit = info.max_total_tokens or info.max_input_tokens
    if limit is None:
        return []
    tokens = TEMPLATE_TOKENS
    if release.retrieval.mode != "off":
        tokens += site.passage_tokens
    if release.retrieval.mode != "off" or not release.task.is_answer or release.features:
        (told,) = compose([Message(role="user", content="?")], (), release.prompt, release.task, _samples(release))
        is_bare = release.task.is_answer and not release.features
        tokens += await engine.count_tokens(release.prompt.template if is_bare else told.text)
    if tokens + release.max_tokens <= limit:
        return []
    return [
        f"`max_tokens`: the prompt with one passage takes about {tokens} tokens and an answer {release.max_tokens}; "
        f"the engine has room for {limit}. Shorten `prompt.template` or lower `max_tokens`."
    ]


def _samples(release: Release) -> list[tuple[str, Any]] | None:
    """Features as long as most are."""
    named = [f"{use.view}:{name}" for use in release.features for name in use.names]
    return [(name, SAMPLE_VALUE) for name in named] or None


async def _task_problems(release: Release, engine: Engine) -> list[str]:
    """Whether the engine takes the labels or the schema that it is to be held to."""
    if release.task.is_answer:
        return []
    generation = Generation(
        messages=compose(
            [Message(role="user", content="What is a hallmark?")], (), release.prompt, release.task, _samples(release)
        ),
        adapter=release.adapter,
        adapter_digest=release.adapter_digest,
        sampling=Sampling(max_tokens=1, temperature=0.0),
        labels=release.task.labels,
        schema=release.task.schema,
    )
    try:
        async with asyncio.timeout(PROBE_SECONDS), aclosing(engine.generate(generation)) as batches:
            async for _ in batches:
                pass
    except (EngineRejected, InvalidRequest) as error:
        return [f"`task`: the engine cannot be held to it: {error.message}"]
    except (ServiceError, TimeoutError):
        pass  # What keeps the engine from answering at all shows elsewhere.
    return []


async def _answers_alike(engine: Engine, adapter: str) -> bool:
    """Whether the adapter's first token has the base model's very probabilities; False where the engine gives none."""
    found = []
    for each in (None, adapter):
        found.append(await _probabilities(engine, each))
        if not found[0]:
            return False
    return found[0] == found[1]


async def _probabilities(engine: Engine, adapter: str | None) -> Sequence[Any]:
    generation = Generation(
        messages=[Message(role="user", content="What is a hallmark?")],
        adapter=adapter,
        sampling=Sampling(max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=5),
    )
    found: list[Any] = []
    try:
        async with asyncio.timeout(PROBE_SECONDS), aclosing(engine.generate(generation)) as batches:
            async for batch in batches:
                for piece in batch:
                    found += (piece.logprobs or {}).get("content") or ()
    except (ServiceError, TimeoutError):
        return []  # What keeps the engine from answering at all shows elsewhere.
    return found
