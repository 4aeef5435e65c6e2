"""What a question asks for - an amount, a time, a person, a reason, a value - and whether a text holds one.

The main rule: these are cues, in English. A question of no known kind, or in another language, is suited by every text.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from retrieval.terms import Terms, stem, terms, word_set

Kind = Literal["count", "share", "extent", "time", "person", "reason", "address", "value"]

_QUESTION = re.compile(
    r"\b(?:(?P<count>how (?:many|much))"
    r"|(?P<extent>how (?:long|big|large|small|quickly|fast|soon|often|far|tall|old|high|deep|wide|heavy|late|early))"
    r"|(?P<what>(?:what|which)(?: (?:kind|sort|type)s? of)?)|(?P<time>when)|(?P<person>who|whom|whose)"
    r"|(?P<reason>why)|(?P<value>where|how))\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_][\w-]*")
# The verb or the preposition that ends "which NOUN": what follows is no part of the thing asked for.
_ENDS_THING = word_set(
    """is are was were do does did can could will would should has have had may might must shall be to of in on at by
    for from with that it the a an i you we they he she if"""
)
_MEASURES = frozenset(
    map(
        stem,
        word_set(
            """size number length dimension amount age height weight rate price cost speed distance
            limit total count duration period port version extension"""
        ),
    )
)
_SHARES = frozenset(map(stem, word_set("percent percentage share proportion fraction")))
_ADDRESSES = re.compile(r"\b(?:e-?mail|mail) address", re.IGNORECASE)
_TIMES = frozenset(map(stem, word_set("day date year month time century decade hour week")))
_THING_IS = re.compile(
    r"\s(?:is|are|was|were)\s(?:the|a|an)\s((?:[\w-]+\s){0,3}?[\w-]+)(?=\s(?:of|for|that)\s|\W*\Z)", re.IGNORECASE
)
# The number in a name, as in SHA-256, counts nothing.
_NUMBER = re.compile(r"(?<!\w)(?<![^\W\d_]-)\d+(?:[.,]\d+)*")
# Nor does one that tells which: of the status 404, of the second source [2], of the release support@3.
_WHICH = re.compile(r"\b(status|code|error|port|version|step|page|number)\s\d+(?:[.,]\d+)*|\[\d+\]|@\d+")
# How well an amount suits whose sentence does not name what is asked for.
_OF_SOMETHING = 0.5
_NUMBER_WORDS = word_set(
    """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million
    billion half third quarter fifth tenth twice dozen zero none"""
)
# These are searched in lower case, which is three times faster than ignoring case.
# An amount without a number.
_AMOUNT = re.compile(
    r"\b(?:unlimited|free|for ?ever|indefinitely|immediately|permanently|no limit|as (?:many|much|long) as)\b",
)
_HOLDS = {
    "share": re.compile(
        r"\d\s?%|\bper ?cent\b|\b(?:half|third|quarter|fifth|tenth|twice|all|none|every|most)s?\b|\d in \d"
    ),
    "address": re.compile(r"[\w.+-]@[\w-]++\.\w"),
}
_PERIOD = re.compile(r"\b(?:hour|day|week|month|year)s?\b")
_MONTH = (
    r"(?:january|february|march|april|may|june|july|august|september|october|november|december"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)"
)
_DATE = re.compile(
    rf"\b\d{{1,2}}(?:st|nd|rd|th)?\s{_MONTH}\b(?:\s\d{{4}})?|\b{_MONTH}\s\d{{1,2}}(?:st|nd|rd|th)?\b(?:,?\s\d{{4}})?"
    rf"|\b{_MONTH}\s\d{{4}}\b|\b\d{{4}}-\d\d-\d\d\b",
)
# Most sentences have none, and then there is no date to look for.
_DIGIT = re.compile(r"\d")
_CLOCK_OR_YEAR = re.compile(r"\b(?:\d{1,2}:\d\d|1\d{3}|20\d\d)\b")
_CALENDAR = re.compile(
    r"\b(?:(?:mon|tues|wednes|thurs|fri|satur|sun)days?|daily|weekly|monthly|yearly|midnight|noon|morning|evening|spring"
    r"|summer|autumn|winter|before|after|until|during|when|while|once|as soon as|every)\b",
)
_EXTENT = re.compile(
    r"(?:\d|\ban?\s|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|half an?))\s?-?\s?"
    r"(?:ms|s|min|h|d|(?:milli|micro)?seconds?|minutes?|hours?|days?|weeks?|months?|years?|decades?|centur\w+"
    r"|working days|tokens?|characters?|words?|pages?|(?:kilo|mega|giga|tera)?bytes?|[kmgt]i?b"
    r"|(?:kilo|centi|milli)?met(?:er|re)s?|km|cm|mm|miles?|feet|foot|percent|%|million|billion|parameters?)\b",
)
_REASON = re.compile(
    r"\b(?:because|since|so|due to|owing to|in order to|therefore|otherwise|caused?|causes|reasons?|thus)\b",
)
# Only whether there is some is asked, so what surrounds it is not read: that would be a look at all of a long word from
# each of its letters.
_CODE = re.compile(r"`[^`]+`|\w_\w|https?://\S|(?<!\w)--\w|(?<!\w)/\w|\w@\d")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a question asks for, what it says, and its own words, which answer nothing."""

    kind: Kind | None
    said: Terms
    known: frozenset[str]
    new_number_words: frozenset[str]
    """The number words that it does not hold."""
    things: frozenset[str]
    """Stems of the words for what is asked for: of "stored" and "predictions", or of "port"."""

    def suits(self, text: str, said: Terms) -> float:
        """Tell how well a text, whose terms are `said`, holds what is asked for.

        1 says that it does, 0 that nothing is known, -1 that it cannot be the answer.
        """
        lower = text.lower()
        match self.kind:
            case "count":
                return self._counts(lower)
            case "share" | "address" as kind:
                return 1.0 if _HOLDS[kind].search(lower) else -1.0
            case "extent":
                if _EXTENT.search(lower) or _AMOUNT.search(lower):
                    return 1.0
                return 0.3 if _PERIOD.search(lower) or self._new_number(lower) else -1.0
            case "time":
                if _DIGIT.search(lower) and (_CLOCK_OR_YEAR.search(lower) or _DATE.search(lower)):
                    return 1.0
                return 0.7 if _CALENDAR.search(lower) else 0.3 if self._new_number(lower) else -0.5
            case "person":
                return 1.0 if said.names - self.known else -0.5
            case "reason":
                return 1.0 if _REASON.search(lower) else 0.0
            case "value":
                return 0.5 if said.names - self.known or _CODE.search(text) or self._new_digits(lower) else 0.0
        return 0.0

    def _counts(self, lower: str) -> float:
        """Tell how well a text in lower case holds an amount: of what is asked for, or of something else."""
        if _AMOUNT.search(lower):
            return 1.0
        if not self._new_number(_WHICH.sub(lambda told: told[0] if stem(told[1] or "") in self.things else " ", lower)):
            return -1.0
        named = not self.things.isdisjoint(map(stem, _WORD.findall(lower)))
        return 1.0 if named or not self.things else _OF_SOMETHING

    def _new_number(self, lower: str) -> bool:
        """Tell whether a text in lower case holds a number that the question does not and that is no part of a date."""
        if self._new_digits(lower):
            return True
        return not self.new_number_words.isdisjoint(_WORD.findall(lower))

    def _new_digits(self, lower: str) -> bool:
        if not _DIGIT.search(lower):
            return False
        return any(number not in self.known for number in _NUMBER.findall(_DATE.sub(" ", lower)))


