"""Small facts about content, made before it is sealed, so that figures need neither the content nor a key.

The main rule: a fact here says how an answer was and never what it said. What compares contents is keyed by the key
they are sealed by, and means nothing without it.
"""

import re

import msgspec

from app.privacy.sealing import DataKey

OPENING_CHARACTERS = 80
"""Of an answer that are looked at for how it begins."""

# How models decline, at the beginning of an answer. Where passages are checked, the verdict says so in any language.
_REFUSAL = re.compile(
    r"""\W*(
        i(\ am|['’]?m)\ ((really|very)\ )?sorry | sorry, | i\ apologi[sz]e | as\ an\ ai\b
        | i\ (can\ ?not|can['’]t|won['’]t)\ (help|assist|answer|provide|do\ that|discuss|comply)
        | i(\ am|['’]?m)\ (not\ able|unable)\ to
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def declines(answer: str) -> bool:
    """Whether an answer begins as models do when they decline."""
    return _REFUSAL.match(answer[:OPENING_CHARACTERS]) is not None


def question_digest(question: str, key: DataKey) -> bytes:
    """What the same question of the same subject has too: it tells that it was asked again."""
    return key.digest(msgspec.json.encode(question))
