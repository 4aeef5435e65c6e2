"""Pure: what an answer says about each guard, and what follows from all that were heard.

The main rule: `judge` is a fold. From the stored observations in their order it gives every e-value again, to the last
bit, and so the same decision: that is what a replay shows.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import blake2b

import msgspec

from app.predictions.derived import declines, is_stuck
from app.trial_plans import TrialPlan
from observability.sequential import Arm, Observation, Trial

BURST = 10
"""Sessions of the canary that a guard without statistics looks at: the last ones."""

_BURST_BAD = 9

_BESIDE = 3
"""Stable sessions heard since the first of these that it takes to see whose fault it is: earlier ones do not tell. Of
equal canaries that meet an outage of the engine that both arms share, at most one in 25 is taken back by it, at any
share up to three quarters; where hardly any session is stable, what is broken is found later."""

HARD_GUARDS = {"error": "error_burst", "index_empty": "empty_index", "degenerate": "degenerate_output"}
"""Guards that need no statistics, by the signal they count."""

_BURST_WORDS = {
    "error": "failed",
    "index_empty": "found nothing in the index",
    "degenerate": "were no text: one short pattern over and over, or tokens without any",
}

PATH_POINTS = 32


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the guards see of a prediction that has ended."""

    id: str
    tenant: str
    user: str | None
    conversation: str | None
    arm: Arm
    outcome: str
    finish_reason: str | None
    verdict: str | None
    retrieval_outcome: str | None
    total_seconds: float | None
    is_wordless: bool
    """Whether the engine said nothing and called no tool."""
    found_nothing: bool
    """Whether passages were searched, and the index gave not one."""
    opening: str | None
    """The first words of the answer, where it was kept, and the next two were not noted."""
    declines: bool | None = None
    """Whether the answer began as models do when they decline."""
    stuck: bool | None = None
    """Whether it began with one short pattern over and over."""
    is_hollow: bool = False
    """Whether the engine counted tokens, and there was neither text nor a call, where it was kept."""


class Path(msgspec.Struct, frozen=True):
    """A guard's e-values along the way, thinned to a few: after how many sessions of the canary it was how high."""

    every: int = 1
    points: tuple[tuple[int, float], ...] = ()

    def add(self, n: int, e_value: float) -> "Path":
        """Note the e-value after the canary's session `n`."""
        if n % self.every:
            return self
        points = (*self.points, (n, e_value))
        return Path(self.every, points) if len(points) < PATH_POINTS else Path(self.every * 2, points[1::2])


