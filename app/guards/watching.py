"""Watches the canary of every rollout, and takes it back when it is worse than the stable release beside it.

The main rule: a step reads what came behind a trial's position, judges it, and writes the observations, what is known
then, the new position and, where it follows, the rollback with its audit row in one transaction. It does nothing if
another worker was quicker. So a worker may be killed at any moment, and a step that is done again changes nothing.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database, trial_observations, trials
from app.guards.hearing import Batch, hear
from app.guards.judging import Decision, State, audit_of, judge
from app.guards.trials import TrialRecord, replace, running, values_of
from app.predictions import History, Settled
from app.registry import Entry, all_rollouts, change_rollout, entries, entry_of, is_release, raise_version
from app.rollouts import Rollout, roll_back
from app.trial_plans import TrialPlan
from app.vetting import FolderDigests

log = logging.getLogger(__name__)

Clock = Callable[[], int]
"""Milliseconds since 1970."""


class Watcher:
    """Watches canaries; whoever calls `step` again and again is the worker.

    Args:
        database: shared by all replicas and workers.
        history: the predictions there.
        clock: the time.
        adapter_folders: by engine group, where adapters lie on this machine, each in a folder of its name.
        batch_rows: predictions of a trial that are judged in one step.
    """

    def __init__(
        self,
        database: Database,
        history: History,
        clock: Clock,
        *,
        adapter_folders: Mapping[str, Path] | None = None,
        batch_rows: int = 500,
    ) -> None:
        self._database = database
        self._history = history
        self._clock = clock
        self._folders = adapter_folders or {}
        self._digests = FolderDigests()
        self._batch_rows = batch_rows

    async def step(self) -> bool:
        """Take every trial a batch further; tells whether there may be more to do at once.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self._database.reading() as connection:
            rollouts = {rollout.seed: rollout for rollout in await all_rollouts(connection) if rollout.canary}
            known = {trial.id: trial for trial in await running(connection)}
        if not (rollouts or known):
            return False
        settled = await self._history.settled()
        for seed in rollouts.keys() - known.keys():
            await self._begin(rollouts[seed], settled)
        more = [await self._further(trial, rollouts.get(trial.id), settled) for trial in known.values()]
        return any(more) or bool(rollouts.keys() - known.keys())

    async def _begin(self, rollout: Rollout, settled: Settled | None) -> None:
        """Begin to watch a trial from here on; a worker that was as quick has begun the same."""
        plan, now = rollout.plan or TrialPlan(), self._clock()
        record = TrialRecord(
            id=rollout.seed,
            name=rollout.name,
            stable=rollout.stable,
            canary=rollout.canary or 0,
            plan=plan,
            status="running",
            state=State.begin(plan),
            observations=0,
            position=settled,
            feedback_position=0,
            started_at=now,
            updated_at=now,
            heard_at=now,
            alarm=None,
            decision=None,
        )
        async with self._database.writing() as connection:
            await connection.execute(
                self._database.insert(trials).values(**values_of(record)).on_conflict_do_nothing(index_elements=["id"])
            )

    async def _further(self, trial: TrialRecord, rollout: Rollout | None, settled: Settled | None) -> bool:
        now = self._clock()
        if rollout is None or rollout.stable != trial.stable:
            async with self._database.writing() as connection:
                await replace(connection, trial, msgspec.structs.replace(trial, status="ended", updated_at=now))
            return False
        decision = await self._adapter_decision(trial)
        share = 0.0 if rollout.paused else rollout.share
        batch = await hear(self._database, trial, settled, share=share, limit=self._batch_rows)
        # Without statistics nothing is heard any more: what follows from the observations follows from those before.
        after, rows = (trial, []) if decision else await asyncio.to_thread(_judged, trial, batch, now)
        decision = decision or after.decision
        if decision is not None:
            after = msgspec.structs.replace(after, status="rolled_back", decision=decision, updated_at=now)
            await self._roll_back(trial, after, rows, decision)
            return False
        after = self._alarmed(after, now, is_paused=rollout.paused)
        if after != trial:
            async with self._database.writing() as connection:
                if await replace(connection, trial, after) and rows:
                    await connection.execute(trial_observations.insert(), rows)
        return not batch.is_last

    async def _roll_back(
        self, trial: TrialRecord, after: TrialRecord, rows: list[dict[str, object]], decision: Decision
    ) -> None:
        """End the trial, with what was heard, the audit row and the way back in one transaction."""
        async with self._database.writing() as connection:
            await raise_version(connection)
            if not await self._is_on(connection, trial) or not await replace(connection, trial, after):
                return  # A person was quicker, or another worker.
            if rows:
                await connection.execute(trial_observations.insert(), rows)
            who = f"guard:{decision.guard}"
            await change_rollout(connection, trial.name, "rollback", roll_back, who=who, why=audit_of(decision))
        log.error("%s is rolled back by the guard %s: %s", trial.label("canary"), decision.guard, decision.why)

    async def _is_on(self, connection: AsyncConnection, trial: TrialRecord) -> bool:
        return any(rollout.seed == trial.id for rollout in await all_rollouts(connection))

    async def _adapter_decision(self, trial: TrialRecord) -> Decision | None:
        """Whether the canary's adapter on this machine is another than the release says."""
        if not self._folders:
            return None
        async with self._database.reading() as connection:
            row = (await connection.execute(entries().where(is_release(trial.name, trial.canary)))).one()
        entry: Entry = entry_of(row)
        release = entry.release
        folder = self._folders.get(release.engine)
        if release.adapter is None or folder is None:
            return None
        problems = await asyncio.to_thread(self._digests.problems, release, folder / release.adapter)
        return Decision(guard="adapter_digest", why=problems[0]) if problems else None

    def _alarmed(self, trial: TrialRecord, now: int, *, is_paused: bool) -> TrialRecord:
        """Say so, once, where a trial cannot come to an end: nothing is heard of the canary, or by a guard of it."""
        since = trial.started_at if trial.observations else trial.heard_at
        silent_ms = trial.plan.silent_seconds * 1000
        deaf = [name for name, known in trial.state.trial.evidence.items() if not known.canary.n]
        alarm = None
        if is_paused:
            alarm = trial.alarm
        elif now - trial.heard_at >= silent_ms:
            alarm = "no answer of the canary was heard: it gets no traffic, or its share is too small"
        elif deaf and now - since >= silent_ms:
            alarm = f"the guard {', '.join(deaf)} has heard nothing of the canary: it gets no feedback"
        if alarm == trial.alarm:
            return trial
        if alarm is not None:
            log.error("The trial of %s cannot come to an end: %s", trial.label("canary"), alarm)
        return msgspec.structs.replace(trial, alarm=alarm, updated_at=now)


def _judged(trial: TrialRecord, batch: Batch, now: int) -> tuple[TrialRecord, list[dict[str, object]]]:
    """What is known after a batch, up to the observation that decides, and the rows of the observations."""
    state, decision, rows, heard_at = trial.state, None, [], trial.heard_at
    for number, word in enumerate(batch.words, trial.observations + 1):
        state, decision = judge(state, word.arm, word.badness)
        heard_at = now if word.arm == "canary" else heard_at
        rows.append(
            {
                "trial": trial.id,
                "number": number,
                "kind": word.kind,
                "session": word.session,
                "arm": word.arm,
                "prediction_id": word.prediction_id,
                "badness": msgspec.json.encode(word.badness).decode(),
                "at": now,
            }
        )
        if decision is not None:
            decision = msgspec.structs.replace(decision, observation=number)
            break
    after = msgspec.structs.replace(
        trial,
        state=state,
        observations=trial.observations + len(rows),
        position=batch.position,
        feedback_position=batch.feedback_position,
        heard_at=heard_at,
        updated_at=now if rows else trial.updated_at,
        decision=decision,
    )
    return after, rows
