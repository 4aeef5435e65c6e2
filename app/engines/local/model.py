"""A model on the CPU: loading it, choosing its number format, and the forward pass of one batch.

Main rule: everything here runs on one thread at a time. A batch is left-padded, so that all its sequences end in the
same column and one decode step serves them all; a sequence joins with the cache of its own prefill and leaves alone.
In fp32 a sequence's greedy tokens are those it would get alone; in bf16 the sums round differently with the size of
the batch, and a near tie may fall the other way.
"""

import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import linear, pad
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from app.engines.local.weights import Weights, WeightsUnavailable

log = logging.getLogger(__name__)

Dtype = Literal["auto", "bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The base model with its tokenizer and what a server must know about it."""

    model: Any
    tokenizer: Any
    model_id: str
    revision: str | None
    dtype: str
    context_tokens: int
    end_token_ids: frozenset[int]

    @property
    def vocabulary(self) -> Any:
        """The `tokenizers.Tokenizer` underneath, which may be used from several threads."""
        return self.tokenizer.backend_tokenizer


def load(weights: Weights, dtype: Dtype) -> LoadedModel:
    """Load a model for inference and run it once, so that the first request finds it warm.

    Raises:
        WeightsUnavailable: the location holds no causal language model this engine can run.
    """
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    name = faster_dtype() if dtype == "auto" else dtype
    log.info("loading %s as %s", weights.model_id, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights.location)
        model = AutoModelForCausalLM.from_pretrained(weights.location, dtype=_DTYPES[name])
    except Exception as error:
        raise WeightsUnavailable(f"model: {weights.location} cannot be loaded: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None or not tokenizer.chat_template:
        raise WeightsUnavailable(f"model: {weights.model_id} lacks a tokenizer.json or a chat template; choose another")
    model.eval().requires_grad_(requires_grad=False)
    with torch.inference_mode():
        Prefill(model, [0, 0]).advance(2)
    log.info("loaded %s in %.1f s", weights.model_id, time.monotonic() - started)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        model_id=weights.model_id,
        revision=weights.revision or getattr(model.config, "_commit_hash", None),
        dtype=name,
        context_tokens=int(getattr(model.config, "max_position_embeddings", 2048)),
        end_token_ids=_end_tokens(model, tokenizer),
    )


def control_tokens(vocabulary: Any) -> re.Pattern[str]:
    """Match what a vocabulary reads as a control token wherever it stands, such as the mark that ends a turn."""
    added = [token.content for token in vocabulary.get_added_tokens_decoder().values() if token.special]
    longest_first = sorted((content for content in added if len(content) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def faster_dtype() -> Literal["bf16", "fp32"]:
    """Time a decode-shaped and a prefill-shaped product in both formats and name the faster; takes a tenth of a second.

    bf16 halves the memory traffic that bounds decoding, but on a CPU without bf16 instructions the products are
    emulated and slower than fp32, by an amount that only a measurement tells.
    """
    products = {name: _products(dtype) for name, dtype in _DTYPES.items()}
    cost = dict.fromkeys(products, float("inf"))
    with torch.inference_mode():
        for _ in range(4):  # In turns, so that a busy neighbour hits both; the least is the least disturbed.
            for name, (one, head, many, layer) in products.items():
                started = time.perf_counter()
                linear(one, head)
                linear(many, layer)
                cost[name] = min(cost[name], time.perf_counter() - started)
    log.info("measured bf16 %.1f ms, fp32 %.1f ms", cost["bf16"] * 1e3, cost["fp32"] * 1e3)
    return "bf16" if cost["bf16"] < cost["fp32"] else "fp32"


def _products(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return the factors of a decode step's product, whose head exceeds the caches, and of a prefill's."""
    shapes = ((1, 576), (32768, 576), (128, 576), (1536, 576))
    return tuple(torch.ones(shape, dtype=dtype) for shape in shapes)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = model.generation_config.eos_token_id
    ids: Iterable[int | None] = configured if isinstance(configured, list) else [configured]
    return frozenset(id_ for id_ in [*ids, tokenizer.eos_token_id] if id_ is not None)


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the next-token logits of the last column, one row per sequence."""
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    if _is_plain(model):
        hidden = model.model(**inputs, use_cache=True).last_hidden_state
        # A 2-D slice on purpose: given the 3-D one with frozen weights, ATen copies the whole head at every call.
        return model.lm_head(hidden[:, -1]).float()
    return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()


def _is_plain(model: Any) -> bool:
    """Say whether the logits are the head's output and nothing else."""
    scaled = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    return (
        hasattr(model, "model") and hasattr(model, "lm_head") and not any(hasattr(model.config, key) for key in scaled)
    )


class Prefill:
    """One prompt on its way into a batch, a bounded number of tokens at a time."""

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self.model = model
        self.prompt = prompt
        self.cache: Any = DynamicCache()
        self.done_tokens = 0

    def advance(self, max_tokens: int) -> torch.Tensor | None:
        """Run the next `max_tokens` tokens; return the (1, vocabulary) logits once the prompt is through."""
        start, end = self.done_tokens, min(len(self.prompt), self.done_tokens + max_tokens)
        ids = torch.tensor([self.prompt[start:end]])
        mask = torch.ones((1, end), dtype=torch.long)
        logits = _logits(self.model, ids, mask, torch.arange(start, end).unsqueeze(0), self.cache)
        self.done_tokens = end
        return logits if end == len(self.prompt) else None


class Batch:
    """The sequences of one model that decode together; row numbers are the order of joining."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache: Any = None
        self._mask = torch.ones((0, 0), dtype=torch.long)

    def __len__(self) -> int:
        return self._mask.shape[0]

    def join(self, prefill: Prefill) -> None:
        """Append a finished prefill as the last row."""
        ones = torch.ones((1, prefill.done_tokens), dtype=torch.long)
        if not len(self):
            self._cache, self._mask = prefill.cache, ones
            return
        width = max(self._mask.shape[1], ones.shape[1])
        old, new = width - self._mask.shape[1], width - ones.shape[1]
        for mine, its in zip(self._cache.layers, prefill.cache.layers, strict=True):
            mine.keys = torch.cat([pad(mine.keys, (0, 0, old, 0)), pad(its.keys, (0, 0, new, 0))])
            mine.values = torch.cat([pad(mine.values, (0, 0, old, 0)), pad(its.values, (0, 0, new, 0))])
        self._mask = torch.cat([pad(self._mask, (old, 0)), pad(ones, (new, 0))])

    def step(self, tokens: list[int]) -> torch.Tensor:
        """Feed each row its next token and return the (rows, vocabulary) logits for the one after."""
        self._mask = pad(self._mask, (0, 1), value=1)
        positions = self._mask.sum(1, keepdim=True) - 1
        return _logits(self.model, torch.tensor(tokens).unsqueeze(1), self._mask, positions, self._cache)

    def keep(self, rows: list[int]) -> None:
        """Drop every other row, and the columns that are padding for all that stay."""
        if not rows:
            self._cache, self._mask = None, torch.ones((0, 0), dtype=torch.long)
            return
        index = torch.tensor(rows)
        mask = self._mask[index]
        first = int(mask.any(0).int().argmax())
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[index, :, first:], layer.values[index, :, first:]
        self._mask = mask[:, first:]