class State(msgspec.Struct, frozen=True):
    """All that is known in a trial; encode it with msgspec to keep it."""

    trial: Trial
    recent: Mapping[str, str] = {}
    """By hard signal the sessions since the canary's tenth last, in their order: `c` is one of the canary's, `s` one of
    the stable release's, and a capital was bad."""
    paths: Mapping[str, Path] = {}

    @classmethod
    def begin(cls, plan: TrialPlan) -> "State":
        """Know nothing yet."""
        return cls(Trial.begin(plan.bets), paths={guard.name: Path() for guard in plan.bets.guards})


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Why a trial was ended; without statistics there is no e-value."""

    guard: str
    why: str
    observation: int = 0
    """The number of the observation that decided; 0 where none did."""
    e_value: float | None = None
    threshold: float | None = None
    path: tuple[tuple[int, float], ...] = ()


def session_of(trial_id: str, seen: Seen) -> bytes:
    """What is observed once: the conversation, else the user, else the answer. A digest, keyed by the trial."""
    if seen.conversation:
        who = f"{seen.tenant}\0c{seen.conversation}"
    else:
        who = f"{seen.tenant}\0u{seen.user}" if seen.user else f"\0p{seen.id}"
    return blake2b(who.encode(errors="surrogatepass"), key=bytes.fromhex(trial_id), digest_size=16).digest()


def signals(seen: Seen, plan: TrialPlan) -> dict[str, float]:
    """Say how bad an answer was, by guard and hard signal; nothing where the client left, or the process ended.

    Every guard but `disliked` hears of every answer that came to an end, so that none waits for a kind of answer.
    """
    if seen.outcome not in ("finished", "failed"):
        return {}
    is_error = seen.outcome == "failed"
    verdict = seen.verdict or ""
    is_refused = verdict.startswith("abstained") or seen.finish_reason == "content_filter"
    found = {
        "failed": is_error or seen.is_wordless or seen.finish_reason == "length",
        "refused": not is_error and (is_refused or bool(seen.declines) or declines(seen.opening or "")),
        "unsupported": verdict.endswith(":unsupported_answer"),
        "slow": (seen.total_seconds or 0.0) > plan.slow_seconds,
    }
    watched = {guard.name for guard in plan.bets.guards}
    is_degenerate = not is_error and (seen.is_hollow or bool(seen.stuck) or is_stuck(seen.opening or ""))
    hard = {"error": is_error, "index_empty": seen.found_nothing, "degenerate": is_degenerate}
    return {name: float(bad) for name, bad in {**found, **hard}.items() if name in watched or name in hard}


def judge(state: State, arm: Arm, badness: Mapping[str, float]) -> tuple[State, Decision | None]:
    """Take in one session; gives the decision to roll back, where that follows."""
    trial, paths, recent = state.trial, dict(state.paths), dict(state.recent)
    for guard in trial.plan.guards:
        if guard.name in badness:
            trial = trial.observe(Observation(guard.name, arm, badness[guard.name]))
            if arm == "canary":
                known = trial.evidence[guard.name]
                paths[guard.name] = paths[guard.name].add(known.canary.n, known.harm_e_value)
    for signal in HARD_GUARDS.keys() & badness.keys():
        recent[signal] = _followed(recent.get(signal, ""), arm, is_bad=bool(badness[signal]))
    after = State(trial, recent, paths)
    return after, _burst(after) or _harm(after)


def replay(
    plan: TrialPlan, observations: Iterable[tuple[Arm, Mapping[str, float]]]
) -> tuple[State, Decision | None, int]:
    """Judge stored observations again, up to the one that decides: the state then, the decision, how many they were."""
    state, number = State.begin(plan), 0
    for number, (arm, badness) in enumerate(observations, 1):
        state, decision = judge(state, arm, badness)
        if decision is not None:
            return state, msgspec.structs.replace(decision, observation=number), number
    return state, None, number


def _followed(sessions: str, arm: Arm, *, is_bad: bool) -> str:
    sessions += arm[0].upper() if is_bad else arm[0]
    if sessions.lower().count("c") > BURST:
        sessions = sessions[1:]
    return sessions.lstrip("sS")


def _burst(state: State) -> Decision | None:
    for signal, guard in HARD_GUARDS.items():
        said = Counter(state.recent.get(signal, ""))
        stable = said["s"] + said["S"]
        # Where most of the stable sessions are bad too, the cause is not the canary's.
        is_alone = stable >= _BESIDE and said["S"] <= said["s"]
        if said["c"] + said["C"] == BURST and said["C"] >= _BURST_BAD and is_alone:
            what = f"{said['C']} of the canary's last {BURST} sessions {_BURST_WORDS[signal]}"
            return Decision(guard=guard, why=f"{what}, of the stable ones beside them {said['S']} of {stable}.")
    return None


def _harm(state: State) -> Decision | None:
    verdict = state.trial.verdict
    if verdict.action != "roll_back":
        return None
    known, path = state.trial.evidence[verdict.guard], state.paths[verdict.guard].points
    n = known.canary.n
    points = path if path and path[-1][0] == n else (*path, (n, verdict.e_value))
    share = f"{known.canary.mean:.1%} of {n} canary sessions against {known.stable.mean:.1%} of {known.stable.n} stable"
    return Decision(
        guard=verdict.guard,
        why=f"{verdict.guard}: {share}; e-value {verdict.e_value:.6g} reached {verdict.threshold:.6g}.",
        e_value=verdict.e_value,
        threshold=verdict.threshold,
        path=points,
    )


def audit_of(decision: Decision) -> str:
    """The reason as the rollout's audit has it, with the path of the e-values."""
    path = ", ".join(f"{n}: {e_value:.3g}" for n, e_value in decision.path)
    return decision.why + (f" E-values by canary sessions: {path}." if path else "")
