"""How well texts answer a question: a linear head half-way up the model, which knows more than it can say.

SmolLM2 answers questions badly, and whether a text holds the answer it cannot tell when asked. Its state after
"Question: ... Answer:" in the middle layers does tell: a linear probe finds it there (as Slobodkin et al., 2023,
arXiv 2310.11877, found it in larger models). `tests/benchmarks/reader.py` trains the head and says how good it is. A
head fits the weights it was trained on and no others.
"""

import copy
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Self

import msgspec
import torch

from app.engines.local.model import LoadedModel

MAX_DOCUMENT_TOKENS = 512
MAX_QUERY_TOKENS = 256
"""Of longer texts the first tokens are read."""


class Head(msgspec.Struct, frozen=True):
    """A logistic regression on the state after so many layers: `model_id` and `revision` say of which weights."""

    model_id: str
    revision: str
    layer: int
    weights: list[float]
    bias: float


class Reader:
    """Rates texts by a question with one loaded model; used on the engine's thread."""

    def __init__(self, base: LoadedModel, head: Head) -> None:
        self._base = base
        self._trunk = _trunk(base.model.model, head.layer)
        self._weights = torch.tensor(head.weights)
        self._bias = head.bias

    @classmethod
    def of(cls, base: LoadedModel) -> Self | None:
        """The reader for a model, or None where no head was trained for its weights."""
        head = msgspec.json.decode((files(__package__) / "reader.json").read_bytes(), type=Head)
        return cls(base, head) if (base.model_id, base.revision) == (head.model_id, head.revision) else None

    def prompt(self, query: str, text: str) -> list[int]:
        """Give the tokens to rate `text` by."""
        asked = self._tokens(f"\n\nQuestion: {query}")[:MAX_QUERY_TOKENS]
        return [*self._tokens(text)[:MAX_DOCUMENT_TOKENS], *asked, *self._tokens("\nAnswer:")]

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._base.vocabulary.encode(text, add_special_tokens=False).ids
        return ids

    def states(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Give the model's state at each prompt's end, (prompts, width)."""
        width = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        hidden = self._trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states: torch.Tensor = hidden[torch.arange(len(prompts)), lengths - 1].float()
        return states

    def rate(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """Give for each prompt how likely its text answers its question, 0 to 1."""
        return torch.sigmoid(self.states(prompts) @ self._weights + self._bias).tolist()


def _trunk(model: Any, layers: int) -> Any:
    """Share a model's first layers as a model of its own, whose output is their last state."""
    trunk = copy.copy(model)
    # The copy still holds the same table of modules, and the layers must go from one of them only.
    trunk._modules = dict(model._modules)  # noqa: SLF001 - torch has no other way to share a part of a module.
    trunk.layers = model.layers[:layers]
    trunk.norm = torch.nn.Identity()
    return trunk
