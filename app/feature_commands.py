"""`hallmark features ...`: define views, write features from files, read them as of any time, by the public API."""

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from tomllib import TOMLDecodeError, loads
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from app.client import Client, ServiceFailure
from app.datasets.files import KINDS, BadLine, kind_of, rows_of
from app.errors import InvalidRequest
from app.features import BadRow, FeatureRow, FeatureView
from app.features import rows_of as rows_of_view
from app.features.views import EVENT_TIME, moment_of, shown_time
from app.terminal import Key, Url, explained, out, whole

features = typer.Typer(
    help="Features: define, write, read as of any time, join to training rows.", no_args_is_help=True
)

URL = "http://127.0.0.1:8080"
ROWS_AT_ONCE = 1_000
POINTS_AT_ONCE = 500
_JSON = {"content-type": "application/json"}

View = Annotated[str, typer.Argument(help="The view's name.")]
File = Annotated[Path, typer.Argument(help="JSON lines, CSV or Parquet.", exists=True, dir_okay=False)]
Names = Annotated[list[str], typer.Option("--feature", help="As `view:feature`; may be said again.")]


@features.command("define")
def define(
    view: View,
    file: Annotated[Path, typer.Argument(help="What is in the view, in TOML or JSON.", exists=True, dir_okay=False)],
    key: Key,
    url: Url = URL,
) -> None:
    """Make a view, or add features to one."""
    with explained(), Client(url, key) as client:
        made = client.call("PUT", _path(view), content=msgspec.json.encode(_described(file)), headers=_JSON)
    out.print(f"{escape(made['name'])}: {len(made['features'])} features of {escape(made['entity'])}")


@features.command("describe")
def describe(
    key: Key, view: Annotated[str | None, typer.Argument(help="Only this one.")] = None, url: Url = URL
) -> None:
    """List the views and what is in them."""
    table = Table("feature", "type", "of", "holds", "subject")
    with explained(), Client(url, key) as client:
        found = [client.call("GET", _path(view))] if view else client.call("GET", "/v1/features")["data"]
    for each in found:
        holds = "until the next" if each["ttl_seconds"] is None else f"{each['ttl_seconds']} s"
        for name, kind in each["features"].items():
            table.add_row(f"{each['name']}:{name}", kind, each["entity"], holds, each["subject"] or "")
    out.print(table)


@features.command("delete")
def delete(view: View, key: Key, url: Url = URL) -> None:
    """Take a view away, with all that every tenant has in it."""
    with explained(), Client(url, key) as client:
        client.call("DELETE", _path(view))
    out.print(f"{escape(view)} is gone")


@features.command("put")
def put(view: View, file: File, key: Key, url: Url = URL) -> None:
    """Write a file's rows: a column for the entity, `event_time`, perhaps `created_time`, and the features.

    All of the file is looked at first, and nothing is written if one row cannot be taken; exits with 2 then.
    """
    with explained(), Client(url, key) as client:
        told = client.call("GET", _path(view))
        there = FeatureView(**{name: told[name] for name in FeatureView.__struct_fields__})
        rows = [_sent(there, row) for row in read_rows(there, file)]
        added = unchanged = 0
        for at in range(0, len(rows), ROWS_AT_ONCE):
            content = msgspec.json.encode({"rows": rows[at : at + ROWS_AT_ONCE]})
            try:
                written = client.call("POST", f"{_path(view)}/rows", content=content, headers=_JSON)
            except ServiceFailure as error:
                done = (
                    f" The first {at:,} rows are written; write the file again, and they are passed over." if at else ""
                )
                raise ServiceFailure(f"{error}{done}") from error
            added, unchanged = added + written["added"], unchanged + written["unchanged"]
    out.print(f"{added} added, {unchanged} unchanged")


@features.command("get")
def get(
    names: Names,
    entity: Annotated[list[str], typer.Option("--entity", help="Whose, as `customer=c-17`; may be said again.")],
    key: Key,
    url: Url = URL,
    at: Annotated[str | None, typer.Option(help="As they were known then: 2026-11-01T09:30:00Z.")] = None,
) -> None:
    """Read an entity's features, now or as they were known at a time."""
    with explained(), Client(url, key) as client:
        row: dict[str, Any] = {"entity": dict(map(_pair, entity))} | ({"at": _moment(at)} if at else {})
        (found,) = client.call("POST", "/v1/feature-values", json={"features": names, "rows": [row]})["data"]
    table = Table("feature", "value", "state", "since", "known since")
    for each in found["values"]:
        value = "" if each["value"] is None else msgspec.json.encode(each["value"]).decode()
        times = [(each[name] or "")[:19] for name in ("event_at", "created_at")]
        table.add_row(escape(each["feature"]), escape(value), each["state"], *times)
    out.print(table)


