"""Text out of tokens, as they come: no torn character, nothing of a stop string, nothing held longer than needed.

Main rule: what was handed out is never taken back, so a tail that may still become a stop string waits.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class StopGuard:
    """Lets text through up to the first stop string, holding back only what may yet turn out to begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text and return what may be shown; after a stop string nothing more is shown."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        shown, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return shown

    def flush(self) -> str:
        """Return what was held back: the text ended and it became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class TextStream:
    """The text of one answer, token by token; special tokens are left out."""

    def __init__(self, vocabulary: Any, stops: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []
        self._guard = StopGuard(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._guard.stopped

    def push(self, token: int) -> str:
        """Take a token and return the text it makes showable; bytes of an unfinished character wait."""
        self._pending.append(token)
        try:
            text = self._decoder.step(self._vocabulary, token)
        except Exception:  # noqa: BLE001 - the tokenizer raises nothing narrower.
            text = self._decode_anew()
        if not text:
            return ""
        self._pending.clear()
        return self._guard.push(text)

    def _decode_anew(self) -> str:
        """Begin again with the tokens that have shown no text yet.

        A vocabulary with tokens for single bytes reads a run of them as one: after a byte that cannot follow, the
        characters before it are read in another way, which no longer begins with what was shown.
        """
        self._decoder = DecodeStream(skip_special_tokens=True)
        return "".join(self._decoder.step(self._vocabulary, token) or "" for token in self._pending)

    def flush(self) -> str:
        """Return what was held back for stop strings; an unfinished character is dropped."""
        return self._guard.flush()
