"""Retrieval, citations and abstention measured on small sets; and on the judged sets beside the project."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from starlette.types import Receive, Send
from starlette.types import Scope as Scoped
from typer.testing import CliRunner, Result

from app.eval_cli import app
from app.evaluated import EvaluatedService
from retrieval.documents import Hit, Passage, Scope, SearchResult
from retrieval.embedder import HashingEmbedder
from retrieval.errors import RetrievalError
from retrieval.evaluation.answering import Answer, Asked, Cited, Extractive, abstention_figures, ask, citation_figures
from retrieval.evaluation.claims import value_figures
from retrieval.evaluation.searching import MODES, SCOPE, indexed, rank
from retrieval.evaluation.sets import BadSet, EvaluationSet, Question, TextDocument
from retrieval.retriever import Retriever
from tests.fake_models import fake_models_beside
from tests.service import serving

DATA = Path(__file__).parents[3] / "shared" / "data"
CATS = "The cats of the castle sleep twelve hours a day. They hunt at night."
TOWER = "The tower of the harbour is 330 metres tall. It was built in 1931."
JUDGED = EvaluationSet(
    "tiny",
    (
        Question("q1", "How long do the cats of the castle sleep?", {"cats": 1}, ("twelve hours",)),
        Question("q2", "How tall is the tower of the harbour?", {"tower": 1}, ("330 metres",)),
        Question("q3", "How tall is the tower of the airport in Lisbon?", {}, kind="near_miss"),
        Question("q4", "Who composed the opera Carmen?", {}, kind="off_topic"),
    ),
    (TextDocument("cats", "Cats", CATS), TextDocument("tower", "Tower", TOWER)),
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def retriever() -> AsyncIterator[Retriever]:
    async with indexed(JUDGED, HashingEmbedder(256)) as open_one:
        yield open_one


def values(figures: object) -> dict[str, float | None]:
    return {each.name: each.value for each in figures}


async def test_each_way_of_searching_is_scored(retriever: Retriever) -> None:
    for mode in MODES:
        ranked = await rank(retriever, JUDGED, mode, k=5)
        assert values(ranked.figures) == {"ndcg@5": 1.0, "recall@5": 1.0, "mrr@5": 1.0}
        assert ranked.index_version == retriever.index_version


async def test_a_document_ranks_as_its_best_passage() -> None:
    long = EvaluationSet(
        "long",
        (Question("q", "How tall is the tower?", {"b": 1}),),
        (TextDocument("a", "", "Some words. " * 300), TextDocument("b", "", "The tower is tall. " * 300)),
    )
    async with indexed(long, HashingEmbedder(64), passage_tokens=60) as searched:
        assert (await rank(searched, long, "hybrid")).value("ndcg") == 1.0


async def test_files_go_through_the_parser_and_one_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"# Cats\n\n{CATS}\n")
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    files = {name: tmp_path / name for name in ("a.md", "b.bin")}
    own = EvaluationSet("own", (Question("1", "How long do the cats sleep?", {"a.md": 1}),), files=files)
    async with indexed(own, HashingEmbedder(64)) as searched:
        assert (await rank(searched, own, "sparse")).value("recall") == 1.0
        assert [document.title for document in await searched.documents(SCOPE)] == ["Cats"]
    with pytest.raises(BadSet, match=r"no document can be read; b\.bin"):
        async with indexed(EvaluationSet("own", (), files={"b.bin": tmp_path / "b.bin"}), HashingEmbedder(64)):
            pass
    with pytest.raises(BadSet, match="--documents"):
        async with indexed(EvaluationSet("own", ()), HashingEmbedder(64)):
            pass


async def test_the_extractive_answerer_is_right_cites_and_refuses(retriever: Retriever) -> None:
    asked = await ask(Extractive(retriever), JUDGED.questions)
    assert values(citation_figures(asked)) == {
        "citation_precision": 1.0,
        "citation_recall": 1.0,
        "right_source": 1.0,
        "answered_right": 1.0,
    }
    abstained = values(abstention_figures(asked))
    assert abstained["false_abstention"] == 0.0
    assert abstained["off_topic_abstention"] == 1.0


def asked(text: str, *citations: Cited, refused: str | None = None) -> Asked:
    return Asked(JUDGED.questions[1], Answer(text, citations, refused))


def test_a_citation_whose_quote_does_not_say_it_is_imprecise_and_the_claim_unsupported() -> None:
    said = "The tower of the harbour is 333 metres tall [1]."
    wrong = asked(said, Cited(0, len(said), "tower", TOWER.partition(" It")[0]))
    found = values(citation_figures([wrong]))
    assert (found["citation_precision"], found["citation_recall"], found["answered_right"]) == (0.0, 0.0, 1.0)


def test_a_claim_without_a_citation_counts_against_recall_only() -> None:
    said = "The tower of the harbour is 330 metres tall [1]. Its architect was Jane Doe of Oslo."
    first = said.index(".") + 1
    half = asked(said, Cited(0, first, "tower", TOWER.partition(" It")[0]))
    found = values(citation_figures([half]))
    assert (found["citation_precision"], found["citation_recall"]) == (1.0, 0.5)


def test_an_answer_from_a_wrong_document_is_not_right() -> None:
    said = "The tower of the harbour is 330 metres tall [1]."
    found = values(citation_figures([asked(said, Cited(0, len(said), "cats", TOWER))]))
    assert (found["right_source"], found["answered_right"]) == (0.0, 0.0)


def test_a_refusal_is_no_right_answer_and_counts_where_it_was_made() -> None:
    refused = [asked("", refused="nothing_relevant"), asked("", refused="unsupported_answer")]
    assert values(citation_figures(refused))["answered_right"] == 0.0
    found = values(abstention_figures(refused))
    assert found == {"false_abstention": 1.0, "false_abstention_before_engine": 0.5}


async def test_wrong_values_are_told_from_right_ones(retriever: Retriever) -> None:
    found = values(await value_figures(JUDGED, retriever))
    assert found == {"wrong_value_auc": 1.0, "right_value_supported": 1.0, "wrong_value_supported": 0.0}


class Down:
    """A service's search that finds one document under the name it was loaded by."""

    async def search(self, scope: Scope, query: str, **_: object) -> SearchResult:
        return SearchResult((Hit(Passage("0193", "v", 1, TOWER, 0, 5, document_name="tower"), 1.0),), "served-1")


