"""Whether the questions of a window are other than those of the reference, and which ones are new.

The main rule: two tests look for two kinds of change, and both keep sessions whole. Permuted MMD finds topics that
became more or less frequent and changes of all questions alike; novelty finds the few questions that are far from
everything known, and names them. docs/quality.md has what each finds, and what rules of thumb do instead.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import rankdata

from observability.estimates import Floats, numbered
from observability.permutations import Floats32, holm, permutation_p, session_means

MIN_SESSIONS = 200
"""Distinct sessions in a window below which it is refused; 500 are better. A reference needs twice as many."""
MAX_SESSIONS = 8000
"""Sessions in window and reference together: the kernel's matrix takes 4 bytes for each pair."""
PERMUTATIONS = 999
_NEIGHBOURS = 5
# A question further from its neighbours than this part of the reference's own is a candidate for something new.
_FAR = 0.95
_NAMING_LEVEL = 0.05
_CLUSTER_COSINE = 0.4
_MIN_CLUSTER_SESSIONS = 3
_MAX_CLUSTERED = 2000
_BANDWIDTH_ROWS = 1000
_SESSIONS_AT_ONCE = 100
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Questions:
    """Embedded questions: (n, dimension) vectors, and the session of each."""

    vectors: Floats32
    sessions: NDArray[np.intp]

    @classmethod
    def of(cls, vectors: ArrayLike, sessions: Sequence[Hashable] | None = None) -> Self:
        """Take vectors of any precision; None makes every question a session of its own."""
        known = np.asarray(vectors, np.float32)
        if known.ndim != 2 or not np.all(np.isfinite(known)) or not np.all(np.any(known, axis=1)):
            raise ValueError("vectors must be rows of finite numbers, all of one length, and none of them zero.")
        codes = numbered(sessions, len(known))
        return cls(known, np.arange(len(known)) if codes is None else codes)

    @property
    def session_count(self) -> int:
        """Distinct sessions."""
        return int(self.sessions.max()) + 1 if len(self.sessions) else 0

    def of_sessions(self, numbers: NDArray[np.intp]) -> "Questions":
        """Keep these sessions only."""
        kept = np.isin(self.sessions, numbers)
        return Questions.of(self.vectors[kept], self.sessions[kept].tolist())

    def at_most(self, each: int, seed: int) -> "Questions":
        """Keep so many of each session's questions, taken at random."""
        order = np.lexsort((np.random.default_rng(seed).random(len(self.sessions)), self.sessions))
        place = np.arange(len(order)) - np.searchsorted(self.sessions[order], self.sessions[order])
        kept = np.sort(order[place < each])
        return Questions.of(self.vectors[kept], self.sessions[kept].tolist())


@dataclass(frozen=True, slots=True)
class Cluster:
    """New questions that are alike: in how many sessions, and rows of the window as examples, most typical first."""

    sessions: int
    examples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drift:
    """A window against its reference.

    `p_value` is the smaller of both tests' after Holm's correction: what to compare with a level. Severity comes from
    effects and not from p: `mmd2` (0 is none) and `novel_share`, the share of sessions that are further from the
    reference than nearly all of its own, beyond the share that always is. `clusters` are what is new, the largest
    first, when novelty has a p-value of at most 0.05.
    """

    p_value: float
    mmd_p: float
    novelty_p: float
    mmd2: float
    novel_share: float
    clusters: tuple[Cluster, ...]


def question_drift(
    reference: Questions, window: Questions, *, permutations: int = PERMUTATIONS, seed: int = 0, examples: int = 5
) -> Drift:
    """Test a window of questions against a reference of at least twice `MIN_SESSIONS`, by MMD and by novelty.

    The same input and seed give the same result.

    Raises:
        ValueError: there are too few sessions to tell anything, or too many to compare at once.
    """
    _check_sizes(reference, window)
    mmd2, mmd_p = mmd(reference, window, permutations=permutations, seed=seed)
    novelty = _novelty(reference, window, seed)
    return Drift(
        min(holm((mmd_p, novelty.p_value))),
        mmd_p,
        novelty.p_value,
        mmd2,
        novelty.share,
        _clusters(window, novelty.far, examples) if novelty.p_value <= _NAMING_LEVEL else (),
    )


