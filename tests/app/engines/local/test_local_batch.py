"""Joining and leaving a batch changes nobody's tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from app.engines.local.model import Batch, LoadedModel, Prefill, faster_dtype
from tests.properties import examples

prompts = st.lists(st.integers(2, 300), min_size=1, max_size=40)


@torch.inference_mode()
def alone(tiny: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by recomputing the whole text at every step, without cache or batch."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(tiny.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def prefilled(tiny: LoadedModel, prompt: list[int], slice_tokens: int) -> tuple[Prefill, int]:
    prefill = Prefill(tiny.model, prompt)
    while (logits := prefill.advance(slice_tokens)) is None:
        pass
    return prefill, int(logits.argmax())


@examples(30)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=6),
    st.integers(1, 64),
)
@torch.inference_mode()
def test_every_sequence_gets_the_tokens_it_would_get_alone(
    tiny: LoadedModel, requests: list[tuple[list[int], int, int]], slice_tokens: int
) -> None:
    """Each request is a prompt, the number of tokens it wants and the step at which it arrives."""
    batch, running, answers = Batch(tiny.model), list[int](), dict[int, list[int]]()
    for step in range(20):
        for number, (prompt, _, arrival) in enumerate(requests):
            if arrival == step:
                prefill, first = prefilled(tiny, prompt, slice_tokens)
                batch.join(prefill)
                running.append(number)
                answers[number] = [first]
        staying = [row for row, number in enumerate(running) if len(answers[number]) < requests[number][1]]
        if len(staying) < len(running):
            batch.keep(staying)
            running = [running[row] for row in staying]
        assert len(batch) == len(running)
        if running:
            tokens = batch.step([answers[number][-1] for number in running]).argmax(-1).tolist()
            for number, token in zip(running, tokens, strict=True):
                answers[number].append(token)
    for number, (prompt, count, _) in enumerate(requests):
        assert answers[number] == alone(tiny, prompt, count)


def test_the_number_format_is_chosen_by_measurement() -> None:
    assert faster_dtype() in ("bf16", "fp32")
