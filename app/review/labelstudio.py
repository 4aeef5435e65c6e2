"""Pure: items as tasks in Label Studio's JSON, and what its annotations say.

A task's `data` shows `question` and `answer`; the controls go by the names `class` (Choices), `correction`, `passages`
and `comment` (TextArea), each `toName="answer"`. A task is known again by `data.hallmark_item`.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec

from app.feedback import Label
from app.predictions import Prediction
from app.review.findings import Item
from app.review.reviews import Finding, Review

MAX_TASKS = 2_000
MAX_TOLD = 20
"""Bad entries that are told at a time."""

_TEXTS = {"correction": 100_000, "comment": 10_000, "passages": 256}
"""The controls that hold text, and how long one may be."""

_MAX_PASSAGES = 200
_MAX_NAME = 256


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody said of a task; `entry` is its place in the file, for whoever is told of it."""

    entry: str
    item_id: str
    reviewer: str
    finding: Finding | None
    """None where the task was skipped."""
    at: int
    """When it was last changed, in milliseconds since 1970."""


class Unreadable(Exception):
    """An entry cannot be read; the message says why."""


# --- out ---


def task_of(
    item: Item, prediction: Prediction, said: Sequence[tuple[Review, Label | None]], classes: Sequence[str]
) -> Any:
    """An item as a task, with what reviewers said as its annotations."""
    messages = _messages(prediction)
    answer = prediction.answer or ""
    result = [_choice(answer)] if answer in classes else []
    return {
        "data": {
            "question": _text(messages[-1].get("content")) if messages else prediction.question or "",
            "answer": answer,
            "conversation": "\n\n".join(f"{each.get('role')}: {_text(each.get('content'))}" for each in messages[:-1]),
            "quotes": "\n\n".join(str(each["quote"]) for each in prediction.citations or () if "quote" in each),
            "hallmark_item": item.id,
            "prediction_id": item.prediction_id,
        },
        "meta": {"policy": item.policy, "sampling_probability": item.probability},
        "predictions": [{"model_version": item.release_name, "result": result}],
        "annotations": [_annotation(review, label) for review, label in said],
    }


def messages_of(prediction: Prediction) -> list[dict[str, Any]]:
    """The conversation that a prediction answers, as its caller sent it."""
    return _messages(prediction)


def _messages(prediction: Prediction) -> list[dict[str, Any]]:
    if prediction.request is None:
        return []
    try:
        body = msgspec.json.decode(prediction.request)
        return [each for each in body["messages"] if isinstance(each, dict)]
    except (msgspec.DecodeError, KeyError, TypeError):
        return []


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _annotation(review: Review, label: Label | None) -> dict[str, Any]:
    result = []
    if review.state == "done" and review.class_name is not None:
        result.append(_choice(review.class_name))
    if review.state == "done" and label is not None and not label.withdrawn:
        texts = {"correction": label.answer, "comment": label.comment}
        result += [_area(name, [text]) for name, text in texts.items() if text is not None]
        result += [_area("passages", label.passages)] if label.passages is not None else []
    at = datetime.fromtimestamp((review.finished_at or review.leased_at) / 1000, UTC).isoformat()
    return {
        "completed_by": {"email": review.reviewer},
        "was_cancelled": review.state == "skipped",
        "ground_truth": False,
        "created_at": at,
        "updated_at": at,
        "lead_time": ((review.finished_at or review.leased_at) - review.leased_at) / 1000,
        "result": result,
    }


def _choice(class_name: str) -> dict[str, Any]:
    return {"from_name": "class", "to_name": "answer", "type": "choices", "value": {"choices": [class_name]}}


def _area(name: str, texts: Sequence[str]) -> dict[str, Any]:
    return {"from_name": name, "to_name": "answer", "type": "textarea", "value": {"text": list(texts)}}


# --- in ---


def read_tasks(body: Any, *, now: int) -> tuple[list[Annotation], list[str]]:
    """Read what annotations say, and what is wrong with any; `now` is the latest moment that one may name."""
    if not isinstance(body, list) or len(body) > MAX_TASKS:
        return [], [f"send a list of at most {MAX_TASKS} tasks, as Label Studio exports them"]
    found: list[Annotation] = []
    problems: list[str] = []
    for at, task in enumerate(body):
        try:
            item_id, annotations = _item_id(task), _list(task, "annotations")
        except Unreadable as error:
            problems.append(f"[{at}].{error}")
            continue
        for number, annotation in enumerate(annotations):
            entry = f"[{at}].annotations[{number}]"
            try:
                found.append(_read(entry, item_id, annotation, now))
            except Unreadable as error:
                problems.append(f"{entry}.{error}")
    return found, problems


