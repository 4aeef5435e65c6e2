"""What is said of answers, told as OpenTelemetry events: who thinks what of which answer, without a word of theirs.

The main rule: nobody waits for it. What was accepted waits in a bounded queue; a task finds out which trace the answer
is in, and hands the event to the exporter, which has a bounded queue of its own.
"""

import asyncio
import logging
import re
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Protocol, Self

from app.errors import ServiceError
from app.feedback import Feedback, Label
from app.predictions import Traced
from observability.genai import Evaluation

log = logging.getLogger(__name__)

_CATEGORY: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_NOT_TRACED: Final = Traced()


class Events(Protocol):
    """Where events go."""

    @property
    def tells_evaluations(self) -> bool:
        """Whether events are exported."""
        ...

    def evaluated(self, evaluation: Evaluation) -> None:
        """Take one; does not wait."""
        ...


class Predictions(Protocol):
    """What is asked of the predictions on record."""

    async def traced(self, tenant: str, prediction_id: str) -> Traced | None:
        """Which trace a prediction is in."""
        ...


class Labels(Protocol):
    """What is asked of the labels on record."""

    async def get(self, tenant: str, label_id: str) -> Label:
        """One of them."""
        ...


class Evaluations:
    """Tells what is said of answers, as far as events are exported."""

    def __init__(self, events: Events, predictions: Predictions, labels: Labels, *, capacity: int = 1_000) -> None:
        self._events = events
        self._predictions = predictions
        self._labels = labels
        self._capacity = capacity
        self._waiting: deque[Feedback | Label | tuple[str, str]] = deque()
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0
        """How many were not told, because so many waited already."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what waits: it is on record, and telling it again is nobody's duty."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def feedback(self, row: Mapping[str, Any]) -> None:
        """Tell feedback as it is now on record."""
        if self._events.tells_evaluations:
            self._put(Feedback.of(dict(row)))

    def label(self, row: Mapping[str, Any]) -> None:
        """Tell a label as it is now on record."""
        if self._events.tells_evaluations:
            self._put(Label.of(dict(row)))

    def reviewed(self, tenant: str, label_id: str | None) -> None:
        """Tell the label that a review has written."""
        if label_id is not None and self._events.tells_evaluations:
            self._put((tenant, label_id))

    def _put(self, said: Feedback | Label | tuple[str, str]) -> None:
        if len(self._waiting) >= self._capacity:
            self.dropped += 1
            return
        self._waiting.append(said)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell_waiting(), name="evaluations")

    async def _tell_waiting(self) -> None:
        while self._waiting:
            said = self._waiting.popleft()
            try:
                label = said if isinstance(said, Feedback | Label) else await self._labels.get(*said)
                self._events.evaluated(evaluation(label, await self._traced(label)))
            except ServiceError:
                self.dropped += 1  # The database is away, or it is gone: what is said is on record, if anything is.
            except Exception:
                log.exception("what was said of an answer was not told by a defect of ours")

    async def _traced(self, said: Feedback | Label) -> Traced:
        if said.prediction_id is None:
            return _NOT_TRACED
        return await self._predictions.traced(said.tenant, said.prediction_id) or _NOT_TRACED


def evaluation(said: Feedback | Label, about: Traced) -> Evaluation:
    """Make the event: a score where there is one, and never the comment, the correction or the right answer."""
    if isinstance(said, Feedback):
        name, (value, label) = _feedback_name(said.category), _feedback_score(said)
    else:
        name, (value, label) = "label", _label_score(said, about)
    return Evaluation(
        name=name,
        value=value,
        label=label,
        source=said.source,
        prediction_id=said.prediction_id,
        conversation=said.conversation if isinstance(said, Feedback) else None,
        trace_id=about.trace_id,
        has_generation=about.has_generation,
        said_ns=said.said_at * 1_000_000,
    )


def _feedback_name(category: str | None) -> str:
    if category is None:
        return "feedback"
    # A category is a caller's own text, and is told where it is a name.
    return f"feedback.{category}" if _CATEGORY.fullmatch(category) else "feedback.other"


def _feedback_score(said: Feedback) -> tuple[float | None, str | None]:
    if said.withdrawn:
        return None, "withdrawn"
    if isinstance(said.rating, bool):
        return (1.0, "positive") if said.rating else (0.0, "negative")
    return (None, "text") if said.rating is None else (float(said.rating), None)


def _label_score(said: Label, about: Traced) -> tuple[float | None, str | None]:
    if said.withdrawn:
        return None, "withdrawn"
    if said.class_name is None or about.predicted_class is None:
        return None, "stated"
    return (1.0, "correct") if said.class_name == about.predicted_class else (0.0, "incorrect")
