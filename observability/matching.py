"""How near an answer is to the right one, as SQuAD 2.0's official script judges (Rajpurkar and others 2016, 2018).

Both measures look at words alone: lower case, no ASCII punctuation, no articles.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, right_answers: Sequence[str]) -> float:
    """1 when the answer has the same words as one of the right ones, else 0. No right answers: 1 for an empty one."""
    return float(any(_words(answer) == _words(right) for right in right_answers or ("",)))


def token_f1(answer: str, right_answers: Sequence[str]) -> float:
    """F1 of the words that the answer shares with the right answer nearest to it, 0 to 1, word for word."""
    return max(_overlap(_words(answer), _words(right)) for right in right_answers or ("",))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _overlap(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    shared = (Counter(answer) & Counter(right)).total()
    return 2 * shared / (len(answer) + len(right))
