"""What people say of answers in words: how much of it is kept, under which names, and sealed by whose keys.

The main rule: what is not to be kept is taken out before a call is made of it, so its digest never saw it either; what
is kept is sealed after, so the same call is known again. Figures - ratings, classes, ids - stay in the open.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from app.feedback.calls import KEY_PREFIX, Call, Row, Speaker, callers_key, own_key
from app.privacy.envelopes import Ring, can_open, disclose, enclose, is_sealed, keys_for
from app.privacy.policies import Level, Policy
from app.privacy.sealing import DataKey, is_pseudonym

Pseudonym = Callable[[str, str], str]

_END_USER = "end_user"


class Words:
    """Keeps and shows what is said in words.

    Args:
        policy: how much is kept; of a tenant, whatever a request about the same answer wanted.
        pseudonym: names authors that are end users; where it is None they are kept as they were named.
        ring: seals; where it is None what is kept is written as it is.
    """

    def __init__(
        self, policy: Policy | None = None, *, pseudonym: Pseudonym | None = None, ring: Ring | None = None
    ) -> None:
        self._policy = policy or Policy()
        self._pseudonym = pseudonym
        self._ring = ring

    def named(self, speaker: Speaker, source: str) -> Speaker:
        """The speaker by the name that is kept: an end user's pseudonym."""
        name = speaker.user
        if self._pseudonym is None or source != _END_USER or name is None or is_pseudonym(name):
            return speaker
        return msgspec.structs.replace(speaker, user=self._pseudonym(speaker.tenant, name))

    async def kept(self, tenant: str, says: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Any]:
        """What is kept of what a call says in `columns`."""
        level = self._policy.level_for(tenant)
        if level == "redacted" and self._policy.names is not None:
            return await asyncio.to_thread(self._left, level, says, columns)
        return dict(says) if level == "full" else self._left(level, says, columns)

    def _left(self, level: Level, says: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Any]:
        kept = dict(says)
        for name in columns:
            if kept.get(name) is not None:
                kept[name] = self._policy.redact_all(kept[name]) if level == "redacted" else None
        return kept

    async def sealed(self, call: Call, columns: Iterable[str]) -> Call:
        """The call with its words sealed by the key of whose they are.

        Raises:
            Unavailable: where the keys are does not answer.
        """
        said = {name: call.says[name] for name in columns if call.says.get(name) is not None}
        if self._ring is None or not said:
            return call
        subject = _subject(call.identity, call.says.get("source"))
        key = (await self._ring.sealing(call.tenant, [subject]))[subject]
        envelopes = {name: enclose(value.encode(), key, _context(call.slot, name)) for name, value in said.items()}
        # A digest of words in the open would let anybody check a guess.
        digest = key.digest(call.digest)
        own = call.idempotency_key is not None and callers_key(call.idempotency_key) is None
        return msgspec.structs.replace(
            call,
            says={**call.says, **envelopes},
            digest=digest,
            idempotency_key=own_key(digest) if own else call.idempotency_key,
        )

    async def lasting(
        self, connection: AsyncConnection, kept: Sequence[tuple[Call, Call]], columns: Sequence[str]
    ) -> list[Call]:
        """Of calls and what `sealed` made of them, what the transaction may write: sealed by keys that are there.

        Raises:
            Unavailable: where the keys are does not answer.
        """
        sealed = [each for _, each in kept]
        if await can_open(self._ring, connection, (each.says.get(name) for each in sealed for name in columns)):
            return sealed
        return [await self.sealed(call, columns) for call, _ in kept]

    async def opened(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[Row]:
        """The rows with their words in place; what was erased, or cannot be read here, is null.

        Raises:
            Unavailable: where the keys are does not answer.
        """
        if not any(
            is_sealed(row[name]) or (row.get("said") and _MAY_BE in row["said"]) for row in rows for name in columns
        ):
            return [dict(row) for row in rows]
        said = [msgspec.json.decode(row["said"]) if row.get("said") else {} for row in rows]
        held = [each.get(name) for each in (*rows, *said) for name in columns]
        keys = await keys_for(self._ring, (each for each in held if isinstance(each, str)))
        shown: list[Row] = []
        for row, word in zip(rows, said, strict=True):
            in_place = {name: _disclosed(row[name], keys, row["slot"], name) for name in columns}
            if word:
                both = word | {
                    name: _disclosed(word[name], keys, row["slot"], name) for name in columns if name in word
                }
                in_place["said"] = msgspec.json.encode(both).decode()
            shown.append({**row, **in_place})
        return shown


_MAY_BE = "sealed:"


PREDICTION = "prediction:"
"""How the subject of a key begins that is a prediction."""


def prediction_subject(prediction_id: str) -> str:
    """Whose words about a prediction are that are not its user's own: they go with the prediction."""
    return f"{PREDICTION}{prediction_id}"


def _subject(identity: Mapping[str, Any], source: str | None) -> str:
    """Whose words are: an end user's own, else those of the answer or conversation they are about."""
    author = identity["author"]
    if identity.get("source", source) == _END_USER and not author.startswith(KEY_PREFIX):
        return str(author)
    about = identity["prediction_id"]
    return prediction_subject(about) if about is not None else f"conversation:{identity['conversation']}"


def _disclosed(held: Any, keys: Mapping[str, DataKey], slot: bytes, name: str) -> Any:
    if not isinstance(held, str) or not is_sealed(held):
        return held
    content = disclose(held, keys, _context(slot, name))
    return None if content is None else content.decode()


def _context(slot: bytes, column: str) -> bytes:
    return bytes(slot) + column.encode()
