"""Work that a process does beside requests, again and again, for as long as it lives."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

from app.errors import ServiceError

log = logging.getLogger(__name__)

MORE_SECONDS = 0.05
"""The pause after a step that says there is more to do: others get their turns."""


class Repeating:
    """Takes a step, pauses, and takes the next; use it in an `async with` block.

    A step that fails is told once, until one works again: an outage is one line in the log, whatever it lasts. Of an
    error that is not ours only the type is told, since what a driver says may quote content.

    Args:
        step: what is done; tells whether there is more to do at once.
        failing: how the line begins that says it does not work, as in "Alerts cannot be read".
        every_seconds: the pause between two steps.
        first_after_seconds: the pause before the first, for what has time until the start is over.
    """

    def __init__(
        self,
        step: Callable[[], Awaitable[bool | None]],
        *,
        failing: str,
        every_seconds: float,
        first_after_seconds: float = 0.0,
    ) -> None:
        self._step = step
        self._failing = failing
        self._every_seconds = every_seconds
        self._first_after_seconds = first_after_seconds
        self._is_failing = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=self._failing)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        await asyncio.sleep(self._first_after_seconds)
        while True:
            more = await self._attempt()
            await asyncio.sleep(MORE_SECONDS if more else self._every_seconds)

    async def _attempt(self) -> bool | None:
        try:
            more = await self._step()
        except ServiceError as error:
            self._tell(logging.WARNING, f"{error.code}: {error}")
        except Exception as error:  # noqa: BLE001 - what a driver says may quote content.
            self._tell(logging.ERROR, type(error).__name__)
        else:
            if self._is_failing:
                log.info("No longer: %s", self._failing)
            self._is_failing = False
            return more
        return False

    def _tell(self, level: int, why: str) -> None:
        if not self._is_failing:
            log.log(level, "%s; tried again every %g s (%s)", self._failing, self._every_seconds, why)
        self._is_failing = True