def mmd(
    reference: Questions, window: Questions, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, float]:
    """Give the squared maximum mean discrepancy (unbiased; Gretton and others 2012, JMLR 13:723) and its p-value.

    The kernel is Gaussian with the median distance as its width; a session is the mean of its questions in the
    kernel's space, so that long conversations count no more than short ones. Sessions of the side with longer ones are
    cut to the other side's: means of five vary less than single questions, which would pass for a change.
    """
    each = max(1, min(len(side.sessions) // side.session_count for side in (reference, window)))
    kernel = _session_kernel(reference.at_most(each, seed), window.at_most(each, seed))
    n, m = window.session_count, reference.session_count
    totals = kernel.sum(axis=0)
    whole = float(totals.sum(dtype=np.float64))

    def discrepancy(masks: Floats32) -> Floats:
        inside = np.einsum("gp,gp->p", masks, kernel @ masks, dtype=np.float64)
        touching = (totals @ masks).astype(np.float64)
        outside = whole - 2 * touching + inside
        across = touching - inside
        return np.asarray(inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * across / (n * m))

    return permutation_p(discrepancy, m, n, permutations=permutations, seed=seed)


def _session_kernel(reference: Questions, window: Questions) -> Floats32:
    """The mean kernel of each pair of sessions, centred for the sake of float32, with zeros on the diagonal."""
    rows = np.concatenate([reference.vectors, window.vectors])
    sessions = np.concatenate([reference.sessions, window.sessions + reference.session_count])
    some = rows[:: -(-len(rows) // _BANDWIDTH_ROWS)]
    width = max(float(np.median(_squared_distances(some, some))), 1e-6)
    order = np.argsort(sessions, kind="stable")
    rows, sessions = rows[order], sessions[order]
    starts = np.searchsorted(sessions, np.arange(sessions[-1] + 1))
    counts = np.diff([*starts, len(rows)]).astype(np.float32)
    kernel = np.empty((len(starts), len(starts)), np.float32)
    for first in range(0, len(starts), _SESSIONS_AT_ONCE):
        last = min(first + _SESSIONS_AT_ONCE, len(starts))
        pairs = _squared_distances(rows[starts[first] : starts[last] if last < len(starts) else len(rows)], rows)
        pairs /= np.float32(-width)
        np.exp(pairs, out=pairs)
        sums = np.add.reduceat(np.add.reduceat(pairs, starts, axis=1), starts[first:last] - starts[first], axis=0)
        kernel[first:last] = sums / (counts[first:last, None] * counts)
    kernel -= kernel.mean()
    np.fill_diagonal(kernel, 0)
    return kernel


def _squared_distances(one: Floats32, other: Floats32) -> Floats32:
    # In place: a new matrix for each step costs more than the arithmetic.
    distances: Floats32 = one @ other.T
    distances *= -2
    distances += np.einsum("nd,nd->n", one, one)[:, None]
    distances += np.einsum("nd,nd->n", other, other)
    return np.maximum(distances, 0, out=distances)


@dataclass(frozen=True, slots=True)
class _Novelty:
    p_value: float
    share: float
    far: NDArray[np.intp]


def _novelty(reference: Questions, window: Questions, seed: int) -> _Novelty:
    """Compare the window's distances to one half of the reference with those of the other half.

    The distances become exponential scores of their ranks, which heed the far end, where new questions are (Savage
    1956): with a tenth of them new that found 57 % of windows where plain ranks found 31. Scores are averaged within
    sessions, which leaves their mean the same whatever the sizes of sessions are, and the means are compared as Welch
    does (ranks in clusters: Rosner, Glynn, Lee 2003). One-sided: questions nearer than usual are no news.
    """
    shuffled = np.random.default_rng(seed).permutation(reference.session_count)
    known = reference.of_sessions(shuffled[: len(shuffled) // 2])
    held_out = reference.of_sessions(shuffled[len(shuffled) // 2 :])
    expected, found = _strangeness(held_out.vectors, known.vectors), _strangeness(window.vectors, known.vectors)
    ranks = rankdata(np.concatenate([expected, found]))
    scores = -np.log1p(-ranks / (len(ranks) + 1))
    own, theirs = (
        session_means(part, codes.tolist())
        for part, codes in ((scores[: len(expected)], held_out.sessions), (scores[len(expected) :], window.sessions))
    )
    error = math.sqrt(own.var() / len(own) + theirs.var() / len(theirs))
    # Hundreds of sessions a side: the normal distribution's tail.
    p_value = math.erfc(float(theirs.mean() - own.mean()) / error / math.sqrt(2)) / 2 if error > 0 else 1.0
    far = found > np.quantile(expected, _FAR)
    share = float(session_means(far, window.sessions.tolist()).mean()) - (1 - _FAR)
    return _Novelty(p_value, max(0.0, share), np.flatnonzero(far))


def _strangeness(vectors: Floats32, known: Floats32) -> Floats32:
    """The mean squared distance to the five nearest of what is known."""
    means = np.empty(len(vectors), np.float32)
    for first in range(0, len(vectors), _ROWS_AT_ONCE):
        distances = _squared_distances(vectors[first : first + _ROWS_AT_ONCE], known)
        distances.partition(_NEIGHBOURS - 1, axis=1)
        means[first : first + _ROWS_AT_ONCE] = distances[:, :_NEIGHBOURS].mean(axis=1)
    return means


def _clusters(window: Questions, far: NDArray[np.intp], examples: int) -> tuple[Cluster, ...]:
    """Group the far questions by average linkage; groups of fewer than three sessions are chance."""
    far = far[:_MAX_CLUSTERED]
    if len(far) < _MIN_CLUSTER_SESSIONS:
        return ()
    vectors = window.vectors[far]
    groups = fcluster(linkage(vectors, "average", metric="cosine"), 1 - _CLUSTER_COSINE, "distance")
    found = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        sessions = window.sessions[far[members]]
        if len(set(sessions)) >= _MIN_CLUSTER_SESSIONS:
            typical = members[np.argsort(-(vectors[members] @ vectors[members].mean(axis=0)), kind="stable")]
            _, firsts = np.unique(window.sessions[far[typical]], return_index=True)
            shown = tuple(int(far[typical[place]]) for place in sorted(firsts)[:examples])
            found.append(Cluster(len(set(sessions)), shown))
    return tuple(sorted(found, key=lambda cluster: -cluster.sessions))


def _check_sizes(reference: Questions, window: Questions) -> None:
    for name, sample, least in (("window", window, MIN_SESSIONS), ("reference", reference, 2 * MIN_SESSIONS)):
        if sample.session_count < least:
            raise ValueError(
                f"The {name} has {sample.session_count} sessions: it takes {least} to tell drift from chance."
            )
    if reference.vectors.shape[1] != window.vectors.shape[1]:
        raise ValueError("Window and reference have vectors of different lengths: embed both with the same model.")
    if reference.session_count + window.session_count > MAX_SESSIONS:
        raise ValueError(
            f"Window and reference have over {MAX_SESSIONS} sessions: take a random part of the reference."
        )
