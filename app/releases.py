"""Releases: the immutable bundle that answers, and the names it is asked for by.

A release's digest is the SHA-256 of its canonical JSON (keys sorted, defaults written out), so that anybody who
holds the parts can verify it. `name@1` names one release for ever; the bare name means what its rollout says.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from random import random
from typing import Annotated, Any, Literal

import msgspec

from app.errors import InvalidRequest, ModelNotFound, invalid_field
from app.rollouts import Lot, Role, Rollout
from app.tasks import Task
from retrieval.citations import CheckPolicy
from retrieval.variety import Variety

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
FEATURE_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
LABEL_PATTERN = r"^([a-z0-9][a-z0-9._-]{0,63})@([1-9][0-9]{0,8})$"

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Short = Annotated[str, msgspec.Meta(max_length=512)]
Text = Annotated[str, msgspec.Meta(max_length=100_000)]
FeatureName = Annotated[str, msgspec.Meta(pattern=FEATURE_NAME_PATTERN)]
EntityKey = Annotated[str, msgspec.Meta(pattern=r"^(request|user|conversation|header:[a-z0-9][a-z0-9-]{0,63})$")]


BESIDE = frozenset({"alerts"})
"""What a release's file may say that is kept beside the release and is no part of its digest."""


_LATER = {"per_document": None, "mmr": None, "rewrite": False}
"""What a plan of retrieval may say by now, and what it has where it does not: then it is no part of the digest."""


class BadRelease(ValueError):
    """A release that could not answer as it says."""


class Prompt(msgspec.Struct, frozen=True):
    """How a question and its passages become messages; `{sources}` and `{question}` are replaced in `template`.

    `{fence}` is a word for the marks around the sources, which their authors cannot know. That of a task may also have
    `{labels}` or `{schema}`, and needs `{sources}` only where passages are looked up. That of a release with features
    has `{features}`.
    """

    version: Short
    template: Text


class RetrievalPlan(msgspec.Struct, frozen=True):
    """What the release searches, how its answers are checked, and what replaces an unsupported one."""

    mode: Literal["off", "auto", "required"] = "auto"
    collection: Short = "hallmark"
    search: Literal["hybrid", "dense", "sparse"] = "hybrid"
    fusion: Literal["dbsf", "rrf"] = "dbsf"
    top_k: Annotated[int, msgspec.Meta(ge=1, le=50)] = 5
    per_document: Annotated[int, msgspec.Meta(ge=1, le=50)] | None = None
    """So many passages of one document at most."""
    mmr: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    """How much relevance counts beside being unlike the passages taken already; None: alone."""
    rewrite: bool = False
    """Whether the engine makes the last question of a conversation into one that can be searched by itself."""
    context: Literal["passages", "sentences"] = "passages"
    policy: CheckPolicy = CheckPolicy()
    check: Literal["sentence", "end", "off"] = "sentence"
    fallback: Literal["extract", "abstain", "keep"] = "extract"
    abstention: Text = "I can't answer that from the documents I have."

    @property
    def variety(self) -> Variety:
        """How unlike each other the passages have to be."""
        return Variety(self.per_document, self.mmr)


class FeatureUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Features of one view that a release puts into its prompt, and whose they are in a request."""

    view: FeatureName
    entity: FeatureName
    """What the view is of."""
    names: Annotated[tuple[FeatureName, ...], msgspec.Meta(min_length=1, max_length=50)]
    key: EntityKey = "request"
    """Where the entity's key is from: `features.entity` of the request, its user, its conversation, or a header."""
    required: bool = False
    """Whether a request is refused where one of them is missing, too old, or cannot be read."""
    defaults: Annotated[dict[FeatureName, str | int | float | bool], msgspec.Meta(max_length=50)] = {}
    """What stands in the prompt for those; one without a default is left out."""

    def __post_init__(self) -> None:
        """Check what a type cannot say; raises ValueError."""
        if len(set(self.names)) < len(self.names):
            raise BadRelease(f"`features.names`: one of {self.view!r} is named twice.")
        strange = sorted(set(self.defaults) - set(self.names))
        if strange:
            raise BadRelease(f"`features.defaults`: {strange[0]!r} is none of the `names` of {self.view!r}.")
        if self.required and self.defaults:
            raise BadRelease(f"`features.defaults`: those of {self.view!r} are required: nothing stands for them.")


