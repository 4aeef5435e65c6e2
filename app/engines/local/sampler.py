"""Which token comes next: greedy, or drawn with the request's own temperature, nucleus, penalties and seed.

Main rule: a request's draws depend on its own seed and logits only, never on what else is in its batch.
"""

from collections import Counter
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How one request wants its tokens picked; `temperature` 0 is greedy, a `seed` of None is a random one.

    A temperature below `COLDEST` is 0.

    `top_logprobs` of None asks for no log-probabilities, 0 for the chosen token's only.
    The penalties are OpenAI's: subtracted from the logits of what was already generated.
    `choices` are the answers there may be, as tokens with their end; probabilities are then of what may come next.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    top_logprobs: int | None = None
    choices: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Picked:
    """A token, with its log-probability and its best rivals' where they were asked for."""

    token: int
    logprob: float | None = None
    rivals: tuple[tuple[int, float], ...] = ()


COLDEST = 1e-5
"""Below it, nothing but the largest logit has a chance, and dividing by it soon exceeds what a float can hold."""


class Sampler:
    """The picking state of one request."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._seen: Counter[int] = Counter()
        self._choices = options.choices
        self._step = 0
        self._penalised = bool(options.frequency_penalty or options.presence_penalty)
        self._is_greedy = options.temperature < COLDEST
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    @property
    def is_argmax(self) -> bool:
        """Whether the pick is the largest logit and nothing more is asked."""
        options = self.options
        return self._is_greedy and options.top_logprobs is None and not self._penalised and not self._choices

    def pick(self, logits: torch.Tensor, leader: int | None) -> Picked:
        """Pick from one row of logits, of which `leaders` has told the leader.

        Raises:
            FloatingPointError: they are no numbers: whatever were picked of them would look like an answer.
        """
        if leader is None:
            raise FloatingPointError("the model's scores are no numbers")
        if self.is_argmax:
            return Picked(leader)
        options = self.options
        if self._penalised:
            logits = self._penalise(logits)
        allowed = len(logits)
        if self._choices:
            logits, allowed = self._narrow(logits)
        token = int(logits.argmax()) if self._is_greedy else self._draw(logits)
        self._seen[token] += 1
        if self._choices:
            self._choices = tuple(choice for choice in self._choices if choice[self._step : self._step + 1] == (token,))
            self._step += 1
        if options.top_logprobs is None:
            return Picked(token)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(options.top_logprobs, allowed))
        return Picked(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _narrow(self, logits: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Leave only what continues one of the choices, and tell how many tokens that are."""
        ids = torch.tensor(sorted({choice[self._step] for choice in self._choices}))
        narrowed = torch.full_like(logits, float("-inf"))
        narrowed[ids] = logits[ids]
        return narrowed, len(ids)

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._seen:
            return logits
        ids, counts = torch.tensor(list(self._seen)), torch.tensor(list(self._seen.values()), dtype=logits.dtype)
        logits = logits.clone()
        logits[ids] -= counts * self.options.frequency_penalty + self.options.presence_penalty
        return logits

    def _draw(self, logits: torch.Tensor) -> int:
        # The largest becomes 0: what is divided by a small temperature falls to minus infinity, which is no chance.
        probabilities = ((logits - logits.max()) / self.options.temperature).softmax(-1)
        if self.options.top_p >= 1:
            return int(torch.multinomial(probabilities, 1, generator=self._generator))
        values, ids = _nucleus(probabilities, self.options.top_p)
        return int(ids[torch.multinomial(values, 1, generator=self._generator)])


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fewest most likely tokens whose probabilities reach `top_p`; sorts no more of them than it must."""
    size = min(64, len(probabilities))
    while True:
        values, ids = probabilities.topk(size)
        reached = values.cumsum(0)
        if float(reached[-1]) >= top_p or size == len(probabilities):
            count = int((reached < top_p).sum()) + 1
            return values[:count], ids[:count]
        size = min(size * 16, len(probabilities))


def leaders(logits: torch.Tensor) -> list[int | None]:
    """Return each row's token of the largest logit, all in one go; None for a row that is no numbers."""
    scores, largest = logits.max(-1)
    are_numbers = scores.isfinite().tolist()  # The largest of numbers among which one is NaN is NaN.
    return [token if is_number else None for token, is_number in zip(largest.tolist(), are_numbers, strict=True)]
