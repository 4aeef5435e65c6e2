"""Cuts an answer before its first stop sequence, however the text arrives in pieces."""

from collections.abc import Sequence


class StopCutter:
    """Passes text on up to the first stop sequence and holds back an ending that may turn out to begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.is_cut = False

    def feed(self, text: str) -> str:
        """Return the text that is safe to pass on."""
        if self.is_cut or not text:
            return ""
        text = self._held + text
        # The stop that is complete first decides, so that the cut does not depend on how the text was dealt out.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_cut, self._held = True, ""
            return text[: min(found)[1]]
        held = self._held_length(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        """Return the length of the longest ending of `text` that a stop sequence starts with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
