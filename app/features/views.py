"""Pure: what features there are, and a row of their values as somebody sends it or has it in a file.

The main rule: a value is of the type that its view says, or the row is refused by its field; nothing is guessed.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

import msgspec

from app.errors import InvalidRequest
from app.privacy.subjects import SubjectKind
from app.releases import FeatureName

Type = Literal["string", "integer", "number", "boolean"]
Value = str | int | float | bool | None
"""What a feature is; None where nothing is known."""

MAX_FEATURES = 100
MAX_CHARACTERS = 2_000
"""Of a value that is text."""
MAX_ENTITY = 512
MAX_TOLD = 20
LARGEST_INTEGER = 2**53 - 1
"""Every JSON reader has integers up to here exact."""

EVENT_TIME, CREATED_TIME = "event_time", "created_time"
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
_WHOLE = re.compile(r"[+-]?[0-9]{1,16}")
_TRUTH = {"true": True, "false": False}


class FeatureView(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Features of one kind of entity, which are written together.

    Raises:
        ValueError: its names collide.
    """

    name: FeatureName
    entity: FeatureName
    """The kind of thing that has them, such as `customer`; a request names one of it."""
    features: Annotated[dict[FeatureName, Type], msgspec.Meta(min_length=1, max_length=MAX_FEATURES)]
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=10**9)] | None = None
    """How long after its event a value holds; None is until the next."""
    subject: SubjectKind | None = None
    """Whose its entities are where they are people or conversations: with them they are erased."""
    description: Annotated[str, msgspec.Meta(max_length=2_000)] = ""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        taken = sorted({self.entity, EVENT_TIME, CREATED_TIME} & set(self.features))
        if self.entity in (EVENT_TIME, CREATED_TIME):
            raise ValueError("`entity`: is what a file calls a time: choose another name")
        if taken:
            raise ValueError(f"`features`: {taken[0]!r} is what a file calls something else: choose another name")
        if not is_plain(self.description):
            raise ValueError("`description`: must be text")


class FeatureRow(msgspec.Struct, frozen=True, kw_only=True):
    """What an entity's features were from a moment on; times are milliseconds since 1970."""

    entity: str
    event_at: int
    values: dict[str, Value]
    created_at: int | None = None
    """When that was known; None is when it is written."""


class BadRow(ValueError):
    """A row that cannot be taken; the message names the field and the fix."""


def rows_of(
    view: FeatureView, given: Sequence[tuple[str, Mapping[str, Any] | BadRow]], *, now: int, is_text: bool = False
) -> list[FeatureRow]:
    """Read rows, each with its place (`line 3`), as a file has them: a column for the entity, the times, each feature.

    With `is_text` everything is text, as in CSV, and is read as what the view says it is.

    Raises:
        InvalidRequest: some cannot be taken; the first of them are named with what is wrong.
    """
    rows: list[FeatureRow] = []
    problems: list[str] = []
    seen: dict[tuple[str, int, int | None], str] = {}
    for place, each in given:
        try:
            row = row_of(view, each, now=now, is_text=is_text)
        except BadRow as error:
            problems.append(f"{place}: {error}.")
            continue
        first = seen.setdefault((row.entity, row.event_at, row.created_at), place)
        if first is place:
            rows.append(row)
        else:
            problems.append(f"{place}: it is of the same entity and times as {first}; leave one of them out.")
    if problems:
        shown = "\n".join(problems[:MAX_TOLD])
        more = f"\nand {len(problems) - MAX_TOLD:,} more" if len(problems) > MAX_TOLD else ""
        count = "1 row" if len(problems) == 1 else f"{len(problems):,} rows"
        raise InvalidRequest(f"{count} cannot be taken, so none was:\n{shown}{more}", param="rows")
    return rows