@lru_cache(maxsize=512)
def asked(question: str) -> Asked:
    """Read what a question asks for."""
    read = terms(question)
    known = read.vocabulary | {word.lower() for word in _WORD.findall(question)} | set(_NUMBER.findall(question))
    found = _QUESTION.search(question)
    things = _things(question, found) if found else []
    kind = _kind(question, found, things) if found else None
    return Asked(kind, read, known, _NUMBER_WORDS - known, frozenset(things))


def _things(question: str, found: re.Match[str]) -> list[str]:
    """The stems of what is counted, or of what "which" and "what" ask for; three at most."""
    if found.lastgroup not in ("count", "what"):
        return []
    things: list[str] = []
    for word in _WORD.findall(question[found.end() :]):
        if word.lower() in _ENDS_THING or len(things) == 3:
            break
        things.append(stem(word.lower()))
    if not things and (says := _THING_IS.match(question, found.end())):
        things = [stem(word.lower()) for word in says[1].split()]
    return things


def _kind(question: str, found: re.Match[str], things: list[str]) -> Kind | None:
    match found.lastgroup:
        case "count" | "extent" | "time" | "person" | "reason" as kind:
            return kind
        case "value":
            return "value"
    if "happen" in things[:1]:
        return None
    if _ADDRESSES.search(question):
        return "address"
    if set(things) & _SHARES:
        return "share"
    if set(things) & _MEASURES:
        return "count"
    return "time" if set(things) & _TIMES else "value"
