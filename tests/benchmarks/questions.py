"""Asks the regression set over `examples/` through the whole service with the embedded model, and scores the answers.

A right answer matches one of the question's patterns; it is rightly cited when a supported or weak citation points into
a document that holds the evidence, at the evidence itself or at words that hold the answer. The embedded engine is
started as `hallmark serve --local-engine` starts it, the documents are loaded under the names that `hallmark ingest`
gives them, and every question goes through `POST /v1/chat/completions` with the default settings.

    python -m tests.benchmarks.questions [--split tune|held_out|all] [--cache FILE] [--retrieval-only]

The held-out third is for reporting only: which of its questions fail is not shown unless asked for. `--cache` keeps the
engine's answers by prompt, so that a change of the checks alone is measured in seconds. The last line is JSON; the exit
status is 1 when the questions asked, taken together, miss a bar.
"""

import argparse
import asyncio
import hashlib
import io
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec

from app.access import create_key
from app.client import Client
from app.engines import Engine, EngineInfo
from app.engines.local import EngineSettings
from app.engines.supervisor import LocalEngineSupervisor
from app.engines.tgi import TGIEngine
from app.links import SECRET_BYTES
from app.main import open_service
from app.messages import Generation, Piece
from app.settings import Settings
from app.sources.folder import Folder
from observability import logs
from tests.service import serving

EXAMPLES = Path(__file__).parents[2] / "examples"
BARS = {"right_and_cited": 0.75, "wrong": 0.10, "absent_refused": 0.75}
READY_SECONDS = 900.0
ANSWER_SECONDS = 300.0
SEARCHED = 20
Outcome = Literal["right", "miscited", "wrong", "refused"]


class Evidence(msgspec.Struct, frozen=True):
    """A place that holds the answer."""

    document: str
    quote: str


class Question(msgspec.Struct, frozen=True):
    """One line of the regression set; `answers` are patterns over the lower-cased answer on one line."""

    id: str
    question: str
    answerable: bool
    answers: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    split: Literal["tune", "held_out"]

    def answered_by(self, text: str) -> bool:
        """Tell whether a text holds the answer; the markers of citations are no part of it."""
        plain = " ".join(re.sub(r"\[\d+\]", "", text).lower().split())
        return any(re.search(answer, plain) for answer in self.answers)


@dataclass(frozen=True)
class Asked:
    """What became of one question."""

    question: Question
    outcome: Outcome
    status: str
    reason: str
    answer: str
    seconds: float


