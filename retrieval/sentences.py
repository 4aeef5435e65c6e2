"""Where sentences end, in documents, answers and streams alike.

The main rule: a decision about a sentence depends only on that sentence and on the few characters after it. So
a stream can be cut as it arrives and gives the same sentences however it was chunked, and cutting off what has
been handled changes nothing for the rest:

    sentence_ends(text, final) == [first] + [first + end for end in sentence_ends(text[first:], final)]

Unknown words before a full stop end a sentence; known abbreviations, initials, enumerators, decimals, versions,
addresses and dotted names do not. A line break ends a sentence at a blank line, around list items, headings,
table rows and code fences, after a Markdown hard break, and where the line still had room for the next word;
otherwise it is a soft wrap. A fenced code block is one sentence. Citation markers (`[1]`) right after a full stop
belong to the sentence they follow.
"""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A title or a Latin short form is followed by the rest of its sentence.
_NEVER_LAST = _words(
    """adm approx asst brig capt cf cmdr dr eg e.g esp excl fr gen gov hon i.e ie incl lt maj messrs mr mrs ms mt prof
    rep resp rev sen sgt vs viz bzw z.b d.h u.a"""
)
# These abbreviate only before a number: "No. 5", but "The answer is no."
_BEFORE_NUMBER = _words(
    """app art bd c ca ch chap circa col cols eq eqn eqns eqs ex fig figs ln no nos nr op p par para pp pt ref refs sec
    sect secs tab v ver vol vols Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec"""
)
# These may also be the last word: only a usual first word after them tells.
_MAYBE_LAST = _words(
    """al assn ave avg blvd bros co corp dept dist ed eds eq eqs est etc ext fig figs ft gmbh hr hrs inc jr llc ltd max
    mfg min phd plc rd ref refs repr sec secs sq sr st tel temp trans univ var vol vols
    Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thur Thurs Fri Sat Sun"""
)
_FIRST_WORDS = _words(
    """A After All Also Although An And Another Any Are As At Because Before Both But By Can Did Do Does During Each
    Even Every Finally First For From Had Has Have He Her Here His How However I If In Is It Its Let Many More Most
    My Next No Not Now Of On Once One Or Other Our Please Second See She Since So Some Such That The Their Then There
    Therefore These They This Those Though Thus To Under Unless Until Use Using Was We Were What When Where Which
    While Who Why Will With Without You Your"""
)
_VOWELS = frozenset("aeiouy")
_LONGEST_ABBREVIATION = 16
_LONGEST_ENUMERATOR = 24
_LONGEST_RUN_IN = 60
# Nobody wraps lines narrower than this: a shorter line was ended on purpose.
_NARROWEST_WRAP = 40

