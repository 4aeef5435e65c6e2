"""What is recorded of a request and its answer, and the id it goes by."""

import os
import random
import threading
import time
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from app.privacy.policies import Level

Outcome = Literal["open", "finished", "failed", "cancelled", "interrupted"]

Kept = Level | Literal["erased", "expired", "unreadable"]
"""How much of the content is there. `erased`: it was sealed, and the key of whose it was is destroyed. `unreadable`: it
is sealed, and was changed since, or this process has no keys. `expired`: it was kept for as long as it may be."""

_UNTOLD = frozenset(
    {"answer_characters", "declines", "stuck", "called_tools", "question_digest", "question_embedding"}
    | {"subject_key", "sealed", "handed_over"}
)

_id_lock = threading.Lock()
_last_tick = 0
# An id must be unique, not secret: what it names is guarded by its tenant. The kernel's generator costs eight times
# as much.
_random = random.Random()  # noqa: S311
os.register_at_fork(after_in_child=_random.seed)


def uuid7() -> str:
    """Make a UUIDv7: 60 bits of time, strictly rising within the process, and 62 random ones.

    The 12 bits after the milliseconds count fractions of one (RFC 9562, section 6.2, method 3); ids made within the
    same quarter of a microsecond borrow from the future.
    """
    global _last_tick  # noqa: PLW0603 - a clock that must not repeat itself is one for the whole process.
    nanoseconds = time.time_ns()
    tick = (nanoseconds // 1_000_000 << 12) + (nanoseconds % 1_000_000 << 12) // 1_000_000
    with _id_lock:
        if tick <= _last_tick:
            tick = _last_tick + 1
        _last_tick = tick
        noise = _random.getrandbits(62)
    return "%08x-%04x-7%03x-%04x-%012x" % (  # noqa: UP031 - an f-string takes 20 % longer.
        tick >> 28,
        tick >> 12 & 0xFFFF,
        tick & 0xFFF,
        0x8000 | noise >> 48,
        noise & 0xFFFF_FFFF_FFFF,
    )


def created_at(prediction_id: str) -> datetime:
    """The moment an id was made, to the millisecond."""
    return datetime.fromtimestamp(int(prediction_id[:8] + prediction_id[9:13], 16) / 1000, UTC)


class Prediction(msgspec.Struct, kw_only=True):
    """One request and its answer, filled in while it is answered.

    The fields are the columns of `database.predictions`, in their order. Lists and dicts are replaced, never changed
    in place, once the prediction is open: the writer reads them from its thread. With `store` false nothing that
    the caller or the documents said is written: request, messages, question, answer, tool calls and quotes.
    """

    id: str
    tenant: str
    outcome: Outcome = "open"
    key_id: str | None = None
    user: str | None = None
    conversation: str | None = None
    model: str | None = None
    """The name the caller asked for."""
    release_name: str | None = None
    """`name@3`."""
    release_digest: str | None = None
    assignment: str | None = None
    """Why that release: `stable` or `canary` by its rollout, `pinned` by the caller, `shadow` beside another; while an
    engine was away `fallback` in place of another, or `extractive` without its engine; `chore` whatever the release, if
    a chat page asked for itself."""
    shadow_of: str | None = None
    """The prediction that was shown where this one was not."""
    base_model: str | None = None
    adapter: str | None = None
    prompt_version: str | None = None
    index_version: str | None = None
    retrieval_mode: str | None = None
    retrieval_outcome: str | None = None
    stream: bool = False
    store: bool = True
    finish_reason: str | None = None
    error_code: str | None = None
    verdict: str | None = None
    predicted_class: str | None = None
    """The label that a release with the task `classify` answered with."""
    valid: bool | None = None
    """Whether the answer is what the release's task asks for; None where that is a plain answer, or nothing came."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    retrieve_seconds: float | None = None
    queue_seconds: float | None = None
    """The wait for a place here, and from the engine being called to the first it sent: its queue and its reading of
    the prompt, and of an answer that is not streamed the writing too."""
    first_token_seconds: float | None = None
    """From the request's arrival."""
    engine_seconds: float | None = None
    total_seconds: float | None = None
    trace_id: str | None = None
    kept: Kept | None = None
    """How much of what was said is kept; before it is written, how much of it the request wants kept at most."""
    subject_key: str | None = None
    """The key that its content is sealed by."""
    answer_characters: int | None = None
    """How long the answer is; this and the next four are made of the content as it is written, and told to nobody."""
    declines: bool | None = None
    """Whether it begins as models do when they decline."""
    stuck: bool | None = None
    """Whether it begins with one short pattern over and over."""
    called_tools: bool | None = None
    question_digest: bytes | None = None
    """Of a sealed question, what the same one has too."""
    metadata: dict[str, Any] | None = None
    """What the caller sent along, as it is."""
    passages: list[dict[str, Any]] | None = None
    citations: list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    request: Any = None
    """The caller's body: its JSON bytes, or anything msgspec encodes; read back as `msgspec.Raw`."""
    messages: list[Any] | None = None
    """The prompt as the engine got it, where passages were put into it; else it got those of the request."""
    question: str | None = None
    answer: str | None = None
    question_embedding: bytes | None = None
    """What was searched for, as `app.predictions.embeddings` packs it; told to nobody but who looks for drift."""
    sealed: bytes | None = None
    """The content as it is stored where it is sealed; what is read is opened."""
    features: list[dict[str, Any]] | None = None
    """What the release's features were, as they stand in the prompt: see `app.features.reading`."""
    handed_over: bool = False
    """Set by the log when the closing row is on its way: what changes later is not recorded."""

    @property
    def fallback(self) -> str | None:
        """What answered because an engine could not: a release by its label, or `extractive`."""
        if self.assignment == "fallback":
            return self.release_name
        return "extractive" if self.assignment == "extractive" else None

    @property
    def created_at(self) -> datetime:
        """The moment the id was made, to the millisecond."""
        return created_at(self.id)

    def as_dict(self) -> dict[str, Any]:
        """Give every fact that is told, `created_at` and `fallback`, ready for msgspec's JSON encoder."""
        facts = {name: getattr(self, name) for name in self.__struct_fields__ if name not in _UNTOLD}
        if isinstance(self.request, bytes):
            facts["request"] = msgspec.Raw(self.request)
        return {"id": facts.pop("id"), "created_at": self.created_at, **facts, "fallback": self.fallback}

    def __repr__(self) -> str:
        # What is printed ends up in logs, where content must not be.
        return f"<Prediction {self.id} {self.outcome}>"


FACTS = ("id", "created_at", *(name for name in Prediction.__struct_fields__[1:] if name not in _UNTOLD), "fallback")
"""What `Prediction.as_dict` gives, in its order."""