class Replay:
    """An engine that remembers: a prompt it has answered before is answered from a file, the rest by the real one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self._parts = AsyncExitStack()
        self._starting: asyncio.Future[Engine] | None = None

    async def _real(self) -> Engine:
        # One start for all: who asks whether it is ready gives up sooner than it takes.
        self._starting = self._starting or asyncio.ensure_future(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> Engine:
        supervisor = await self._parts.enter_async_context(LocalEngineSupervisor(EngineSettings()))
        await supervisor.ready(READY_SECONDS)
        engine = TGIEngine(supervisor.base_url, dialect="embedded", token=supervisor.token)
        self._parts.push_async_callback(engine.aclose)
        return engine

    is_up = True

    async def wait_until_up(self) -> bool:
        return False

    async def generate(self, generation: Generation) -> AsyncGenerator[list[Piece], None]:
        key = _key(msgspec.to_builtins([generation.messages, generation.adapter, generation.sampling]))
        if key not in self._known:
            pieces = [piece async for batch in (await self._real()).generate(generation) for piece in batch]
            self._known[key] = msgspec.to_builtins(pieces)
        yield msgspec.convert(self._known[key], list[Piece])

    async def describe(self) -> EngineInfo:
        if "info" not in self._known:
            self._known["info"] = msgspec.to_builtins(await (await self._real()).describe())
        return msgspec.convert(self._known["info"], EngineInfo)

    async def count_tokens(self, text: str) -> int:
        key = _key(["tokens", text])
        if key not in self._known:
            self._known[key] = await (await self._real()).count_tokens(text)
        return int(self._known[key])

    async def rate(self, question: str, texts: list[str]) -> list[float] | None:
        key = _key(["rate", question, texts])
        if key not in self._known:
            self._known[key] = await (await self._real()).rate(question, texts)
        rated: list[float] | None = self._known[key]
        return rated

    async def healthy(self) -> bool:
        return True

    async def aclose(self) -> None:
        await self._parts.aclose()
        self._file.write_text(json.dumps(self._known))


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_questions(split: str) -> list[Question]:
    """Read the questions of a split, or `all`."""
    lines = (EXAMPLES / "questions.jsonl").read_bytes().splitlines()
    questions = [msgspec.json.decode(line, type=Question) for line in lines]
    return [question for question in questions if split in (question.split, "all")]


@asynccontextmanager
async def running_service(data_dir: Path, cache: Path | None) -> AsyncIterator[httpx.AsyncClient]:
    """Run the service with the embedded engine and the examples loaded; gives a client of it."""
    settings = Settings(data_dir=data_dir, embedded={"enabled": True})
    key = await asyncio.to_thread(_make_key, data_dir)
    # The same prompts in every run, and with them the same answers.
    (data_dir / "fences.secret").write_bytes(bytes(SECRET_BYTES))
    replay = Replay(cache) if cache else None
    log = logs.configure("WARNING", "text", stream=sys.stderr.buffer if sys.stderr.isatty() else io.BytesIO())
    async with AsyncExitStack() as parts:
        parts.push_async_callback(asyncio.to_thread, log.close)
        if replay is not None:
            parts.push_async_callback(replay.aclose)
        app = await parts.enter_async_context(open_service(settings, log, engine=replay))
        url = await parts.enter_async_context(serving(app))
        client = await parts.enter_async_context(
            httpx.AsyncClient(
                base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=ANSWER_SECONDS, trust_env=False
            )
        )
        await asyncio.to_thread(_load, url, key)
        yield client


def _make_key(data_dir: Path) -> str:
    data_dir.mkdir(parents=True, exist_ok=True)
    return create_key(data_dir / "hallmark.db", name="questions", scopes=("chat", "documents:read", "documents:write"))[
        1
    ]


def _load(url: str, key: str) -> None:
    with Client(url, key) as client:
        client.wait_until_ready(READY_SECONDS, on_wait=lambda missing: None)
        examples = Folder(EXAMPLES)
        for name in examples.names():
            client.add(examples.read(name).data, name)


class Sources:
    """The documents' source texts as the service has them, and where the evidence stands in them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._ids: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    async def places(self, evidence: Evidence) -> list[tuple[int, int]]:
        """Every span of the evidence in its document, however its lines are broken."""
        if not self._ids:
            listed = (await self._client.get("/v1/documents?limit=200")).json()["data"]
            self._ids = {document["name"]: document["id"] for document in listed}
        if evidence.document not in self._texts:
            found = await self._client.get(f"/v1/documents/{self._ids[evidence.document]}/source")
            self._texts[evidence.document] = found.json()["text"]
        pattern = r"\s+".join(re.escape(word) for word in evidence.quote.split())
        return [found.span() for found in re.finditer(pattern, self._texts[evidence.document], re.IGNORECASE)]

    async def hold(self, question: Question, document: str, start: int, end: int) -> bool:
        """Tell whether `start:end` of a document touches the question's evidence."""
        for evidence in question.evidence:
            places = await self.places(evidence) if evidence.document == document else ()
            if any(left < end and start < right for left, right in places):
                return True
        return False


async def ask(client: httpx.AsyncClient, sources: Sources, question: Question) -> Asked:
    """Ask one question and score what comes back."""
    began = time.monotonic()
    body = {"model": "hallmark", "messages": [{"role": "user", "content": question.question}]}
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    seconds = time.monotonic() - began
    completion = response.json()
    answer = completion["choices"][0]["message"]["content"]
    verdict = completion.get("verdict") or {"status": "unchecked", "reason": "none", "abstained": False}
    outcome: Outcome = "wrong"
    if verdict["abstained"]:
        outcome = "refused"
    elif question.answerable and question.answered_by(answer):
        rightly = [await _is_right(sources, question, citation) for citation in completion.get("citations", ())]
        outcome = "right" if any(rightly) else "miscited"
    return Asked(question, outcome, verdict["status"], verdict["reason"], answer, seconds)


async def _is_right(sources: Sources, question: Question, citation: dict[str, Any]) -> bool:
    name = citation["document_name"]
    if citation["status"] == "unsupported" or name not in {evidence.document for evidence in question.evidence}:
        return False
    return question.answered_by(citation["quote"]) or await sources.hold(
        question, name, citation["source_start"], citation["source_end"]
    )


async def measure_retrieval(client: httpx.AsyncClient, questions: Sequence[Question]) -> dict[str, Any]:
    """Tell how often the evidence is among the first passages found: no answer can be better."""
    sources = Sources(client)
    ranks: dict[str, int | None] = {}
    for question in (each for each in questions if each.answerable):
        response = await client.post("/v1/search", json={"query": question.question, "top_k": SEARCHED})
        response.raise_for_status()
        passages = [hit["passage"] for hit in response.json()["hits"]]
        held = [await sources.hold(question, each["document_name"], each["start"], each["end"]) for each in passages]
        ranks[question.id] = held.index(True) + 1 if any(held) else None
    shares = {}
    for depth in (1, 2, 3, 5, 10, SEARCHED):
        within = sum(rank is not None and rank <= depth for rank in ranks.values())
        shares[f"evidence_in_top_{depth}"] = round(within / len(ranks), 3)
        print(f"evidence in the top {depth:>2}: {within} of {len(ranks)}")
    deep = {each.id: ranks[each.id] for each in questions if each.split == "tune" and (ranks.get(each.id, 1) or 99) > 5}
    print(f"not in the top 5 (tune only): {deep}")
    return shares


