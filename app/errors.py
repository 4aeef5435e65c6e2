"""Every error a caller can see, as one tree; routes render it in OpenAI's envelope.

ServiceError                      500 internal_error
├── InvalidRequest                400 invalid_request         the request's own fault: names the field and the fix
│   ├── ContextTooLong            400 context_length_exceeded
│   ├── FeatureMissing            422 feature_missing         a feature that the release requires is not known
│   ├── PayloadTooLarge           413 payload_too_large
│   │   └── DocumentLimitExceeded 413 document_limit_exceeded  parsing the document costs more than one may
│   ├── UnreadableContent         422 unreadable_document     the file holds no text that can be read
│   └── UnsupportedMedia          415 unsupported_media_type
├── Unauthenticated               401 invalid_api_key
├── Forbidden                     403 insufficient_scope
├── NotFound                      404 not_found               also for what belongs to another tenant
│   └── ModelNotFound             404 model_not_found
├── Gone                          410 gone
├── Conflict                      409 conflict
├── Overloaded                    429 overloaded              retry after `retry_after_seconds`
├── RateLimited                   429 rate_limit_exceeded     likewise; the key has used up what it may take
├── EngineError                   502 engine_error            the engine answered, but not with an answer
│   ├── EngineRejected            400 engine_rejected         the engine refused the request as invalid
│   ├── EngineGarbage             502 engine_garbage          what came back is not the protocol
│   └── EngineInterrupted         502 engine_interrupted      cut off after the first byte
├── UnfitAnswer                   502 unfit_answer            the answer is not what the release's task asks for
├── Unavailable                   503 unavailable
│   ├── EngineUnavailable         503 engine_unavailable
│   ├── FeaturesUnavailable       503 features_unavailable    a feature that the release requires cannot be read
│   ├── RetrievalUnavailable      503 retrieval_unavailable
│   └── RecordUnavailable         503 record_unavailable      the prediction could not be recorded
└── EngineTimeout                 504 engine_timeout

`retryable` says whether sending the same request again, perhaps to another engine, can succeed.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from retrieval.errors import (
    DocumentChanged,
    DocumentNotFound,
    DocumentOwned,
    EmbeddingFailed,
    IndexMismatch,
    IndexUnavailable,
    IndexVersionNotFound,
    IndexVersionState,
    InvalidFilter,
    JobEnded,
    JobNotFound,
    Limit,
    LimitExceeded,
    NotExpected,
    QueueFull,
    RetrievalError,
    TooManyDeletions,
    UnreadableDocument,
    UnsupportedType,
    UrlRefused,
    UrlUnreachable,
)


class ServiceError(Exception):
    """The root: something went wrong and the caller is told what, in words that leak nothing."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "server_error"  # The envelope's `type`, as OpenAI's SDKs know it.
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_seconds: float | None = None) -> None:
        """`param` names the offending field; `retry_after_seconds` becomes the Retry-After header."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(ServiceError):
    """The request breaks a rule the caller can mend."""

    status, code, kind = 400, "invalid_request", "invalid_request_error"


class ContextTooLong(InvalidRequest):
    """The prompt and the tokens asked for do not fit the model's context."""

    code = "context_length_exceeded"


class FeatureMissing(InvalidRequest):
    """A feature that the release requires is not known of whom the request is about, or too old."""

    status, code = 422, "feature_missing"


class PayloadTooLarge(InvalidRequest):
    """The body or file is over a limit."""

    status, code = 413, "payload_too_large"


class DocumentLimitExceeded(PayloadTooLarge):
    """Parsing the document costs more than one may; the message names the limit and its setting."""

    code = "document_limit_exceeded"


class UnsupportedMedia(InvalidRequest):
    """The body or file is of a type that is not read."""

    status, code = 415, "unsupported_media_type"


class UnreadableContent(InvalidRequest):
    """The uploaded file cannot be turned into text."""

    status, code = 422, "unreadable_document"


class Unauthenticated(ServiceError):
    """No valid API key came with the request."""

    status, code, kind = 401, "invalid_api_key", "authentication_error"


class UserUnverified(Unauthenticated):
    """The key is valid, and what says for whom it acts is not."""

    code = "invalid_user_token"


class Forbidden(ServiceError):
    """The key is valid but lacks the scope the route needs."""

    status, code, kind = 403, "insufficient_scope", "permission_error"


class NotFound(ServiceError):
    """It does not exist, or not for this tenant."""

    status, code, kind = 404, "not_found", "invalid_request_error"


class ModelNotFound(NotFound):
    """No release or adapter of that name is served."""

    code = "model_not_found"


class Gone(ServiceError):
    """It existed and was deleted or replaced."""

    status, code, kind = 410, "gone", "invalid_request_error"


class Conflict(ServiceError):
    """It collides with what is there."""

    status, code, kind = 409, "conflict", "invalid_request_error"


