"""Brings the tool calls of one answer into OpenAI's streaming shape, as the accumulators of SDKs need it.

The main rule: an SDK joins the strings of a call's deltas, so `id`, `type` and the function's name are said once for
each call, and the id is one that no other answer has. TGI repeats all of them, and counts its ids from 0.
"""

import secrets
from typing import Any

import msgspec

from app.errors import EngineGarbage


class ToolCalls:
    """The calls of one answer, whole or as its deltas arrive."""

    def __init__(self) -> None:
        self._said: dict[int, set[str]] = {}
        self._ids: set[str] = set()

    def read(self, calls: Any) -> list[dict[str, Any]]:
        """Return the deltas that these of the engine's make.

        TGI 2 sends one object for a list and arguments as an object; TGI 3 sends nulls for what a delta lacks.

        Raises:
            EngineGarbage: they are not tool calls.
        """
        return [self._delta(call, at) for at, call in enumerate(calls if isinstance(calls, list) else [calls])]

    def _delta(self, call: Any, at: int) -> dict[str, Any]:
        if not isinstance(call, dict) or not isinstance(call.get("function") or {}, dict):
            raise EngineGarbage("the engine sent a tool call that is not an object")
        index = at if call.get("index") is None else call["index"]
        if not isinstance(index, int):
            raise EngineGarbage("the engine sent a tool call whose index is not a number")
        said = self._said.get(index)
        delta: dict[str, Any] = {"index": index}
        if said is None:
            said = self._said[index] = set()
            delta["id"] = self._unique(call.get("id"))
            delta["type"] = call.get("type") or "function"
        function = {key: value for key, value in (call.get("function") or {}).items() if value is not None}
        if "name" in said:
            function.pop("name", None)
        elif function.get("name"):
            said.add("name")
        if not isinstance(function.get("arguments", ""), str):
            function["arguments"] = msgspec.json.encode(function["arguments"]).decode()
        delta["function"] = function
        return delta

    def _unique(self, given: Any) -> str:
        """Keep the engine's id where it can be one of its own among all calls of a conversation."""
        unique = given if isinstance(given, str) and given and not given.isdigit() and given not in self._ids else None
        unique = unique or f"call_{secrets.token_hex(12)}"
        self._ids.add(unique)
        return unique
