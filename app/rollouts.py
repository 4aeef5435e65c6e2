"""Rollouts: which release of a name is stable, which is on trial at what share, and which answers in the shadow.

Pure: a rollout is a value, a change of it makes the next one, and who gets the canary is a keyed hash. So every replica
that holds the same rollout sends the same conversation to the same release. The seed is drawn when a trial begins and
kept while its share grows: then identities only ever move from stable to canary, and back only when the share shrinks.
"""

from hashlib import blake2b
from random import random
from secrets import token_hex
from typing import Literal

import msgspec

from app.errors import Conflict
from app.trial_plans import TrialPlan

Role = Literal["stable", "canary", "pinned", "shadow", "fallback", "extractive", "chore"]
"""Why a release answered: by the rollout, because the caller named it, unseen beside the one that did, or while an
engine was away: in place of the release that was to, or itself, by its passages alone. A chore is what a chat page asks
for itself, such as a title: nobody reads it as an answer, so it says nothing of how good answers are."""

MAX_PREVIOUS = 20
"""How many promotions can be gone back."""

_HASH_BYTES = 8


class Rollout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of one public name; releases are given by their numbers."""

    name: str
    revision: int
    """Rises by one with every change."""
    stable: int
    canary: int | None = None
    share: float = 0.0
    """The canary's part of the identities, 0 to 1."""
    shadow: int | None = None
    shadow_rate: float = 0.0
    """The part of the requests that the shadow answers too, 0 to 1."""
    paused: bool = False
    """Whether canary and shadow get nothing for now."""
    previous: tuple[int, ...] = ()
    """What was stable before, oldest first."""
    seed: str = ""
    """Names the trial of the canary, too: it is drawn when one begins."""
    plan: TrialPlan | None = None
    """What the canary is watched for."""

    @property
    def serving(self) -> set[int]:
        """The numbers that answer, or would if the rollout were not paused."""
        return {number for number in (self.stable, self.canary, self.shadow) if number is not None}


class Lot:
    """Decides by hash who is in: the same identity always gets the same answer."""

    def __init__(self, name: str, seed: str, share: float) -> None:
        """`share` is the part of all identities that is in, 0 to 1."""
        self._keyed = blake2b(name.encode() + b"\0", digest_size=_HASH_BYTES, key=bytes.fromhex(seed))
        self._share = share
        self._below = round(share * (1 << 8 * _HASH_BYTES))

    def __contains__(self, identity: str | None) -> bool:
        if identity is None:
            return random() < self._share  # noqa: S311 - chance, not secrecy.
        keyed = self._keyed.copy()
        keyed.update(identity.encode(errors="surrogatepass"))
        return int.from_bytes(keyed.digest()) < self._below


def identity_of(tenant: str, conversation: str | None, user: str | None) -> str | None:
    """What an assignment sticks to: the conversation, else the user, else nothing."""
    if conversation:
        return f"{tenant}\0c{conversation}"
    return f"{tenant}\0u{user}" if user else None


def begin(name: str, number: int) -> Rollout:
    """The first state of a name."""
    return Rollout(name=name, revision=1, stable=number)


def set_canary(rollout: Rollout, number: int, share: float, plan: TrialPlan | None = None) -> Rollout:
    """Give release `number` that share of the identities; another canary starts a trial of its own, by `plan`.

    Raises:
        Conflict: the release is stable, or its trial has begun by another plan.
    """
    if number == rollout.stable:
        raise Conflict(f"{rollout.name}@{number} is the stable release already.", param="release")
    if number != rollout.canary or not rollout.seed:
        begun = {"seed": token_hex(16), "plan": plan or TrialPlan()}
        return _next(rollout, canary=number, share=share, paused=False, **begun)
    if plan is not None and plan != (rollout.plan or TrialPlan()):
        raise Conflict(
            f"The trial of {rollout.name}@{number} has begun, and its plan is fixed. Roll it back to begin another.",
            param="plan",
        )
    return _next(rollout, share=share, paused=False)


def set_shadow(rollout: Rollout, number: int | None, rate: float) -> Rollout:
    """Let release `number` answer that part of the requests unseen; None ends it."""
    return _next(rollout, shadow=number, shadow_rate=rate if number is not None else 0.0)


def promote(rollout: Rollout, number: int | None = None) -> Rollout:
    """Make the canary stable, or another release; the trial is over.

    Raises:
        Conflict: there is no canary, or the release is stable already.
    """
    number = rollout.canary if number is None else number
    if number is None:
        raise Conflict(f"{rollout.name} has no canary to promote: name the release.", param="release")
    if number == rollout.stable:
        raise Conflict(f"{rollout.name}@{number} is the stable release already.", param="release")
    previous = (*rollout.previous, rollout.stable)[-MAX_PREVIOUS:]
    after = _next(rollout, stable=number, previous=previous, **_NO_TRIAL)
    return msgspec.structs.replace(after, shadow=None, shadow_rate=0.0) if after.shadow == number else after


def roll_back(rollout: Rollout, available: set[int]) -> Rollout:
    """End the trial of the canary; without one, go back to what was stable before and is still `available`.

    Raises:
        Conflict: there is nothing to go back to.
    """
    if rollout.canary is not None:
        return _next(rollout, **_NO_TRIAL)
    previous = [number for number in rollout.previous if number in available]
    if not previous:
        raise Conflict(f"{rollout.name} has no canary, and no release was stable before {rollout.stable}.")
    return _next(rollout, stable=previous[-1], previous=tuple(previous[:-1]), paused=False)


def pause(rollout: Rollout) -> Rollout:
    """Send everything to the stable release, and remember the rest."""
    if rollout.paused:
        raise Conflict(f"The rollout of {rollout.name} is paused already.")
    return _next(rollout, paused=True)


def resume(rollout: Rollout) -> Rollout:
    """Go on where the rollout was paused."""
    if not rollout.paused:
        raise Conflict(f"The rollout of {rollout.name} is not paused.")
    return _next(rollout, paused=False)


_NO_TRIAL = {"canary": None, "share": 0.0, "seed": "", "plan": None, "paused": False}


def _next(rollout: Rollout, **changes: object) -> Rollout:
    return msgspec.structs.replace(rollout, revision=rollout.revision + 1, **changes)