_WIDE_STOPS = "。！？｡"
_CANDIDATE = re.compile(r"[.!?…‽؟।॥۔]+|[。！？｡]+|\r\n?+|[\n\f\v\x85\u2028\u2029]")
_MARKER = r"[ \t]*+(?:\[\^?\d{1,4}(?:[ \t]*+[,;–-][ \t]*+\^?\d{1,4})*+\]|【\d{1,4}(?:[ \t]*+[,;–-][ \t]*+\d{1,4})*+】)"
_AFTER = re.compile(
    r"(?P<closers>[\"'”’»›)\]}」』）】*_`~]*+)"
    rf"(?P<markers>(?:{_MARKER})*+)"
    r"(?P<gap>\s*+)"
    r"(?P<openers>[\"'“‘«‹(\[{「『（【*_`~$<#@&]*+)"
    r"(?P<word>\w{0,24}+)"
)
_UNFINISHED_MARKER = re.compile(r"[ \t]*+(?:[\[【][\^\d,;– \t-]*+)?\Z")
_BLANK_LINE = re.compile(r"(?:\r\n?+|\n)[ \t]*+[\n\r]|[\f\v\u2029]")
_NEXT_LINE = re.compile(r"(?:\r\n?+|[\n\x85\u2028])[ \t]*+(?P<word>\S{0,24}+)")
# Offsets are never negative, and None already means "cannot tell yet".
_NOT_HERE = -1
_LINE_BREAKS = "\n\r\f\v\x85\u2028\u2029"
_LINE_BREAK = re.compile(f"[{_LINE_BREAKS}]")
_BLOCK_LINE = re.compile(r"[ \t]*(?:#{1,6}[ \t]|\|)")
_BLOCK_WORD = re.compile(r"(?:[-*+•‣◦▪●·–—]|\d{1,2}[.)]|\(?[a-zA-Z\d]\)|#{1,6}|[-*_=]{3,})\Z|>|\||`{3}|~{3}")
_ENUMERATOR = re.compile(r"(?:[-*+•‣◦▪●·>–—]\s+)*(?:\*\*)?\(?(?:\d{1,3}(?:\.\d{1,3})*|[A-Za-z]|[ivxlIVXL]{1,5})\Z")
# "**Passage.** A piece of a document": what follows a heading in bold on its line says what the heading names.
_RUN_IN = re.compile(rf"(?:[-*+] +)?\*\*[^*\n\r]{{1,{_LONGEST_RUN_IN}}}")
_FENCE = re.compile(r"(?P<fence>`{3,}+|~{3,}+)(?P<info>[^\n\r]*+)(?P<end>[\n\r]|\Z)")
_SPACE = re.compile(r"\s*+")


def sentences(text: str) -> list[tuple[int, int]]:
    """Return the (start, end) of each sentence without the white space around it: every other character is in one."""
    spans = []
    start = 0
    for end in sentence_ends(text, final=True):
        spans.append((_skip_space(text, start), end))
        start = end
    return spans


def sentence_ends(text: str, final: bool) -> list[int]:
    """Return where the sentences of `text` end, each after its full stop, closing quotes and citation markers.

    With `final` the text is complete and what remains is a last sentence. Without, only the ends that no further
    text can change are returned: a full stop is certain once the word after it is complete (or a blank line came),
    a line break once the first word of its next line is, a code fence once its closing line is. For every
    prefix p of t, `sentence_ends(p, False)` is therefore a prefix of `sentence_ends(t, True)`.
    """
    ends: list[int] = []
    start = 0
    while (end := _first_end(text, start, final)) is not None:
        ends.append(end)
        start = end
    return ends


def _first_end(text: str, start: int, final: bool) -> int | None:
    """Return where the sentence that begins at `start` ends, or None when that is not certain or nothing is left."""
    first = _skip_space(text, start)
    if first == len(text):
        return None
    fence = _FENCE.match(text, first)
    if fence and "`" not in fence["info"]:
        if fence["end"]:
            return _fence_end(text, fence, final)
        if not final:
            return None
    # Where a sentence begins inside a line, how long that line is cannot be told: it may be full.
    mid_line = first > start and not _LINE_BREAK.search(text, start, first)
    line_start = first
    for candidate in _CANDIDATE.finditer(text, first):
        if candidate[0][0] in _LINE_BREAKS:
            end = _line_break_end(text, line_start, candidate.start(), final, may_have_room=not mid_line)
            line_start, mid_line = candidate.end(), False
        else:
            end = _full_stop_end(text, first, candidate, final)
        if end != _NOT_HERE:
            return end
    return _without_space(text, len(text)) if final else None


def _full_stop_end(text: str, first: int, stop: re.Match[str], final: bool) -> int | None:
    after = _AFTER.match(text, stop.end())
    assert after
    end = after.end("markers")
    if not final and _UNFINISHED_MARKER.match(text, end):
        return None
    # Between most sentences stands a space, in which there is no blank line to look for.
    gap = after["gap"]
    if stop[0][0] in _WIDE_STOPS or end == len(text) or (gap != " " and _BLANK_LINE.search(gap)):
        return end
    if not final and after.end() == len(text):
        return None
    if not gap and not (after["markers"] and after["word"][:1].isupper()):
        return _NOT_HERE
    return end if _ends_sentence(text, first, stop, after) else _NOT_HERE