def _item_id(task: Any) -> str:
    data = task.get("data") if isinstance(task, Mapping) else None
    if not isinstance(data, Mapping):
        raise Unreadable("data: is missing")
    try:
        return str(UUID(data["hallmark_item"]))
    except (KeyError, ValueError, TypeError, AttributeError):
        raise Unreadable("data.hallmark_item: is not the id of an item: export the tasks from here") from None


def _list(owner: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = owner.get(name) or []
    if not isinstance(found, list):
        raise Unreadable(f"{name}: is not a list")
    return found


def _read(entry: str, item_id: str, annotation: Any, now: int) -> Annotation:
    if not isinstance(annotation, Mapping):
        raise Unreadable("completed_by: is missing")
    is_skipped = annotation.get("was_cancelled") is True
    return Annotation(
        entry=entry,
        item_id=item_id,
        reviewer=_reviewer(annotation.get("completed_by")),
        finding=None if is_skipped else _finding(_list(annotation, "result")),
        at=_moment(annotation.get("updated_at") or annotation.get("created_at"), now),
    )


def _reviewer(completed_by: Any) -> str:
    """Who annotated: by e-mail where that is told, else by the number that Label Studio knows them under."""
    if isinstance(completed_by, Mapping):
        completed_by = completed_by.get("email") or completed_by.get("id")
    if isinstance(completed_by, int) and not isinstance(completed_by, bool):
        return f"label-studio:{completed_by}"
    if isinstance(completed_by, str) and 0 < len(completed_by) <= _MAX_NAME and completed_by.isprintable():
        return completed_by
    raise Unreadable("completed_by: is neither a number nor holds an e-mail")


def _moment(written: Any, now: int) -> int:
    try:
        moment = datetime.fromisoformat(written)
        at = int(moment.timestamp() * 1000)
    except (TypeError, ValueError, OverflowError):
        raise Unreadable("updated_at: is no date and time, as in 2026-11-24T12:00:00Z") from None
    if moment.tzinfo is None or not 0 <= at <= now:
        raise Unreadable("updated_at: has no time zone, or lies before 1970 or in the future")
    return at


def _finding(result: Sequence[Any]) -> Finding:
    class_name: str | None = None
    texts: dict[str, list[str]] = {}
    for name, value in _controls(result):
        if name == "class":
            choices = value.get("choices")
            if class_name is not None or not isinstance(choices, list) or len(choices) != 1:
                raise Unreadable("result: `class` holds not just one choice")
            (class_name,) = _strings(name, choices, _MAX_NAME)
        elif name in _TEXTS:
            given = value.get("text")
            texts.setdefault(name, []).extend(
                _strings(name, given if isinstance(given, list) else [given], _TEXTS[name])
            )
    passages = texts.get("passages")
    if passages is not None and len(passages) > _MAX_PASSAGES:
        raise Unreadable(f"result: `passages` holds more than {_MAX_PASSAGES}")
    finding = Finding(
        class_name=class_name,
        answer="\n".join(texts["correction"]) if texts.get("correction") else None,
        passages=passages,
        comment="\n".join(texts["comment"]) if texts.get("comment") else None,
    )
    if finding.class_name is None and finding.answer is None and finding.passages is None:
        raise Unreadable("result: holds neither `class` nor `correction` nor `passages`")
    return finding


def _controls(result: Sequence[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for region in result:
        if not isinstance(region, Mapping) or not isinstance(region.get("value"), Mapping):
            raise Unreadable("result: holds something without a value")
        yield str(region.get("from_name")), region["value"]


def _strings(name: str, values: Sequence[Any], limit: int) -> list[str]:
    for value in values:
        if not isinstance(value, str) or not value or len(value) > limit:
            raise Unreadable(f"result: `{name}` holds no text of 1 to {limit} characters")
        if not _is_plain(value):
            raise Unreadable(f"result: `{name}` holds a NUL or half of a surrogate pair")
    return list(values)


def _is_plain(text: str) -> bool:
    """Whether every database takes a text: it has no NUL, and no half of a surrogate pair."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False
