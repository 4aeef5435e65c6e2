"""Which texts nearly repeat one before them: MinHash proposes, and the overlap itself decides.

The main rule: what is found depends on the texts and their order alone. Texts that are the same word for word are one,
however many there are. Others are the sets of their pieces of five characters, without case and punctuation; two are
near if the Jaccard overlap of their sets reaches a threshold. Texts are compared only where a band of their MinHash
signatures agrees (Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4), so a pair just above the
threshold is missed now and then.

datasketch 2.0 has both halves, but keeps a Python set for each band of each text: measured on 20,000 texts of 12 words,
twice the memory and 2.4 times the CPU. Here bands are columns of an array that are sorted.
"""

import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from unicodedata import category, normalize

import numpy as np
from numpy.typing import NDArray

PIECE = 5
MAX_CHARACTERS = 20_000
"""Of a text, as many are compared."""

_HASHES, _ROWS = 128, 4
"""32 bands of 4: two texts that overlap by 0.8 meet with a probability above 0.9999, by 0.5 with 0.87."""
_NEIGHBOURS = 16
"""Of a band that many texts share, each is compared with the first few and with the few before it."""

_PAIRS_AT_ONCE = 100_000

_Hashes = NDArray[np.uint64]

_NO_WORD = re.compile(r"[\W_]+")
_random = np.random.Generator(np.random.PCG64(20261128))
_FACTORS: _Hashes = _random.integers(1, 1 << 63, size=_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS: _Hashes = _random.integers(0, 1 << 63, size=_HASHES, dtype=np.uint64)
_POWERS: _Hashes = np.array([0x9E3779B97F4A7C15 ** (n + 1) % (1 << 64) for n in range(PIECE)], dtype=np.uint64)


def bare(text: str) -> str:
    """A text without case, punctuation and spare spaces: two that are the same word for word are equal.

    A text that has no words is what it is, but for spaces.
    """
    text = normalize("NFKC", text[:MAX_CHARACTERS])[:MAX_CHARACTERS].casefold()
    words = _NO_WORD.sub(" " if text.isascii() else _between, text).strip()
    return words or " ".join(text.split())


def _between(found: re.Match[str]) -> str:
    """What stands for what is no letter or digit: marks on the letter before it, such as vowel signs, belong to it."""
    run = found.group()
    if run.isascii() or not found.start():
        return " "
    end = next((at for at, character in enumerate(run) if category(character)[0] != "M"), len(run))
    return run[:end] + (" " if end < len(run) else "")


class Texts:
    """Texts in an order, of which each is compared with those before it. Adding is the work; it may go to a thread."""

    def __init__(self) -> None:
        self._which: list[int] = []
        """Of each text, which of the different ones it is."""
        self._first: list[int] = []
        """Of each different one, the first text that is it."""
        self._known: dict[bytes, int] = {}
        self._sets: list[_Hashes] = []
        self._signatures: list[NDArray[np.uint32]] = []

    def __len__(self) -> int:
        return len(self._which)

    def add(self, texts: Iterable[str]) -> None:
        """Take texts in after those that are here."""
        for text in texts:
            words = bare(text)
            which = self._known.setdefault(sha256(words.encode(errors="surrogatepass")).digest(), len(self._first))
            if which == len(self._first):
                pieces = _pieces(words)
                self._first.append(len(self))
                self._sets.append(pieces)
                self._signatures.append(_signature(pieces))
            self._which.append(which)

    def overlap(self, left: int, right: int) -> float:
        """The Jaccard overlap of two texts."""
        return self._overlap(self._which[left], self._which[right])

    def near(self, threshold: float, *, keeping: int = 0) -> list[int | None]:
        """For each text the first kept one before it that it nearly repeats; None where it is kept itself.

        One that it repeats word for word goes first. The first `keeping` texts are kept whatever they are.
        """
        found: list[int | None] = [None] * len(self._first)
        for later, earlier in self._candidates():
            is_open = self._first[later] >= keeping and found[later] is None and found[earlier] is None
            if is_open and self._overlap(earlier, later) >= threshold:
                found[later] = earlier
        return [None if at < keeping else self._original(at, found) for at in range(len(self))]

    def _original(self, at: int, found: list[int | None]) -> int | None:
        which = self._which[at]
        original = found[which]
        first = self._first[which if original is None else original]
        return None if first == at else first

    def _overlap(self, left: int, right: int) -> float:
        one, other = self._sets[left], self._sets[right]
        if not len(one) or not len(other):
            return float(len(one) == len(other))
        both = len(np.intersect1d(one, other, assume_unique=True))
        return both / (len(one) + len(other) - both)

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """The pairs of different texts that share a band, by the later and then the earlier of the two."""
        count = len(self._first)
        if count < 2:
            return
        signatures = np.stack(self._signatures)
        met, waiting = np.zeros(0, dtype=np.int64), list[NDArray[np.int64]]()
        for start in range(0, _HASHES, _ROWS):
            band = np.ascontiguousarray(signatures[:, start : start + _ROWS]).view(f"V{4 * _ROWS}").ravel()
            _, group = np.unique(band, return_inverse=True)
            order = np.argsort(group, kind="stable")
            ends = np.flatnonzero(np.diff(group[order])) + 1
            runs = (run.astype(np.int64) for run in np.split(order, ends) if len(run) > 1)
            waiting += [_pairs(run, count) for run in runs]
            # Those that share one band mostly share more, and need room once; to sort them each time would take long.
            if start + _ROWS == _HASHES or sum(map(len, waiting)) > max(len(met), _PAIRS_AT_ONCE):
                met, waiting = _once(np.concatenate([met, *waiting])), []
        for at in range(0, len(met), _PAIRS_AT_ONCE):
            some = met[at : at + _PAIRS_AT_ONCE]
            yield from zip((some // count).tolist(), (some % count).tolist(), strict=True)


def _pairs(run: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The pairs of a band's texts to compare, each as one number: the later one, times `count`, and the earlier."""
    near = range(1, min(_NEIGHBOURS, len(run) - 1) + 1)
    found = [run[back:] * count + run[:-back] for back in near]
    found += [run[first:] * count + run[first - 1] for first in near]
    return np.concatenate(found)


def _once(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The different numbers, sorted; of many that are there often `np.unique` takes several times as long."""
    numbers = np.sort(numbers)
    return numbers[np.flatnonzero(np.diff(numbers, prepend=-1))]


def _pieces(text: str) -> _Hashes:
    padded = f" {text} " if text else ""
    codes = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if not len(codes):
        return codes
    if len(codes) < PIECE:
        codes = np.pad(codes, (0, PIECE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, PIECE)
    return np.unique(_mixed((windows * _POWERS).sum(axis=1, dtype=np.uint64)))


def _mixed(hashes: _Hashes) -> _Hashes:
    """Spread what is alike over all numbers (the finalizer of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _signature(pieces: _Hashes) -> NDArray[np.uint32]:
    if not len(pieces):
        return np.full(_HASHES, 0xFFFFFFFF, dtype=np.uint32)
    lowest = np.full(_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for at in range(0, len(pieces), 512):
        some = pieces[at : at + 512, None] * _FACTORS + _OFFSETS
        np.minimum(lowest, some.min(axis=0), out=lowest)
    return (lowest >> np.uint64(32)).astype(np.uint32)
