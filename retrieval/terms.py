"""What a piece of text says, word by word: stemmed content words, numbers, names, identifiers, and what is negated.

The main rule: the same fact gives the same terms however it is written - "1,000" and "one thousand"; "7 days" and
"seven days"; "200ms" and "200 milliseconds"; "deleted" and "deletion"; an accent that is a character of its own and one
that is not - and two different values never do. No model
and no word list but English function words, number words and units: another language keeps its function words.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple
from unicodedata import normalize

from retrieval.numerals import SCALE_WORDS, dates_spelled, groups_joined, normal_number, other_numbers, scale_of


def word_set(words: str) -> frozenset[str]:
    """Make a set of the words of a string: a word list reads best as text."""
    return frozenset(words.split())


_STOPWORDS = word_set(
    """a about above after again all also am an and any anyone anything are as at be because been before being below
    between both but by can could did do does doing done during each either else ever every few for from further had
    has have having he her here hers him his how however i if in into is it its itself just let may me might more most
    much must my of off on once one only or other our ours out over own per shall she should since so some
    something still such than that the their theirs them then there therefore these they this those though through
    thus to too under until up upon us very via was we were what when where whether which while who whom whose why
    will with within would yes yet you your yours"""
)
_NEGATIONS = word_set("no not never none neither nor cannot without nobody nothing nowhere hardly")
# "One" is left out: "one of them" counts nothing.
_NUMBER_WORDS = {
    "zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17,
    "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70,
    "eighty": 80, "ninety": 90,
}  # fmt: skip
# Right after a number these are units; elsewhere "s" and "m" are letters.
_UNITS = {
    "ms": "millisecond", "msec": "millisecond", "us": "microsecond", "µs": "microsecond", "s": "second",
    "sec": "second", "secs": "second", "min": "minute", "mins": "minute", "h": "hour", "hr": "hour", "hrs": "hour",
    "d": "day", "wk": "week", "yr": "year", "yrs": "year", "kb": "kilobyte", "mb": "megabyte", "gb": "gigabyte",
    "tb": "terabyte", "kib": "kibibyte", "mib": "mebibyte", "gib": "gibibyte", "km": "kilometre", "m": "metre",
    "cm": "centimetre", "mm": "millimetre", "kg": "kilogram", "g": "gram", "mg": "milligram", "lb": "pound",
    "lbs": "pound", "ft": "foot", "feet": "foot", "mi": "mile", "pct": "percent", "percentage": "percent",
}  # fmt: skip
# An ideograph is a word of its own, since nothing separates the words there. How far an "@" is looked for has an end,
# or "a-a-a" would be read to its end from each letter.
_TOKEN = re.compile(
    r"(?P<number>(?:(?<!\w)[-−vV](?=\d))?\d+(?:[.,]\d+)*)"
    r"|(?P<ideograph>[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])"
    r"|(?P<versioned>[^\W\d_][\w-]{0,64}+@[vV]?\d+(?:\.\d+)*)"
    r"|(?P<word>[^\W\d_](?:(?![\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])\w)*(?:['’][^\W\d_]+)?)"
    r"|(?P<percent>[%‰])"
    r"|(?P<clause>[,;:()—\n])"
    r"|(?P<stop>[.!?…。！？])"
)
# Characters that look like others, or like nothing: ligatures and full-width forms, soft hyphens and what joins or
# parts words invisibly. What "³" and the like stand for is left alone: 10³ is not 103.
_ALIKE = {
    code: normalize("NFKC", chr(code)) for code in (*range(0xFB00, 0xFB07), *range(0xFF01, 0xFF5F))
} | dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF))
# What "million" may multiply: not "1,2,3", nor more digits than any amount has, each of which would be written anew for
# each further "thousand".
_SCALED = re.compile(r"-?\d{1,100}(?:\.\d{1,100})?")
_IDENTIFIER = re.compile(r"\w[^\W_]*+_\w++|\w*[a-z][A-Z]\w*+|[^\W\d_]++\d\w*+")
_WORD_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\da-zA-Z_]+|\d+")
_RUN = re.compile(r"\S+|\n")
# Longer runs are addresses and encoded data, which do not come again.
_LONGEST_KEPT_RUN = 40
_MOST_KNOWN_RUNS = 50_000
# What counts as a word of the text; a name and a part of an identifier are told beside the word they belong to.
_CONTENT = frozenset(("word", "number", "identifier"))
_MARKED = frozenset(("number", "name", "identifier", "also"))
_NUMBERS = frozenset(("number", "number word"))
_ORDINALS = frozenset(("st", "nd", "rd", "th"))
# What a number may take into it from the words behind.
_AFTER_NUMBER = _ORDINALS.union(_UNITS, SCALE_WORDS, _NUMBER_WORDS, ("one",))
_VOWEL = re.compile(r"[aeiouy]")
# (ending, the least that must stay of the word)
_ENDINGS = (("ations", 4), ("ation", 4), ("ions", 4), ("ion", 4), ("ing", 3), ("ed", 3), ("ment", 4), ("ly", 4))
_CLAUSE_WORDS = word_set("but and while although whereas because")
_CONTRACTION = re.compile(r"(?:n['’]t|['’]\w+)\Z")
# These deny nothing of what follows: a bound, an emphasis, a time, and a double negation.
_NO_NEGATION = re.compile(
    r"\b(?:no|not) (?:later|earlier|sooner|more|less|fewer|longer) than\b|\bnot (?:only|just|merely|until|un\w+)\b"
    r"|\bno (?:doubt|matter)\b",
    re.IGNORECASE,
)
# "One third" and "one of them" are not 1.
_NO_ONE = re.compile(
    r"\bone(?=[\s-](?:half|third|quarter|fourth|fifth|sixth|eighth|tenth|of|another)\b)", re.IGNORECASE
)
# How many content words a negation reaches: "not (be) deleted automatically after".
_NEGATION_REACH = 3


class Terms(NamedTuple):
    """The terms of one text, lower case and stemmed.

    `words` are in the text's order; `vocabulary` is what another text's terms are looked up in and holds more:
    the parts of an identifier, and "1" for every "one". `numbers` are written in digits ("1000", "-2.5"); `names`
    are capitalised inside a sentence; `identifiers` are code-like (`MAX_SIZE`, `sha256`); `negated` words are within
    reach of a negation, `affirmed` ones stand outside at least once. A tuple, since a request reads fifty texts.
    """

    words: tuple[str, ...]
    vocabulary: frozenset[str]
    numbers: frozenset[str]
    names: frozenset[str]
    identifiers: frozenset[str]
    negated: frozenset[str]
    affirmed: frozenset[str]
    negations: int

    @property
    def hard(self) -> frozenset[str]:
        """The terms that are right or wrong, never paraphrased."""
        return self.numbers | self.identifiers


_NOTHING: frozenset[str] = frozenset()
_SILENCE = Terms((), _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, 0)


class _Run(NamedTuple):
    """What characters without white space between them say.

    `words` are what counts as a word of the text, `marked` the (kind, term) of the rest that is looked up. `counts`
    says that it holds a number, which what follows may change; `first` that a capital means nothing in what follows.
    """

    words: tuple[str, ...]
    marked: tuple[tuple[str, str], ...]
    denies: bool
    counts: bool
    first: bool
    said: tuple[tuple[str, str], ...]
    """(kind, term) in order; a kind is word, number, name, identifier, negation, clause, or also (vocabulary only)."""


# By whether a capital means nothing, then by the run. A dictionary is asked in half the time of a cached function.
_KNOWN_RUNS: tuple[dict[str, _Run], dict[str, _Run]] = ({}, {})


def terms(text: str) -> Terms:
    """Read the terms of `text`."""
    if not text:
        return _SILENCE
    runs = _runs(text)
    words: list[str] = []
    marked: list[tuple[str, str]] = []
    denying = False
    for of_run, marks, denies, _, _, _ in runs:
        words += of_run
        if marks:
            marked += marks
        denying = denying or denies
    said = frozenset(words)
    negations, negated, affirmed = _denied(runs) if denying else (0, _NOTHING, said)
    if not marked:
        return Terms(tuple(words), said, _NOTHING, _NOTHING, _NOTHING, negated, affirmed, negations)
    others: dict[str, list[str]] = {}
    for kind, term in marked:
        others.setdefault(kind, []).append(term)
    also = others.get("also", ())
    if not words and also == ["1"]:
        words.append("1")  # "One" as an answer of its own.
    return Terms(
        tuple(words),
        said.union(also),
        frozenset(others.get("number", ())),
        frozenset(others.get("name", ())),
        frozenset(others.get("identifier", ())),
        negated,
        affirmed,
        negations,
    )


def _denied(runs: Iterable[_Run]) -> tuple[int, frozenset[str], frozenset[str]]:
    """Count the negations, and tell the words within their reach from those outside it."""
    negated: set[str] = set()
    affirmed: set[str] = set()
    negations = reach = 0
    for run in runs:
        for kind, term in run.said:
            if kind in _CONTENT:
                (negated if reach > 0 else affirmed).add(term)
                reach -= 1
            elif kind == "clause":
                reach = 0
            elif kind == "negation":
                negations += 1
                reach = _NEGATION_REACH
    return negations, frozenset(negated), frozenset(affirmed)


def _runs(text: str) -> list[_Run]:
    """Read a text run by run; a number is read together with the runs that may belong to it."""
    lower = text.lower()
    # A look for the words themselves first: few sentences have them, and the patterns are slow.
    plain = _NO_NEGATION.sub(" ", text) if "no " in lower or "not " in lower else text
    plain = _NO_ONE.sub(" ", plain) if "one" in lower else plain
    plain = groups_joined(plain)
    pieces = _RUN.findall(plain)
    found: list[_Run] = []
    first, skipped = True, 0
    for at, piece in enumerate(pieces, 1):
        if skipped:
            skipped -= 1
            continue
        run = _KNOWN_RUNS[first].get(piece) or _learn(piece, first)
        if run[3] and (more := pieces[at : _end_of_number(pieces, at)]):  # It counts.
            run = _read(_tokens(" ".join([piece, *more])), first)
            skipped = len(more)
        found.append(run)
        first = run[4]
    return found


def _end_of_number(pieces: Sequence[str], at: int) -> int:
    """Tell where the pieces end that may belong to the number before them."""
    return next((end for end in range(at, len(pieces)) if not _may_go_on(pieces[end])), len(pieces))


def _may_go_on(run: str) -> bool:
    """Tell whether a run may go on with the number before it."""
    token = _TOKEN.search(_spelled(run))
    return token is None or token[0].lower() in _AFTER_NUMBER


def _learn(run: str, first: bool) -> _Run:
    """Read a run; `first` says that a capital of its first word means nothing. Most will come again."""
    read = _read(_tokens(run), first)
    if len(run) <= _LONGEST_KEPT_RUN:
        known = _KNOWN_RUNS[first]
        if len(known) >= _MOST_KNOWN_RUNS:
            known.clear()
        known[run] = read
    return read


def _read(tokens: Sequence[tuple[str, str]], first: bool) -> _Run:
    """Read tokens, a number with what belongs to it."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(tokens):
        kind, word = tokens[at]
        at += 1
        if kind == "word":
            found += _terms_of(word, first)
        elif kind in _NUMBERS:
            value, at = _amount(tokens, at - 1)
            found.append(("number" if kind == "number" else "word", value))
            found += [("also", other) for other in other_numbers(word, value)]
            following = tokens[at][1].lower() if at < len(tokens) else ""
            if following in _UNITS:
                found.append(("word", stem(_UNITS[following])))
            at += following in _UNITS or following in _ORDINALS
        elif kind == "versioned":
            found.append(("identifier", word.lower()))
            found += [("also", stem(part.lower())) for part in _WORD_PARTS.findall(word)]
        elif kind in ("ideograph", "percent"):
            found.append(("word", "percent" if kind == "percent" else word))
        else:
            found.append(("clause", ""))
        first = kind == "stop" or word == "\n" or (first and kind == "clause")
    return _Run(
        words=tuple(term for kind, term in found if kind in _CONTENT),
        marked=tuple((kind, term) for kind, term in found if kind in _MARKED),
        denies=any(kind == "negation" for kind, _ in found),
        counts=any(kind in _NUMBERS for kind, _ in tokens),
        first=first,
        said=tuple(found),
    )


