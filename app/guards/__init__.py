"""The guards of a canary: they compare it with the stable release beside it, and take it back when it is worse.

The main rule: evidence is an e-value per guard (`observability.sequential`), which stays true however often somebody
looks. What was heard is stored in its order, so that every decision can be replayed. Guards run in `hallmark worker`,
never in the serving process; rolling back is a change of the rollout like any other, made by `guard:NAME`.
"""

from app.guards.judging import HARD_GUARDS, Decision, State, replay
from app.guards.trials import Heard, TrialRecord, Trials
from app.guards.watching import Watcher

__all__ = ["HARD_GUARDS", "Decision", "Heard", "State", "TrialRecord", "Trials", "Watcher", "replay"]
