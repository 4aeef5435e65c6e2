"""Predictions as rows of the database and back, and the statements that move them.

With `store` false, what the caller or a document said is dropped here, before anything is written anywhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, compress
from operator import itemgetter
from typing import Any
from uuid import UUID

import msgspec

from app import database
from app.predictions.derived import OPENING_CHARACTERS, declines, is_stuck, question_digest
from app.predictions.prediction import Prediction
from app.predictions.sealed import SEALED, opened, seal, seal_embedding
from app.privacy.sealing import DataKey

COLUMNS = tuple(column.name for column in database.predictions.columns if column.name != "row")
_JSON_COLUMNS = tuple(
    COLUMNS.index(name) for name in ("metadata", "passages", "citations", "tool_calls", "messages", "features")
)
_json_of, _NO_JSON = itemgetter(*_JSON_COLUMNS), (None,) * len(_JSON_COLUMNS)
_REQUEST, _STREAM, _STORE, _VALID, _EMBEDDING = (
    COLUMNS.index(name) for name in ("request", "stream", "store", "valid", "question_embedding")
)
_CHARACTERS, _DECLINES, _STUCK, _CALLED, _DIGEST = (
    COLUMNS.index(name) for name in ("answer_characters", "declines", "stuck", "called_tools", "question_digest")
)
_CONTENT_COLUMNS = tuple(
    COLUMNS.index(name) for name in ("tool_calls", "request", "messages", "question", "answer", "question_embedding")
)
_SEALED_COLUMNS = tuple((name, COLUMNS.index(name)) for name in SEALED)
KEPT = COLUMNS.index("kept")
"""Where a row says how much is kept."""
_SEALED, _SUBJECT_KEY = COLUMNS.index("sealed"), COLUMNS.index("subject_key")
# The strings of a passage or citation that name it; every other string of it may be somebody's text.
_NAMES = frozenset({"id", "passage_id", "document_id", "document_version", "status", "index_version"})
_AGES = ("feature", "state", "event_at", "created_at")

_quoted = [f'"{name}"' for name in COLUMNS]
SELECT = f"SELECT {', '.join(_quoted)} FROM predictions"  # noqa: S608 - our own column names.
_OVER_OPEN = (
    " ON CONFLICT (tenant, id) "
    f"DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _quoted)} "
    "WHERE predictions.outcome IN ('open', 'interrupted')"
)
INTERRUPT_OPEN = "UPDATE predictions SET outcome = 'interrupted' WHERE outcome = 'open'"

# The outcome is the one the row was read with: one taken for interrupted may have turned out finished since.
REMOVE = "DELETE FROM predictions WHERE outcome = ? AND row IN (SELECT value FROM json_each(?))"
CLOSED = (
    f"SELECT row, {', '.join(_quoted)} FROM predictions "  # noqa: S608 - our own column names.
    "WHERE outcome <> 'open' AND row NOT IN (SELECT value FROM json_each(?)) ORDER BY row LIMIT ?"
)
BACKLOG = (
    "SELECT (SELECT count(*) FROM predictions) - (SELECT count(*) FROM predictions WHERE outcome = 'open'), "
    "(SELECT id FROM predictions WHERE outcome <> 'open' ORDER BY row LIMIT 1)"
)

MAX_ROWS = 16
"""Rows that one statement writes at most."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

Row = list[Any]


def insert(rows: Sequence[Row]) -> tuple[str, list[Any]]:
    """The statement that writes so many new rows, and its values."""
    columns, values = _values(rows)
    return _insert(columns, len(rows)), values


def upsert(rows: Sequence[Row]) -> tuple[str, list[Any]]:
    """The statement that writes rows of which some may be there, and its values.

    A row that is finished stays as it is; one that was taken for interrupted may still turn out finished.
    """
    columns, values = _values(rows)
    return _insert(columns, len(rows)) + _OVER_OPEN, values


def _values(rows: Sequence[Row]) -> tuple[tuple[int, ...], list[Any]]:
    """The columns that any of the rows fills, and what they hold: sqlite3 binds a None at fifteen times a number."""
    empty = (None,) * len(rows)
    # Without a line of Python for each of the columns, of which there are fifty: it is done for every commit.
    columns = tuple(compress(range(len(COLUMNS)), map(empty.__ne__, zip(*rows, strict=True))))
    return columns, list(chain.from_iterable(map(itemgetter(*columns), rows)))


@lru_cache(maxsize=256)
def _insert(columns: tuple[int, ...], rows: int) -> str:
    """One statement for all the rows, because Python's lock is let go and fought for around every single one."""
    names = ", ".join(_quoted[at] for at in columns)
    values = f"({', '.join('?' * len(columns))})"
    return f"INSERT INTO predictions ({names}) VALUES {', '.join([values] * rows)}"  # noqa: S608 - our own names.