@features.command("join")
def join(
    file: File,
    names: Names,
    target: Annotated[Path, typer.Option("--out", help="The file to write, JSON lines.", dir_okay=False)],
    key: Key,
    url: Url = URL,
    column: Annotated[str, typer.Option("--time", help="The column with each row's own time.")] = EVENT_TIME,
) -> None:
    """Add to each row of a file what its features were known to be at the row's own time."""
    with explained(), Client(url, key) as client:
        views = {each["name"]: each["entity"] for each in client.call("GET", "/v1/features")["data"]}
        entities = sorted({views[view] for name in names if (view := name.partition(":")[0]) in views})
        rows = list(_points(file, entities, column))
        with whole(target) as written:
            for at in range(0, len(rows), POINTS_AT_ONCE):
                some = rows[at : at + POINTS_AT_ONCE]
                asked = {"features": names, "rows": [point for _, point in some]}
                found = client.call("POST", "/v1/feature-values", json=asked)["data"]
                for (row, _), joined in zip(some, found, strict=True):
                    added = {each["feature"]: each["value"] for each in joined["values"]}
                    written.write(msgspec.json.encode({**row, **added}) + b"\n")
    out.print(f"{len(rows)} rows in {escape(str(target))}", soft_wrap=True)


def read_rows(view: FeatureView, file: Path) -> list[FeatureRow]:
    """Read all rows of a file; raises InvalidRequest naming the lines that cannot be taken."""
    kind = _kind(file)
    with file.open("rb") as opened:
        given = [
            (f"{file.name} line {number}", BadRow(str(row)) if isinstance(row, BadLine) else row)
            for number, row in rows_of(file.name, opened)
        ]
    rows = rows_of_view(view, given, now=time.time_ns() // 1_000_000, is_text=kind == "csv")
    if not rows:
        raise InvalidRequest(f"{file.name}: there is no row in it.")
    return rows


def _points(file: Path, entities: list[str], column: str) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Each row, and what is asked for it."""
    _kind(file)
    with file.open("rb") as opened:
        for number, row in rows_of(file.name, opened):
            try:
                if isinstance(row, BadLine):
                    raise BadRow(str(row))  # noqa: TRY301 - told like what else is wrong with a line.
                missing = [name for name in (*entities, column) if row.get(name) is None]
                if missing:
                    raise BadRow(f"`{missing[0]}` is missing")  # noqa: TRY301
                at = shown_time(moment_of(row[column], column))
            except BadRow as error:
                raise InvalidRequest(f"{file.name} line {number}: {error}.") from None
            yield row, {"entity": {name: row[name] for name in entities}, "at": at}


def _kind(file: Path) -> str:
    kind = kind_of(file.name)
    if kind is None:
        raise InvalidRequest(f"{file.name} is of no kind that is read; {', '.join(KINDS)} are.")
    return kind


def _sent(view: FeatureView, row: FeatureRow) -> dict[str, Any]:
    """A row as the API takes it."""
    known = {} if row.created_at is None else {"created_time": shown_time(row.created_at)}
    # A row in which nothing is known says so of each feature it had.
    said = row.values or dict.fromkeys(view.features)
    return {"entity": row.entity, "event_time": shown_time(row.event_at), "values": said, **known}


def _described(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return msgspec.json.decode(text) if file.suffix.lower() == ".json" else loads(text)
    except (UnicodeDecodeError, TOMLDecodeError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{file} cannot be read: {error}.") from None


def _pair(text: str) -> tuple[str, str]:
    kind, equals, key = text.partition("=")
    if not (kind and equals and key):
        raise InvalidRequest(f"`--entity`: is written `customer=c-17`, unlike {text!r}.")
    return kind, key


def _moment(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest("`--at`: give a time, as in 2026-11-24T12:00:00Z.") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).isoformat()


def _path(view: str) -> str:
    return f"/v1/features/{quote(view, safe='')}"
