"""What servers say beside answers: of themselves, read as one `EngineInfo`, and of texts."""

from typing import Any

import msgspec

from app.engines import EngineInfo


class Settings(msgspec.Struct):
    """Of llama.cpp's server."""

    n_ctx: int | None = None


class Info(msgspec.Struct):
    """The union of TGI's `/info`, vLLM's `/version`, SGLang's `/model_info` and llama.cpp's `/props`.

    Of TGI's, the embedded engine's alone has `max_adapters`.
    """

    model_id: str | None = None
    model_sha: str | None = None
    model_path: str | None = None
    version: str | None = None
    build_info: str | None = None
    max_total_tokens: int | None = None
    max_input_tokens: int | None = None
    max_input_length: int | None = None
    max_adapters: int | None = None
    default_generation_settings: Settings | None = None


class Model(msgspec.Struct):
    """An entry of `/v1/models`."""

    id: str
    parent: str | None = None
    max_model_len: int | None = None


class Models(msgspec.Struct):
    """The answer of `/v1/models`."""

    data: list[Model] = []


class Counted(msgspec.Struct):
    """The answer of `/tokenize`, where it is no list of tokens."""

    count: int | None = None
    tokens: list[Any] = []


class Rated(msgspec.Struct):
    """An entry of `Reranked`: the number of the text, and how likely it answers."""

    index: int
    relevance_score: float


class Reranked(msgspec.Struct):
    """The answer of `/v1/rerank`."""

    results: list[Rated]


def described(info: Info, models: Models, adapters: tuple[str, ...]) -> EngineInfo:
    """Put together what a server said; the base model is the first of `models`."""
    first = models.data[0] if models.data else Model(id="")
    settings = info.default_generation_settings
    return EngineInfo(
        model_id=info.model_id or first.id or info.model_path or "",
        revision=info.model_sha,
        version=info.version or info.build_info,
        max_total_tokens=info.max_total_tokens or first.max_model_len or (settings.n_ctx if settings else None),
        max_input_tokens=info.max_input_tokens or info.max_input_length,
        adapters=adapters,
        max_adapters=info.max_adapters,
    )