class Lineage(msgspec.Struct, frozen=True):
    """What the adapter was made by, and of."""

    training_run: Short | None = None
    dataset_digest: Digest | None = None


class Release(msgspec.Struct, frozen=True, dict=True):
    """Base model, adapter, prompt, retrieval and generation defaults as one thing: named, and gone back to, whole.

    Raises:
        BadRelease: its parts do not belong together.
    """

    name: Name
    number: int
    engine: Short
    prompt: Prompt
    retrieval: RetrievalPlan = RetrievalPlan()
    task: Task = Task()
    served_model: Short | None = None
    """The name the engine is asked for instead of its own base model's."""
    base_model: Short | None = None
    base_revision: Short | None = None
    adapter: Short | None = None
    adapter_digest: Digest | None = None
    """Of its folder: see `app.vetting.folder_digest`."""
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 256
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = 0.0
    fallback: Annotated[str, msgspec.Meta(pattern=rf"^extractive$|{LABEL_PATTERN}")] | None = None
    """What answers while this release's engine cannot: another release by its label, or the passages themselves."""
    lineage: Lineage = Lineage()
    notes: Text = ""
    features: Annotated[tuple[FeatureUse, ...], msgspec.Meta(max_length=16)] = ()
    """What is known of whom a request is about: see `app.features`."""

    def __post_init__(self) -> None:
        is_answer, template = self.task.is_answer, self.prompt.template
        has_sources = self.retrieval.mode != "off" or (is_answer and not self.features)
        slots = ["{question}"] + ["{sources}"] * has_sources + ["{features}"] * bool(self.features)
        for slot in slots:
            if slot not in template:
                raise BadRelease(
                    f"`prompt.template`: {self.prompt.version!r} has no {slot}, so that the engine would never see it: "
                    "put it where it belongs."
                )
        if len({use.view for use in self.features}) < len(self.features):
            raise BadRelease("`features`: name all features of a view in one place.")
        if self.fallback == "extractive" and not is_answer:
            raise BadRelease("`fallback`: passages by themselves are an answer, and fulfil no other task.")

    @cached_property
    def label(self) -> str:
        """`name@number`."""
        return f"{self.name}@{self.number}"

    @cached_property
    def canonical(self) -> bytes:
        """The bytes the digest is taken of; the number is the registry's and not part of them.

        Without features there is no word of them: a release from before there were any has the digest it had. So it
        is with what retrieval can do by now and is not asked for.
        """
        without = {"number"} if self.features else {"number", "features"}
        parts = {key: value for key, value in msgspec.to_builtins(self).items() if key not in without}
        for name, unasked in _LATER.items():
            if parts["retrieval"][name] is unasked:
                del parts["retrieval"][name]
        return msgspec.json.encode(parts, order="sorted")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `canonical`, in hex."""
        return hashlib.sha256(self.canonical).hexdigest()


def read_release(content: bytes, *, is_toml: bool, defaults: Mapping[str, Any]) -> Release:
    """Read a release from the file that describes it, with `defaults` for what it leaves out.

    What `defaults` has under `engines`, by a group's name, goes before the rest for a release on that group, and what
    it has under `tasks`, by a kind, for a release with that task.

    Raises:
        InvalidRequest: names the field and what it should be.
    """
    given = {name: value for name, value in parts_of(content, is_toml=is_toml).items() if name not in BESIDE}
    if "number" in given:
        raise InvalidRequest("`number` is given by the registry: leave it out.", param="number")
    try:
        release = msgspec.convert(_completed(given, defaults), Release)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from error
    _refuse_unknown(given, msgspec.to_builtins(release))
    return release


def parts_of(content: bytes, *, is_toml: bool) -> dict[str, Any]:
    """Read the file that describes a release as it is; raises InvalidRequest where it is no TOML or JSON."""
    try:
        decode = msgspec.toml.decode if is_toml else msgspec.json.decode
        given: dict[str, Any] = decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        kind = "TOML" if is_toml else "JSON"
        raise InvalidRequest(f"The release is not valid {kind}: {error}.") from error
    return given


def stored_release(number: int, canonical: str, digest: str) -> Release:
    """Make a release of what the registry keeps; its digest is that of the bytes kept, whatever later fields there are.

    Raises:
        BadRelease: the digest does not verify, or a newer Hallmark made the release.
    """
    written = canonical.encode()
    if hashlib.sha256(written).hexdigest() != digest:
        raise BadRelease(f"its content does not have the digest {digest}: it was changed after it was made.")
    try:
        parts = msgspec.json.decode(written, type=dict[str, Any])
        release = msgspec.convert(parts | {"number": number}, Release)
        _refuse_unknown(parts, msgspec.to_builtins(release))
    except (msgspec.DecodeError, InvalidRequest) as error:
        raise BadRelease(f"this version cannot read it: {error}") from error
    vars(release).update(canonical=written, digest=digest)
    return release


def differences(a: Release, b: Release) -> list[tuple[str, Any, Any]]:
    """The fields in which two releases differ, by dotted path, with the value in each; None where one has none."""
    left, right = (dict(_flat(msgspec.json.decode(release.canonical))) for release in (a, b))
    paths = dict.fromkeys((*left, *right))
    return [(path, left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)]


class Choice(msgspec.Struct, frozen=True):
    """The release that answers a request, why, and the one that answers it too, unseen."""

    release: Release
    role: Role
    shadow: Release | None = None


class _Split:
    """How the requests of one name are shared out; made once for each state of its rollout."""

    __slots__ = ("_canaries", "_in_canary", "_shadow_rate", "_stables")

    def __init__(self, rollout: Rollout, releases: Mapping[int, Release]) -> None:
        shadow = releases.get(rollout.shadow) if rollout.shadow is not None and not rollout.paused else None
        canary = releases.get(rollout.canary) if rollout.canary is not None and not rollout.paused else None
        self._shadow_rate = rollout.shadow_rate if shadow is not None else 0.0
        self._stables = _choices(releases[rollout.stable], "stable", shadow)
        self._canaries = _choices(canary, "canary", shadow) if canary is not None else None
        self._in_canary = Lot(rollout.name, rollout.seed, rollout.share) if canary is not None else None

    def choose(self, identity: str | None) -> Choice:
        choices = self._stables
        if self._in_canary is not None and self._canaries is not None and identity in self._in_canary:
            choices = self._canaries
        return choices[self._shadow_rate > 0.0 and random() < self._shadow_rate]  # noqa: S311 - chance, not secrecy.

    @property
    def members(self) -> list[Release]:
        """The releases that answer, stable first."""
        return [choices[0].release for choices in (self._stables, self._canaries) if choices is not None]


class _Pinned:
    __slots__ = ("_choice",)

    def __init__(self, release: Release) -> None:
        self._choice = Choice(release, "pinned")

    def choose(self, identity: str | None) -> Choice:  # noqa: ARG002 - who asks makes no difference here.
        return self._choice


class Releases:
    """The releases that serve, by the names callers use for them; the registry replaces them when they change."""

    def __init__(self, *releases: Release) -> None:
        """The last release of a name is the one its bare name means."""
        self._splits: dict[str, _Split] = {}
        self._routes: dict[str, _Split | _Pinned] = {}
        stable = {release.name: release.number for release in releases}
        rollouts = [Rollout(name=name, revision=0, stable=number) for name, number in stable.items()]
        self.replace(releases, rollouts)

    def replace(self, releases: Iterable[Release], rollouts: Iterable[Rollout]) -> list[str]:
        """Serve these from now on; give the names whose stable release is not among them, which stay as they are."""
        numbered: dict[str, dict[int, Release]] = {}
        for release in releases:
            numbered.setdefault(release.name, {})[release.number] = release
        splits, kept = {}, []
        for rollout in rollouts:
            found = numbered.get(rollout.name, {})
            if rollout.stable in found:
                splits[rollout.name] = _Split(rollout, found)
            else:
                kept.append(rollout.name)
                if rollout.name in self._splits:
                    splits[rollout.name] = self._splits[rollout.name]
        pinned = {release.label: _Pinned(release) for found in numbered.values() for release in found.values()}
        self._splits, self._routes = splits, {**pinned, **splits}
        return kept

    @property
    def serving(self) -> list[Release]:
        """The stable release of each name, in name order."""
        return [split.members[0] for _, split in sorted(self._splits.items())]

    @property
    def answering(self) -> list[Release]:
        """Every release that gets requests by its bare name: the stable ones and the canaries."""
        return [release for _, split in sorted(self._splits.items()) for release in split.members]

    def resolve(self, model: str, identity: str | None = None) -> Choice:
        """Choose the release behind a public model name for whoever asks (`rollouts.identity_of`).

        Raises:
            ModelNotFound: with the names that are served.
        """
        found = self._routes.get(model)
        if found is None:
            names = [*sorted(self._splits), *sorted(self._routes.keys() - self._splits.keys())]
            known = ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise ModelNotFound(
                f"`model`: no release {model[:256]!r} is served; there is {known or 'none'}.", param="model"
            )
        return found.choose(identity)


def parse_label(label: str, *, param: str = "release") -> tuple[str, int]:
    """Split `name@3`; raises InvalidRequest if it is something else."""
    found = re.fullmatch(LABEL_PATTERN, label)
    if found is None:
        raise InvalidRequest(f"`{param}`: a release is written `name@3`, unlike {label[:100]!r}.", param=param)
    return found[1], int(found[2])


def _choices(release: Release, role: Role, shadow: Release | None) -> tuple[Choice, Choice]:
    """The choice without and with a shadow; a release is not compared with itself."""
    beside = shadow if shadow is not release else None
    return Choice(release, role), Choice(release, role, beside)


def _completed(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, over what its kind of task has, over what its engine has, over what all have."""
    parts = {name: value for name, value in defaults.items() if name not in ("engines", "tasks")}
    task = given.get("task")
    kind = task.get("kind") if isinstance(task, Mapping) else None
    for group, name in (("engines", given.get("engine")), ("tasks", kind)):
        own = defaults.get(group, {}).get(name, {}) if isinstance(name, str) else {}
        parts |= {**own, "retrieval": {**parts.get("retrieval", {}), **own.get("retrieval", {})}}
    retrieval = given.get("retrieval", {})
    if isinstance(retrieval, Mapping):
        retrieval = {**parts["retrieval"], **retrieval}
    return {**parts, **given, "retrieval": retrieval, "number": 0}


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any], path: str = "") -> None:
    """Refuse a field that nothing was made of; what was read back from `given` is `known`."""
    for key, value in given.items():
        if key not in known:
            near = get_close_matches(key, [name for name in known if name != "number"], n=1)
            hint = f"did you mean `{path}{near[0]}`?" if near else f"there are {', '.join(sorted(known))}."
            raise InvalidRequest(f"`{path}{key}`: a release has no such field; {hint}", param=f"{path}{key}")
        inner = known[key]
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            _refuse_unknown(value, inner, f"{path}{key}.")


def _flat(parts: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in parts.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
