"""Pure: which of the rows that were found a version has. Each step keeps some and counts what it dropped, and why.

The main rule: a step looks at the rows in one order, whatever order they came in: sessions by their first prediction,
rows by their digest, or by a rank that the seed gives each.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from app.datasets.candidates import Fact
from app.datasets.recipes import Balance
from app.datasets.sessions import rank

MIN_TELLING = 12
"""A question with fewer characters, as "and why?", tells nothing of the conversation it stands in."""

Sieved = tuple[list[Fact], Counter[str]]


def sessions_of(facts: Iterable[Fact]) -> list[list[Fact]]:
    """The rows by session, in the order in which the sessions began."""
    found: dict[str, list[Fact]] = defaultdict(list)
    for fact in sorted(facts, key=_order):
        found[fact.session].append(fact)
    return list(found.values())


def once(facts: Sequence[Fact]) -> Sieved:
    """Keep each row once."""
    kept = {fact.digest: fact for fact in sorted(facts, key=_order)}
    return list(kept.values()), _count(same_row=len(facts) - len(kept))


def without_repeats(sessions: Sequence[Sequence[Fact]], near: Sequence[int | None]) -> Sieved:
    """Drop the sessions that nearly repeat an earlier one."""
    kept = [fact for facts, original in zip(sessions, near, strict=True) if original is None for fact in facts]
    return kept, _count(near_duplicate=sum(map(len, sessions)) - len(kept))


def apart(facts: Sequence[Fact], questions: Mapping[str, str]) -> Sieved:
    """Drop the rows to train on whose question is held out; `questions` are bare, by the digests of rows."""
    held = {questions[fact.digest] for fact in facts if fact.split == "heldout"}
    kept = [fact for fact in facts if fact.split == "heldout" or questions[fact.digest] not in held]
    return kept, _count(held_out=len(facts) - len(kept))


def without_leaks(facts: Sequence[Fact], leaking: Mapping[str, str], telling: Mapping[str, bool]) -> Sieved:
    """Drop the rows that leak, and the conversations they stand in.

    Args:
        facts: the rows.
        leaking: for the digest of each row that leaks, why.
        telling: for the digest of each, whether its question is long enough to be known again.
    """
    sessions = {fact.session for fact in facts if fact.digest in leaking and telling[fact.digest]}
    kept, dropped = [], Counter[str]()
    for fact in facts:
        reason = leaking.get(fact.digest) or ("leaking_session" if fact.session in sessions else None)
        if reason is None:
            kept.append(fact)
        else:
            dropped[reason] += 1
    return kept, dropped


def balanced(facts: Sequence[Fact], balance: Balance, seed: str) -> Sieved:
    """Drop what a class has too many of to train on."""
    seen, kept, dropped = Counter[str](), [], Counter[str]()
    for fact in ranked(facts, seed):
        name = fact.class_name
        limit = None if name is None else balance.max_of.get(name, balance.max_per_class)
        if fact.split == "train" and name is not None and limit is not None:
            seen[name] += 1
            if seen[name] > limit:
                dropped["over_cap"] += 1
                continue
        kept.append(fact)
    return kept, dropped


def limited(facts: Sequence[Fact], limit: int, seed: str) -> Sieved:
    """Keep so many, as chance has it."""
    kept = ranked(facts, seed)[:limit]
    return kept, _count(over_limit=len(facts) - len(kept))


def ranked(facts: Iterable[Fact], seed: str) -> list[Fact]:
    """The rows as chance orders them; what is said of a prediction does not move it."""
    return sorted(facts, key=lambda fact: (rank(seed, fact.prediction_id or fact.content_digest), fact.digest))


def composition(facts: Iterable[Fact]) -> dict[str, dict[str, int]]:
    """How many rows of each class each side has; without classes under one name for all."""
    found: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}
    for fact in facts:
        found[fact.split][fact.class_name or "rows"] += 1
    return {split: dict(sorted(classes.items())) for split, classes in found.items()}


def _order(fact: Fact) -> tuple[str, str]:
    """Ids of predictions rise with time; what has none comes after, by its digest."""
    return fact.prediction_id or "~", fact.digest


def _count(**dropped: int) -> Counter[str]:
    return Counter({reason: count for reason, count in dropped.items() if count})
