"""Whether the service could answer now, part by part.

The main rule: anybody may ask, as often as they like. So the parts are asked at most once a second whoever asks, none
is waited for longer than a prober would, and what is told is a short reason; the whole of it goes to the log.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 2.0
BELIEVED_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a part is not ready: in words for anybody, and for the log."""

    reason: str
    detail: str = ""
    blocks: bool = True
    """False of what is told although the part does its work."""


Check = Callable[[], Awaitable[Problem | None]]
"""Asks one part whether it is ready: None, or what is wrong."""


class Readiness:
    """Asks the parts by their checks, all at once, and believes the answer for a moment."""

    def __init__(
        self,
        checks: Mapping[str, Check],
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        believed_seconds: float = BELIEVED_SECONDS,
    ) -> None:
        self._checks = checks
        self._patience_seconds = patience_seconds
        self._believed_seconds = believed_seconds
        self._asking = asyncio.Lock()
        self._found: dict[str, Problem | None] = {}
        self._until = 0.0

    async def problems(self) -> dict[str, str | None]:
        """Give for each part why it is not ready, or None."""
        found = await self._look()
        return {name: problem.reason if problem and problem.blocks else None for name, problem in found.items()}

    async def notes(self) -> dict[str, str]:
        """Give what is to be said of parts that are ready."""
        found = await self._look()
        return {name: problem.reason for name, problem in found.items() if problem and not problem.blocks}

    async def _look(self) -> dict[str, Problem | None]:
        async with self._asking:
            if monotonic() >= self._until:
                found = await asyncio.gather(*map(self._ask, self._checks.values()))
                self._note(dict(zip(self._checks, found, strict=True)))
                self._until = monotonic() + self._believed_seconds
            return self._found

    async def _ask(self, check: Check) -> Problem | None:
        try:
            async with asyncio.timeout(self._patience_seconds):
                return await check()
        except TimeoutError:
            return Problem(f"did not answer in {self._patience_seconds:g} s")
        except Exception as error:  # noqa: BLE001 - a defect of a check is its part's problem, and told as one.
            return Problem("failed while it was checked", f"{type(error).__name__}: {error}")

    def _note(self, found: dict[str, Problem | None]) -> None:
        for name, problem in found.items():
            if problem == self._found.get(name):
                continue
            if problem is None or not problem.blocks:
                log.info("%s is ready again", name)
            else:
                log.warning("%s is not ready: %s", name, " - ".join(filter(None, (problem.reason, problem.detail))))
        self._found = found
