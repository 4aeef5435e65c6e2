"""What is left of a prediction whose subject was erased, and which those are that turn up later.

The main rule: figures stay, and nothing that anybody said or went by.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import erasures
from app.predictions.prediction import created_at
from app.predictions.rows import FIGURES
from app.privacy.subjects import SubjectKind, subject_digest

_GONE = (
    "user",
    "conversation",
    "metadata",
    "tool_calls",
    "request",
    "messages",
    "question",
    "answer",
    "question_embedding",
    "question_digest",
    "sealed",
    "subject_key",
)
_decode = msgspec.json.Decoder(list[dict[str, Any]]).decode


def blank(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that change when it is erased; `facts` has those of `FIGURES`, as JSON."""
    kept = {name: facts[name] and _figures(name, facts[name]) for name in FIGURES}
    return {**dict.fromkeys(_GONE), **kept, "store": False, "kept": "erased"}


def _figures(name: str, written: str) -> str:
    return msgspec.json.encode([FIGURES[name](item) for item in _decode(written)]).decode()


async def erased_since(connection: AsyncConnection) -> dict[str, int]:
    """When each subject was erased last, by digest, in milliseconds since 1970."""
    found: dict[str, int] = {}
    for row in await connection.execute(select(erasures.c.digests, erasures.c.requested_at)):
        found |= {digest: max(row.requested_at, found.get(digest, 0)) for digest in json.loads(row.digests)}
    return found


def is_erased(facts: Mapping[str, Any], erased: Mapping[str, int]) -> bool:
    """Whether a row, or the answer that it is the shadow of, was made before its subject was erased."""
    made = created_at(facts["shadow_of"] or facts["id"]).timestamp() * 1000
    kinds: tuple[SubjectKind, ...] = ("user", "conversation")
    return any(
        facts[kind] is not None and erased.get(subject_digest(facts["tenant"], kind, facts[kind]), -1) >= made
        for kind in kinds
    )