def wilson(count: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    if not n:
        return 0.0, 1.0
    z, share = 1.96, count / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * ((share * (1 - share) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def summarise(asked: Sequence[Asked]) -> dict[str, Any]:
    """Count what became of some questions; shares are of the answerable ones, or of the absent ones."""
    answerable = [each for each in asked if each.question.answerable]
    absent = [each for each in asked if not each.question.answerable]
    outcomes = Counter(each.outcome for each in answerable)
    refused = sum(each.outcome == "refused" for each in absent)
    counts = {
        "right_and_cited": (outcomes["right"], len(answerable)),
        "right_but_miscited": (outcomes["miscited"], len(answerable)),
        "wrong": (outcomes["wrong"], len(answerable)),
        "refused": (outcomes["refused"], len(answerable)),
        "absent_refused": (refused, len(absent)),
        "absent_answered": (len(absent) - refused, len(absent)),
    }
    figures: dict[str, Any] = {
        name: {"count": count, "n": n, "share": round(count / n, 4) if n else None, "interval_95": wilson(count, n)}
        for name, (count, n) in counts.items()
    }
    figures["verdicts"] = dict(sorted(Counter(_label(each) for each in asked).items()))
    seconds = sorted(each.seconds for each in asked)
    figures["seconds"] = {"median": round(seconds[len(seconds) // 2], 2), "max": round(seconds[-1], 2)}
    figures["meets_the_bars"] = meets_the_bars(figures)
    return figures


def _label(each: Asked) -> str:
    return each.status if each.reason == "none" else f"{each.status}: {each.reason}"


def meets_the_bars(figures: dict[str, Any]) -> bool:
    """Tell whether the shares reach what is required."""
    shares = {name: figures[name]["share"] for name in BARS}
    return all(
        share is None or (share <= BARS[name] if name == "wrong" else share >= BARS[name])
        for name, share in shares.items()
    )


def show(split: str, figures: dict[str, Any]) -> None:
    """Print one split's table."""
    print(f"\n{split}")
    for name, value in figures.items():
        if "share" in (value if isinstance(value, dict) else ()):
            low, high = value["interval_95"]
            bar = f"   bar {BARS[name]:.0%}" if name in BARS else ""
            share = f"{value['share'] or 0:6.1%} [{low:6.1%}, {high:6.1%}]"
            print(f"  {name:<20} {value['count']:>3} of {value['n']:<3} {share}{bar}")
        else:
            print(f"  {name:<20} {value}")


def show_failures(asked: Iterable[Asked], *, held_out: bool) -> None:
    """Print the questions that failed; those held out only on demand."""
    for each in asked:
        failed = each.outcome != ("right" if each.question.answerable else "refused")
        if failed and (held_out or each.question.split == "tune"):
            answer = " ".join(each.answer.split())
            print(f"  {each.question.id:<12} {each.outcome:<9} {_label(each)}: {each.question.question} -> {answer}")


async def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Start the service and ask."""
    questions = read_questions(chosen.split)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        async with running_service(chosen.data_dir or Path(scratch), chosen.cache) as client:
            print(f"ready after {time.monotonic() - began:.0f} s; {len(questions)} questions", flush=True)
            if chosen.retrieval_only:
                return await measure_retrieval(client, questions)
            sources = Sources(client)
            asked = [await ask(client, sources, question) for question in questions]
    result: dict[str, Any] = {}
    for split in ("tune", "held_out", "all"):
        of_split = [each for each in asked if split in (each.question.split, "all")]
        if of_split and (split != "all" or chosen.split == "all"):
            result[split] = summarise(of_split)
            show(split, result[split])
    print("\nfailed" + ("" if chosen.show_held_out else " (tune only)"))
    show_failures(asked, held_out=chosen.show_held_out)
    return result


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("tune", "held_out", "all"), default="all")
    parser.add_argument("--cache", type=Path, help="keep the engine's answers in this file")
    parser.add_argument("--data-dir", type=Path, help="keep the service's data here; by default it is thrown away")
    parser.add_argument("--retrieval-only", action="store_true", help="only look for the evidence in what is found")
    parser.add_argument("--show-held-out", action="store_true", help="show which held-out questions failed")
    chosen = parser.parse_args()
    result = asyncio.run(run(chosen))
    print(json.dumps(result))
    asked = result.get("all") or result.get(chosen.split) or {"meets_the_bars": True}
    return 0 if asked["meets_the_bars"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
