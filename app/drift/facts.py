"""What drift looks at in predictions: the embedding of each question, and what its answer was like, in figures.

The main rule: every query names its tenant and its release, here and nowhere else in the package.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Protocol, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Row, Select, select

from app.database import Database, predictions
from app.messages import Message
from app.predictions.embeddings import Vectors, pack
from app.predictions.sealed import opened
from app.privacy.envelopes import Ring
from app.privacy.sealing import DataKey
from app.prompts import search_query

MAX_QUESTIONS = 5
"""Questions of one session that count: more of them would say little more, and there could be any number."""

MAX_QUESTION_CHARACTERS = 2_000
_ROWS_AT_ONCE = 500
_EMBEDDED_AT_ONCE = 64

T = TypeVar("T")
_p = predictions.c
SESSION = (_p.id, _p.user, _p.conversation)
_LOOKED_AT = (
    _p.row,
    *SESSION,
    _p.finish_reason,
    _p.verdict,
    _p.predicted_class,
    _p.completion_tokens,
    _p.passages,
    _p.citations,
    _p.question_embedding,
    _p.tenant,
    _p.subject_key,
    _p.sealed,
)


class Outputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer was like; None is what it cannot tell."""

    predicted_class: str | None = None
    finish_reason: str | None = None
    refused: bool = False
    tokens: int | None = None
    top_score: float | None = None
    """The cosine of the passage nearest to the question."""
    support: float | None = None
    """How far its passages bear it out, 0 to 1: the mean over the sentences that cite."""


class Question(msgspec.Struct, frozen=True):
    """A question with its answer's figures; `outputs` is None where nothing was answered."""

    session: bytes
    prediction_id: str | None
    embedding: bytes | None
    outputs: Outputs | None
    key: str | None = None
    """The key that its prediction is sealed by: a copy of the embedding is sealed by the same."""


class QuestionEmbedder(Protocol):
    """What embeds questions that were searched for nothing: `retrieval.embedder.Embedder`, or a test's stand-in."""

    model_id: str

    async def embed(self, texts: Sequence[str], kind: Any, *, bulk: bool = False) -> Vectors:
        """Embed; (n, dimension) float32."""
        ...


class _Passage(msgspec.Struct):
    dense_score: float | None = None


class _Citation(msgspec.Struct):
    answer_start: int = 0
    support: float | None = None


class _Asked(msgspec.Struct):
    messages: list[Message] = []


_passages = msgspec.json.Decoder(list[_Passage]).decode
_citations = msgspec.json.Decoder(list[_Citation]).decode
_asked = msgspec.json.Decoder(_Asked).decode


def counted(release: str | None = None) -> tuple[ColumnElement[bool], ...]:
    """Which answers count: finished ones that a rollout chose the release for, and that somebody was shown."""
    named = _p.release_name.is_not(None) if release is None else _p.release_name == release
    return (named, _p.outcome == "finished", _p.assignment.in_(("stable", "canary")))


def session_of(tenant: str, prediction_id: str, user: str | None, conversation: str | None) -> bytes:
    """What counts once, as a digest: the conversation, else the user, else the answer."""
    who = f"c{conversation}" if conversation else f"u{user}" if user else f"p{prediction_id}"
    return blake2b(f"{tenant}\0{who}".encode(errors="surrogatepass"), digest_size=8).digest()


async def questions_of(
    database: Database,
    tenant: str,
    release: str,
    rows: Sequence[int],
    *,
    embedder: QuestionEmbedder | None = None,
    ring: Ring | None = None,
) -> list[Question]:
    """Read the questions in these rows of the predictions, opened by the ring's keys; those that are gone are left out.

    Where an embedder is given, kept questions without an embedding get one, which is not kept.
    """
    found: list[Question] = []
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        wanted = (*counted(release), _p.tenant == tenant, _p.row.in_(rows[at : at + _ROWS_AT_ONCE]))
        async with database.reading() as connection:
            query: Select[Any] = select(*_LOOKED_AT).where(*wanted).order_by(_p.row)
            page = (await connection.execute(query)).all()
        keys = await _keys(ring, page)
        read = await asyncio.to_thread(_read, tenant, page, keys)
        found += await _embedded(database, tenant, page, read, embedder, keys) if embedder else read
    return found


