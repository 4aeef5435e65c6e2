"""Simulated canaries: how often healthy ones are rolled back, and how soon bad ones are found, by several rules.

The capital of `observability.sequential` is computed here for a whole trial at once, because Python would take minutes
for each row; a test compares it with the real thing.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from observability.sequential import STAKES
from tests.benchmarks.tables import Table

LOOKS = 3000
SHARE = 0.1
MIN_OBSERVATIONS = 30
Pairing = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pairing(arms: np.ndarray) -> Pairing:
    """Who is compared with whom: a canary session, first and last + 1 of the stable ones beside it, canaries so far."""
    waiting: list[int] = []
    first = seen_stable = seen_canary = 0
    found = []
    for session, is_canary in enumerate(arms.tolist()):
        if is_canary:
            waiting = [*waiting, session][-8:]
            seen_canary += 1
        else:
            seen_stable += 1
        beside = seen_stable - first
        if waiting and (beside >= 4 or (beside and len(waiting) == 8)):
            found.append((waiting.pop(0), first, seen_stable, seen_canary))
            first = seen_stable
    columns = np.array(found, np.intp).reshape(-1, 4).T
    return columns[0], columns[1], columns[2], columns[3]


def differences(arms: np.ndarray, badness: np.ndarray, pairs: Pairing) -> np.ndarray:
    """Each compared canary session's badness less the mean of the stable ones beside it."""
    canary, first, last, _ = pairs
    running = np.concatenate([[0.0], np.cumsum(badness[~arms])])
    return badness[canary] - (running[last] - running[first]) / (last - first)


def e_values(outcomes: np.ndarray) -> np.ndarray:
    """The mean capital after each bet on outcomes of at least -1."""
    total = np.zeros(len(outcomes))
    for stake in STAKES:
        total += np.cumprod(1 + stake * outcomes)
    return total / len(STAKES)


def harm(difference: np.ndarray, tolerance: float) -> np.ndarray:
    return e_values((difference - tolerance) / (1 + tolerance))


def safety(difference: np.ndarray, margin: float) -> np.ndarray:
    return e_values((margin - difference) / (1 - margin))


def first_reached(values: np.ndarray, threshold: float, seen: np.ndarray) -> int | None:
    """The number of canary sessions when the threshold was first reached."""
    reached = np.flatnonzero((values >= threshold) & (seen >= MIN_OBSERVATIONS))
    return int(seen[reached[0]]) if len(reached) else None


@cache
def trials(runs: int, share: float = SHARE, seed: int = 21) -> list[tuple[np.ndarray, Pairing]]:
    """The arms of `runs` trials of 3,000 canary sessions each, and who is compared with whom."""
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(runs):
        arms = random.random(int(LOOKS / share * 1.1)) < share
        arms = arms[: np.searchsorted(np.cumsum(arms), LOOKS) + 1]
        drawn.append((arms, pairing(arms)))
    return drawn


def e_process(runs: int, stable: float, canary: float, *, tolerance: float = 0.0, alpha: float = 0.01, seed: int = 22):
    """When each trial was stopped for harm, None for those that were not."""
    random = np.random.default_rng(seed)
    stops = []
    for arms, pairs in trials(runs):
        badness = (random.random(len(arms)) < np.where(arms, canary, stable)).astype(float)
        values = harm(differences(arms, badness, pairs), tolerance)
        stops.append(first_reached(values, 1 / alpha, pairs[3]))
    return stops


def promotions(runs: int, stable: float, canary: float, margin: float, *, error: float = 0.05, seed: int = 23):
    """When each trial would have been promoted."""
    random = np.random.default_rng(seed)
    stops = []
    for arms, pairs in trials(runs):
        badness = (random.random(len(arms)) < np.where(arms, canary, stable)).astype(float)
        values = safety(differences(arms, badness, pairs), margin)
        stops.append(first_reached(values, 1 / error, pairs[3]))
    return stops