class Overloaded(ServiceError):
    """A bounded queue is full."""

    status, code, kind = 429, "overloaded", "rate_limit_error"
    retryable = True


class RateLimited(ServiceError):
    """The key has taken what it may in this minute."""

    status, code, kind = 429, "rate_limit_exceeded", "rate_limit_error"
    retryable = True

    def __init__(
        self, message: str, *, retry_after_seconds: float, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """`headers` tell how the key stands within its limits."""
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.headers = headers


class EngineError(ServiceError):
    """The engine failed while answering."""

    status, code = 502, "engine_error"
    retryable = True


class EngineRejected(EngineError):
    """The engine found the request invalid: the caller can mend it."""

    status, code, kind = 400, "engine_rejected", "invalid_request_error"
    retryable = False


class EngineGarbage(EngineError):
    """The engine's answer is not the protocol it should speak."""

    code = "engine_garbage"


class EngineInterrupted(EngineError):
    """The engine's answer broke off after its first byte."""

    code = "engine_interrupted"


class UnfitAnswer(ServiceError):
    """The engine answered, but not with one of the release's labels, or JSON that fits its schema."""

    status, code = 502, "unfit_answer"


class Unavailable(ServiceError):
    """Something the request needs is down."""

    status, code = 503, "unavailable"
    retryable = True


class EngineUnavailable(Unavailable):
    """No engine can be reached, or it says it is not healthy."""

    code = "engine_unavailable"


class FeaturesUnavailable(Unavailable):
    """The feature store does not answer, and the release requires a feature."""

    code = "features_unavailable"


class RetrievalUnavailable(Unavailable):
    """The index or the embedder is down and the request requires retrieval."""

    code = "retrieval_unavailable"


class RecordUnavailable(Unavailable):
    """The prediction cannot be recorded, and an unrecorded answer is not given."""

    code = "record_unavailable"


class EngineTimeout(ServiceError):
    """The engine did not answer in time."""

    status, code = 504, "engine_timeout"
    retryable = True


_FROM_RETRIEVAL: dict[type[RetrievalError], type[ServiceError]] = {
    UnsupportedType: UnsupportedMedia,
    LimitExceeded: DocumentLimitExceeded,
    UnreadableDocument: UnreadableContent,
    UrlRefused: InvalidRequest,
    DocumentNotFound: NotFound,
    DocumentChanged: Gone,
    DocumentOwned: Conflict,
    JobNotFound: NotFound,
    JobEnded: Conflict,
    NotExpected: Conflict,
    TooManyDeletions: Conflict,
    QueueFull: Overloaded,
    EmbeddingFailed: RetrievalUnavailable,
    InvalidFilter: InvalidRequest,
    IndexVersionNotFound: NotFound,
    IndexVersionState: Conflict,
    IndexMismatch: RetrievalUnavailable,
    IndexUnavailable: RetrievalUnavailable,
}


_SETTINGS: dict[Limit, str] = {
    "bytes": "max_document_bytes",
    "pages": "max_document_pages",
    "characters": "max_document_characters",
    "seconds": "max_document_seconds",
    "memory": "max_document_memory_bytes",
}


def from_retrieval(error: RetrievalError, *, param: str | None = None) -> ServiceError:
    """Translate retrieval's error into the one the caller sees; `param` names the field it came from.

    Where the index is, and what is wrong with it, is for the log and for `/readyz`.
    """
    for kind in type(error).__mro__:
        if found := _FROM_RETRIEVAL.get(kind):
            if found is RetrievalUnavailable:
                return found("The index does not answer. Try again shortly.", retry_after_seconds=2.0)
            if isinstance(error, QueueFull):
                return found(str(error), retry_after_seconds=error.retry_after_seconds)
            if isinstance(error, UrlRefused | UrlUnreachable):
                return found(str(error), param="url")
            message = f"{error}{_setting_of(error)}"
            return found(message, param=param if found.kind == "invalid_request_error" else None)
    return ServiceError("Retrieval failed.")


def _setting_of(error: RetrievalError) -> str:
    setting = _SETTINGS.get(error.limit) if isinstance(error, LimitExceeded) else None
    return f" (setting `limits.{setting}`)" if setting else ""


_INSIDE = re.compile(r"^`([\w.]+)`: |(?:missing required|contains unknown) field `([^`]+)`")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")


def invalid_field(error: Exception) -> InvalidRequest:
    """Turn msgspec's complaint, which ends in a JSON path, into one that names the field."""
    text = str(error)
    found = _PATH.search(text)
    reason = _PATH.sub("", text).rstrip(".")
    inside = _INSIDE.search(reason)
    param = found.group(1) if found else ""
    if inside:
        name = inside.group(1) or inside.group(2)
        param = f"{param}.{name}" if param else name
        reason = reason.removeprefix(f"`{name}`: ")
    where = f"`{param}`: " if param else ""
    return InvalidRequest(f"{where}{reason}.", param=param or None)