async def test_documents_of_a_service_count_by_their_names() -> None:
    ranked = await rank(Down(), JUDGED, "hybrid")
    assert (ranked.value("recall"), ranked.index_version) == (0.5, "served-1")


class Busy:
    """A service without room for so many requests, and with an answer for the next."""

    def __init__(self, refusals: int, retry_after: bytes = b"3") -> None:
        self.refusals = refusals
        self.retry_after = retry_after
        self.asked = 0

    async def __call__(self, scope: Scoped, receive: Receive, send: Send) -> None:
        self.asked += 1
        is_refused = self.asked <= self.refusals
        body = b'{"error": {"message": "Come back."}}' if is_refused else b'{"hits": [], "index_version": "v"}'
        headers = [(b"retry-after", self.retry_after)] if is_refused else []
        status = 429 if is_refused else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("busy", "waits"), [(Busy(2), [3.0, 3.0]), (Busy(1, b"900"), [30.0]), (Busy(100), [3.0] * 19), (Busy(1, b""), [])]
)
async def test_a_service_without_room_is_asked_again_when_it_says(busy: Busy, waits: list[float]) -> None:
    waited: list[float] = []

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    async with serving(busy) as url, EvaluatedService(url, "key", pause=pause) as service:
        if busy.refusals > 20 or not busy.retry_after:
            with pytest.raises(RetrievalError, match=r"429: Come back\."):
                await service.search(SCOPE, "Which?")
        else:
            assert (await service.search(SCOPE, "Which?")).index_version == "v"
    assert waited == waits


def run(*arguments: object, embedder: str | None = None) -> Result:
    env = {"HALLMARK_API_KEY": None, "HALLMARK_RETRIEVAL_EMBEDDING_URL": embedder}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


