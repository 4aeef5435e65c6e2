"""Guessed accuracy: right where nothing changed, doubtful where it says so, and storable."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observability.calibration import Calibration, calibrate, label_free
from tests.benchmarks.simulated_labels import signals
from tests.properties import examples


def world(seed=1, labels=600, **change):
    return signals(np.random.default_rng(seed), labels, **change)


@pytest.fixture(scope="module")
def fitted() -> Calibration:
    return calibrate(*world())


def test_answers_like_the_labelled_are_guessed_within_the_interval(fitted):
    later, right = world(2, 3000)
    guess = label_free(fitted, later)
    assert guess.valid
    assert guess.doubts == ()
    assert guess.estimate.low <= right.mean() <= guess.estimate.high
    assert guess.estimate.high - guess.estimate.low < 0.1
    assert (guess.estimate.n, guess.estimate.method) == (3000, "calibrated")


def test_harder_answers_are_guessed_lower(fitted):
    later, right = world(3, 3000, harder=0.7)
    guess = label_free(fitted, later).estimate
    assert guess.value == pytest.approx(right.mean(), abs=0.06)
    assert guess.value < label_free(fitted, world(2, 3000)[0]).estimate.value - 0.1


def test_a_queue_that_prefers_the_doubtful_leaves_no_bias_when_its_probabilities_are_given():
    known, right = world(4, 20_000)
    chances = np.clip(0.3 * (1 - known["support"]) ** 3, 0.005, 1)
    asked = np.random.default_rng(5).random(20_000) < chances
    labelled = {name: column[asked] for name, column in known.items()}
    guess = label_free(calibrate(labelled, right[asked], chances[asked]), known).estimate
    assert right[asked].mean() < right.mean() - 0.15
    assert guess.value == pytest.approx(right.mean(), abs=0.04)
    assert guess.effective_n < 20_000


@pytest.mark.parametrize(
    ("signal", "value"),
    [("support", 7.0), ("retrieval_score", -9.0), ("support", np.nan)],
    ids=["higher", "lower", "absent where it never was"],
)
def test_signals_unlike_the_labelled_make_the_guess_doubtful(fitted, signal, value):
    later, _ = world(6, 1000)
    later[signal] = np.where(np.arange(1000) < 100, value, later[signal])
    guess = label_free(fitted, later)
    assert (guess.valid, guess.doubts) == (False, ("unseen_signals",))


def test_a_signal_that_was_absent_before_may_be_absent(fitted):
    later, _ = world(7, 1000)
    later["mean_log_probability"][:] = np.nan
    assert label_free(fitted, later).valid


def test_drift_makes_the_guess_doubtful(fitted):
    assert label_free(fitted, world(8, 1000)[0], drifted=True).doubts == ("drifted",)


def test_signals_that_tell_nothing_are_called_uninformative():
    random = np.random.default_rng(9)
    noise = {"support": random.random(400)}
    guess = label_free(calibrate(noise, random.integers(0, 2, 400)), noise)
    assert "uninformative" in guess.doubts


def test_a_guess_that_is_off_on_labels_is_called_badly_calibrated(fitted):
    off = msgspec.structs.replace(fitted, error=0.2)
    assert label_free(off, world(10, 1000)[0]).doubts == ("badly_calibrated",)


def test_no_answers_are_no_guess(fitted):
    guess = label_free(fitted, {name: [] for name in fitted.signals})
    assert guess.doubts == ("no_answers",)
    assert guess.estimate.value is None


def test_the_interval_is_wider_when_labels_come_in_sessions():
    known, right = world(11, 300)
    repeated = {name: np.repeat(column, 4) for name, column in known.items()}
    sessions = [str(row // 4) for row in range(1200)]
    alone = calibrate(repeated, np.repeat(right, 4)).variance
    together = calibrate(repeated, np.repeat(right, 4), sessions=sessions).variance
    assert together > 2.5 * alone


def test_a_calibration_survives_json(fitted):
    stored = msgspec.json.decode(msgspec.json.encode(fitted), type=Calibration)
    later, _ = world(12, 100)
    assert stored == fitted
    assert np.array_equal(stored.guess(later), fitted.guess(later))


def test_the_same_labels_give_the_same_calibration(fitted):
    assert calibrate(*world()) == fitted


@examples(30)
@given(st.dictionaries(st.sampled_from(["support", "retrieval_score", "mean_log_probability"]), st.floats(-1e6, 1e6)))
def test_every_guess_is_a_probability_whatever_the_signals(fitted, values):
    columns = {name: [values.get(name, np.nan)] for name in fitted.signals}
    assert 0 <= fitted.guess(columns)[0] <= 1
    assert 0 <= fitted.unseen(columns) <= 1


SAME = {"support": [0.5] * 100}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibrate({"support": [0.5] * 99}, [1, 0, 0] * 33), "takes 100 labels and 20 of each kind"),
        (lambda: calibrate({"support": [0.5] * 110}, [1] * 100 + [0] * 10), "there are 100 right and 10 wrong"),
        (lambda: calibrate(SAME, [1, 0] * 50, sessions=["app"] * 100), "of each kind from several sessions"),
        (lambda: calibrate(SAME, [1, 0] * 50, sessions=["a", "b"] * 50), "each kind from several"),
        (lambda: calibrate({"support": [0.5] * 100}, [0.5] * 100), "correct must be 1 or 0"),
        (lambda: calibrate({"support": [0.5] * 99}, [1, 0] * 50), "signals must have 100 values each"),
        (lambda: calibrate({}, [1, 0] * 50), "signals must be at least one"),
        (lambda: calibrate({"a": [0.5] * 100, "b": [0.5]}, [1, 0] * 50), "columns of one length"),
        (lambda: calibrate({"support": [np.inf] * 100}, [1, 0] * 50), "with numbers or NaN"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_set_of_signals_is_refused_by_name(fitted):
    with pytest.raises(
        ValueError, match="signals must be mean_log_probability, retrieval_score, support: there are support"
    ):
        label_free(fitted, {"support": [0.5]})