async def _keys(ring: Ring | None, page: Sequence[Row[Any]]) -> Mapping[str, DataKey]:
    sealed_by = sorted({row.subject_key for row in page if row.sealed is not None})
    return await ring.opening(sealed_by) if ring is not None and sealed_by else {}


def _read(tenant: str, page: Sequence[Row[Any]], keys: Mapping[str, DataKey]) -> list[Question]:
    return [
        Question(
            session_of(tenant, row.id, row.user, row.conversation),
            row.id,
            row.question_embedding if row.sealed is None else opened(row._asdict(), keys)["question_embedding"],
            outputs_of(row),
            row.subject_key if row.sealed is not None else None,
        )
        for row in page
    ]


def outputs_of(row: Row[Any]) -> Outputs:
    """What an answer was like, from its columns."""
    verdict = row.verdict or ""
    scores = [each.dense_score for each in _read_json(_passages, row.passages) if each.dense_score is not None]
    return Outputs(
        predicted_class=row.predicted_class,
        finish_reason=row.finish_reason,
        refused=verdict.startswith("abstained") or row.finish_reason == "content_filter",
        tokens=row.completion_tokens,
        top_score=max(scores, default=None),
        support=_support(verdict, row.citations),
    )


def _read_json(decode: Callable[[str], list[T]], text: str | None) -> list[T]:
    """Read what is of the usual form: of any other, nothing is known."""
    try:
        return decode(text) if text else []
    except msgspec.DecodeError:
        return []


def _support(verdict: str, citations: str | None) -> float | None:
    if verdict.endswith(":unsupported_answer"):
        return 0.0
    if verdict != "answered":
        return None
    best: dict[int, float] = {}
    for each in _read_json(_citations, citations):
        best[each.answer_start] = max(best.get(each.answer_start, 0.0), each.support or 0.0)
    return sum(best.values()) / len(best) if best else 0.0


async def _embedded(
    database: Database,
    tenant: str,
    page: Sequence[Row[Any]],
    read: list[Question],
    embedder: QuestionEmbedder,
    keys: Mapping[str, DataKey],
) -> list[Question]:
    """Embed what was kept of the questions that have no embedding."""
    missing = [row.row for row, question in zip(page, read, strict=True) if question.embedding is None]
    kept = (_p.tenant == tenant, _p.row.in_(missing), _p.store)
    async with database.reading() as connection:
        query = select(_p.id, _p.tenant, _p.subject_key, _p.sealed, _p.question, _p.request).where(*kept)
        rows = [opened(row._asdict(), keys) for row in await connection.execute(query)]
    texts = {row["id"]: text for row in rows if (text := row["question"] or _asked_in(row["request"]))}
    made: dict[str, bytes] = {}
    ids = sorted(texts)
    for at in range(0, len(ids), _EMBEDDED_AT_ONCE):
        some = ids[at : at + _EMBEDDED_AT_ONCE]
        vectors = await embedder.embed([texts[each][:MAX_QUESTION_CHARACTERS] for each in some], "query", bulk=True)
        made |= {each: pack(vector, embedder.model_id) for each, vector in zip(some, vectors, strict=True)}
    return [
        msgspec.structs.replace(each, embedding=made[each.prediction_id]) if each.prediction_id in made else each
        for each in read
    ]


def _asked_in(request: str | None) -> str:
    """What a request asks, as a search would take it; nothing where it is of another form."""
    try:
        return search_query(_asked(request).messages) if request else ""
    except msgspec.DecodeError:
        return ""
