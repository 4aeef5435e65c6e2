"""The last question as the release will put it to the model: what is trained is what is served.

The main rule: a template is filled as the service fills a release's `prompt.template`, slot by slot in one pass, so
that what a question says is never taken for a slot.
"""

import json
import re

from finetune.dataset import Manifest, Message, Passage, Row
from finetune.errors import BadDataset

_SLOT = re.compile(r"\{(question|sources|labels|schema)\}")
_FENCE = re.compile(r"<(?=\s*/?\s*sources\b)", re.IGNORECASE)


def asked(row: Row, template: str | None, manifest: Manifest, *, bare: bool = False) -> tuple[Message, ...]:
    """What the model is given for a row: its messages, the last question put into the template where there is one.

    `bare` gives the question as it was asked, for a service that puts it into its release's template itself.

    Raises:
        BadDataset: the template needs a passage whose text is gone.
    """
    question = row.asked[-1].content if row.question is None else row.question
    if template is None:
        return (*row.asked[:-1], Message("user", question)) if bare else row.asked
    if "{sources}" in template and any(passage.text is None for passage in row.passages):
        raise BadDataset(f"row {row.row}: a passage has no text any more; leave such rows out of the dataset")
    schema = json.dumps(manifest.schema, separators=(",", ":"), ensure_ascii=False)
    slots = {
        "question": question.strip(),
        "sources": "\n\n".join(_render(n, passage) for n, passage in enumerate(row.passages, start=1)),
        "labels": "\n".join(f"- {label}" for label in manifest.labels),
        "schema": schema if manifest.schema is not None else "",
    }
    return (*row.asked[:-1], Message("user", _SLOT.sub(lambda slot: slots[slot[1]], template)))


def _render(n: int, passage: Passage) -> str:
    head = " > ".join(part for part in dict.fromkeys((passage.title, *passage.heading_path)) if part)
    body = (passage.text or "").strip()
    text = f"[{n}] {head}\n{body}" if head else f"[{n}] {body}"
    return _FENCE.sub("‹", text)
