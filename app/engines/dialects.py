"""What differs between the servers that speak OpenAI's chat protocol, as one table, and the payloads made from it.

The main rule: the caller speaks OpenAI's shapes, and each server gets the largest part of the request it accepts;
what it would refuse or misread is translated, left out where leaving out means the same, or refused here with the
field's name. Nulls are never sent.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeVar

import msgspec

from app.errors import InvalidRequest
from app.messages import Generation, Message

T = TypeVar("T")

# What servers take in place of 0: it keeps the likeliest token alone, which is what 0 means.
_SMALLEST_TOP_P = 1e-6
_IMAGE_MARK = "![]("
_MARK_AS_JSON, _NO_MARK_AS_JSON = b"![](", b"![ ]("
_U64 = (1 << 64) - 1
# Nothing else is escaped: not every engine's regular expressions know an escaped space.
_MEANINGFUL, _ESCAPED = re.compile(r"[\\.+*?()|\[\]{}^$]"), r"\\\g<0>"
_ALIKE = ("max_tokens", "temperature", "frequency_penalty")
_AS_OPENAI = (*_ALIKE, "presence_penalty", "top_p", "seed")
_DIGITS_OF_DIGEST = 16


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of server.

    `base_model` is what `model` says to get the base model; None means the name that `/v1/models` lists.
    `adapter_model` builds it for an adapter; None when requests cannot choose one.
    `lists_adapters`: `/v1/models` names them. `leaves_stops`: stop sequences stay in the returned text.
    `passed`: the sampling fields sent as they are. TGI's presence_penalty is not among them: it becomes a
    repetition penalty of value + 2, so that 0 already distorts the answer.
    `is_tgi`: the request rules of TGI's router apply (see `_for_tgi`).
    `rerank_path`: where a question and texts are rated by the model that also answers.
    `running_metric`, `waiting_metric`: the gauges in `/metrics` of what it works at and of what queues.
    `labels`: how the answer is held to one of several texts; None where it cannot be.
    `takes_schemas`: whether the answer can be held to a JSON schema.
    `load_path`: where an adapter is loaded while the server runs; None where it takes them at its start only.
    `unload_path`: where it is taken out again.
    `knows_developers`: the role `developer` is passed; chat templates know none, and read `system`.
    """

    name: str
    base_model: str | None = None
    adapter_model: str | None = "{adapter}"
    lists_adapters: bool = True
    leaves_stops: bool = False
    is_tgi: bool = False
    knows_developers: bool = False
    labels: Literal["response_format", "structured_outputs", "regex", "grammar"] | None = None
    takes_schemas: bool = True
    passed: tuple[str, ...] = _AS_OPENAI
    max_stops: int | None = None
    max_top_logprobs: int | None = None
    info_path: str | None = None
    health_path: str = "/health"
    running_metric: str | None = None
    waiting_metric: str | None = None
    tokenize_path: str | None = "/tokenize"
    rerank_path: str | None = None
    load_path: str | None = None
    unload_path: str | None = None
    tokenize_field: str = "prompt"


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "tgi",
            base_model="tgi",
            lists_adapters=False,
            leaves_stops=True,
            is_tgi=True,
            labels="response_format",
            passed=_ALIKE,
            max_stops=4,
            max_top_logprobs=5,
            info_path="/info",
            running_metric="tgi_batch_current_size",
            waiting_metric="tgi_queue_size",
            tokenize_field="inputs",
        ),
        # Our own engine: TGI's protocol, but it lists its adapters, answers 404 for an unknown one, and follows
        # OpenAI in the presence penalty and in leaving stop sequences out of the text.
        Dialect(
            "embedded",
            base_model="tgi",
            is_tgi=True,
            labels="structured_outputs",
            takes_schemas=False,
            passed=(*_ALIKE, "presence_penalty"),
            max_stops=4,
            max_top_logprobs=5,
            info_path="/info",
            running_metric="tgi_batch_current_size",
            waiting_metric="tgi_queue_size",
            tokenize_field="inputs",
            rerank_path="/v1/rerank",
            load_path="/v1/load_lora_adapter",
            unload_path="/v1/unload_lora_adapter",
        ),
        Dialect(
            "vllm",
            labels="structured_outputs",
            info_path="/version",
            load_path="/v1/load_lora_adapter",
            unload_path="/v1/unload_lora_adapter",
            running_metric="vllm:num_requests_running",
            waiting_metric="vllm:num_requests_waiting",
        ),
        # /health generates a token on SGLang, /ready does not.
        Dialect(
            "sglang",
            adapter_model="{base}:{adapter}",
            labels="regex",
            info_path="/model_info",
            health_path="/ready",
            running_metric="sglang:num_running_reqs",
            waiting_metric="sglang:num_queue_reqs",
        ),
        Dialect(
            "llamacpp",
            adapter_model=None,
            lists_adapters=False,
            labels="grammar",
            info_path="/props",
            running_metric="llamacpp:requests_processing",
            waiting_metric="llamacpp:requests_deferred",
            tokenize_field="content",
        ),
        Dialect("openai", knows_developers=True, health_path="/v1/models", tokenize_path=None),
    )
}


