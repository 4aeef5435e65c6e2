"""Pure: a window of questions and answers against its reference. It takes scipy, and seconds: for the worker alone.

The main rule: a p-value is corrected for all that was asked of a kind at once (Holm), so that a kind is one test. What
there is too little of to tell anything is left out and says so by being None.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from app.drift.facts import Outputs, Question
from app.drift.states import Cluster, Inputs, Judged, Output
from app.predictions.embeddings import Vectors, model_of, unpack
from observability.drift import MIN_SESSIONS, Questions, question_drift
from observability.permutations import holm
from observability.shifts import Shift, category_shift, number_shift

MAX_CATEGORIES = 50
MAX_CLUSTERS = 5
_OTHER = "(other)"
_PERMUTATIONS = (999, 1_999, 4_999, 9_999)

_CATEGORIES: dict[str, Callable[[Outputs], str | None]] = {
    "class": lambda answer: answer.predicted_class,
    "refused": lambda answer: "refused" if answer.refused else "answered",
    "finish_reason": lambda answer: answer.finish_reason,
}
_NUMBERS: dict[str, Callable[[Outputs], float | None]] = {
    "answer_tokens": lambda answer: answer.tokens,
    "top_score": lambda answer: answer.top_score,
    "support": lambda answer: answer.support,
}


def judge(reference: Sequence[Question], window: Sequence[Question], *, level: float, seed: int = 0) -> Judged:
    """Compare a window with a reference; the same input and seed give the same."""
    inputs, clusters = _inputs(reference, window, level, seed)
    return Judged(inputs=inputs, outputs=_outputs(reference, window, level, seed), clusters=clusters)


def permutations_for(level: float, tests: int) -> int:
    """How many permutations let the smallest p-value, corrected for so many tests, lie below half the level."""
    return next((count for count in _PERMUTATIONS if tests / (count + 1) <= level / 2), _PERMUTATIONS[-1])


def _inputs(
    reference: Sequence[Question], window: Sequence[Question], level: float, seed: int
) -> tuple[Inputs | None, tuple[Cluster, ...]]:
    spaces = Counter(_space(each) for each in reference if each.embedding)
    if not spaces:
        return None, ()
    space = spaces.most_common(1)[0][0]
    (known, asked), vectors = zip(*(_embedded(side, space) for side in (reference, window)), strict=True)
    if _session_count(known) < 2 * MIN_SESSIONS or _session_count(asked) < MIN_SESSIONS:
        return None, ()
    sides = [
        Questions.of(side, [each.session for each in questions])
        for side, questions in zip(vectors, (known, asked), strict=True)
    ]
    found = question_drift(*sides, permutations=permutations_for(level, 2), seed=seed)
    inputs = Inputs(
        p_value=found.p_value,
        mmd_p=found.mmd_p,
        novelty_p=found.novelty_p,
        mmd2=found.mmd2,
        novel_share=found.novel_share,
        sessions=sides[1].session_count,
    )
    clusters = tuple(
        Cluster(each.sessions, tuple(id_ for row in each.examples if (id_ := asked[row].prediction_id)))
        for each in found.clusters[:MAX_CLUSTERS]
    )
    return inputs, clusters


def _space(question: Question) -> tuple[bytes, int]:
    """What a vector can be compared with: those of its model and length."""
    return model_of(question.embedding or b""), len(question.embedding or b"")


def _embedded(questions: Sequence[Question], space: tuple[bytes, int]) -> tuple[list[Question], Vectors]:
    """Those with a vector in that space that says something, and their vectors."""
    with_one = [each for each in questions if each.embedding and _space(each) == space]
    if not with_one:
        return [], np.empty((0, 0), np.float32)
    vectors = unpack([each.embedding for each in with_one if each.embedding])
    fit = np.flatnonzero(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))
    return [with_one[at] for at in fit], vectors[fit]


def _session_count(questions: Sequence[Question]) -> int:
    return len({each.session for each in questions})


def _outputs(reference: Sequence[Question], window: Sequence[Question], level: float, seed: int) -> tuple[Output, ...]:
    """Test everything that both sides show enough of, and that is not the same for all."""
    sides = {
        name: (_shown(reference, read), _shown(window, read)) for name, read in {**_CATEGORIES, **_NUMBERS}.items()
    }
    tested = {
        name: both
        for name, both in sides.items()
        if all(len(set(sessions)) >= MIN_SESSIONS for _, sessions in both) and len({*both[0][0], *both[1][0]}) > 1
    }
    permutations = permutations_for(level, len(tested))
    found: dict[str, Shift] = {}
    for name, ((before, own), (after, theirs)) in tested.items():
        is_category = name in _CATEGORIES
        shift: Callable[..., Shift] = category_shift if is_category else number_shift
        sides_shown = _common(before, after) if is_category else (before, after)
        found[name] = shift(*sides_shown, own, theirs, permutations=permutations, seed=seed)
    adjusted = holm([shift.p_value for shift in found.values()])
    return tuple(
        Output(
            name=name,
            p_value=p_value,
            effect=shift.effect,
            at=shift.at,
            reference=shift.reference,
            window=shift.window,
            sessions=len(set(tested[name][1][1])),
        )
        for (name, shift), p_value in zip(found.items(), adjusted, strict=True)
    )


def _shown(
    questions: Sequence[Question], read: Callable[[Outputs], str | float | None]
) -> tuple[list[str | float], list[bytes]]:
    """What answers show of one thing, and the session of each."""
    shown = [(value, each.session) for each in questions if each.outputs and (value := read(each.outputs)) is not None]
    return [value for value, _ in shown], [session for _, session in shown]


def _common(*sides: Sequence[str | float]) -> tuple[list[str | float], ...]:
    """Put the rarest categories together: each takes memory for each session."""
    counts = Counter(value for side in sides for value in side)
    kept = {value for value, _ in counts.most_common(MAX_CATEGORIES)}
    return tuple([value if value in kept else _OTHER for value in side] for side in sides)