def _tokens(run: str) -> list[tuple[str, str]]:
    """Return the (kind, token) of a run of characters without white space, which no token goes beyond."""
    tokens = [(token.lastgroup or "", token[0]) for token in _TOKEN.finditer(_spelled(run))]
    return [
        ("number word" if kind == "word" and word.lower() in _NUMBER_WORDS else kind, word) for kind, word in tokens
    ]


def _spelled(run: str) -> str:
    """Spell one way what looks alike: a PDF or a file name from a Mac is seldom spelled as a question is."""
    plain = run if run.isascii() else normalize("NFC", run.translate(_ALIKE))
    return dates_spelled(plain)


def _amount(tokens: Sequence[tuple[str, str]], at: int) -> tuple[str, int]:
    """Return the number that begins at token `at`, its tens and scales applied, and where it ends."""
    kind, word = tokens[at]
    at += 1
    lower = word.lower()
    value = normal_number(word) if kind == "number" else str(_NUMBER_WORDS[lower])
    following = tokens[at][1].lower() if at < len(tokens) else ""
    if kind != "number" and _NUMBER_WORDS[lower] >= 20 and 1 <= _NUMBER_WORDS.get(following, 0) <= 9:
        value, at = str(_NUMBER_WORDS[lower] + _NUMBER_WORDS[following]), at + 1
    elif following == "one" and kind != "number" and _NUMBER_WORDS[lower] >= 20:
        value, at = str(_NUMBER_WORDS[lower] + 1), at + 1
    while at < len(tokens) and (scale := scale_of(tokens[at][1])) and _SCALED.fullmatch(value):
        value, at = normal_number(f"{Decimal(value) * scale:f}", trim=True), at + 1
    return value, at


