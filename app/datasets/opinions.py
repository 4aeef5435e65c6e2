"""Pure: what is right in a prediction, by what people and programs said of it; and the row that this makes."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from app.datasets.examples import Example, Unusable, content_of, example, fitting, turns_of
from app.datasets.recipes import LabelPolicy, Recipe, Split
from app.datasets.sessions import conversation_of, session_of
from app.predictions import Prediction


class Opinion(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody says is right."""

    said_at: int
    id: str
    """Of the label or the feedback."""
    source: str
    class_name: str | None = None
    answer: str | None = None
    passages: list[str] | None = None
    policy: str | None = None
    sampling_probability: float | None = None
    is_label: bool = True


class _Verdict(msgspec.Struct, frozen=True):
    """What is taken as right, and who said so."""

    value: str
    said: Opinion
    opinions: int
    agreeing: int


PassageTexts = Callable[[Mapping[str, Any]], str | None]
"""Gives the text of a passage as predictions have it; None where that is gone."""


def row_of(
    recipe: Recipe,
    prediction: Prediction,
    opinions: Sequence[Opinion],
    passage_text: PassageTexts | None = None,
    *,
    split: Split | None = None,
) -> Example:
    """Make a row of a prediction and what is said of it; `split` is its side, unless a hash decides.

    Raises:
        Unusable: it is no row; says why in a word that is counted.
    """
    kind = "shadow" if prediction.shadow_of is not None else prediction.assignment
    if kind in ("shadow", "chore") and recipe.query.assignment != kind:
        raise Unusable(kind)
    if not prediction.store:
        raise Unusable("not_stored")
    verdict = resolved(recipe, prediction.answer, opinions)
    asked = _messages(prediction.request)
    turns = turns_of(asked)
    prompt = turns
    if recipe.prompt == "engine" and prediction.messages:
        prompt = turns_of(prediction.messages)
    facts: dict[str, Any] = {"meta": _meta(prediction, verdict), "weight": _weight(recipe.labels, verdict.said)}
    if prediction.features is not None:
        # As they stood in the prompt then, whatever is known of them now.
        stood = [each for each in prediction.features if each.get("value") is not None]
        facts["features"] = [{"feature": each["feature"], "value": each["value"]} for each in stood]
    if recipe.task == "classify":
        facts["label"] = verdict.value
    if recipe.task == "answer":
        facts |= _grounds(prediction, verdict, passage_text)
    if recipe.task == "preference":
        if not prediction.answer:
            raise Unusable("no_answer")
        if prediction.answer.strip() == verdict.value.strip():
            raise Unusable("same_answer")
        facts["rejected"] = prediction.answer
    own, user, conversation = prediction.id, prediction.user, prediction.conversation
    return example(
        recipe,
        content_of(recipe.task, prompt, verdict.value, **facts),
        session=session_of(prediction.tenant, own, conversation, user, by=recipe.split.by),
        conversation=conversation_of(prediction.tenant, conversation),
        question=turns[-1]["content"],
        subject=user,
        prediction_id=own,
        label_id=verdict.said.id if verdict.said.is_label else None,
        split=split,
    )


def resolved(recipe: Recipe, answer: str | None, opinions: Sequence[Opinion]) -> _Verdict:
    """Find what is right where some say so; raises Unusable where nobody does, or too few agree."""
    policy = recipe.labels
    votes: dict[str, list[Opinion]] = defaultdict(list)
    problem = "unlabelled"
    for opinion in opinions:
        value = _value(recipe, answer, opinion)
        if value is None:
            continue
        try:
            votes[fitting(recipe.shape, value)].append(opinion)
        except Unusable as error:
            problem = error.reason
    count = sum(map(len, votes.values()))
    if not count:
        raise Unusable(problem)
    if count < policy.min_opinions:
        raise Unusable("too_few_opinions")
    newest = {value: max(said, key=_recency) for value, said in votes.items()}
    most = max(map(len, votes.values()))
    leading = [value for value, said in votes.items() if policy.resolve == "newest" or len(said) == most]
    if policy.resolve == "majority" and len(leading) > 1:
        raise Unusable("disagreement")
    right = max(leading, key=lambda value: _recency(newest[value]))
    if len(votes[right]) < policy.min_agreement * count:
        raise Unusable("disagreement")
    return _Verdict(right, newest[right], count, len(votes[right]))


def _value(recipe: Recipe, answer: str | None, opinion: Opinion) -> str | None:
    """What somebody says is right, as far as the task asks for it."""
    if recipe.task == "classify":
        if opinion.is_label:
            return opinion.class_name
        return opinion.answer if opinion.answer in recipe.classes else None
    if opinion.answer is not None:
        return opinion.answer
    return answer if opinion.class_name in recipe.labels.confirming and answer else None


def _recency(opinion: Opinion) -> tuple[int, str]:
    return opinion.said_at, opinion.id


def _meta(prediction: Prediction, verdict: _Verdict) -> dict[str, Any]:
    """Where a row comes from, and how sure it is."""
    said = verdict.said
    facts = {
        "release": prediction.release_name,
        "source": said.source,
        "feedback_id": None if said.is_label else said.id,
        "policy": said.policy,
        "sampling_probability": said.sampling_probability,
        "opinions": verdict.opinions,
        "agreeing": verdict.agreeing,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _weight(policy: LabelPolicy, said: Opinion) -> float | None:
    if policy.weights == "none":
        return None
    if not said.sampling_probability:
        raise Unusable("no_probability")
    return 1.0 / said.sampling_probability


def _grounds(prediction: Prediction, verdict: _Verdict, passage_text: PassageTexts | None) -> dict[str, Any]:
    """What an answer rests on, what it should cite, and whether it should be one."""
    own = verdict.value == prediction.answer
    cited = verdict.said.passages
    if cited is None:
        cited = [each["passage_id"] for each in prediction.citations or () if own and "passage_id" in each]
    is_abstention = own and (prediction.verdict or "").startswith("abstained")
    passages = [
        {
            "id": each.get("id"),
            "document_id": each.get("document_id"),
            "document_version": each.get("document_version"),
            "text": passage_text(each) if passage_text else None,
        }
        for each in prediction.passages or ()
    ]
    return {
        "passages": passages,
        "citations": list(dict.fromkeys(cited)),
        "answerable": not (is_abstention or verdict.said.passages == []),
    }


def _messages(request: Any) -> list[dict[str, Any]]:
    """The conversation as its caller sent it."""
    try:
        found = msgspec.json.decode(request)["messages"] if request else []
    except (msgspec.DecodeError, KeyError, TypeError):
        found = []
    if not found:
        raise Unusable("no_question")
    return [each for each in found if isinstance(each, dict)]
