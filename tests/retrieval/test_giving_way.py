"""While something computes, the interpreter's lock changes hands more often, and not a moment longer."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from retrieval.giving_way import SWITCH_SECONDS, giving_way


@pytest.fixture(autouse=True)
def usual_seconds() -> Iterator[float]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield sys.getswitchinterval()
    sys.setswitchinterval(before)


def test_the_usual_interval_is_back_when_the_last_of_those_that_compute_is_done(usual_seconds: float) -> None:
    both_in, one_out = Barrier(2), Barrier(2)

    def first() -> float:
        with giving_way:
            both_in.wait(10)
        one_out.wait(10)
        return sys.getswitchinterval()

    def second() -> tuple[float, float]:
        with giving_way:
            both_in.wait(10)
            one_out.wait(10)
            inside = sys.getswitchinterval()
        return inside, sys.getswitchinterval()

    with ThreadPoolExecutor(2) as pool:
        others, (inside, after) = pool.submit(first), pool.submit(second).result(20)
        others.result(20)
    assert inside == pytest.approx(SWITCH_SECONDS)
    assert after == pytest.approx(usual_seconds)


def test_a_failure_leaves_the_usual_interval(usual_seconds: float) -> None:
    with pytest.raises(ZeroDivisionError), giving_way:
        assert 1 // 0
    assert sys.getswitchinterval() == pytest.approx(usual_seconds)


def test_an_interval_that_is_shorter_already_stays() -> None:
    sys.setswitchinterval(SWITCH_SECONDS / 10)
    short = sys.getswitchinterval()
    with giving_way:
        assert sys.getswitchinterval() == pytest.approx(short)