def _terms_of(word: str, first: bool) -> Iterator[tuple[str, str]]:
    """Give the terms of one word that is not a number; `first` says that a capital means nothing here."""
    if (contraction := _CONTRACTION.search(word)) is not None:
        if contraction[0][0] in "nN":
            yield "negation", ""
        word = word[: contraction.start()]
    lower = word.lower()
    if lower in _NEGATIONS:
        yield "negation", ""
    elif lower in _CLAUSE_WORDS:
        yield "clause", ""
    elif lower == "one":
        yield "also", "1"
    elif _IDENTIFIER.fullmatch(word):
        yield "identifier", lower
        for part in _WORD_PARTS.findall(word):
            yield "also", stem(part.lower())
    elif lower and lower not in _STOPWORDS:
        term = stem(lower)
        if word[0].isupper() and (not first or (len(word) > 1 and word.isupper())):
            yield "name", term
        yield "word", term


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """Cut the English endings that leave the meaning alone; conservative, so that unlike words stay unlike."""
    if len(word) < 4 or not word.isascii():
        return word[:-1] if len(word) == 3 and word[-1] == "s" and word[-2] not in "siu" else word
    word = _singular(word)
    for ending, least in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= least and _VOWEL.search(word[: -len(ending)]):
            word = word[: -len(ending)]
            if word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    word = word[:-1] if word[-1] == "e" and len(word) > 3 else word
    return word[:-1] + "z" if len(word) > 5 and word.endswith("is") else word  # normalise, normalize


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes", "zes")):
        return word[:-2]
    return word[:-1] if word[-1] == "s" and word[-2] not in "siu" else word
