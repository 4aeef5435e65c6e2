"""Question drift on made-up vectors: what is found, what is not, and which questions are named."""

import numpy as np
import pytest

from observability.drift import Questions, mmd, question_drift

DIMENSION = 24


def topic_centres(seed=0, topics=6):
    centres = np.random.default_rng(seed).normal(size=(topics, DIMENSION))
    return centres / np.linalg.norm(centres, axis=1, keepdims=True)


CENTRES = topic_centres()


def questions(random, topics, *, turns=1):
    """Unit vectors near their topics' centres; the turns of a session repeat each other with small changes."""
    vectors = CENTRES[np.asarray(topics)] + 0.12 * random.normal(size=(len(topics), DIMENSION))
    vectors = np.repeat(vectors, turns, axis=0)
    vectors += 0.01 * random.normal(size=vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Questions.of(vectors, np.repeat(np.arange(len(topics)), turns).tolist())


def sides(random, *, new=0, turns=1, window=200, reference=400, topics=5):
    """A reference about the first topics, and a window in which the first `new` sessions are about the last."""
    later = random.integers(0, topics, window)
    later[:new] = 5
    return questions(random, random.integers(0, topics, reference), turns=turns), questions(random, later, turns=turns)


def alarms(trials, *, level=0.05, seed=1, **options):
    random = np.random.default_rng(seed)
    return np.array(
        [
            [drift.mmd_p <= level, drift.novelty_p <= level, drift.p_value <= level]
            for _ in range(trials)
            for drift in [question_drift(*sides(random, **options), permutations=99)]
        ]
    ).mean(axis=0)


def test_without_drift_alarms_are_as_rare_as_the_level_says_also_when_sessions_repeat_themselves():
    assert alarms(12, level=0.1).max() <= 0.35
    assert alarms(12, level=0.1, turns=2).max() <= 0.35


def test_a_new_topic_is_found_and_its_questions_are_named():
    reference, window = sides(np.random.default_rng(2), new=30)
    drift = question_drift(reference, window, permutations=199)
    assert drift.p_value <= 0.01
    assert drift.mmd2 > 0
    assert 0.1 < drift.novel_share < 0.2
    first = drift.clusters[0]
    assert first.sessions >= 20
    assert len(first.examples) == 5
    assert all(row < 30 for row in first.examples)


def test_examples_come_from_different_sessions():
    reference, window = sides(np.random.default_rng(3), new=30, turns=3)
    examples = question_drift(reference, window, permutations=99).clusters[0].examples
    assert len({row // 3 for row in examples}) == len(examples) == 5


def test_topics_that_change_places_are_found_and_nothing_is_called_new():
    random = np.random.default_rng(4)
    reference = questions(random, random.integers(0, 5, 400))
    window = questions(random, random.choice(5, 200, p=[0.5, 0.2, 0.1, 0.1, 0.1]))
    drift = question_drift(reference, window, permutations=199)
    assert drift.mmd_p <= 0.01
    assert drift.novelty_p > 0.05
    assert drift.clusters == ()


def test_the_same_input_and_seed_give_the_same_result():
    reference, window = sides(np.random.default_rng(5), new=10)
    assert question_drift(reference, window, permutations=99) == question_drift(reference, window, permutations=99)


def test_vectors_kept_in_half_precision_give_the_same_verdict():
    reference, window = sides(np.random.default_rng(6), new=30)
    halved = (Questions.of(side.vectors.astype(np.float16), side.sessions.tolist()) for side in (reference, window))
    full, half = question_drift(reference, window), question_drift(*halved)
    assert half.mmd2 == pytest.approx(full.mmd2, rel=0.02)
    assert half.p_value <= 0.01 >= full.p_value


def test_mmd_is_the_unbiased_estimate_of_the_textbook():
    random = np.random.default_rng(7)
    x, y = random.normal(size=(30, 3)).astype(np.float32), random.normal(0.3, 1, size=(20, 3)).astype(np.float32)
    both = np.concatenate([x, y]).astype(np.float64)
    squares = ((both[:, None] - both[None]) ** 2).sum(axis=2)
    kernel = np.exp(-squares / np.median(squares))
    within = [
        (part.sum() - np.trace(part)) / (len(part) * (len(part) - 1)) for part in (kernel[:30, :30], kernel[30:, 30:])
    ]
    assert mmd(Questions.of(x), Questions.of(y))[0] == pytest.approx(
        sum(within) - 2 * kernel[:30, 30:].mean(), abs=1e-5
    )


def test_a_session_counts_once_however_long_it_is():
    random = np.random.default_rng(8)
    reference, window = sides(random)
    talkative = np.concatenate([window.vectors, np.repeat(window.vectors[:1], 500, axis=0)])
    sessions = [*window.sessions.tolist(), *[0] * 500]
    alone, beside = mmd(reference, window), mmd(reference, Questions.of(talkative, sessions))
    assert beside[0] == pytest.approx(alone[0], abs=1e-4)


@pytest.mark.slow
def test_longer_sessions_in_the_reference_than_in_the_window_are_no_drift():
    # Sessions of five different questions: their means vary less than single questions do.
    random = np.random.default_rng(9)
    found = []
    for _ in range(200):
        reference = questions(random, random.integers(0, 5, 2000))
        of_five = Questions.of(reference.vectors, [row // 5 for row in range(2000)])
        window = questions(random, random.integers(0, 5, 200))
        drift = question_drift(of_five, window, permutations=99)
        found.append((drift.mmd_p <= 0.05, drift.novelty_p <= 0.05))
    assert np.mean(found, axis=0).max() <= 0.09


def test_the_order_of_rows_within_the_window_does_not_matter_to_mmd():
    random = np.random.default_rng(10)
    reference, window = sides(random, turns=2)
    order = random.permutation(len(window.vectors))
    shuffled = Questions.of(window.vectors[order], window.sessions[order].tolist())
    assert mmd(reference, shuffled, permutations=9)[0] == pytest.approx(
        mmd(reference, window, permutations=9)[0], abs=2e-5
    )


@pytest.mark.parametrize(
    ("reference", "window", "message"),
    [
        (400, 199, "window has 199 sessions: it takes 200"),
        (399, 200, "reference has 399 sessions: it takes 400"),
        (7900, 200, "over 8000 sessions"),
    ],
)
def test_too_few_or_too_many_sessions_are_refused(reference, window, message):
    random = np.random.default_rng(11)
    with pytest.raises(ValueError, match=message):
        question_drift(*sides(random, reference=reference, window=window))


def test_questions_that_are_all_the_same_are_no_drift():
    same = Questions.of(np.ones((400, 3))), Questions.of(np.ones((200, 3)))
    drift = question_drift(*same, permutations=19)
    assert (drift.p_value, drift.novel_share, drift.clusters) == (1.0, 0.0, ())


def test_many_questions_of_few_sessions_are_too_few():
    random = np.random.default_rng(12)
    reference, window = sides(random, turns=5, window=199)
    with pytest.raises(ValueError, match="window has 199 sessions"):
        question_drift(reference, window)


def test_vectors_of_different_models_are_refused():
    with pytest.raises(ValueError, match="embed both with the same model"):
        question_drift(Questions.of(np.ones((400, 3))), Questions.of(np.ones((200, 4))))


def test_one_endless_conversation_neither_decides_nor_costs_much():
    random = np.random.default_rng(13)
    reference, window = sides(random)
    endless = questions(random, [5] * 5000)
    beside = Questions.of(
        np.concatenate([window.vectors, endless.vectors]), [*window.sessions.tolist(), *[0] * len(endless.vectors)]
    )
    assert question_drift(reference, beside, permutations=99).p_value > 0.05


@pytest.mark.parametrize("vectors", [[1.0, 2.0], [[1.0, float("nan")]], [[0.0, 0.0]]])
def test_vectors_that_are_none_are_refused(vectors):
    with pytest.raises(ValueError, match="vectors must be rows of finite numbers"):
        Questions.of(vectors)