def _ends_sentence(text: str, first: int, stop: re.Match[str], after: re.Match[str]) -> bool:
    """Decide about a full stop with white space after it; what follows is known up to the end of its first word."""
    next_word = after["word"]
    if not next_word and not after["openers"] and text[after.end() : after.end() + 1] in ",;:)]}":
        return False
    goes_on = next_word[:1].islower()
    if stop[0] != ".":
        trails_off = "…" in stop[0] or ".." in stop[0]
        return not (goes_on and (trails_off or after["closers"]))
    if goes_on and after["closers"].strip("*_`~"):
        return False
    if after["closers"][:2] == "**" and _RUN_IN.fullmatch(text, first, stop.start()):
        return _LINE_BREAK.search(after["gap"]) is not None
    if stop.start() - first <= _LONGEST_ENUMERATOR and _ENUMERATOR.match(text[first : stop.start()]):
        return False
    return _word_ends_sentence(_word_before(text, first, stop.start()), next_word)


def _word_ends_sentence(word: str, next_word: str) -> bool:
    """Tell whether `word` and its full stop end a sentence when `next_word` follows."""
    lower = word.lower()

    def is_one_of(words: frozenset[str]) -> bool:
        return word in words or lower in words

    if is_one_of(_NEVER_LAST) or (next_word[:1].isdigit() and is_one_of(_BEFORE_NUMBER)):
        return False
    initials = "." in word and word < "\u2e80" and all(len(part) <= 2 for part in word.split("."))
    if initials or (len(word) == 1 and word < "\u2e80") or is_one_of(_MAYBE_LAST):
        return next_word in _FIRST_WORDS or not next_word
    # "Mgmt. of": without a vowel and not an acronym, it is short for something.
    shortened = 1 < len(word) <= 5 and next_word[:1].islower() and not set(lower) & _VOWELS
    return not (shortened and word.isascii() and not word.isupper())


def _word_before(text: str, first: int, end: int) -> str:
    """Return the letters and inner full stops right before `end`, the possible abbreviation; none in `c=d` or `5a`."""
    start = end
    limit = max(first, end - _LONGEST_ABBREVIATION)
    while start > limit and (text[start - 1].isalpha() or text[start - 1] == "."):
        start -= 1
    if start > first and not (text[start - 1].isspace() or text[start - 1] in "\"'“‘«‹([{*_-–—"):
        return ""
    return text[start:end].lstrip(".")


def _line_break_end(text: str, line_start: int, at: int, final: bool, *, may_have_room: bool) -> int | None:
    end = _without_space(text, at)
    if _BLANK_LINE.match(text, at):
        return end
    follows = _NEXT_LINE.match(text, at)
    assert follows
    if follows.end() == len(text) and not final:
        return None
    word = follows["word"]
    if not word:
        return _NOT_HERE if follows.end() == len(text) else end
    line = text[line_start:at]
    if line.endswith(("  ", "\\")) or _BLOCK_LINE.match(line) or _BLOCK_WORD.match(word):
        return end
    has_room = may_have_room and len(line.strip()) + 1 + len(word) < _NARROWEST_WRAP
    return end if has_room and not word[0].islower() else _NOT_HERE


def _fence_end(text: str, fence: re.Match[str], final: bool) -> int | None:
    mark = fence["fence"]
    closing = re.compile(rf"[\n\r][ \t]*+{re.escape(mark)}{re.escape(mark[0])}*+[ \t]*+(?P<end>[\n\r]|\Z)")
    found = closing.search(text, fence.start("end"))
    if found and (found["end"] or final):
        return _without_space(text, found.start("end"))
    return _without_space(text, len(text)) if final else None


def _skip_space(text: str, start: int) -> int:
    if start < len(text) and not text[start].isspace():
        return start
    found = _SPACE.match(text, start)
    assert found
    return found.end()


def _without_space(text: str, end: int) -> int:
    """Return `end` moved back over white space; there is a visible character before it."""
    while text[end - 1].isspace():
        end -= 1
    return end