def adapter_name(dialect: Dialect, adapter: str, digest: str | None) -> str:
    """What a server is to call an adapter of that digest.

    One that takes adapters while it runs is to have this one by a name that holds the digest, where the adapter's own
    does not: no server tells what it has under a name, and another adapter may have got the same name since.
    """
    if digest is None or dialect.load_path is None:
        return adapter
    digits = digest[:_DIGITS_OF_DIGEST]
    return adapter if adapter.endswith(digits) else f"{adapter}@{digits}"


def payload(dialect: Dialect, generation: Generation, model: str) -> dict[str, Any]:
    """Return the body of the chat request; raises InvalidRequest naming a field this kind of server cannot serve."""
    body: dict[str, Any] = {
        "model": model,
        "messages": _messages(dialect, generation.messages),
        "stream": generation.stream,
    }
    if generation.stream:
        body["stream_options"] = {"include_usage": True}
    sampling = generation.sampling
    for name in dialect.passed:
        if (value := getattr(sampling, name)) is not None:
            body[name] = value
    if sampling.top_p == 0 and "top_p" in body:
        body["top_p"] = _SMALLEST_TOP_P
    if sampling.stop:
        body["stop"] = _stops(dialect, sampling.stop)
    if sampling.logprobs:
        body.update(_logprobs(dialect, sampling.top_logprobs))
    if generation.tools:
        body.update(_tools(dialect, generation))
    if dialect.is_tgi:
        _for_tgi(body, generation)
    return body | _form(dialect, generation)


def _form(dialect: Dialect, generation: Generation) -> dict[str, Any]:
    """What the answer is held to."""
    if generation.labels and dialect.labels is not None:
        return {dialect.labels: _one_of(dialect, generation.labels)}
    wanted = generation.response_format
    if generation.schema is not None:
        if not dialect.takes_schemas:
            return {}
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": generation.schema}}
    if dialect.is_tgi:
        wanted = _tgi_grammar(wanted)
    return {} if wanted is None else {"response_format": wanted}


def _one_of(dialect: Dialect, labels: tuple[str, ...]) -> Any:
    """Say that the answer is one of these texts."""
    match dialect.labels:
        case "structured_outputs":
            return {"choice": labels}
        case "grammar":  # Its strings are written as JSON's are.
            return "root ::= " + " | ".join(msgspec.json.encode(label).decode() for label in labels)
    pattern = f"({'|'.join(_MEANINGFUL.sub(_ESCAPED, label) for label in labels)})"
    return pattern if dialect.labels == "regex" else {"type": "regex", "value": pattern}


def _messages(dialect: Dialect, messages: list[Message]) -> list[Message]:
    if not dialect.knows_developers and any(message.role == "developer" for message in messages):
        messages = [
            Message("system", message.content, message.name) if message.role == "developer" else message
            for message in messages
        ]
    return [_without_image_marks(message) for message in messages] if dialect.is_tgi else messages


