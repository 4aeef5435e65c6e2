"""`hallmark drift`: whether questions or answers have changed, and what they are compared with, by the public API."""

from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.table import Column, Table

from app.client import Client
from app.errors import InvalidRequest
from app.messages import Message
from app.prompts import search_query
from app.terminal import Key, Url, explained, out

URL = "http://127.0.0.1:8080"
_TEXTS_AT_ONCE = 64

drift = typer.Typer(help="Drift: whether questions or answers have changed, and since when.", no_args_is_help=True)


class _Row(msgspec.Struct):
    """A line of a file of questions, or of a dataset's export."""

    question: str | None = None
    messages: list[Message] = []
    session: str | None = None


@drift.command("show")
def show(
    key: Key,
    url: Url = URL,
    release: Annotated[str | None, typer.Option(help="Only this release, as `name@3`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False,
) -> None:
    """Show each release's reference, its last windows, and what is wrong."""
    with explained(), Client(url, key) as client:
        report = client.call("GET", "/v1/drift", params={"release": release} if release else {})
    if as_json:
        out.print_json(data=report)
        return
    if not report["data"]:
        out.print("nothing is followed yet: `hallmark worker` begins with what is asked while it runs")
    for each in report["data"]:
        out.print(_windows(each))
        out.print(_summary(each), soft_wrap=True)


@drift.command("reference")
def reference(
    release: Annotated[str, typer.Argument(help="A release, as `name@3`.")],
    key: Key,
    url: Url = URL,
    since: Annotated[str | None, typer.Option(help="From what was asked then or later: 2026-11-01T09:30:00Z.")] = None,
    until: Annotated[str | None, typer.Option(help="And before then.")] = None,
    dataset: Annotated[str | None, typer.Option(help="From a registered dataset's predictions, by its digest.")] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="From a file: a JSON object a line, with `question` or `messages`.", exists=True),
    ] = None,
    embedding_model: Annotated[
        str, typer.Option(help="What embeds the file's questions: the model that the service has.")
    ] = "all-minilm-l6-v2",
) -> None:
    """Set what a release is compared with from now on; exits with 2 where that cannot be read."""
    body: dict[str, Any] = {"release": release}
    body |= {name: value for name, value in (("since", since), ("until", until), ("dataset", dataset)) if value}
    with explained(), Client(url, key) as client:
        if questions is not None:
            body["questions"] = _embedded(questions, embedding_model)
        made = client.call("POST", "/v1/drift/references", json=body)
    out.print(f"reference {made['version']} of {release}: {made['sessions']} sessions, {made['embedded']} embedded")


def _embedded(file: Path, model: str) -> dict[str, Any]:
    """Embed a file's questions here: the words stay on this machine."""
    from retrieval.embedder import SentenceTransformerEmbedder

    rows = list(_rows(file))
    embedder = SentenceTransformerEmbedder(model)
    embedder.load()
    vectors: list[str] = []
    for at in range(0, len(rows), _TEXTS_AT_ONCE):
        texts = [text for text, _ in rows[at : at + _TEXTS_AT_ONCE]]
        found = embedder.encode(texts, "query").astype("<f2")
        vectors += [b64encode(vector.tobytes()).decode() for vector in found]
    sessions = [session or f"line {number}" for number, (_, session) in enumerate(rows)]
    return {"name": file.name[:256], "model": embedder.model_id, "vectors": vectors, "sessions": sessions}


def _rows(file: Path) -> Iterator[tuple[str, str | None]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = msgspec.json.decode(line, type=_Row)
            except msgspec.DecodeError as error:
                raise InvalidRequest(f"{file}, line {number}: {error}") from error
            text = row.question or search_query(row.messages)
            if not text.strip():
                raise InvalidRequest(f"{file}, line {number}: it has neither `question` nor a user's message.")
            yield text, row.session


def _windows(release: dict[str, Any]) -> Table:
    names = ("window", "sessions", "questions p", "MMD²", "new", "answers p", "most changed", "level")
    table = Table(*(Column(name, no_wrap=True) for name in names), title=release["release"], title_justify="left")
    for each in release["windows"]:
        inputs, outputs = each["inputs"], each["outputs"]
        least = min(outputs, key=lambda output: output["p_value"], default=None)
        table.add_row(
            str(each["number"]),
            str(each["sessions"]),
            f"{inputs['p_value']:.3g}" if inputs else "?",
            f"{inputs['mmd2']:.4f}" if inputs else "?",
            f"{inputs['novel_share'] * 100:.1f} %" if inputs else "?",
            f"{least['p_value']:.3g}" if least else "?",
            f"{least['name']} ({least['effect']:.2f})" if least else "",
            f"{each['level']:.3g}",
        )
    return table


def _summary(release: dict[str, Any]) -> str:
    known = release["reference"]
    lines = [
        f"reference {known['version']}: {known['sessions']} sessions, from {known['source'].get('kind')}"
        if known
        else f"no reference yet: {release['open_sessions']} sessions of it so far"
    ]
    lines += [f"[red]{each['kind']} have drifted since {each['since'][:19]}[/]" for each in release["alarms"]]
    if release["alarms"] and release["examples"]:
        lines.append(f"such as {', '.join(map(escape, release['examples']))}")
    if not release["alarms"] and release["compared"]:
        lines.append("no alarm")
    return "\n".join(lines)
