"""Whether a rule's condition holds: yes, no, or nothing can be said, with the figures that say so.

The main rule: `None` is an answer. With too few answers, or an interval on both sides of a bound, nothing is known, and
what is not known neither raises an alert nor ends one.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from app.alerts.facts import Counts, Facts, Target
from app.alerts.rules import BurnWindow, Rule
from app.drift import UNKNOWN, DriftState
from app.quality import Figure
from observability.estimates import wilson

MAX_EXAMPLES = 10


class Finding(msgspec.Struct, frozen=True):
    """What is found of a condition: whether it is bad, the words for it, and the figures."""

    bad: bool | None
    why: str
    facts: dict[str, Any] = {}


class DriftSource(Protocol):
    """Whoever knows of drift: `app.drift.Drift`."""

    async def state(self, tenant: str, release: str) -> DriftState:
        """The state of a tenant's traffic on a release."""
        ...


async def judge(rule: Rule, target: Target, facts: Facts, drift: DriftSource | None) -> Finding:
    """Find out whether a rule's condition holds for a release.

    Raises:
        Unavailable: the database does not answer.
    """
    if rule.kind == "drift":
        return await _drift(rule, target, facts.tenant, drift)
    return await _JUDGES[rule.kind](rule, target, facts)


async def _threshold(rule: Rule, target: Target, facts: Facts) -> Finding:
    found = await _figure(rule, target, facts)
    what = _named(rule)
    if found is None or found.n < rule.min_n:
        n = found.n if found else 0
        return Finding(None, f"{what}: {n} answers, and {rule.min_n} are needed.", {"n": n})
    if found.value is None or found.low is None or found.high is None:
        return Finding(None, f"{what}: {found.n} answers tell no interval.", {"n": found.n})
    told = {
        "figure": found.name,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "effective_n": found.effective_n,
        "window_seconds": rule.window_seconds,
        **({"class": rule.class_name} if rule.class_name else {}),
    }
    shown = f"{what} is {found.value:.4g} ({found.low:.4g} to {found.high:.4g}, n = {found.n})"
    if rule.above is not None:
        bound, bad, good = rule.above, found.low > rule.above, found.value <= rule.above
        return Finding(
            _verdict(bad, good=good), f"{shown}; the bound is at most {bound:.4g}.", {**told, "above": bound}
        )
    below = rule.below if rule.below is not None else 0.0
    bad, good = found.high < below, found.value >= below
    return Finding(_verdict(bad, good=good), f"{shown}; the bound is at least {below:.4g}.", {**told, "below": below})


def _verdict(bad: bool, *, good: bool) -> bool | None:
    """Bad where the whole interval is, good where the estimate itself is; between them nothing is known."""
    return True if bad else False if good else None


async def _figure(rule: Rule, target: Target, facts: Facts) -> Figure | None:
    quality = await facts.quality(rule.window_seconds, target.release)
    for each in quality.figures if quality else ():
        if (each.name, each.class_name) == (rule.figure, rule.class_name):
            return each
    return None


def _named(rule: Rule) -> str:
    return f"{rule.figure} of {rule.class_name!r}" if rule.class_name else str(rule.figure)


async def _absence(rule: Rule, target: Target, facts: Facts) -> Finding:
    window_ms = round(rule.window_seconds * 1000)
    told: dict[str, Any] = {"missing": rule.missing, "window_seconds": rule.window_seconds}
    if target.role == "shadow" or target.paused or facts.now - target.serving_since < window_ms:
        return Finding(None, "It has not served for as long as the rule looks back.", told)
    if not await facts.is_used():
        return Finding(None, "The tenant has asked nothing for a month.", told)
    if rule.missing == "answers":
        newest = await facts.newest_answer(target)
        bad = newest is None or facts.now - newest >= window_ms
        return Finding(bad, _since("the last answer", newest, facts.now), {**told, "newest": newest})
    if rule.missing == "labels":
        known = await facts.is_labelled(target, window_ms)
        return Finding(not known, f"{'a' if known else 'no'} label in the last {rule.window_seconds:g} s", told)
    quality = await facts.quality(rule.window_seconds, target.release)
    found = await _figure(rule, target, facts)
    n, answers = (found.n if found else 0), (quality.answers if quality else 0)
    told |= {"figure": rule.figure, "n": n, "answers": answers}
    if answers < rule.min_n:
        return Finding(None, f"{answers} answers, and {rule.min_n} are needed.", told)
    return Finding(not n, f"{rule.figure} rests on {n} of {answers} answers.", told)


def _since(what: str, moment: int | None, now: int) -> str:
    return f"{what} was {(now - moment) / 1000:.0f} s ago" if moment else f"{what} was over a month ago"


async def _burn(rule: Rule, target: Target, facts: Facts) -> Finding:
    """The first pair of windows in which the budget burns too fast; the good news needs all of them."""
    assert rule.share is not None
    assert rule.objective is not None
    budget = 1.0 - rule.objective
    findings = []
    for window in rule.windows:
        long = await facts.counts(window.long_seconds, target.release, rule.slow_seconds)
        short = await facts.counts(window.short_seconds, target.release, rule.slow_seconds)
        findings.append(_burning(rule, window, budget, long, short))
    for found in findings:
        if found.bad:
            return found
    unknown = [found for found in findings if found.bad is None]
    return unknown[0] if unknown else findings[0]


def _burning(rule: Rule, window: BurnWindow, budget: float, long: Counts, short: Counts) -> Finding:
    assert rule.share is not None
    bad, n = long.of(rule.share)
    short_bad, short_n = short.of(rule.share)
    told: dict[str, Any] = {"share": rule.share, "n": n, "factor": window.factor, "long_seconds": window.long_seconds}
    told |= {"short_seconds": window.short_seconds, "objective": rule.objective}
    if n < rule.min_n:
        return Finding(None, f"{rule.share}: {n} answers, and {rule.min_n} are needed.", told)
    low, high = wilson(bad / n, n)
    rate, short_rate = bad / n / budget, (short_bad / short_n / budget if short_n else 0.0)
    told |= {"value": bad / n, "low": low, "high": high, "burn_rate": rate, "short_burn_rate": short_rate}
    why = (
        f"{rule.share}: {bad} of {n} answers in {window.long_seconds:g} s, {short_bad} of {short_n} in "
        f"{window.short_seconds:g} s; the budget burns {rate:.3g} and {short_rate:.3g} times as fast as it may, and "
        f"{window.factor:g} is the bound."
    )
    burns = low / budget >= window.factor and short_rate >= window.factor
    return Finding(burns or (False if rate < window.factor or short_rate < window.factor else None), why, told)


async def _drift(rule: Rule, target: Target, tenant: str, drift: DriftSource | None) -> Finding:
    state = await drift.state(tenant, target.release) if drift is not None else UNKNOWN
    if not state.windows:
        return Finding(None, "Nothing was compared yet.")
    kinds = [kind for kind in state.kinds if kind in rule.shifts]
    if not (state.alarm and kinds):
        return Finding(bad=False, why="No drift is found.")
    told = {"kinds": kinds, "since": state.since, "examples": list(state.examples)[:MAX_EXAMPLES]}
    return Finding(bad=True, why=f"What comes in or goes out has changed: {', '.join(kinds)}.", facts=told)


_JUDGES: Mapping[str, Callable[[Rule, Target, Facts], Awaitable[Finding]]] = {
    "threshold": _threshold,
    "absence": _absence,
    "burn_rate": _burn,
}
