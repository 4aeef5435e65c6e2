"""A folder of a Git repository as a place of documents, read by the git program.

The main rule: a repository is data. Nothing is checked out, so that no hook, filter, symbolic link or submodule of it
is ever acted on; only one state is fetched, and of that only the blobs that are wanted, where the server can.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from app.errors import InvalidRequest
from app.sources.source import MOST_FILE_BYTES, Content, FileFailure, SourceFailure, is_document

FETCH_SECONDS: Final = 900.0
"""Longest time for a fetch."""
_LOCAL_SECONDS: Final = 60.0
_SCHEMES: Final = ("https", "http", "ssh", "file")
_FILES: Final = ("100644", "100755")
_ENVIRONMENT: Final = (
    # Who is asked for a password could not answer: the command may run at night.
    "GIT_TERMINAL_PROMPT=0",
    # A server cannot redirect to a transport that runs a program.
    f"GIT_ALLOW_PROTOCOL={':'.join(_SCHEMES)}",
    "GIT_CONFIG_COUNT=2",
    "GIT_CONFIG_KEY_0=core.hooksPath",
    "GIT_CONFIG_VALUE_0=/dev/null",
    "GIT_CONFIG_KEY_1=fetch.fsckObjects",
    "GIT_CONFIG_VALUE_1=true",
)


class Repository:
    """The files of one commit below a folder, by their paths within it; use it in a `with` block."""

    def __init__(self, address: str) -> None:
        """Take `git+https://host/repository.git@ref#folder`; raises InvalidRequest for another form."""
        self._address = address
        self._url, self._ref, self._folder = _parts(address)
        self._copy = Path()
        self._blobs: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Fetch what the repository is like, without its files; raises SourceFailure."""
        if shutil.which("git") is None:
            raise SourceFailure("The git program is not there: install git.")
        self._copy = Path(tempfile.mkdtemp(prefix="hallmark-git-"))
        try:
            self._git("init", "--bare", "--quiet")
            self._git("remote", "add", "origin", self._url)
            self._fetch("--depth", "1", "origin", self._ref)
            self._blobs = self._listed()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)

    @property
    def name(self) -> str:
        """The repository's own name, and the folder in it."""
        own = urlsplit(self._url).path.rstrip("/").rpartition("/")[2].removesuffix(".git")
        return f"{own}/{self._folder}".rstrip("/")

    def names(self) -> list[str]:
        """The documents below the folder."""
        return sorted(self._blobs)

    def manifest(self) -> list[dict[str, str]]:
        """The documents with the ids of their blobs."""
        return [{"name": name, "etag": self._blobs[name]} for name in self.names()]

    def expect(self, names: Collection[str]) -> None:
        """Fetch the blobs of these at once."""
        missing = self._git("rev-list", "--objects", "--missing=print", "FETCH_HEAD").decode().splitlines()
        absent = {line[1:] for line in missing if line.startswith("?")}
        wanted = {self._blobs[name] for name in names} & absent
        if wanted:
            self._fetch("--stdin", "origin", given="\n".join(sorted(wanted)))

    def read(self, name: str) -> Content:
        """A file's bytes, and its blob's id."""
        blob = self._blobs[name]
        try:
            size_bytes = int(self._git("cat-file", "-s", blob))
            data = self._git("cat-file", "blob", blob) if size_bytes <= MOST_FILE_BYTES else b""
        except SourceFailure as error:
            raise FileFailure(f"It cannot be read: {error}") from error
        if size_bytes > MOST_FILE_BYTES:
            raise FileFailure(f"It has more than {MOST_FILE_BYTES:,} bytes.")
        return Content(data, blob)

    def _listed(self) -> dict[str, str]:
        rows = self._git("ls-tree", "-r", "-z", f"FETCH_HEAD:{self._folder}").decode(errors="replace").split("\0")
        found = (row.partition("\t") for row in rows if row)
        return {
            name: facts.split()[2]
            for facts, _, name in found
            if facts.split()[0] in _FILES and is_document(name) and name.isprintable()
        }

    def _fetch(self, *what: str, given: str = "") -> None:
        before: tuple[str, ...] = ()
        options: tuple[str, ...] = ("--quiet", "--no-tags", "--no-recurse-submodules", "--filter=blob:none")
        if given:
            # Told that we have the commit, a server takes it that we have its blobs, and leaves out what we ask for.
            before, options = ("-c", "fetch.negotiationAlgorithm=noop"), (*options, "--no-write-fetch-head")
        self._git(*before, "fetch", *options, *what, given=given, seconds=FETCH_SECONDS)

    def _git(self, *arguments: str, given: str = "", seconds: float = _LOCAL_SECONDS) -> bytes:
        command = ["env", *_ENVIRONMENT, "git", f"--git-dir={self._copy}", *arguments]
        try:
            done = subprocess.run(  # noqa: S603 - a list of arguments, without a shell.
                command, input=given.encode(), capture_output=True, check=False, timeout=seconds, start_new_session=True
            )
        except subprocess.TimeoutExpired as error:
            raise SourceFailure(f"{self._address}: git took more than {seconds:g} s.") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").splitlines()
            fatal = next((line for line in said if line.startswith("fatal:")), f"status {done.returncode}")
            raise SourceFailure(f"{self._address}: git says: {fatal[:300]}")
        return done.stdout


def _parts(address: str) -> tuple[str, str, str]:
    """The repository's URL, the ref and the folder of an address."""
    url, _, folder = address.removeprefix("git+").partition("#")
    parts = urlsplit(url)
    path, _, ref = parts.path.partition("@")
    if parts.scheme not in _SCHEMES or parts.query or not path.strip("/") or parts.password:
        raise InvalidRequest(
            "That is no repository: write git+https://host/repository.git@branch#folder, without a password, which "
            "git's credential helper can give."
        )
    if not re.fullmatch(r"(?!-)[\w./+-]*", ref):
        raise InvalidRequest(f"{ref!r} is no branch, tag or commit.")
    return parts._replace(path=path).geturl(), ref or "HEAD", folder.strip("/")
