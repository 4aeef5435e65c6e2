"""How many requests fit on GPUs: what weights, adapters, activations and the driver leave for the cache."""

from dataclasses import dataclass, field

from app.capacity.architecture import LINEARS, Architecture, check_range
from app.capacity.formats import adapter_parameters, kv_bytes_per_token, weight_bytes
from app.errors import InvalidRequest

GIB = 1024**3
MIB = 1024**2

GPUS = {
    "t4": 15_360 * MIB,
    "a10g": 23_028 * MIB,
    "l4": 23_034 * MIB,
    "rtx-4090": 24_564 * MIB,
    "rtx-3090": 24_576 * MIB,
    "a100-40gb": 40_960 * MIB,
    "l40s": 46_068 * MIB,
    "h100-80gb": 81_559 * MIB,
    "a100-80gb": 81_920 * MIB,
    "h200": 143_771 * MIB,
}
"""Memory as the driver reports it, which is less than what is printed on the box."""

BLOCK_TOKENS = 16
"""The cache is given out in blocks of so many tokens, by vLLM; TGI's are no larger."""

BATCH_TOKENS = 4096
SEQUENCES = 256
"""What an engine prefills at once, and how many sequences it decodes at once, unless a request is longer."""


@dataclass(frozen=True)
class Request:
    """The length of one kind of request."""

    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Deployment:
    """How a model is to be served."""

    gpu_bytes: int
    weights: str
    kv_cache: str = "auto"
    requests: tuple[Request, ...] = (Request(1000, 300),)
    utilisation: float = 0.9
    """The share of a GPU's memory that the engine may take."""
    reserve_bytes: int = GIB
    """CUDA context, kernels, communication buffers and fragmentation of one GPU: an assumption, not a measurement."""
    adapters: int = 0
    adapter_rank: int = 16
    adapter_targets: tuple[str, ...] = field(default=LINEARS)

    @property
    def longest(self) -> Request:
        """The request that takes most of the cache."""
        return max(self.requests, key=lambda request: request.tokens)

    @property
    def cache_dtype(self) -> str:
        """What keys and values are kept in: `auto` is as the weights are, so 32 bits where they have 32."""
        return "float32" if (self.kv_cache, self.weights) == ("auto", "float32") else self.kv_cache

    @property
    def batch_tokens(self) -> int:
        """How many tokens are prefilled at once: the longest prompt at least, for TGI does not split one."""
        return max(BATCH_TOKENS, *(request.prompt_tokens for request in self.requests))


@dataclass(frozen=True)
class Fit:
    """What one tensor-parallel group of GPUs holds; bytes are of each GPU."""

    tensor_parallel: int
    weight_bytes: int
    adapter_bytes: int
    activation_bytes: int
    reserve_bytes: int
    cache_bytes: int
    """What is left for the cache; negative where the rest alone does not fit."""
    token_bytes: int
    """What one token takes in the cache."""
    cache_tokens: int
    """How many tokens the whole group caches."""
    concurrent: tuple[int, ...]
    """How many of each kind of request fit at once, if all are of that kind and at full length."""


def fits(model: Architecture, deployment: Deployment, gpus: int) -> list[Fit]:
    """What fits, for each tensor-parallel degree that the heads and the number of GPUs allow.

    Raises:
        InvalidRequest: a number is out of its range.
    """
    _check(deployment, gpus)
    return [_fit(model, deployment, degree) for degree in range(1, gpus + 1) if _splits(model, degree)]


def smallest(found: list[Fit], deployment: Deployment, concurrent: int) -> Fit | None:
    """The fewest GPUs that hold so many of the longest request at once."""
    longest = deployment.requests.index(deployment.longest)
    return next((fit for fit in found if fit.concurrent[longest] >= concurrent), None)


def _splits(model: Architecture, degree: int) -> bool:
    """Whether heads can be dealt out evenly; key-value heads may also be repeated."""
    return model.heads % degree == 0 and (model.kv_heads % degree == 0 or degree % model.kv_heads == 0)


def _fit(model: Architecture, deployment: Deployment, degree: int) -> Fit:
    weights = -(-weight_bytes(model, deployment.weights) // degree)
    adapter = adapter_parameters(model, deployment.adapter_rank, deployment.adapter_targets) * 2
    adapters = -(-deployment.adapters * adapter // degree)
    activations = activation_bytes(model, deployment.batch_tokens, degree)
    allowed = int(deployment.gpu_bytes * deployment.utilisation)
    left = allowed - weights - adapters - activations - deployment.reserve_bytes
    # With more GPUs than key-value heads each holds one head whole: the cache then shrinks no further.
    per_token = kv_bytes_per_token(model, deployment.cache_dtype) * max(1, model.kv_heads // degree) // model.kv_heads
    blocks = max(0, left) // (per_token * BLOCK_TOKENS)
    return Fit(
        tensor_parallel=degree,
        weight_bytes=weights,
        adapter_bytes=adapters,
        activation_bytes=activations,
        reserve_bytes=deployment.reserve_bytes,
        cache_bytes=left,
        token_bytes=per_token,
        cache_tokens=blocks * BLOCK_TOKENS,
        concurrent=tuple(blocks // -(-request.tokens // BLOCK_TOKENS) for request in deployment.requests),
    )


def activation_bytes(model: Architecture, batch_tokens: int, degree: int = 1) -> int:
    """An estimate of what one forward pass needs at its peak: one layer's values in 16 bits, and logits in 32.

    The engines measure this at their start; the estimate counts the hidden state with its residual and norm, queries,
    keys and values, and the two inputs of the gated product.
    """
    heads = (2 * model.heads + 2 * model.kv_heads) * model.head_size
    layer = 3 * model.hidden + (heads + 3 * model.intermediate * model.active_experts) / degree
    logits = SEQUENCES * model.vocabulary * 4 * 2  # The logits, and their softmax.
    return round(batch_tokens * layer * 2 + logits)


def _check(deployment: Deployment, gpus: int) -> None:
    check_range("gpus", gpus)
    check_range("utilisation", deployment.utilisation, 0.01, 1.0)
    check_range("adapters", deployment.adapters, 0)
    check_range("adapter-rank", deployment.adapter_rank)
    if not deployment.requests or any(min(each.prompt_tokens, each.output_tokens) < 1 for each in deployment.requests):
        raise InvalidRequest("`--request`: prompt and answer have to have a token each, as 1000+300.", param="request")
