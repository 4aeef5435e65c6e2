"""A breaker opens for what is certain at once, for what is not when it repeats itself, and closes by a trial."""

import pytest

from app.engines.breaker import Breaker


def opened_by_requests(**options: float) -> Breaker:
    breaker = Breaker(failures=3, **options)  # type: ignore[arg-type]
    for _ in range(3):
        breaker.failed(0.0, "requests fail")
    return breaker


def test_failures_open_it_only_in_a_row():
    breaker = Breaker(failures=3)
    for _ in range(2):
        breaker.failed(0.0, "x")
        breaker.failed(0.0, "x")
        breaker.succeeded()
    assert breaker.state == "closed"
    assert opened_by_requests().state == "open"


def test_a_refused_connection_opens_it_at_once_and_an_answered_probe_ends_that():
    breaker = Breaker()
    breaker.gone(10.0, "refused")
    assert (breaker.state, breaker.reason, breaker.needs_trial) == ("open", "refused", False)
    breaker.answered(10.5)
    assert breaker.state == "half_open"


def test_what_requests_found_of_a_process_that_is_gone_is_not_held_against_the_next():
    breaker = opened_by_requests(open_seconds=5.0)  # The connections of a killed one break off, all at the same time.
    breaker.gone(0.1, "refused")
    breaker.failed(0.2, "the last one under way breaks off")
    breaker.answered(0.6)
    assert (breaker.state, breaker.needs_trial, breaker.openings) == ("half_open", False, 1)
    breaker.succeeded()
    for _ in range(3):
        breaker.failed(1.0, "the next one's requests fail")
    breaker.answered(5.9)
    assert breaker.state == "open"
    breaker.answered(6.0)
    assert (breaker.state, breaker.needs_trial) == ("half_open", True)


def test_a_pause_that_grew_is_forgotten_with_the_process_that_earned_it():
    breaker = opened_by_requests(open_seconds=5.0)
    breaker.answered(5.0)
    breaker.failed(5.0, "the trial fails")
    breaker.gone(6.0, "refused")
    breaker.answered(6.0)
    breaker.failed(6.0, "the trial of the next one fails")
    breaker.answered(15.9)
    assert breaker.state == "open"
    breaker.answered(16.0)
    assert breaker.state == "half_open"


def test_silence_opens_it_when_it_repeats_itself():
    breaker = Breaker(misses=2)
    breaker.missed(1.0, "silent")
    breaker.answered(2.0)
    breaker.missed(3.0, "silent")
    assert breaker.state == "closed"
    breaker.missed(4.0, "silent")
    assert (breaker.state, breaker.reason) == ("open", "silent")


def test_an_engine_that_says_it_takes_no_work_is_out_at_once():
    breaker = Breaker(misses=2)
    breaker.missed(1.0, "loading", at_once=True)
    assert breaker.state == "open"


def test_what_requests_found_outlasts_probes_that_are_answered():
    breaker = opened_by_requests(open_seconds=5.0)
    breaker.answered(4.9)
    assert breaker.state == "open"
    breaker.answered(5.0)
    assert (breaker.state, breaker.needs_trial) == ("half_open", True)


def test_only_a_trial_closes_it():
    breaker = opened_by_requests()
    breaker.answered(5.0)
    breaker.succeeded()
    assert (breaker.state, breaker.reason, breaker.needs_trial) == ("closed", "", False)


def test_each_failed_trial_doubles_the_pause_up_to_the_longest():
    breaker = opened_by_requests(open_seconds=5.0, longest_seconds=15.0)
    now = 5.0
    for pause in (10.0, 15.0, 15.0):
        breaker.answered(now)
        breaker.failed(now, "still")
        breaker.answered(now + pause - 0.1)
        assert breaker.state == "open"
        breaker.answered(now + pause)
        assert breaker.state == "half_open"
        now += pause


def test_a_probe_that_fails_puts_a_half_open_one_out_again():
    breaker = opened_by_requests(open_seconds=5.0)
    breaker.answered(5.0)
    breaker.missed(6.0, "gone", at_once=True)
    assert breaker.state == "open"


def test_openings_are_counted_once_for_each_time_it_was_closed():
    breaker = opened_by_requests(open_seconds=0.0)
    breaker.answered(1.0)
    breaker.failed(1.0, "still")
    assert breaker.openings == 1
    breaker.answered(2.0)
    breaker.succeeded()
    breaker.missed(3.0, "gone", at_once=True)
    assert breaker.openings == 2


@pytest.mark.parametrize("errors", [1, 10])
def test_failures_of_requests_that_were_under_way_do_not_prolong_it(errors):
    breaker = opened_by_requests(open_seconds=5.0)
    for _ in range(errors):
        breaker.failed(4.0, "late")
    breaker.answered(5.0)
    assert breaker.state == "half_open"
