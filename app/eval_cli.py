"""The command line: `hallmark-eval retrieval | citations | abstention`: figures on questions whose answers are known.

The main rule: no model judges, and the same documents, questions and settings give the same figures. What is measured
is the retrieval that the settings describe, in a directory of its own, or a running service by its public API.

Exit codes: 0 good enough, 1 below a threshold or the work failed, 2 the command or a file it names is wrong.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from app.cli import load_settings
from app.evaluated import EvaluatedService
from app.retrieval_wiring import embedder_of, second_look_of
from app.settings import Settings
from app.terminal import err, out, whole
from retrieval.documents import SearchMode
from retrieval.errors import RetrievalError
from retrieval.evaluation import reports
from retrieval.evaluation.answering import Answerer, Extractive, abstention_figures, ask, citation_figures
from retrieval.evaluation.claims import value_figures
from retrieval.evaluation.measures import Figure
from retrieval.evaluation.reports import Report, Row, Threshold
from retrieval.evaluation.searching import MODES, Search, indexed, rank
from retrieval.evaluation.searching import Progress as Told
from retrieval.evaluation.sets import BadSet, EvaluationSet, Question, load, off_topic
from retrieval.retriever import Retriever

app = typer.Typer(
    name="hallmark-eval",
    help="How well passages are found, answers cited, and questions without an answer refused.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Sets = Annotated[list[Path], typer.Argument(help="Files of questions, and folders in BEIR's form.", exists=True)]
Documents = Annotated[Path | None, typer.Option(help="Folder with the documents that files of questions are about.")]
Url = Annotated[str | None, typer.Option(help="Measure this running service, which has the documents already.")]
Key = Annotated[str | None, typer.Option(envvar="HALLMARK_API_KEY", help="An API key of that service.")]
Model = Annotated[str, typer.Option(help="The release to ask there, by name or as `name@3`.")]
Least = Annotated[list[str] | None, typer.Option("--at-least", help="FIGURE=VALUE or SET:FIGURE=VALUE; repeat.")]
Most = Annotated[list[str] | None, typer.Option("--at-most", help="The same for what should be small; repeat.")]


def _place(path: Path | None) -> Path | None:
    """Refuse a place that nothing can be written to before anything is measured, which takes minutes."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"There is no folder {str(path.parent)!r} to write {path.name} into.")
    return path


Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.", callback=_place)]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Write the report as a table.", callback=_place)]
TopK = Annotated[int, typer.Option(min=1, max=50, help="Passages that an answer may rest on.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Ask so many questions of each set and kind, evenly through it.")
]


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def retrieval(
    sets: Sets,
    documents: Documents = None,
    url: Url = None,
    key: Key = None,
    k: Annotated[int, typer.Option(min=1, max=50, help="Documents of a ranking that count.")] = 10,
    settings_too: Annotated[
        bool, typer.Option("--settings", help="Also rank by what settings can change: the other fusion, the reranker.")
    ] = False,
    references: Annotated[Path | None, typer.Option(help="JSON: for each set what others reach.", exists=True)] = None,
    into: Annotated[
        Path | None, typer.Option(help="A Markdown file whose marked table is replaced.", exists=True)
    ] = None,
    at_least: Least = None,
    at_most: Most = None,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Rank each set's documents: nDCG, recall and MRR of the dense leg, BM25 and their fusion."""
    with _explained():
        thresholds = _thresholds(at_least, at_most)
        known = msgspec.json.decode(references.read_bytes(), type=dict[str, Any]) if references else {}
        loaded = [load(path, documents) for path in sets]
        rows, of = asyncio.run(_retrieval(loaded, k, settings_too, url, key))
        report = Report("retrieval", {**of, "k": k}, tuple(rows), reports.failures(rows, thresholds))
        table = reports.comparison(rows, known.get("sets", {}), known.get("names", ()))
        if into:
            _replace_table(into, table)
    out.print(table, markup=False, soft_wrap=True)
    _finish(report, json, markdown)


@app.command()
def citations(
    sets: Sets,
    documents: Documents = None,
    url: Url = None,
    key: Key = None,
    model: Model = "hallmark",
    top_k: TopK = 5,
    limit: Limit = None,
    at_least: Least = None,
    at_most: Most = None,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Ask what the sets' documents answer: precision and recall of citations, right answers, wrong values told."""
    with _explained():
        thresholds = _thresholds(at_least, at_most)
        loaded = [load(path, documents) for path in sets]
        rows, of = asyncio.run(_citations(loaded, url, key, model, top_k, limit))
        report = Report("citations", {**of, "top_k": top_k}, tuple(rows), reports.failures(rows, thresholds))
    _finish(report, json, markdown)


@app.command()
def abstention(
    sets: Sets,
    documents: Documents = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--off-topic", help="Questions of other fields: a file or a BEIR folder; repeat."),
    ] = None,
    url: Url = None,
    key: Key = None,
    model: Model = "hallmark",
    top_k: TopK = 5,
    limit: Limit = None,
    at_least: Least = None,
    at_most: Most = None,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Ask what the documents answer and what they do not: how many of either are refused, near misses apart."""
    with _explained():
        thresholds = _thresholds(at_least, at_most)
        loaded = [load(path, documents) for path in sets]
        strange = [question for path in beside or () for question in off_topic(path, limit)]
        rows, of = asyncio.run(_abstention(loaded, strange, url, key, model, top_k, limit))
        report = Report("abstention", {**of, "top_k": top_k}, tuple(rows), reports.failures(rows, thresholds))
    _finish(report, json, markdown)


async def _retrieval(
    sets: Sequence[EvaluationSet], k: int, settings_too: bool, url: str | None, key: str | None
) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    of: dict[str, Any] = {}

    async def measure(search: Search, judged: EvaluationSet, mode: SearchMode, name: str, **options: Any) -> None:
        with _progress(judged.name) as told:
            ranked = await rank(search, judged, mode, k=k, progress=told, **options)
        rows.append(Row(judged.name, ranked.figures, name))
        of["index_version"] = ranked.index_version

    for judged in sets:
        if url is not None:
            async with _service(url, key, "") as service:
                for mode in MODES:
                    await measure(service, judged, mode, mode)
            continue
        settings = load_settings()
        async with _retriever(settings, judged) as retriever:
            of |= _described(settings)
            for mode in MODES:
                await measure(retriever, judged, mode, mode, rerank=False)
            if settings_too:
                other = "rrf" if settings.retrieval.fusion == "dbsf" else "dbsf"
                await measure(retriever, judged, "hybrid", f"fused by {other.upper()}", fusion=other, rerank=False)
                if second_look_of(settings.retrieval) is not None:
                    await measure(retriever, judged, "hybrid", "fused, reranked")
    return rows, of


async def _citations(
    sets: Sequence[EvaluationSet], url: str | None, key: str | None, model: str, top_k: int, limit: int | None
) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    of: dict[str, Any] = {}
    for judged in sets:
        questions = _some([each for each in judged.questions if each.kind == "answerable"], limit)
        async with _answerer(judged, url, key, model, top_k) as (answerer, retriever):
            with _progress(judged.name) as told:
                figures = citation_figures(await ask(answerer, questions, told))
            if retriever is not None:
                figures += [each for each in await value_figures(judged, retriever) if each.n]
            of |= _asked(answerer, retriever)
        rows.append(_row(judged, figures))
    return rows, of


async def _abstention(
    sets: Sequence[EvaluationSet],
    strange: Sequence[Question],
    url: str | None,
    key: str | None,
    model: str,
    top_k: int,
    limit: int | None,
) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    of: dict[str, Any] = {}
    for judged in sets:
        kinds = [[each for each in judged.questions if each.kind == kind] for kind in ("answerable", "near_miss")]
        own = [each for each in judged.questions if each.kind == "off_topic"]
        questions = [each for kind in (*kinds, own) for each in _some(kind, limit)]
        async with _answerer(judged, url, key, model, top_k) as (answerer, retriever):
            with _progress(judged.name) as told:
                asked = await ask(answerer, [*questions, *strange], told)
            of |= _asked(answerer, retriever)
        rows.append(_row(judged, abstention_figures(asked)))
    return rows, of


def _row(judged: EvaluationSet, figures: Sequence[Figure]) -> Row:
    return Row(judged.name, tuple(each for each in figures if each.n))


def _asked(answerer: Answerer, retriever: Retriever | None) -> dict[str, Any]:
    """What answered: the settings' retrieval, or a release of a service."""
    if isinstance(answerer, EvaluatedService):
        return answerer.described()
    return {"answerer": "extractive"} | ({"index_version": retriever.index_version} if retriever else {})


@asynccontextmanager
async def _answerer(
    judged: EvaluationSet, url: str | None, key: str | None, model: str, top_k: int
) -> AsyncIterator[tuple[Answerer, Retriever | None]]:
    if url is not None:
        async with _service(url, key, model, top_k) as service:
            yield service, None
        return
    async with _retriever(load_settings(), judged) as retriever:
        yield Extractive(retriever, top_k=top_k), retriever


@asynccontextmanager
async def _retriever(settings: Settings, judged: EvaluationSet) -> AsyncIterator[Retriever]:
    wanted = settings.retrieval
    with _progress(judged.name) as told:
        ready = indexed(
            judged,
            embedder_of(wanted),
            fusion=wanted.fusion,
            passage_tokens=wanted.passage_tokens,
            second_look=second_look_of(wanted),
            progress=told,
        )
        retriever = await ready.__aenter__()
    try:
        yield retriever
    finally:
        await ready.__aexit__(None, None, None)


@asynccontextmanager
async def _service(url: str, key: str | None, model: str, top_k: int = 5) -> AsyncIterator[EvaluatedService]:
    if not key:
        raise BadSet("--url needs the key of that service: --key, or HALLMARK_API_KEY.")
    async with EvaluatedService(url, key, model=model, top_k=top_k) as service:
        yield service


def _described(settings: Settings) -> dict[str, Any]:
    wanted = settings.retrieval
    return {
        "embedding_model": wanted.embedding_model,
        "fusion": wanted.fusion,
        "passage_tokens": wanted.passage_tokens,
    }


def _some(questions: Sequence[Question], limit: int | None) -> Sequence[Question]:
    """So many of them, evenly through the set: the same each time."""
    return questions[:: max(1, len(questions) // limit)][:limit] if limit else questions


def _thresholds(at_least: Sequence[str] | None, at_most: Sequence[str] | None) -> list[Threshold]:
    try:
        least = [reports.threshold(text) for text in at_least or ()]
        return least + [reports.threshold(text, is_most=True) for text in at_most or ()]
    except ValueError as error:
        raise BadSet(str(error)) from None


def _replace_table(file: Path, table: str) -> None:
    """Put a table between the two comments that mark its place."""
    text = file.read_text(encoding="utf-8")
    begin, end = "<!-- hallmark-eval begin -->\n", "<!-- hallmark-eval end -->"
    head, found, rest = text.partition(begin)
    _, ended, tail = rest.partition(end)
    if not found or not ended:
        raise BadSet(f"{file}: mark the table's place by the lines {begin.strip()} and {end}")
    with whole(file) as target:
        target.write(f"{head}{begin}{table}{end}{tail}".encode())


def _finish(report: Report, json: Path | None, markdown: Path | None) -> None:
    """Show and write what was measured; exits with 1 where it is not good enough."""
    text = report.markdown()
    out.print(text, markup=False, soft_wrap=True)
    for path, content in (
        (json, msgspec.json.format(msgspec.json.encode(report.json()), indent=1)),
        (markdown, text.encode()),
    ):
        if path is not None:
            with whole(path) as file:
                file.write(content)
    if report.failures:
        raise typer.Exit(1)


@contextmanager
def _explained() -> Iterator[None]:
    """Tell a person what was wrong, without a trace."""
    try:
        yield
    except (BadSet, msgspec.MsgspecError) as error:
        err.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    except (RetrievalError, OSError) as error:
        err.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None


@contextmanager
def _progress(name: str) -> Iterator[Told]:
    """Show how far the work on a set is, one bar for each kind of it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def told(what: str, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"{escape(name)}: {what}", total=total)
            progress.advance(tasks[what])

        yield told


if __name__ == "__main__":
    main()
