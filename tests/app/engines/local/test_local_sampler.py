import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.engines.local.sampler import COLDEST, Picked, Sampler, SamplingOptions, leaders

LOGITS = torch.randn(3000, generator=torch.Generator().manual_seed(3)) * 3


def pick(sampler: Sampler, logits: torch.Tensor) -> Picked:
    return sampler.pick(logits, leaders(logits.unsqueeze(0))[0])


def pick_all(samplers: list[Sampler], rows: torch.Tensor) -> list[Picked]:
    return [sampler.pick(row, leader) for sampler, row, leader in zip(samplers, rows, leaders(rows), strict=True)]


def draws(count: int, **options: object) -> list[int]:
    sampler = Sampler(SamplingOptions(**options))  # type: ignore[arg-type]
    return [pick(sampler, LOGITS).token for _ in range(count)]


def test_the_same_seed_draws_the_same_tokens() -> None:
    assert draws(20, seed=5) == draws(20, seed=5)
    assert draws(20, seed=5) != draws(20, seed=6)


def test_no_seed_is_a_new_seed_each_time() -> None:
    assert draws(20) != draws(20)


def test_temperature_zero_takes_the_largest() -> None:
    assert draws(1, temperature=0.0) == [int(LOGITS.argmax())]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).log()
    sampler = Sampler(SamplingOptions(seed=1))
    drawn = [pick(sampler, logits).token for _ in range(3000)]
    assert drawn.count(0) == 0
    assert drawn.count(2) / 3000 == pytest.approx(2 / 3, abs=0.04)


@given(st.floats(0.01, 0.999), st.integers(0, 1000))
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p: float, seed: int) -> None:
    probabilities, ids = LOGITS.softmax(-1).sort(descending=True)
    count = int((probabilities.cumsum(0) < top_p).sum()) + 1
    allowed = set(ids[:count].tolist())
    assert set(draws(20, top_p=top_p, seed=seed)) <= allowed


def test_a_frequency_penalty_grows_with_each_use() -> None:
    logits = torch.tensor([3.0, 1.9, 0.0])
    sampler = Sampler(SamplingOptions(temperature=0, frequency_penalty=1.0))
    assert [pick(sampler, logits).token for _ in range(5)] == [0, 0, 1, 0, 1]


def test_a_presence_penalty_counts_once() -> None:
    logits = torch.tensor([3.0, 1.9, 0.0])
    sampler = Sampler(SamplingOptions(temperature=0, presence_penalty=1.5))
    assert [pick(sampler, logits).token for _ in range(4)] == [0, 1, 0, 0]


def test_logprobs_are_those_of_the_token_and_its_rivals() -> None:
    picked = pick(Sampler(SamplingOptions(temperature=0, top_logprobs=2)), torch.tensor([0.0, 2.0, 1.0]))
    expected = torch.tensor([0.0, 2.0, 1.0]).log_softmax(-1)
    assert picked.logprob == pytest.approx(float(expected[1]))
    assert [token for token, _ in picked.rivals] == [1, 2]


def test_a_row_is_picked_alike_alone_and_among_others() -> None:
    options = [SamplingOptions(temperature=0), SamplingOptions(seed=9), SamplingOptions(seed=4, top_p=0.5)]
    rows = torch.randn(3, 3000, generator=torch.Generator().manual_seed(8))
    together = pick_all([Sampler(option) for option in options], rows)
    alone = [pick(Sampler(option), row) for option, row in zip(options, rows, strict=True)]
    assert together == alone


CHOICES = ((5, 6, 1), (5, 1), (5, 6, 7, 1), (9, 9, 1))


@given(
    choices=st.lists(st.lists(st.integers(2, 9), max_size=4), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_of_choices_exactly_one_is_said_and_ended(choices: list[list[int]], temperature: float, seed: int) -> None:
    ended = tuple((*choice, 1) for choice in choices)
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=seed, choices=ended, frequency_penalty=1.0))
    rows = torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))
    said: list[int] = []
    while not said or said[-1] != 1:
        said.append(pick(sampler, rows[len(said)]).token)
    assert tuple(said) in ended


def test_each_token_of_a_choice_is_the_likeliest_that_goes_on_with_one() -> None:
    sampler = Sampler(SamplingOptions(temperature=0, choices=CHOICES, top_logprobs=5))
    logits = torch.arange(20.0)  # Without choices it would be 19; the end, 1, is the unlikeliest of what may follow.
    picks = [pick(sampler, logits) for _ in range(3)]
    assert [pick.token for pick in picks] == [9, 9, 1]
    sampler = Sampler(SamplingOptions(temperature=0, choices=CHOICES[:3], top_logprobs=5))
    picks = [pick(sampler, logits) for _ in range(4)]
    assert [pick.token for pick in picks] == [5, 6, 7, 1]
    assert [token for token, _ in picks[1].rivals] == [6, 1]
    assert sum(math.exp(logprob) for _, logprob in picks[1].rivals) == pytest.approx(1)
    assert picks[3].rivals == ((1, 0.0),)


def test_choices_of_one_request_are_none_of_its_neighbours() -> None:
    samplers = [Sampler(SamplingOptions(temperature=0)), Sampler(SamplingOptions(temperature=0, choices=CHOICES))]
    logits = torch.arange(20.0).repeat(2, 1)
    assert [picked.token for picked in pick_all(samplers, logits)] == [19, 9]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scores", [[1.0, float("nan"), 0.0], [float("nan")] * 3, [0.0, float("inf"), 1.0]])
def test_scores_that_are_no_numbers_give_no_token_and_their_neighbours_are_picked(
    temperature: float, scores: list[float]
) -> None:
    rows = torch.tensor([scores, [0.0, 9.0, 1.0]])
    first, second = leaders(rows)
    with pytest.raises(FloatingPointError, match="no numbers"):
        Sampler(SamplingOptions(temperature=temperature, seed=1)).pick(rows[0], first)
    assert Sampler(SamplingOptions(temperature=0.0)).pick(rows[1], second).token == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9, COLDEST, 1e-4])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.5}, {"frequency_penalty": 0.1, "top_logprobs": 1}])
def test_a_tiny_temperature_takes_the_largest(temperature: float, more: dict[str, float]) -> None:
    logits = torch.tensor([-90.0, 5.0, 90.0, 40.0])
    assert pick(Sampler(SamplingOptions(temperature=temperature, **more)), logits).token == 2  # type: ignore[arg-type]


def test_a_tiny_temperature_takes_the_likeliest_choice() -> None:
    sampler = Sampler(SamplingOptions(temperature=1e-40, choices=CHOICES[:3]))
    assert [pick(sampler, torch.arange(20.0)).token for _ in range(4)] == [5, 6, 7, 1]
