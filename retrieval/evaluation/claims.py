"""Whether the check of answers tells a right value from a wrong one, by the gold answers of a set.

The main rule: a claim is the question with an answer put in, and what it is held against is the document that answers.
The wrong value is another question's answer, which that document does not have: what a model makes up looks like that.
"""

import random
import re
from collections.abc import Sequence

from retrieval.abstention import CheckPolicy
from retrieval.documents import Hit, Passage
from retrieval.evaluation.measures import Figure, auc, figure
from retrieval.evaluation.searching import SCOPE
from retrieval.evaluation.sets import EvaluationSet, Question
from retrieval.retriever import Retriever
from retrieval.support import Evidence
from retrieval.terms import terms

_SEED = 1
_ASKING = re.compile(r"^(?:in |to |of )?(?:what|who|whom|when|where|which|how many|how much|how|why)\b", re.IGNORECASE)


async def value_figures(judged: EvaluationSet, retriever: Retriever) -> list[Figure]:
    """Score true claims and claims with a wrong value against the documents that answer; none without gold answers."""
    questions = [each for each in judged.judged if each.answers]
    passages: dict[str, list[Passage]] = {}
    for name in dict.fromkeys(_best(each) for each in questions):
        passages[name] = await retriever.passages(SCOPE, name)
    choose = random.Random(_SEED)  # noqa: S311 - the same choice each time, not a secret
    right, wrong = [], []
    for each in questions:
        held = passages[_best(each)]
        text = " ".join(passage.text for passage in held).lower()
        strange = [answer for other in choose.choices(questions, k=20) for answer in other.answers[:1]]
        strange = [answer for answer in strange if answer.lower() not in text]
        if strange:
            right.append(_score(each, each.answers[0], held))
            wrong.append(_score(each, strange[0], held))
    least = CheckPolicy().supported_share
    return [
        auc("wrong_value_auc", right, wrong),
        figure("right_value_supported", [score >= least for score in right]),
        figure("wrong_value_supported", [score >= least for score in wrong]),
    ]


def _best(question: Question) -> str:
    return max(question.documents, key=lambda name: (question.documents[name], name))


def _score(question: Question, answer: str, held: Sequence[Passage]) -> float:
    evidence = Evidence(question.text, [Hit(passage, 1.0) for passage in held])
    claim = f"{_ASKING.sub('', question.text).rstrip('?')} {answer}"
    return max((found.score for found in evidence.support(terms(claim))), default=0.0)
