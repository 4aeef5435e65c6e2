"""Equal canaries through the guards' own fold: how many are rolled back at any time, though they are no worse.

Each trial is a stream of answers of two releases that behave alike, heard as `hallmark worker` hears them
(`app.guards.judging`): what an answer says about each guard, one session after the other, judged after each. Failures
come in bursts that hit both arms, refusals rise and fall with the day, and the tolerance of every guard is 0, so that
the canaries are exactly as bad as is still no harm. Every tenth trial, and each that was rolled back, is replayed from
its observations in JSON, as they are stored, and must come to the same end.

    python -m tests.benchmarks.replayed_canaries [--canaries 1000] [--sessions 1000]

Exits with 1 where more are rolled back than the plan's error, 1 %, or a replay differs.
"""

import argparse
import json
import math
import random
import sys
from typing import Any

import msgspec

from app.guards import replay
from app.guards.judging import Seen, State, judge, signals
from app.trial_plans import DEFAULT_GUARDS, TrialPlan
from observability.sequential import Arm, Plan

PLAN = TrialPlan(bets=Plan(guards=tuple(msgspec.structs.replace(each, tolerance=0.0) for each in DEFAULT_GUARDS)))
SHARE = 0.5


def main() -> int:
    """Run the trials, print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=1_000)
    parser.add_argument("--sessions", type=int, default=1_000, help="Of the canary, in each trial.")
    given = parser.parse_args()
    found = equal_canaries(given.canaries, given.sessions)
    print(json.dumps(found))
    return 0 if found["kept"] else 1


def equal_canaries(canaries: int, sessions: int, *, worse: float = 0.0) -> dict[str, Any]:
    """Run trials of canaries that refuse more often by `worse`; tells how many were rolled back, and why."""
    guards: dict[str, int] = {}
    differing = 0
    error = PLAN.bets.rollback_error
    for number in range(canaries):
        chance = random.Random(number)
        state, decision, said = State.begin(PLAN), None, []
        heard = 0
        while heard < sessions and decision is None:
            arm: Arm = "canary" if chance.random() < SHARE else "stable"
            heard += arm == "canary"
            badness = signals(answer(arm, len(said), chance, worse if arm == "canary" else 0.0), PLAN)
            said.append((arm, json.dumps(badness)))
            state, decision = judge(state, arm, badness)
        if decision is not None or number % 10 == 0:
            again, why, _ = replay(PLAN, ((arm, json.loads(badness)) for arm, badness in said))
            differing += again != state or (why is None) != (decision is None)
        if decision is not None:
            guards[decision.guard] = guards.get(decision.guard, 0) + 1
    rolled_back = sum(guards.values())
    kept = rolled_back <= error * canaries and not differing
    return {
        "canaries": canaries,
        "sessions": sessions,
        "rolled_back": rolled_back,
        "by_guard": guards,
        "error": error,
        "replays_that_differ": differing,
        "kept": kept,
    }


def answer(arm: Arm, number: int, chance: random.Random, worse: float) -> Seen:
    """What the guards see of an answer: both arms are hit by the same bursts and the same hours."""
    is_outage = number % 400 < 20
    refuses = 0.1 * (1 + math.sin(number / 150)) + worse
    return Seen(
        id=str(number),
        tenant="t",
        user=None,
        conversation=None,
        arm=arm,
        outcome="failed" if chance.random() < (0.4 if is_outage else 0.01) else "finished",
        finish_reason="length" if chance.random() < 0.03 else "stop",
        verdict="abstained:nothing_relevant"
        if chance.random() < refuses
        else "replaced:unsupported_answer"
        if chance.random() < 0.05
        else "answered",
        retrieval_outcome="passages",
        total_seconds=chance.lognormvariate(2.0, 0.8),
        is_wordless=False,
        found_nothing=False,
        opening=None,
    )


if __name__ == "__main__":
    sys.exit(main())
