"""Releases: the immutable bundle that answers, and the names it is asked for by.

A release's digest is the SHA-256 of its canonical JSON (keys sorted, defaults written out), so that anybody who
holds the parts can verify it. `name@1` names one release for ever; the bare name means the one that serves now.
"""

import hashlib
import time
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec

from app import database
from app.errors import ModelNotFound
from retrieval.citations import CheckPolicy


class BadRelease(Exception):
    """A release that could not answer as it says."""


class Prompt(msgspec.Struct, frozen=True):
    """How a question and its passages become messages; `{sources}` and `{question}` are replaced in `template`.

    Raises:
        BadRelease: the template lacks one of them, so that the engine would never see it.
    """

    version: str
    template: str

    def __post_init__(self) -> None:
        for slot in ("{sources}", "{question}"):
            if slot not in self.template:
                raise BadRelease(f"The prompt template {self.version!r} has no {slot}: put it where they belong.")


class RetrievalPlan(msgspec.Struct, frozen=True):
    """What the release searches, how its answers are checked, and what replaces an unsupported one."""

    mode: Literal["off", "auto", "required"] = "auto"
    collection: str = "hallmark"
    search: Literal["hybrid", "dense", "sparse"] = "hybrid"
    fusion: Literal["dbsf", "rrf"] = "dbsf"
    top_k: int = 5
    context: Literal["passages", "sentences"] = "passages"
    policy: CheckPolicy = CheckPolicy()
    check: Literal["sentence", "end", "off"] = "sentence"
    fallback: Literal["extract", "abstain", "keep"] = "extract"
    abstention: str = "I can't answer that from the documents I have."


class Release(msgspec.Struct, frozen=True, dict=True):
    """Base model, adapter, prompt, retrieval and generation defaults as one thing: named, and gone back to, whole."""

    name: str
    number: int
    engine: str
    prompt: Prompt
    retrieval: RetrievalPlan = RetrievalPlan()
    served_model: str | None = None
    """The name the engine is asked for instead of its own base model's."""
    base_model: str | None = None
    base_revision: str | None = None
    adapter: str | None = None
    adapter_digest: str | None = None
    max_tokens: int = 256
    temperature: float | None = 0.0
    notes: str = ""

    @property
    def label(self) -> str:
        """`name@number`."""
        return f"{self.name}@{self.number}"

    @cached_property
    def canonical(self) -> bytes:
        """The bytes the digest is taken of; the number is the registry's and not part of them."""
        parts = {key: value for key, value in msgspec.to_builtins(self).items() if key != "number"}
        return msgspec.json.encode(parts, order="sorted")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `canonical`, in hex."""
        return hashlib.sha256(self.canonical).hexdigest()


class Releases:
    """The releases that serve, by the names callers use for them."""

    def __init__(self, *releases: Release) -> None:
        """The last release of a name is the one its bare name means."""
        self._by_name: dict[str, Release] = {}
        for release in releases:
            self._by_name[release.label] = release
            self._by_name[release.name] = release

    @property
    def serving(self) -> list[Release]:
        """One release a name, in name order."""
        return [release for name, release in sorted(self._by_name.items()) if name == release.name]

    def resolve(self, model: str) -> Release:
        """Find the release behind a public model name.

        Raises:
            ModelNotFound: with the names that are served.
        """
        try:
            return self._by_name[model]
        except KeyError:
            known = ", ".join(repr(name) for name in sorted(self._by_name))
            raise ModelNotFound(
                f"`model`: no release {model[:256]!r} is served; there is {known}.", param="model"
            ) from None


def enroll(path: Path, release: Release) -> Release:
    """Give a release its number in the database at `path`: the one it has, or the next of its name if it is new.

    The number belongs to the digest for ever, so that `name@1` in an old record still means the same parts.
    """
    with closing(database.connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        found = connection.execute(
            "SELECT number FROM releases WHERE name = ? AND digest = ?", (release.name, release.digest)
        ).fetchone()
        if found is None:
            found = connection.execute(
                "SELECT coalesce(max(number), 0) + 1 FROM releases WHERE name = ?", (release.name,)
            ).fetchone()
            connection.execute(
                "INSERT INTO releases (name, number, digest, canonical, created_at) VALUES (?, ?, ?, ?, ?)",
                (release.name, found[0], release.digest, release.canonical.decode(), time.time_ns() // 1_000_000),
            )
        connection.execute("COMMIT")
    return msgspec.structs.replace(release, number=found[0])
