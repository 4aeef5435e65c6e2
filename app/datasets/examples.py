"""Pure: a row of a dataset, and the digests that name it.

The main rule: a row's content is canonical JSON, and says what a model reads and should write. Its digest and the
row's are lineage's. So a line of an export can be verified by itself: without `row`, `content_digest`, `prediction_id`
and `label_id` it is the content.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from app.datasets.recipes import Kind, Recipe, Split
from app.datasets.sessions import split_of
from app.lineage import canonical, row_digest
from app.lineage.provenance import sha256
from app.tasks import Misfit, Task

MAX_CONTENT = 1_000_000
"""Characters of a row."""

_ROLES = ("system", "user", "assistant")


class Unusable(Exception):
    """No row can be made of something; `reason` is one of few words that are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A row."""

    digest: str
    content_digest: str
    content: str
    """Canonical JSON."""
    prediction_id: str | None
    label_id: str | None
    split: Split
    session: str
    conversation: str | None
    """By which it is known again where the session is all that a user asked."""
    subject: str | None
    question: str
    """What was asked, by which rows are compared."""
    class_name: str | None
    """The class, where rows have one."""


def line_of(digest: str, content_digest: str, content: str, prediction_id: str | None, label_id: str | None) -> str:
    """A row as exports have it, without the end of the line."""
    row: dict[str, Any] = msgspec.json.decode(content)
    whose = {"content_digest": content_digest, "label_id": label_id, "prediction_id": prediction_id, "row": digest}
    return canonical(row | whose)


def example(
    recipe: Recipe,
    content: Mapping[str, Any],
    *,
    session: str,
    conversation: str | None = None,
    question: str,
    subject: str | None = None,
    prediction_id: str | None = None,
    label_id: str | None = None,
    split: Split | None = None,
) -> Example:
    """Make a row; its side of the split is that of its session, unless it is given."""
    side = split or split_of(session, recipe.split)
    content = {**content, "conversation": conversation if conversation != session else None}
    said = {name: value for name, value in content.items() if value is not None}
    written = canonical({"task": recipe.task, "question": question, "session": session, "split": side, **said})
    if len(written) > MAX_CONTENT:
        raise Unusable("too_long")
    digest = sha256(written)
    return Example(
        digest=row_digest(digest, prediction_id, label_id),
        content_digest=digest,
        content=written,
        prediction_id=prediction_id,
        label_id=label_id,
        split=side,
        session=session,
        conversation=conversation,
        subject=subject,
        question=question,
        class_name=content.get("label"),
    )


def turns_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The turns of a conversation as text that ends with the user's; raises Unusable where there is more to it."""
    turns: list[dict[str, str]] = []
    for message in messages:
        role = {"developer": "system"}.get(message.get("role", ""), message.get("role"))
        text = _text(message.get("content"))
        if role not in _ROLES or text is None or message.get("tool_calls"):
            raise Unusable("not_plain_text")
        if role == "system" and turns and turns[-1]["role"] == "system":
            turns[-1]["content"] += f"\n\n{text}"
        elif role == "system" and turns:
            raise Unusable("not_plain_text")
        else:
            turns.append({"role": role, "content": text})
    if not turns or turns[-1]["role"] != "user":
        raise Unusable("no_question")
    return turns


def content_of(
    task: Kind, turns: list[dict[str, str]], target: str, *, rejected: str | None = None, **facts: Any
) -> dict[str, Any]:
    """What a row says: the turns and what should follow them; for a preference also what should not."""
    said = {"role": "assistant", "content": target}
    if task == "preference":
        return {"prompt": turns, "chosen": [said], "rejected": [{"role": "assistant", "content": rejected}], **facts}
    return {"messages": [*turns, said], **facts}


def fitting(shape: Task | None, target: str) -> str:
    """What an answer has to be for the task; raises Unusable where it is not."""
    if shape is None:
        return target
    if shape.kind == "classify":
        if target not in shape.labels:
            raise Unusable("unknown_class")
        return target
    try:
        return shape.read(target)
    except Misfit:
        raise Unusable("unfit") from None


def _text(content: Any) -> str | None:
    """The text of a turn, where it has nothing else."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "\n".join(str(part.get("text", "")) for part in content)
    return None
