"""Ingests a set as the service would, into a directory of its own, and ranks its documents for each question.

The main rule: nothing here parses, splits, embeds or fuses by itself: what is measured is what serves. A document ranks
as its best passage.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from retrieval.documents import ParsedDocument, Scope, SearchMode, SearchResult
from retrieval.edge import EdgeIndex
from retrieval.embedder import Embedder
from retrieval.errors import UnreadableDocument
from retrieval.evaluation.measures import Figure, ranking_figures
from retrieval.evaluation.sets import BadSet, EvaluationSet
from retrieval.fusion import Fusion
from retrieval.parsers import Parser
from retrieval.reranking import SecondLook
from retrieval.retriever import Retriever

_T = TypeVar("_T")

SCOPE = Scope("evaluation")
MODES: tuple[SearchMode, ...] = ("dense", "sparse", "hybrid")
_PASSAGES_PER_QUESTION = 50
_AT_ONCE = 32

Progress = Callable[[str, int], None]
"""Told what is done, and how many of it there will be, once for each."""


class Search(Protocol):
    """What is measured: a `Retriever`, or a running service."""

    async def search(self, scope: Scope, query: str, *, top_k: int = 5, mode: SearchMode = "hybrid") -> SearchResult:
        """Find passages."""
        ...


@dataclass(frozen=True, slots=True)
class Ranked:
    """How one way of searching ranked a set."""

    mode: SearchMode
    index_version: str
    figures: tuple[Figure, ...]

    def value(self, name: str) -> float:
        """A figure's value by its name without the cut-off: ndcg, recall, mrr."""
        return next(each.value or 0.0 for each in self.figures if each.name.partition("@")[0] == name)


class SetParser:
    """Reads the texts of a set in BEIR's form, which are JSON with a title and a text, and leaves files to a parser."""

    def __init__(self, files: Parser | None = None) -> None:
        self._files = files

    async def parse(self, content: bytes, *, name: str, media_type: str | None = None) -> ParsedDocument:
        """Return the text under its title."""
        if self._files is not None:
            return await self._files.parse(content, name=name, media_type=media_type)
        fields = json.loads(content)
        return ParsedDocument(fields["text"], fields["title"] or None)


@asynccontextmanager
async def indexed(
    judged: EvaluationSet,
    embedder: Embedder,
    *,
    fusion: Fusion = "dbsf",
    passage_tokens: int = 200,
    second_look: SecondLook | None = None,
    progress: Progress | None = None,
) -> AsyncIterator[Retriever]:
    """Ingest a set's documents and give the retriever that has them.

    Raises:
        BadSet: the set brings no documents, or none of its files can be read.
    """
    if not judged.texts and not judged.files:
        raise BadSet(f"{judged.name}: there are no documents: name their folder with --documents.")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        async with (
            Parser() as files,
            Retriever(
                directory,
                embedder=embedder,
                index=EdgeIndex(directory / "index"),
                parser=SetParser(files if judged.files is not None else None),
                fusion=fusion,
                passage_tokens=passage_tokens,
                second_look=second_look,
            ) as retriever,
        ):
            yield await ingest(judged, retriever, progress)


async def ingest(judged: EvaluationSet, retriever: Retriever, progress: Progress | None = None) -> Retriever:
    """Add a set's documents to an open, empty retriever made with a `SetParser`."""
    unread: list[str] = []

    async def add(name: str, content: bytes, media_type: str | None) -> None:
        try:
            await retriever.add(SCOPE, name=name, content=content, media_type=media_type, document_id=name)
        except UnreadableDocument as error:
            unread.append(f"{name}: {error}")

    work = [
        add(each.name, json.dumps({"title": each.title, "text": each.text}).encode(), "text/plain")
        for each in judged.texts
    ]
    for name, path in (judged.files or {}).items():
        work.append(add(name, await asyncio.to_thread(path.read_bytes), None))
    await at_once(work, progress, "documents")
    if len(unread) == len(work):
        raise BadSet(f"{judged.name}: no document can be read; {unread[0]}")
    return retriever


async def rank(
    search: Search,
    judged: EvaluationSet,
    mode: SearchMode,
    *,
    k: int = 10,
    scope: Scope = SCOPE,
    progress: Progress | None = None,
    **options: Any,
) -> Ranked:
    """Ask every judged question and score the documents found; `options` are the search's own."""
    asked = judged.judged
    if not asked:
        raise BadSet(f"{judged.name}: no question says by 'documents' what answers it.")
    results = await at_once(
        [search.search(scope, each.text, top_k=_PASSAGES_PER_QUESTION, mode=mode, **options) for each in asked],
        progress,
        mode,
    )
    rankings = {
        each.id: list(islice(dict.fromkeys(hit.passage.document_name for hit in result.hits), k))
        for each, result in zip(asked, results, strict=True)
    }
    judgements = {each.id: each.documents for each in asked}
    return Ranked(mode, results[0].index_version, ranking_figures(rankings, judgements, k))


async def at_once(work: Iterable[Awaitable[_T]], progress: Progress | None = None, what: str = "") -> list[_T]:
    """Await all, 32 at a time, results in order."""
    turns = asyncio.Semaphore(_AT_ONCE)
    waiting: Sequence[Awaitable[_T]] = list(work)

    async def in_turn(one: Awaitable[_T]) -> _T:
        async with turns:
            result = await one
            if progress:
                progress(what, len(waiting))
            return result

    return list(await asyncio.gather(*map(in_turn, waiting)))