def row_of(view: FeatureView, given: Mapping[str, Any] | BadRow, *, now: int, is_text: bool = False) -> FeatureRow:
    """Read one row; raises BadRow."""
    if isinstance(given, BadRow):
        raise given
    known = {view.entity, EVENT_TIME, CREATED_TIME, *view.features}
    unknown = sorted(set(given) - known)
    if unknown:
        raise BadRow(f"`{unknown[0][:100]}`: there is no such column; there are {', '.join(sorted(known))}")
    created_at = moment_of(given[CREATED_TIME], CREATED_TIME) if given.get(CREATED_TIME) is not None else None
    if created_at is not None and created_at > now:
        raise BadRow(f"`{CREATED_TIME}`: it is in the future; it says when the values were known")
    if given.get(EVENT_TIME) is None:
        raise BadRow(f"`{EVENT_TIME}` is missing: give the time from which the values hold, as 2026-11-24T12:00:00Z")
    readers = _TEXT_READERS if is_text else _READERS
    values = {name: _value(name, kind, given[name], readers) for name, kind in view.features.items() if name in given}
    if not values:
        raise BadRow(f"it has none of the features {', '.join(view.features)}; write null for one that nobody knows")
    return FeatureRow(
        entity=entity_of(given.get(view.entity), view.entity),
        event_at=moment_of(given[EVENT_TIME], EVENT_TIME),
        values={name: value for name, value in values.items() if value is not None},
        created_at=created_at,
    )


def entity_of(given: Any, field: str) -> str:
    """Read an entity's key, which may be a whole number; raises BadRow."""
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if not (isinstance(given, str) and given.strip() and len(given) <= MAX_ENTITY and is_plain(given)):
        raise BadRow(f"`{field}`: must be the entity's key, a text of 1 to {MAX_ENTITY} characters or a whole number")
    return given


def moment_of(given: Any, field: str) -> int:
    """Read a time, of which one without a zone is UTC, as milliseconds since 1970; raises BadRow."""
    moment = given
    if isinstance(given, str):
        try:
            moment = datetime.fromisoformat(given)
        except ValueError:
            moment = None
    if isinstance(moment, date) and not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    if not isinstance(moment, datetime):
        raise BadRow(f"`{field}`: must be a time, as in 2026-11-24 or 2026-11-24T12:00:00Z")
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    if not _FIRST <= moment <= _LAST:
        raise BadRow(f"`{field}`: must lie between 1970 and 9999")
    return round(moment.timestamp() * 1000)


def shown_time(milliseconds: int) -> str:
    """A time as records have it."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def reference(view: str, name: str) -> str:
    """What a feature is called in records and prompts."""
    return f"{view}:{name}"


def value_of(kind: Type, given: Any) -> Value:
    """Read a value of a type; None where it is not of it."""
    return _READERS[kind](given)


def _value(name: str, kind: Type, given: Any, readers: Mapping[Type, Callable[[Any], Value]]) -> Value:
    if given is None:
        return None
    read = readers[kind](given)
    if read is None:
        raise BadRow(f"`{name}`: must be {_MEANINGS[kind]}")
    return read


def is_plain(text: str) -> bool:
    """Whether every database takes a text: it has no NUL, and no half of a character."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _string(given: Any) -> str | None:
    return given if isinstance(given, str) and len(given) <= MAX_CHARACTERS and is_plain(given) else None


def _integer(given: Any) -> int | None:
    if isinstance(given, float) and given.is_integer():
        given = int(given)  # A column of integers with gaps is one of floats in many files.
    is_whole = isinstance(given, int) and not isinstance(given, bool)
    return given if is_whole and abs(given) <= LARGEST_INTEGER else None


def _number(given: Any) -> float | None:
    if isinstance(given, bool) or not isinstance(given, int | float):
        return None
    try:
        number = float(given)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _boolean(given: Any) -> bool | None:
    return given if isinstance(given, bool) else None


def _integer_text(given: str) -> int | None:
    return _integer(int(given)) if _WHOLE.fullmatch(given.strip()) else None


def _number_text(given: str) -> float | None:
    try:
        return _number(float(given))
    except ValueError:
        return None


_READERS: Mapping[Type, Callable[[Any], Value]] = {
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
}
_TEXT_READERS: Mapping[Type, Callable[[Any], Value]] = {
    "string": _string,
    "integer": _integer_text,
    "number": _number_text,
    "boolean": lambda given: _TRUTH.get(given.strip().lower()),
}
_MEANINGS: Mapping[Type, str] = {
    "string": f"text of at most {MAX_CHARACTERS:,} characters",
    "integer": "a whole number below 2^53",
    "number": "a finite number",
    "boolean": "true or false",
}
