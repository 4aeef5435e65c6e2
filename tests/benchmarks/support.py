"""How well the checks on answers tell right from wrong, on public questions, with the thresholds of `CheckPolicy`.

Passages are the 646 paragraphs of SQuAD 2 (CS224N half); every question's five are retrieved by MiniLM and BM25, fused.
Near misses are SQuAD's own unanswerable questions, and answerable ones with one word swapped for another article's.
Questions of four other fields are the out-of-domain ones. WiCE checks sentences that people wrote about a cited page.

    python tests/benchmarks/support.py [--questions 300] [--data ../shared/data]

The last line is JSON.
"""

import argparse
import asyncio
import csv
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.abstention import CheckPolicy, relevance
from retrieval.citations import AnswerChecker
from retrieval.documents import Hit, Passage
from retrieval.embedder import SentenceTransformerEmbedder
from retrieval.fusion import fuse
from retrieval.index import Legs
from retrieval.judging import Judge
from retrieval.sparse import SparseEncoder
from retrieval.support import Evidence
from retrieval.terms import terms

QUESTION_WORD = re.compile(
    r"^(?:in |to |of )?(?:what|who|whom|when|where|which|how many|how much|how|why)\b", re.IGNORECASE
)


@dataclass
class Question:
    """A question with its gold answers and paragraph; both are empty for one that has no answer."""

    text: str
    answers: list[str]
    paragraph: str = ""


class Corpus:
    """The paragraphs as passages, searched as the service searches: cosine and BM25, fused by DBSF."""

    def __init__(self, folder: Path) -> None:
        self.passages = []
        for line in (folder / "beir/corpus.jsonl").read_text().splitlines():
            row = json.loads(line)
            document, n = row["_id"].split("#")
            self.passages.append(
                Passage(document, "1", int(n) + 1, row["text"], 0, len(row["text"]), document_title=row["title"])
            )
        self.embedder = SentenceTransformerEmbedder(threads=2, cache_size=20_000)

    async def prepare(self) -> None:
        texts = [passage.embedded_text for passage in self.passages]
        self.vectors = await self.embedder.embed(texts, "document", bulk=True)
        sparse = SparseEncoder()
        self.encode_query = sparse.query
        self.postings: dict[int, list[tuple[int, float]]] = {}
        for i, vector in enumerate(sparse.documents(texts)):
            for term, weight in zip(vector.indices, vector.values, strict=True):
                self.postings.setdefault(term, []).append((i, weight))

    async def search(self, question: str, top_k: int = 5) -> list[Hit]:
        cosines = self.vectors @ (await self.embedder.embed([question], "query"))[0]
        scores: dict[int, float] = {}
        for term in self.encode_query(question).indices:
            rows = self.postings.get(term, [])
            for i, weight in rows:
                rarity = log(1 + (len(self.passages) - len(rows) + 0.5) / (len(rows) + 0.5))
                scores[i] = scores.get(i, 0.0) + weight * rarity
        dense = [(int(i), float(cosines[i])) for i in np.argsort(-cosines)[:40]]
        legs = Legs(dense=dense, sparse=sorted(scores.items(), key=lambda each: -each[1])[:40])
        fused = islice(fuse(legs, "dbsf"), top_k)
        return [Hit(self.passages[each.point], each.score, dense_score=each.dense_score) for each in fused]

    async def similarity(self, text: str, texts: list[str]) -> list[float]:
        vectors = await self.embedder.embed([text, *texts], "query")
        return [float(each) for each in vectors[1:] @ vectors[0]]