def _counts(runs: int, stable: float, canary: float, every: int, seed: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Bad canary answers in each window of `every`, and the bad ones of nine times as many stable answers."""
    random = np.random.default_rng(seed)
    windows = LOOKS // every
    return random.binomial(every, canary, (runs, windows)), random.binomial(9 * every, stable, (runs, windows))


def _stops(reached: np.ndarray, every: int) -> list[int | None]:
    return [int(row.argmax() + 1) * every if row.any() else None for row in reached]


def threshold_counting(runs: int, stable: float, canary: float, *, failures: int, every: int = 50, limit: float = 0.15):
    """Argo Rollouts' and Flagger's way: count windows above a limit, roll back at a number of them."""
    bad, _ = _counts(runs, stable, canary, every)
    return _stops(np.cumsum(bad > limit * every, axis=1) >= failures, every)


def z_test(runs: int, stable: float, canary: float, *, every: int, once_at: int | None = None):
    """A one-sided z-test of two shares at .01, repeated every so many canary answers, or done once."""
    bad, bad_stable = (np.cumsum(each, axis=1) for each in _counts(runs, stable, canary, every))
    n = every * np.arange(1, LOOKS // every + 1)
    pooled = (bad + bad_stable) / (10 * n)
    error = np.sqrt(np.maximum(pooled * (1 - pooled), 1e-12) * (1 / n + 1 / (9 * n)))
    rejected = (bad / n - bad_stable / (9 * n)) / error > 2.326
    return _stops(rejected & (n == once_at) if once_at else rejected, every)


RULES: dict[str, Callable[[int, float, float], Sequence[int | None]]] = {
    "**e-process**": e_process,
    "**e-process, tolerance 0.02**": lambda *case: e_process(*case, tolerance=0.02),
    "**e-process, tolerance 0.02, one of five guards**": lambda *case: e_process(*case, tolerance=0.02, alpha=0.002),
    "z-test looked at every 50": lambda *case: z_test(*case, every=50),
    "z-test once, at 500": lambda *case: z_test(*case, every=50, once_at=500),
    "windows of 50 above 15 %, more than 3 (as Argo Rollouts)": lambda *case: threshold_counting(*case, failures=4),
    "windows of 50 above 15 %, 5 of them (as Flagger)": lambda *case: threshold_counting(*case, failures=5),
}


def _found(stops: Sequence[int | None]) -> tuple[float, str]:
    known = [stop for stop in stops if stop is not None]
    share = len(known) / len(stops)
    if not known:
        return share, "0 %"
    return share, f"{100 * share:.1f} %, {np.median(known):.0f} ({np.percentile(known, 90):.0f})"


def rollback_table(runs: int) -> Table:
    rates = (0.10, 0.12, 0.15, 0.20, 0.30)
    columns = ["rule", *(f"canary {rate:.0%}" if rate > 0.1 else "canary 10 %: false" for rate in rates)]
    conditions = (
        f"{runs:,} trials of {LOOKS:,} canary sessions, a tenth of the traffic; 10 % of the stable answers are bad. "
        "Share of canaries rolled back, then the median (90th percentile) of canary sessions until then."
    )
    table = Table("rollback", conditions, columns)
    for name, rule in RULES.items():
        found = {rate: rule(runs, 0.10, rate) for rate in rates}
        false = sum(stop is not None for stop in found[0.10]) / runs
        table.rows.append([name, f"{100 * false:.1f} %", *(_found(found[rate])[1] for rate in rates[1:])])
        if name.startswith("**"):
            table.require(false <= 0.01, f"{name} rolls back {false:.2%} of equal releases")
    median = float(np.median([stop or LOOKS for stop in e_process(runs, 0.10, 0.20)]))
    table.require(median <= 200, f"10 % -> 20 % takes {median} observations")
    return table


def promotion_table(runs: int) -> Table:
    conditions = f"{runs:,} trials of {LOOKS:,} canary sessions; 10 % of the stable answers are bad; error at most 5 %."
    columns = ["margin", "equal: promoted, after", "worse by the margin: promoted", "worse by half the margin"]
    table = Table("promotion", conditions, columns)
    for margin in (0.02, 0.05, 0.1):
        equal, at_margin, half = (promotions(runs, 0.1, 0.1 + worse, margin) for worse in (0, margin, margin / 2))
        wrong = _found(at_margin)[0]
        table.rows.append([str(margin), _found(equal)[1], f"{100 * wrong:.1f} %", _found(half)[1]])
        table.require(wrong <= 0.05, f"{wrong:.2%} of canaries at margin {margin} are promoted")
    return table


GUARDS = {"unsupported": 0.2, "refusal": 0.05, "regenerated": 0.02}


def equal_canaries(runs: int, weather: str, seed: int = 25) -> tuple[float, float]:
    """The share of canaries equal to stable that any of three guards ever rolls back, and that of the busiest guard.

    Bad sessions are bad for several guards at once. `weather` is what time does to both arms: `steady`, `daily` (twice
    the rate at noon), `outages` (half of all sessions bad in bursts of 100).
    """
    random = np.random.default_rng(seed)
    threshold = len(GUARDS) / 0.01
    stopped = np.zeros((runs, len(GUARDS)), bool)
    for run, (arms, pairs) in enumerate(trials(runs)):
        now = np.arange(len(arms)) + random.integers(10_000)
        hard = random.random(len(arms))
        for column, rate in enumerate(GUARDS.values()):
            rates = np.full(len(arms), rate)
            if weather == "daily":
                rates = rate * (1 + np.sin(now / 500))
            elif weather == "outages":
                rates = np.where(now % 2000 < 100, 0.5, rate)
            own = np.where(random.random(len(arms)) < 0.5, hard, random.random(len(arms)))
            values = harm(differences(arms, (own < rates).astype(float), pairs), 0.0)
            stopped[run, column] = first_reached(values, threshold, pairs[3]) is not None
    return float(stopped.any(axis=1).mean()), float(stopped.mean(axis=0).max())


def answers_for_sessions(runs: int, seed: int = 26) -> float:
    """False rollbacks when every answer counts, in sessions of ten that are mostly all good or all bad."""
    random = np.random.default_rng(seed)
    stopped = 0
    for _ in range(runs):
        sessions = random.random(LOOKS) < SHARE
        arms = np.repeat(sessions, 10)
        chance = np.repeat(random.beta(0.1, 0.9, len(sessions)), 10)
        badness = (random.random(len(arms)) < chance).astype(float)
        pairs = pairing(arms)
        stopped += first_reached(harm(differences(arms, badness, pairs), 0.0), 100, pairs[3]) is not None
    return stopped / runs


def equal_table(runs: int) -> Table:
    conditions = (
        f"{runs:,} canaries that answer as the stable release does, looked at after each of {LOOKS:,} sessions: the "
        "share rolled back at any time. Three guards share an error of 1 %, and a bad session is often bad for all."
    )
    table = Table("equal canaries", conditions, ["traffic", "any guard", "worst guard"])
    names = {
        "steady": "steady",
        "daily": "error rates that rise and fall with the day",
        "outages": "outages: half of both arms' sessions bad, in bursts",
    }
    for weather, name in names.items():
        any_guard, worst = equal_canaries(runs, weather)
        table.rows.append([name, f"{100 * any_guard:.1f} %", f"{100 * worst:.1f} %"])
        table.require(any_guard <= 0.01, f"{any_guard:.2%} of equal canaries are rolled back when traffic is {weather}")
    counted = answers_for_sessions(runs)
    table.rows.append(["one guard, counting each answer of sessions of ten", f"{100 * counted:.1f} %", ""])
    return table