def test_the_command_tells_a_wrong_line_and_exits_with_two(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "Which?"}\n')
    result = run("retrieval", file, "--documents", tmp_path)
    assert result.exit_code == 2
    assert "own.jsonl, line 1" in " ".join(result.output.split())
    file.write_text('{"question": "Which?", "documents": ["nope.md"]}\n')
    result = run("retrieval", file, "--documents", tmp_path)
    assert (result.exit_code, "line 1: there is no 'nope.md'" in " ".join(result.output.split())) == (2, True)
    result = run("citations", file, "--at-least", "ndcg")
    assert (result.exit_code, "FIGURE=VALUE" in result.output) == (2, True)
    file.write_text('{"question": "Which?", "answers": ["a"]}\n')
    result = run("citations", file, "--url", "http://127.0.0.1:1")
    assert (result.exit_code, "--key" in result.output) == (2, True)
    result = run("citations", file, "--json", tmp_path / "nowhere" / "out.json")
    assert (result.exit_code, "There is no folder" in result.output) == (2, True)


@pytest.fixture(scope="module")
def embedder() -> Iterator[str]:
    with fake_models_beside(256) as url:
        yield url


def write_own(folder: Path) -> tuple[object, ...]:
    documents = folder / "docs"
    documents.mkdir()
    (documents / "tower.md").write_text(f"# Tower\n\n{TOWER}\n")
    lines = [
        {"question": "How tall is the tower of the harbour?", "documents": ["tower.md"], "answers": ["330 metres"]},
        {"question": "Who composed the opera Carmen?", "answerable": False, "kind": "off_topic"},
    ]
    file = folder / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file, "--documents", documents, "--json", folder / "out.json"


def test_the_command_ranks_a_teams_own_documents_and_replaces_the_marked_table(tmp_path: Path, embedder: str) -> None:
    own = write_own(tmp_path)
    into = tmp_path / "table.md"
    into.write_text("Before\n<!-- hallmark-eval begin -->\nold\n<!-- hallmark-eval end -->\nafter\n")
    result = run("retrieval", *own, "--into", into, "--at-least", "ndcg=0.9", "--settings", embedder=embedder)
    assert result.exit_code == 0, result.output
    first = (tmp_path / "out.json").read_bytes()
    report = json.loads(first)
    assert report["passed"] is True
    assert report["of"]["fusion"] == "dbsf"
    assert report["of"]["index_version"].startswith("embedder-d256")
    assert [each["mode"] for each in report["rows"]] == ["dense", "sparse", "hybrid", "fused by RRF"]
    assert "| own | 1 | **1.000** |" in into.read_text()
    assert into.read_text().startswith("Before\n<!-- hallmark-eval begin -->\n| set |")
    assert into.read_text().endswith("<!-- hallmark-eval end -->\nafter\n")
    assert run("retrieval", *own, "--settings", "--at-least", "own:mrr=1", embedder=embedder).exit_code == 0
    assert (tmp_path / "out.json").read_bytes() == first
    into.write_text("no marks")
    result = run("retrieval", *own, "--into", into, embedder=embedder)
    assert (result.exit_code, "mark the table's place" in " ".join(result.output.split())) == (2, True)


def test_the_command_fails_where_a_figure_misses_its_threshold(tmp_path: Path, embedder: str) -> None:
    own = write_own(tmp_path)
    result = run(
        "citations", *own, "--at-least", "answered_right=1", "--markdown", tmp_path / "o.md", embedder=embedder
    )
    assert result.exit_code == 0, result.output
    assert "| own | citation_precision | 1.000 |" in (tmp_path / "o.md").read_text()
    met = ("--at-least", "off_topic_abstention=1", "--at-most", "false_abstention=0")
    result = run("abstention", *own, *met, embedder=embedder)
    assert result.exit_code == 0, result.output
    result = run("abstention", *own, "--at-most", "off_topic_abstention=0.5", embedder=embedder)
    assert result.exit_code == 1
    assert "off_topic_abstention is 1.000, over 0.5" in result.output
    assert json.loads((tmp_path / "out.json").read_bytes())["passed"] is False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the judged sets beside the project, in ../shared/data")
@pytest.mark.parametrize(("name", "gate"), [("squad2_cs224n_dev", 0.88), ("cranfield", 0.42), ("cisi", 0.44)])
def test_retrieval_is_good_on_judged_sets(name: str, gate: float) -> None:
    result = run("retrieval", DATA / name, "--at-least", f"ndcg={gate}")
    assert result.exit_code == 0, result.output
