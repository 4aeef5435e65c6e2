"""The embedder in integers of eight bits: near the model's own vectors, kept by what it was made of, another model."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from retrieval.embedder import SentenceTransformerEmbedder
from retrieval.quantising import quantise

pytest.importorskip("onnxruntime")
TEXTS = ["short", "A sentence of middling length, with a comma.", "word " * 300, "Ünïcode: 東京"]


def tiny(seed: int):
    """A transformer as sentence-transformers holds one, so small that its export is most of the work."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)

    class Transformer:
        auto_model = BertModel(config).eval()

    return Transformer()


def test_it_is_another_model_by_its_id() -> None:
    assert SentenceTransformerEmbedder("acme/model", backend="onnx-int8").model_id == "acme/model@onnx-int8"
    assert SentenceTransformerEmbedder("acme/model").model_id == "acme/model"


@pytest.mark.slow
def test_what_was_made_is_found_by_its_weights_and_made_anew_for_others(tmp_path: Path) -> None:
    first = quantise(tiny(1), 0, threads=1, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = quantise(tiny(1), 0, threads=1, cache=tmp_path)
    assert [(path, path.stat().st_mtime_ns) for path in tmp_path.iterdir()] == [(file, written)]
    rows = [[1, 2, 3], [4, 5]]
    made = first(rows)
    assert made["token_embeddings"].shape == (2, 3, 16)
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    np.testing.assert_array_equal(made["token_embeddings"], again(rows)["token_embeddings"])
    quantise(tiny(2), 0, threads=1, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
async def test_its_vectors_are_near_the_models_own(tmp_path: Path) -> None:
    async with (
        SentenceTransformerEmbedder(backend="onnx-int8", quantised=tmp_path) as quantised,
        SentenceTransformerEmbedder() as plain,
    ):
        near, own = await asyncio.gather(quantised.embed(TEXTS, "document"), plain.embed(TEXTS, "document"))
    assert near.shape == own.shape
    np.testing.assert_allclose(np.linalg.norm(near, axis=1), 1.0, rtol=1e-5)
    assert np.sum(near * own, axis=1).min() > 0.95