def _without_image_marks(message: Message) -> Message:
    """Write what TGI would take for an image so that it stays text.

    In front of a vision model TGI turns an image part into `![](url)`, and then fetches whatever stands in such marks
    anywhere in the prompt: a passage's text, a user's, a call of a tool. Texts side by side are joined, so that no mark
    is made of two of them.
    """
    content = message.content
    if isinstance(content, list):
        safe: list[dict[str, Any]] = []
        for is_text, parts in groupby(content, key=lambda part: part.get("type") == "text"):
            if is_text:
                safe.append({"type": "text", "text": "\n".join(part["text"] for part in parts)})
            else:
                safe += [_in_one_mark(part) for part in parts]
        message = Message(message.role, safe, message.name, message.tool_calls, message.tool_call_id)
    elif (content is None or _IMAGE_MARK not in content) and not (
        message.tool_calls or message.name or message.tool_call_id
    ):
        return message  # As by far the most turns.
    return as_text(message)


def _in_one_mark(part: dict[str, Any]) -> dict[str, Any]:
    """Refuse the image whose URL would end the mark that TGI makes of it, and go on behind it."""
    url = part["image_url"]["url"]
    if "(" in url or ")" in url:
        raise InvalidRequest(
            "`messages`: the URL of an image has a bracket, which this engine misreads: write `%28` and `%29`.",
            param="messages",
        )
    return part


def as_text(value: T) -> T:
    """Write the mark so that it stays text wherever a value has it, be it the name of a field."""
    encoded = msgspec.json.encode(value)
    if _MARK_AS_JSON not in encoded:
        return value
    return msgspec.json.decode(encoded.replace(_MARK_AS_JSON, _NO_MARK_AS_JSON), type=type(value))


def _tools(dialect: Dialect, generation: Generation) -> dict[str, Any]:
    tools: dict[str, Any] = {"tools": generation.tools}
    if generation.tool_choice is not None:
        tools["tool_choice"] = generation.tool_choice
    if generation.parallel_tool_calls is not None and not dialect.is_tgi:
        # TGI calls one tool at most, and is not told of the rest.
        tools["parallel_tool_calls"] = generation.parallel_tool_calls
    # TGI writes the tools into the prompt.
    return as_text(tools) if dialect.is_tgi else tools


def _stops(dialect: Dialect, stops: tuple[str, ...]) -> tuple[str, ...]:
    if dialect.max_stops is not None and len(stops) > dialect.max_stops:
        raise InvalidRequest(f"`stop` holds at most {dialect.max_stops} sequences on this engine", param="stop")
    return stops


def _logprobs(dialect: Dialect, top: int | None) -> dict[str, Any]:
    if top is None:
        return {"logprobs": True}
    if dialect.max_top_logprobs is not None and top > dialect.max_top_logprobs:
        raise InvalidRequest(
            f"`top_logprobs` is at most {dialect.max_top_logprobs} on this engine", param="top_logprobs"
        )
    return {"logprobs": True, "top_logprobs": top}


def _for_tgi(body: dict[str, Any], generation: Generation) -> None:
    """Add what TGI reads otherwise than OpenAI."""
    sampling = generation.sampling
    top_p = sampling.top_p
    if top_p is not None and top_p < 1:
        body["top_p"] = max(top_p, _SMALLEST_TOP_P)
    if sampling.seed is not None:
        # TGI reads an unsigned number, OpenAI a signed one.
        body["seed"] = sampling.seed & _U64


def _tgi_grammar(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """Translate OpenAI's response format; TGI's own (`{type, value}`) pass."""
    if response_format is None or response_format.get("type") == "text":
        return None
    kind = response_format.get("type")
    schema = response_format.get("value")
    if kind == "json_schema":
        schema = response_format.get("json_schema")
        schema = schema.get("schema") if isinstance(schema, dict) else None
    elif kind == "regex" and isinstance(schema, str):
        return {"type": "regex", "value": schema}
    elif kind not in ("json", "json_object"):
        raise InvalidRequest(
            "`response_format.type` is one of text, json_object, json_schema", param="response_format.type"
        )
    if not isinstance(schema, dict) or "properties" not in schema:
        raise InvalidRequest(
            "`response_format`: this engine needs a schema with `properties`. Send the type `json_schema`, with a "
            "`name` and a `schema`.",
            param="response_format",
        )
    return {"type": "json", "value": schema}
