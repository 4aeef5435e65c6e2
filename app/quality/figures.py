"""What is reported of a release: figures, each with its interval and what it rests on."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import msgspec

from app.predictions import Where
from observability.estimates import Estimate, Method

DEFAULT_DAYS = 7
MAX_RELEASES = 50
"""Releases of one report: each takes up to three megabytes."""

Unit = Literal["share", "tokens", "seconds"]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure; an end of its interval is None where the rows cannot tell it."""

    name: str
    class_name: str | None
    """The class it is about, or None where it is about all."""
    unit: Unit
    value: float | None
    low: float | None
    high: float | None
    n: int
    effective_n: float
    method: Method
    doubts: list[str] = []
    """Why a guess may be wrong (`observability.calibration.Doubt`, and those of `app.quality.guesses`)."""


class ReleaseQuality(msgspec.Struct, frozen=True, kw_only=True):
    """How good one release's answers are."""

    release: str
    answers: int
    """Finished ones in the window."""
    labelled: int
    """Answers that figures from labels rest on."""
    labels_left_out: int
    """Labelled answers of unknown sampling probability beside others whose probability is known."""
    sampled: bool
    """Whether it is known how likely each labelled answer was to be labelled; else figures speak for these alone."""
    figures: list[Figure]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Which answers a report is about."""

    tenant: str | None
    """None is all tenants together."""
    where: Where
    only: tuple[str, ...] | None = None
    """Of these releases alone."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How good the answers of a window are, release by release."""

    since: datetime
    until: datetime
    computed_at: datetime
    labels_are_cut: bool
    """Whether there are more labelled answers than are read: then the newest count."""
    releases: list[ReleaseQuality]


def figure(
    name: str,
    estimate: Estimate,
    *,
    unit: Unit = "share",
    class_name: str | None = None,
    doubts: Sequence[str] = (),
) -> Figure:
    """Name an estimate."""
    return Figure(
        name=name,
        class_name=class_name,
        unit=unit,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n=estimate.n,
        effective_n=estimate.effective_n,
        method=estimate.method,
        doubts=list(doubts),
    )
