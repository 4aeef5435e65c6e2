"""What served last, in a file: for a start while the database is down."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from app.releases import BadRelease, Release, stored_release
from app.rollouts import Rollout

log = logging.getLogger(__name__)


class _Kept(msgspec.Struct):
    number: int
    canonical: str
    digest: str


class _File(msgspec.Struct):
    rollouts: list[Rollout]
    releases: list[_Kept]


class Memory:
    """The file at `path`; its methods wait for the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, releases: Iterable[Release], rollouts: Sequence[Rollout]) -> None:
        """Write the releases of these rollouts, whole or not at all; a disk that refuses is told and no more."""
        kept = [_Kept(release.number, release.canonical.decode(), release.digest) for release in releases]
        draft = self._path.with_name(f"{self._path.name}.new")
        try:
            draft.write_bytes(msgspec.json.encode(_File(list(rollouts), kept)))
            draft.replace(self._path)
        except OSError as error:
            log.warning("What serves cannot be kept for a start without the database: %s", error)

    def recall(self) -> tuple[list[Release], list[Rollout]]:
        """Read what was kept last; nothing where there is none, or it does not verify."""
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=_File)
            return [stored_release(each.number, each.canonical, each.digest) for each in kept.releases], kept.rollouts
        except FileNotFoundError:
            return [], []
        except (OSError, msgspec.DecodeError, BadRelease) as error:
            log.error("What served last cannot be read from %s: %s", self._path, error)  # noqa: TRY400
            return [], []
