"""A transformer's forward pass on a CPU, without what a short question mostly pays for: unpacked weights and padding.

The main rule: the same numbers as the library's own code, to rounding. Every linear layer's weights are laid out for
oneDNN once, instead of at each call. BERT, which most small embedding models are, also runs in a third of the operators
and without padding.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

Precision = Literal["auto", "bfloat16", "float32"]
Backend = Literal["torch", "onnx-int8"]

_ROWS = 8
"""Several texts make a multiple of so many rows: oneDNN writes code for every number of rows that it meets, which takes
it as long as a batch, and keeps that of the last 1024 alone, of which each number has four."""

_WIDE = 64
"""From so many tokens on the attention is faster in the model's own numbers than in float32: it takes .5 to .7 of the
time with AMX. Of documents it is two fifths of a pass, and a small part of a question's."""

Transform = Callable[[Sequence[Sequence[int]]], dict[str, Any]]
"""Token ids of each text to float32 `token_embeddings`, padded to one length, and their `attention_mask`."""


def pack(transformer: Any, padding_id: int) -> Transform:
    """Return the fastest forward pass there is for a sentence-transformers `Transformer`, which is used up by it.

    torch has the packed layers only as the operators that its own compiler emits: without them all stays as it is.
    """
    import torch
    from transformers import BertModel

    model = transformer.auto_model
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return _Padded(transformer, padding_id)
    if type(model) is BertModel and model.config.hidden_act == "gelu" and not model.config.is_decoder:
        return _Bert(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, _linear(child))
    return _Padded(transformer, padding_id)


def _linear(*layers: Any, activation: str = "none") -> Any:
    """Make one packed layer of linear layers with the same input, their outputs side by side."""
    import torch

    reorder: Callable[..., Any] = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 - see `pack`
    linear: Callable[..., Any] = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - see `pack`

    class PackedLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_packed = reorder(torch.cat([layer.weight.detach() for layer in layers]))
            biases = [layer.bias for layer in layers]
            self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])

        def forward(self, inputs: Any) -> Any:
            return linear(inputs, self.weight_packed, self.bias, activation, [], "none" if activation == "gelu" else "")

    return PackedLinear()


class _Padded:
    """Any transformer, by its own code on one padded batch."""

    def __init__(self, transformer: Any, padding_id: int) -> None:
        self._transformer = transformer
        self._padding_id = padding_id

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        import torch

        width = max(map(len, rows))
        width += -width % _ROWS if len(rows) > 1 else 0
        ids = torch.tensor([[*row, *[self._padding_id] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        # A mask that hides nothing costs a tenth of a lone question.
        features = self._transformer({"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask})
        return {"token_embeddings": features["token_embeddings"].float(), "attention_mask": mask}


class _Bert:
    """BERT's encoder (Devlin et al., 2019). All but the attention works on the texts' tokens in one row, unpadded."""

    def __init__(self, model: Any) -> None:
        embeddings = model.embeddings
        self._words = embeddings.word_embeddings.weight
        # A text is a first segment throughout.
        self._positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self._norm = embeddings.LayerNorm
        self._layers = [_BertLayer(layer, model.config.num_attention_heads) for layer in model.encoder.layer]

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        import torch

        batch = _Batch([len(row) for row in rows], self._words.dtype)
        ids = [token for row in rows for token in row] + [0] * batch.extra
        words = torch.nn.functional.embedding(torch.tensor(ids), self._words)
        tokens = self._norm(words + torch.nn.functional.embedding(batch.positions, self._positions))
        for layer in self._layers:
            tokens = layer(tokens, batch)
        return {"token_embeddings": batch.pad(tokens.float()), "attention_mask": batch.mask.long()}


class _BertLayer:
    def __init__(self, layer: Any, heads: int) -> None:
        attention = layer.attention
        self._heads = heads
        self._project = _linear(attention.self.query, attention.self.key, attention.self.value)
        self._attended = _linear(attention.output.dense)
        self._attended_norm = attention.output.LayerNorm
        self._inner = _linear(layer.intermediate.dense, activation="gelu")
        self._outer = _linear(layer.output.dense)
        self._norm = layer.output.LayerNorm

    def __call__(self, tokens: Any, batch: "_Batch") -> Any:
        import torch

        projected = batch.pad(self._project(tokens)).to(batch.attended)
        query, key, value = projected.unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=batch.hidden)
        tokens = self._attended_norm(
            tokens + self._attended(batch.strip(attended.transpose(1, 2).flatten(2)).to(tokens.dtype))
        )
        return self._norm(tokens + self._outer(self._inner(tokens)))


class _Batch:
    """Where the tokens of texts stand, one text after the other in a row and each in its line of a padded batch."""

    def __init__(self, lengths: Sequence[int], dtype: Any) -> None:
        import torch

        self._width = max(lengths)
        self._texts = len(lengths)
        self.mask = torch.arange(self._width) < torch.tensor(lengths)[:, None]
        places = self.mask.flatten().nonzero().squeeze(1)
        self.extra = -len(places) % _ROWS if len(lengths) > 1 else 0
        """How many tokens that are of no text end the row."""
        self._is_full = not self.extra and len(places) == self.mask.numel()
        self._places = torch.cat((places, places.new_zeros(self.extra)))
        self.positions = self._places % self._width
        self.attended = torch.float32 if self._width < _WIDE else dtype
        """What the attention computes in."""
        self.hidden = None
        if not self._is_full:
            self._tokens = self.mask.flatten().cumsum(0) - 1
            # As numbers: the attention would make them of truth values in every layer.
            hidden = torch.zeros(self.mask.shape, dtype=self.attended).masked_fill_(~self.mask, -math.inf)
            self.hidden = hidden[:, None, None, :]

    def pad(self, tokens: Any) -> Any:
        """Lay the texts side by side. Behind a text stands its last token again, which is hidden."""
        if not self._is_full:
            tokens = tokens.index_select(0, self._tokens)
        return tokens.view(self._texts, self._width, -1)

    def strip(self, padded: Any) -> Any:
        """Lay the texts one after the other."""
        tokens = padded.flatten(0, 1)
        return tokens if self._is_full else tokens.index_select(0, self._places)