def read_questions(folder: Path) -> tuple[list[Question], list[Question]]:
    """Return the answerable and the unanswerable questions, shuffled."""
    answerable: list[Question] = []
    unanswerable: list[Question] = []
    for article in json.loads((folder / "dev-v2.0.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for row in paragraph["qas"]:
                answers = [answer["text"] for answer in row["answers"]]
                question = Question(row["question"], answers, paragraph["context"] if answers else "")
                (answerable if answers else unanswerable).append(question)
    shuffle = random.Random(7).shuffle
    shuffle(answerable)
    shuffle(unanswerable)
    return answerable, unanswerable


def swap_a_word(questions: Sequence[Question], others: Sequence[Question]) -> list[Question]:
    """Make near misses: each question's rarest word that its paragraph has gives way to one of another article."""
    choose = random.Random(3)
    counts = Counter(word for each in questions for word in set(_words(each.text)))
    swapped = []
    for each in questions:
        held = terms(each.paragraph).vocabulary
        known = [word for word in _words(each.text) if set(terms(word).words) & held]
        strange = [w for w in _words(choose.choice(others).text)[1:] if not set(terms(w).words) & held]
        if known and strange:
            old = min(known, key=lambda word: (counts[word], word))
            swapped.append(Question(each.text.replace(old, choose.choice(strange)), []))
    return swapped


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[A-Za-z][A-Za-z'-]{3,}", text) if terms(word).words]


def other_fields(data: Path, count: int) -> list[str]:
    """Return questions about banking, biomedicine, aerodynamics, library science and everyday life."""
    choose = random.Random(5)
    each = count // 5
    texts = [
        text for text, _ in choose.sample(json.loads((data / "clinc150/data_full.json").read_text())["oos_test"], each)
    ]
    with (data / "banking77/test.csv").open() as file:
        texts += [row[0] for row in choose.sample(list(csv.reader(file))[1:], each)]
    medical = json.loads((data / "pubmedqa/dev500.json").read_text()).values()
    texts += [row["QUESTION"] for row in choose.sample(list(medical), each)]
    for name in ("cranfield", "cisi"):
        lines = (data / name / "beir/queries.jsonl").read_text().splitlines()
        texts += [json.loads(line)["text"] for line in choose.sample(lines, min(each, len(lines)))]
    return texts


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """The chance that a right one scores above a wrong one, ties counted half."""
    a, b = np.array(right)[:, None], np.array(wrong)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def claim(question: str, answer: str) -> str:
    """Say question and answer as one sentence, roughly."""
    return f"{QUESTION_WORD.sub('', question).rstrip('?')} {answer}"


def measure_support(corpus: Corpus, questions: Sequence[Question]) -> dict[str, float]:
    """Score true claims against their passage, against another of the article, and with another answer put in."""
    choose = random.Random(1)
    at = {passage.text: passage for passage in corpus.passages}
    right, passage_off, value_off, value_near, kept = [], [], [], [], 0
    policy = CheckPolicy()
    for each in questions:
        own, answer = at[each.paragraph], each.answers[0]
        others = [p for p in corpus.passages if p.document_id == own.document_id and answer not in p.text]
        evidence = Evidence(each.text, [Hit(own, 1.0), Hit(choose.choice(others), 0.9)])
        by_hit = {found.hit: found.score for found in evidence.support(terms(claim(each.text, answer)))}
        right.append(by_hit[0])
        passage_off.append(by_hit[1])
        kept += by_hit[0] >= policy.supported_share
        strange = choose.choice([q.answers[0] for q in questions if q.answers[0] not in own.text])
        value_off.append(evidence.support(terms(claim(each.text, strange)), [0])[0].score)
        near = [q.answers[0] for q in questions if q.paragraph == own.text and not _overlap(q.answers[0], answer)]
        if near:
            value_near.append(evidence.support(terms(claim(each.text, choose.choice(near))), [0])[0].score)
    return {
        "wrong_passage_auc": auc(right, passage_off),
        "wrong_value_auc": auc(right, value_off),
        "wrong_value_from_same_passage_auc": auc(right, value_near),
        "right_supported": kept / len(questions),
        "wrong_passage_supported": float(np.mean([score >= policy.supported_share for score in passage_off])),
        "wrong_value_supported": float(np.mean([score >= policy.supported_share for score in value_off])),
    }


def _overlap(one: str, other: str) -> bool:
    return bool(terms(one).vocabulary & terms(other).vocabulary)


async def measure_wice(data: Path, corpus: Corpus) -> dict[str, Any]:
    """Judge Wikipedia sentences against the pages they cite, cut to passages of about 170 words."""
    rows = [json.loads(line) for line in (data / "wice/dev.jsonl").read_text().splitlines()]
    outcomes: dict[str, Counter[str]] = {}
    scores: dict[str, list[float]] = {}
    for row in rows:
        pieces: list[list[str]] = [[]]
        for sentence in row["evidence"]:
            if sum(len(each.split()) for each in pieces[-1]) > 170:
                pieces.append([])
            pieces[-1].append(sentence)
        texts = ["\n".join(piece) for piece in pieces]
        hits = [Hit(Passage("page", "1", n, text, 0, len(text)), 1.0) for n, text in enumerate(texts, 1)]
        finding = await Judge("", hits, CheckPolicy(), corpus.similarity).judge(row["claim"], focused=True)
        outcomes.setdefault(row["label"], Counter())[finding.status] += 1
        best = Evidence("", hits).support(terms(row["claim"]))[0]
        scores.setdefault(row["label"], []).append(best.score)
    return {
        "auc_supported_or_not": auc(scores["supported"], scores["not_supported"]),
        "status": {
            label: {k: round(n / sum(c.values()), 3) for k, n in sorted(c.items())} for label, c in outcomes.items()
        },
    }


async def measure_answers(corpus: Corpus, groups: dict[str, list[Question]], embed: bool) -> dict[str, Any]:
    """Run the gate and the checker, with an engine that says nothing: what is extracted, and what is refused."""
    result: dict[str, Any] = {}
    for name, questions in groups.items():
        counts: Counter[str] = Counter()
        for each in questions:
            hits = await corpus.search(each.text)
            judged = relevance(each.text, hits, CheckPolicy())
            if not judged.relevant:
                counts["refused: nothing relevant"] += 1
                continue
            checker = AnswerChecker(each.text, judged.hits, similarity=corpus.similarity if embed else None)
            await checker.finish()
            if checker.verdict.status == "abstained":
                counts["refused: no sentence fits"] += 1
            else:
                cited = checker.citations[0]
                right = cited.passage.text == each.paragraph and any(a in cited.quote for a in each.answers)
                counts["right" if right else "wrong"] += 1
        result[name] = {k: round(n / len(questions), 3) for k, n in sorted(counts.items())}
    return result


async def measure_engine_answers(corpus: Corpus, groups: dict[str, list[Question]]) -> dict[str, Any]:
    """Run the checker over an engine's answers: the gold one, bare or as a sentence, and another question's."""
    choose = random.Random(2)
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("bare", "sentence", "wrong value", "near miss")}
    for each in groups["answerable"]:
        hits = await corpus.search(each.text)
        if each.paragraph not in [hit.passage.text for hit in hits]:
            continue
        strange = choose.choice([q.answers[0] for q in groups["answerable"] if q.paragraph != each.paragraph])
        said = {"bare": each.answers[0], "sentence": claim(each.text, each.answers[0]), "wrong value": strange}
        for name, text in said.items():
            checker = AnswerChecker(each.text, hits, CheckPolicy(fallback="abstain"), similarity=corpus.similarity)
            await checker.feed(text)
            await checker.finish()
            right = any(cited.passage.text == each.paragraph for cited in checker.citations)
            counts[name][
                "refused" if checker.verdict.status != "answered" else "kept" if right else "kept, miscited"
            ] += 1
    for each in groups["near miss, a word swapped"]:
        hits = await corpus.search(each.text)
        answer = choose.choice(groups["answerable"]).answers[0]
        extract = AnswerChecker(each.text, hits, CheckPolicy(extract_focus=-1.0), similarity=corpus.similarity)
        answer = await extract.finish()
        checker = AnswerChecker(each.text, hits, CheckPolicy(fallback="abstain"), similarity=corpus.similarity)
        await checker.feed(answer)
        await checker.finish()
        counts["near miss"]["refused" if checker.verdict.status != "answered" else "kept"] += 1
    return {name: {k: round(n / sum(c.values()), 3) for k, n in sorted(c.items())} for name, c in counts.items()}


async def measure_time(corpus: Corpus, questions: Sequence[Question]) -> dict[str, float]:
    """Time reading five passages and checking one sentence against them, in microseconds of CPU."""
    from retrieval.support import read

    cases = [(each, await corpus.search(each.text)) for each in questions[:100]]
    opened, judged = [], []
    for each, hits in cases:
        read.cache_clear()
        began = time.process_time()
        judge = Judge(each.text, hits, CheckPolicy())
        opened.append(time.process_time() - began)
        text = claim(each.text, each.answers[0]) + "."
        began = time.process_time()
        for _ in range(10):
            await judge.judge(text, focused=False)
        judged.append((time.process_time() - began) / 10)
    return {
        "read_five_passages_us": statistics.median(opened) * 1e6,
        "check_one_sentence_us": statistics.median(judged) * 1e6,
        "check_one_sentence_p95_us": sorted(judged)[int(0.95 * len(judged))] * 1e6,
    }


async def run(data: Path, count: int) -> dict[str, Any]:
    """Measure everything; about four minutes of CPU for 300 questions."""
    answerable, unanswerable = read_questions(data / "squad2_cs224n_dev")
    corpus = Corpus(data / "squad2_cs224n_dev")
    texts = {passage.text for passage in corpus.passages}
    answerable = [each for each in answerable if each.paragraph in texts]
    groups = {
        "answerable": answerable[:count],
        "near miss, a word swapped": swap_a_word(answerable[:count], answerable[count:]),
        "near miss, SQuAD": unanswerable[:count],
        "another field": [Question(text, []) for text in other_fields(data, count)],
    }
    async with corpus.embedder:
        await corpus.prepare()
        result: dict[str, Any] = {"support": measure_support(corpus, answerable[:800])}
        show("True claims against wrong ones (SQuAD, 800)", result["support"])
        result["time"] = await measure_time(corpus, answerable)
        show("CPU", result["time"])
        result["wice"] = await measure_wice(data, corpus)
        show("WiCE", result["wice"])
        result["extracted"] = await measure_answers(corpus, groups, embed=True)
        show("Gate and extractive answers, with cosines", result["extracted"])
        result["extracted_words_only"] = await measure_answers(corpus, groups, embed=False)
        show("The same by words alone", result["extracted_words_only"])
        result["engine"] = await measure_engine_answers(corpus, groups)
        show("An engine's answers", result["engine"])
    return result


def show(title: str, figures: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:<36} {value if isinstance(value, dict) else format(value, '.3f')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    chosen = parser.parse_args()
    if not chosen.data.is_dir():
        parser.exit(2, f"There is no evaluation data at {chosen.data}: name its folder with --data.\n")
    result = asyncio.run(run(chosen.data, chosen.questions))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
