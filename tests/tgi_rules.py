"""The requests that TGI's router refuses, and its words for it."""

import json
from typing import Any


def body_problem(raw: bytes) -> str | None:
    """What TGI's JSON extractor would say: a type or a null that its structs do not take."""
    prefix = "Failed to deserialize the JSON body into the target type: "
    try:
        body = json.loads(raw)
    except ValueError:
        return "Failed to parse the request body as JSON: expected value at line 1 column 1"
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        return prefix + "missing field `messages` at line 1 column 2"
    for name in ("stream", "stream_options"):
        if name in body and body[name] is None:
            return prefix + f"{name}: invalid type: null at line 1 column 9"
    if not isinstance(body.get("stop") or [], list):
        return prefix + "stop: invalid type: string, expected a sequence at line 1 column 9"
    if "max_tokens" in body and "max_completion_tokens" in body:
        return prefix + "duplicate field `max_tokens` at line 1 column 9"
    if isinstance(body.get("logit_bias"), dict):
        return prefix + "logit_bias: invalid type: map, expected a sequence at line 1 column 9"
    grammar = body.get("response_format")
    if grammar is not None and (grammar.get("type") not in _GRAMMARS or "value" not in grammar):
        return prefix + "response_format: data did not match any variant at line 1 column 9"
    seed = body.get("seed")
    if seed is not None and not 0 <= seed < 1 << 64:
        return prefix + "seed: invalid value: integer, expected u64 at line 1 column 9"
    return None


_GRAMMARS = ("json", "json_object", "regex", "json_schema")


def validation_problem(body: dict[str, Any]) -> str | None:
    """What TGI's validation would say."""
    top_p, temperature = body.get("top_p"), body.get("temperature")
    if top_p is not None and not 0 < top_p < 1:
        return "`top_p` must be > 0.0 and < 1.0"
    if temperature is not None and temperature < 0:
        return "`temperature` must be strictly positive"
    if body.get("max_tokens") == 0:
        return "`max_new_tokens` must be strictly positive"
    if len(body.get("stop") or ()) > 4:
        return f"`stop` supports up to 4 stop sequences. Given: {len(body['stop'])}"
    if (body.get("top_logprobs") or 0) > 5:
        return f"`top_n_tokens` must be >= 0 and <= 5. Given: {body['top_logprobs']}"
    if body.get("presence_penalty") is not None and body["presence_penalty"] <= -2:
        return "`repetition_penalty` must be strictly positive"
    return None
