"""Small facts about content, made before it is sealed, so that figures need neither the content nor a key.

The main rule: a fact here says how an answer was and never what it said. What compares contents is keyed by the key
they are sealed by, and means nothing without it.
"""

import re

import msgspec

from app.privacy.sealing import DataKey

OPENING_CHARACTERS = 80
"""Of an answer that are looked at for how it begins."""

STUCK_CHARACTERS = 24
_PATTERN_CHARACTERS = 8

# How models decline, at the beginning of an answer. Where passages are checked, the verdict says so in any language.
_REFUSAL = re.compile(
    r"""\W*+(
        i(\ am|['’]?m)\ ((really|very)\ )?sorry | sorry, | i\ apologi[sz]e | as\ an\ ai\b
        | i\ (can\ ?not|can['’]t|won['’]t)\ (help|assist|answer|provide|do\ that|discuss|comply)
        | i(\ am|['’]?m)\ (not\ able|unable)\ to
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def declines(answer: str) -> bool:
    """Whether an answer begins as models do when they decline."""
    return _REFUSAL.match(answer[:OPENING_CHARACTERS]) is not None


def is_stuck(text: str) -> bool:
    """Whether a text is one short pattern over and over: what an engine says whose numbers are not numbers.

    With NaN for every score the same token is the best each time, as `!` of many vocabularies, or `<unk>`.
    """
    text = text.strip()
    # What repeats every few characters has its beginning again that soon: most texts do not, and are done with here.
    if len(text) < STUCK_CHARACTERS or text.find(text[:_PATTERN_CHARACTERS], 1, 2 * _PATTERN_CHARACTERS) < 0:
        return False
    return any(text[size:] == text[:-size] for size in range(1, _PATTERN_CHARACTERS + 1))


def question_digest(question: str, key: DataKey) -> bytes:
    """What the same question of the same subject has too: it tells that it was asked again."""
    return key.digest(msgspec.json.encode(question))
