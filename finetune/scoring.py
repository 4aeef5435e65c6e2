"""What an answer is worth, by the kind of task: a class, an answer with citations, or data that fits a schema.

The main rule: every row gets one score between 0 and 1, by which arms are compared, and the parts that the task's own
figures are made of. An answer that never came scores 0: it is in the figures, not left out of them.
"""

import json
import re
import string
from collections import Counter
from typing import Any

import jsonschema_rs
import msgspec

from finetune.dataset import Manifest, Row

ABSTENTIONS = re.compile(
    r"\b(i (do not|don't|cannot|can't) (know|answer|find|say)|no answer|not (in|part of) the (sources|documents)"
    r"|(sources|documents|passages) do not (say|answer|contain|mention))",
    re.IGNORECASE,
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_EDGES = re.compile(r"^[\W_]+|(?<![\W_])[\W_]++$")
_MARKER = re.compile(r"(?<!\s)\s*+\[\d+\]")


class Citation(msgspec.Struct, frozen=True):
    """What of a gateway's citation says which passage it is."""

    document_id: str = ""
    passage: int = -1
    quote: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an arm answered for a row, and what it took."""

    row: str
    text: str = ""
    failure: str | None = None
    """The code of the error, where no answer came."""
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    citations: tuple[Citation, ...] = ()
    abstained: bool | None = None
    """What the gateway's verdict says; None where there is none."""
    release: str | None = None


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """What one answer is worth. What a task does not have is None."""

    row: str
    score: float
    said: str | None = None
    """The class that was told."""
    exact: float | None = None
    token_f1: float | None = None
    valid: float | None = None
    cited: int = 0
    cited_right: int = 0
    to_cite: int = 0
    to_cite_found: int = 0
    abstained: bool | None = None
    answerable: bool | None = None
    failed: bool = False


def score(row: Row, answer: Answer, manifest: Manifest) -> Score:
    """Judge one answer."""
    failed = answer.failure is not None
    if manifest.task == "classify":
        said = None if failed else read_label(answer.text, manifest.labels)
        return Score(row=row.row, score=float(said == row.label), said=said, failed=failed)
    if manifest.task == "extract":
        return _extraction(row, answer, manifest)
    return _answer(row, answer)


def read_label(text: str, labels: tuple[str, ...]) -> str | None:
    """The label that a text is, or begins with, as the service reads it; None if none, or more than one."""
    said = text.strip()
    if said in labels:
        return said
    folded, bare = _bare(said), {label: _bare(label) for label in labels}
    begins = [label for label, words in bare.items() if words and _mentions(folded, words) == 0]
    if not begins:
        return None
    longest = max((bare[label] for label in begins), key=len)
    rest = folded[len(longest) :]
    found = [label for label in begins if bare[label] == longest]
    others = [label for label, words in bare.items() if words and _mentions(rest, words) is not None]
    return None if others or len(found) > 1 else found[0]


def exact_match(answer: str, right: str) -> float:
    """1 when two texts have the same words, as SQuAD's script sees them (Rajpurkar and others 2016)."""
    return float(_words(answer) == _words(right))


def token_f1(answer: str, right: str) -> float:
    """F1 of the words two texts share, as SQuAD's script counts them."""
    mine, theirs = _words(answer), _words(right)
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * (Counter(mine) & Counter(theirs)).total() / (len(mine) + len(theirs))


def _answer(row: Row, answer: Answer) -> Score:
    """SQuAD 2.0's score: for a question without an answer, abstaining is right and anything else wrong."""
    text, right = _MARKER.sub("", answer.text), _MARKER.sub("", row.target)
    failed = answer.failure is not None
    abstained = not failed and (bool(ABSTENTIONS.search(text)) if answer.abstained is None else answer.abstained)
    gives = not failed and not abstained
    exact, f1 = (exact_match(text, right), token_f1(text, right)) if gives and row.answerable else (0.0, 0.0)
    wanted = [passage for passage in row.passages if passage.id in row.citations]
    hits = [[_is(citation, passage) for passage in wanted] for citation in answer.citations]
    return Score(
        row=row.row,
        score=f1 if row.answerable else float(abstained),
        exact=exact if row.answerable else None,
        token_f1=f1 if row.answerable else None,
        cited=len(hits),
        cited_right=sum(map(any, hits)),
        to_cite=len(wanted),
        to_cite_found=sum(any(hit[n] for hit in hits) for n in range(len(wanted))),
        abstained=abstained,
        answerable=row.answerable,
        failed=failed,
    )


def _is(citation: Citation, passage: Any) -> bool:
    """Whether a citation is of that passage: by document and number, or by words of it that were quoted."""
    if passage.id == f"{citation.document_id}/{citation.passage}":
        return True
    quote = " ".join(citation.quote.split())
    same_document = passage.document_id is None or passage.document_id == citation.document_id
    return bool(quote) and same_document and quote in " ".join((passage.text or "").split())


def _extraction(row: Row, answer: Answer, manifest: Manifest) -> Score:
    right, found = json.loads(row.target), None
    for candidate in (answer.text.strip(), answer.text[answer.text.find("{") : answer.text.rfind("}") + 1]):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        break
    fits = isinstance(found, dict) and _fits(found, manifest.schema or {})
    f1 = _field_f1(found, right) if isinstance(found, dict) else 0.0
    same = float(fits and found == right)
    return Score(row=row.row, score=same, exact=same, token_f1=f1, valid=float(fits), failed=answer.failure is not None)


def _fits(found: dict[str, Any], schema: dict[str, Any]) -> bool:
    try:
        return jsonschema_rs.is_valid(schema, found)
    except ValueError:  # Half a character, or levels too deep to follow: no program takes such data either.
        return False


def _field_f1(found: Any, right: Any) -> float:
    """F1 of the fields, each with its value; what lies within counts by its path."""
    mine, theirs = Counter(_leaves(found)), Counter(_leaves(right))
    total = mine.total() + theirs.total()
    return 2 * (mine & theirs).total() / total if total else 1.0


def _leaves(value: Any) -> list[str]:
    """The values that hold no others, each with the way to it; a model may nest them deeper than calls may."""
    leaves: list[str] = []
    pending = [("", value)]
    while pending:
        path, each = pending.pop()
        if isinstance(each, dict):
            pending += [(f"{path}.{name}", inner) for name, inner in each.items()]
        elif isinstance(each, list):
            pending += [(f"{path}[]", inner) for inner in each]
        else:
            leaves.append(f"{path}={json.dumps(each)}")
    return leaves


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _bare(text: str) -> str:
    return _EDGES.sub("", text.casefold())


def _mentions(text: str, words: str) -> int | None:
    found = re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text)
    return found.start() if found else None
