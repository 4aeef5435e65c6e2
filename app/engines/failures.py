"""What an engine's refusals and breakdowns mean to the caller: the one table between their words and `app.errors`.

The main rule: an engine's words decide before its status does, because TGI answers every failed stream with status
200 and code 422; only a status with a single meaning decides by itself. What the caller can mend is quoted to the
caller, and nothing else: the rest is told in our own words and kept as the error's cause.
"""

import re

from app.engines import wire
from app.errors import (
    ContextTooLong,
    EngineError,
    EngineGarbage,
    EngineInterrupted,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    ServiceError,
)

_MAX_QUOTED_CHARACTERS = 500
_RETRY_AFTER_SECONDS = 1.0
_LONGEST_RETRY_AFTER_SECONDS = 3_600.0

WORDS: tuple[tuple[re.Pattern[str], type[ServiceError]], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), error)
    for pattern, error in (
        # TGI's texts (router/src/lib.rs, infer/mod.rs), then those of vLLM, SGLang and llama.cpp.
        (r"model is overloaded|queue (is full|overflow)|too many (queued )?requests|max[-_]num[-_]queued", Overloaded),
        (r"`inputs` tokens \+ `max_new_tokens` must be|`inputs` must have less than|"
         r"maximum context length|context length|exceed_context_size|exceeds? the available context|"
         r"longer than the (model|maximum)|is too long for", ContextTooLong),
        (r"request failed during generation|incomplete generation", EngineError),
        (r"^unhealthy|loading model|shutting down|engine (core|process|loop).*(dead|died|is not running)",
         EngineUnavailable),
        (r"\b(model|adapter|lora)\b.*(does not exist|not found|is not (loaded|served|known)|unknown)|"
         r"unknown (model|adapter|lora)", ModelNotFound),
        (r"input validation error|template error|tool error|batch size exceeded|suffix not supported|"
         r"failed to (deserialize|parse)", EngineRejected),
    )
)  # fmt: skip
"""A pattern found in the engine's message -> the error; the first hit decides."""

TYPES: dict[str, type[ServiceError]] = {
    "overloaded": Overloaded,
    "validation": EngineRejected,
    "template_error": EngineRejected,
    "tool_error": EngineRejected,
    "generation": EngineError,
    "incomplete_generation": EngineError,
    "incomplete_generation_stream": EngineError,
    "healthcheck": EngineUnavailable,
    "exceed_context_size_error": ContextTooLong,
    "not_supported_error": EngineRejected,
    "invalid_request_error": EngineRejected,
    "badrequesterror": EngineRejected,
    "notfounderror": ModelNotFound,
    "model_not_found": ModelNotFound,
    "adapter_not_found": ModelNotFound,
    "unavailable_error": EngineUnavailable,
}
"""The engine's own error type (TGI's `error_type`, the others' `type`), in lower case."""

STATUSES: dict[int, type[ServiceError]] = {
    400: EngineRejected,
    # Our key is wrong, or our URL: the service is misconfigured, which is not the caller's 401 or 404.
    401: EngineUnavailable,
    403: EngineUnavailable,
    404: EngineUnavailable,
    405: EngineUnavailable,
    408: EngineTimeout,
    413: PayloadTooLarge,
    415: EngineRejected,
    422: EngineRejected,
    424: EngineError,
    429: Overloaded,
    500: EngineError,
    501: EngineRejected,
    502: EngineUnavailable,
    503: EngineUnavailable,
    504: EngineTimeout,
    529: Overloaded,
}

_TOLD: dict[type[ServiceError], str] = {
    Overloaded: "the engine's queue is full: try again shortly",
    EngineError: "the engine failed while answering",
    EngineUnavailable: "the engine is not available",
    EngineTimeout: "the engine did not answer in time",
    PayloadTooLarge: "the request is larger than the engine accepts: shorten the messages",
}


class EngineReply(Exception):
    """What the engine really said: the cause of the error told to the caller, never shown to one."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message[:_MAX_QUOTED_CHARACTERS]}" if message else str(status))
        self.status = status


def refusal(status: int, message: str, kind: str = "", retry_after: str = "") -> ServiceError:
    """Return the error for an engine's refusal, by its words, its error type, then its status."""
    error = _class_of(status, message, kind)
    raised = error(
        _words_for(error, status, message),
        retry_after_seconds=_seconds(retry_after) if issubclass(error, Overloaded | EngineUnavailable) else None,
    )
    raised.__cause__ = EngineReply(status, message)
    return raised


def status_of(error: ServiceError) -> int | None:
    """The status that the engine answered with, where the error is what its answer stands for."""
    return error.__cause__.status if isinstance(error.__cause__, EngineReply) else None


def broken(error: wire.WireError, *, has_begun: bool) -> ServiceError:
    """Return the error for an exchange that failed on the wire, before or after the first piece was handed out."""
    if isinstance(error, wire.PoolExhausted):
        told: ServiceError = Overloaded(
            "every connection to the engine is busy: try again shortly", retry_after_seconds=_RETRY_AFTER_SECONDS
        )
    elif isinstance(error, wire.TimedOut):
        told = EngineTimeout(_TOLD[EngineTimeout])
    elif isinstance(error, wire.BadResponse):
        told = EngineGarbage("the engine's answer is not HTTP as it should be")
    elif has_begun:
        told = EngineInterrupted("the engine's answer broke off")
    else:
        told = EngineUnavailable(_TOLD[EngineUnavailable], retry_after_seconds=_RETRY_AFTER_SECONDS)
    told.__cause__ = error
    return told


def _class_of(status: int, message: str, kind: str) -> type[ServiceError]:
    if status in (401, 403, 413):  # Words such as TGI's "Input validation error" say less.
        return STATUSES[status]
    for pattern, error in WORDS:
        if pattern.search(message):
            return error
    if kind.lower() in TYPES:
        return TYPES[kind.lower()]
    if status in STATUSES:
        return STATUSES[status]
    if 400 <= status < 500:
        return EngineRejected
    return EngineUnavailable if 300 <= status < 400 else EngineError


def _words_for(error: type[ServiceError], status: int, message: str) -> str:
    if status in (401, 403):
        return "the engine refuses the service's key: check the engine's token setting"
    if error is EngineUnavailable and (300 <= status < 400 or status in (404, 405)):
        return "the engine has no such route: check the engine's URL and dialect settings"
    if issubclass(error, InvalidRequest | EngineRejected | ModelNotFound) and message and error is not PayloadTooLarge:
        return f"the engine refused the request: {message[:_MAX_QUOTED_CHARACTERS]}"
    return _TOLD.get(error, "the engine refused the request")


def _seconds(retry_after: str) -> float:
    try:
        seconds = float(retry_after)
    except ValueError:
        return _RETRY_AFTER_SECONDS
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER_SECONDS)  # In this order a NaN is 0.