def to_row(prediction: Prediction) -> Row:
    """Give the values of `COLUMNS`; raises one of `writer.Writer.UNWRITABLE` for content that JSON cannot hold."""
    row = list(msgspec.structs.astuple(prediction)[:-1])
    # Of these types and no others sqlite3 knows that they need no adapter, for which it looks at some length.
    row[0] = bytearray.fromhex(prediction.id.replace("-", ""))
    row[_STREAM], row[_STORE] = int(prediction.stream), int(prediction.store)
    if prediction.valid is not None:
        row[_VALID] = int(prediction.valid)
    _derive(row, prediction)
    if not prediction.store:
        for column in _CONTENT_COLUMNS:
            row[column] = None
        for column, figures in _QUOTING_COLUMNS:
            row[column] = row[column] and [figures(item) for item in row[column]]
    if _json_of(row) != _NO_JSON:
        for column in _JSON_COLUMNS:
            if row[column] is not None:
                row[column] = _encode(row[column]).decode()
    if row[_EMBEDDING] is not None:
        row[_EMBEDDING] = bytearray(row[_EMBEDDING])
    request = row[_REQUEST]
    if request is not None:
        row[_REQUEST] = (request if isinstance(request, bytes) else _encode(request)).decode()
    return row


def _derive(row: Row, prediction: Prediction) -> None:
    """Note what figures need of content that is dropped or sealed next."""
    if (answer := prediction.answer) is not None:
        row[_CHARACTERS] = len(answer)
        row[_DECLINES] = int(declines(answer)) or None
        row[_STUCK] = int(is_stuck(answer[:OPENING_CHARACTERS])) or None
    if prediction.tool_calls is not None:
        row[_CALLED] = 1


def seal_row(row: Row, prediction: Prediction, key: DataKey) -> None:
    """Put what a row says under a key; the figures of passages, citations and features stay beside it."""
    content = {name: row[at] for name, at in _SEALED_COLUMNS if row[at] is not None}
    for _, at in _SEALED_COLUMNS:
        row[at] = None
    for at, figures in _QUOTING_COLUMNS:
        items = getattr(prediction, COLUMNS[at])
        row[at] = None if items is None else _encode([figures(item) for item in items]).decode()
    row[_SUBJECT_KEY] = key.id
    if prediction.question is not None:
        row[_DIGEST] = bytearray(question_digest(prediction.question, key))
    if (packed := row[_EMBEDDING]) is not None:
        row[_EMBEDDING] = bytearray(seal_embedding(prediction.tenant, prediction.id, packed, key))
    row[_SEALED] = bytearray(seal(prediction.tenant, prediction.id, content, key))


def sealed_by(rows: Iterable[Row]) -> set[str]:
    """The keys that rows are sealed by."""
    return {row[_SUBJECT_KEY] for row in rows if row[_SUBJECT_KEY] is not None}


def without_text(item: dict[str, Any]) -> dict[str, Any]:
    """Keep the numbers and the names of a passage or citation."""
    return {
        key: value
        for key, value in item.items()
        if value is None or isinstance(value, int | float) or (key in _NAMES and isinstance(value, str))
    }


def without_values(item: dict[str, Any]) -> dict[str, Any]:
    """Keep of a feature which it was and how old: a value is content, also where it is a number."""
    return {key: item[key] for key in _AGES if key in item}


FIGURES: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "passages": without_text,
    "citations": without_text,
    "features": without_values,
}
"""The columns of which something is left where content is not kept, and what that is."""

_QUOTING_COLUMNS = tuple((COLUMNS.index(name), figures) for name, figures in FIGURES.items())


def facts_of(row: tuple[Any, ...]) -> dict[str, Any]:
    """Give by name what `SELECT` gives."""
    facts = dict(zip(COLUMNS, row, strict=True))
    return facts | {"id": str(UUID(bytes=facts["id"]))}


def from_facts(facts: dict[str, Any], keys: Mapping[str, DataKey] | None = None) -> Prediction:
    """Make a prediction of its columns by name, the id and JSON as text, opened by the keys there are."""
    facts = opened(facts, keys)
    facts["stream"], facts["store"] = bool(facts["stream"]), bool(facts["store"])
    for name in ("valid", "declines", "stuck", "called_tools"):
        facts[name] = None if facts[name] is None else bool(facts[name])
    for column in _JSON_COLUMNS:
        name = COLUMNS[column]
        facts[name] = facts[name] and _decode(facts[name])
    facts["request"] = facts["request"] and msgspec.Raw(facts["request"].encode())
    return Prediction(**facts, handed_over=facts["outcome"] != "open")


def salvaged_row(prediction: Prediction) -> Row:
    """Give the plain facts of a prediction whose content cannot be written: a poor row is better than none."""
    row = to_row(Prediction(id=prediction.id, tenant=prediction.tenant))
    for column, value in enumerate(msgspec.structs.astuple(prediction)[:_REQUEST]):
        if isinstance(value, str) and column:
            row[column] = value.encode(errors="replace").decode()
        elif isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63):
            row[column] = value
    row[COLUMNS.index("error_code")] = prediction.error_code or "record_incomplete"
    return row
