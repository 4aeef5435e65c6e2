"""The arguments that start an engine as planned."""

from app.capacity.formats import format_of
from app.capacity.serving import BLOCK_TOKENS, SEQUENCES, Deployment, Fit

TGI_SHARE = 0.9
"""What TGI takes of a GPU's memory at `--cuda-memory-fraction 1`: it multiplies the two (its TGI_WIGGLE_ROOM)."""

TGI_CONCURRENT = 128
"""How many requests TGI takes unless told otherwise; it refuses those beyond."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def tgi_cache_tokens(deployment: Deployment, fit: Fit) -> int:
    """How many tokens TGI caches: fewer than planned where more of a GPU was planned than it takes."""
    not_taken = max(0, int(deployment.gpu_bytes * deployment.utilisation) - int(deployment.gpu_bytes * TGI_SHARE))
    return max(0, fit.cache_bytes - not_taken) // (fit.token_bytes * BLOCK_TOKENS) * BLOCK_TOKENS


def tgi_arguments(deployment: Deployment, fit: Fit, model_id: str) -> list[str] | None:
    """The arguments of `text-generation-launcher`; None where TGI has no such weights, or no room for the requests.

    TGI does not start where its cache holds less than the longest request, or than what it is to prefill at once.
    """
    format_, cache_tokens = format_of(deployment.weights), tgi_cache_tokens(deployment, fit)
    if deployment.weights == "float32" or cache_tokens < deployment.longest.tokens:
        return None
    longest, concurrent = deployment.longest, max(fit.concurrent)
    given = {
        "--model-id": model_id,
        "--num-shard": fit.tensor_parallel,
        **({"--quantize": format_.tgi} if format_.tgi else {"--dtype": deployment.weights}),
        "--max-input-tokens": max(request.prompt_tokens for request in deployment.requests),
        "--max-total-tokens": longest.tokens,
        "--max-batch-prefill-tokens": min(deployment.batch_tokens, cache_tokens),
        "--max-batch-total-tokens": cache_tokens,
        "--cuda-memory-fraction": f"{min(1.0, deployment.utilisation / TGI_SHARE):g}",
    }
    if concurrent > TGI_CONCURRENT:
        given["--max-concurrent-requests"] = concurrent
    if deployment.kv_cache == "fp8":
        given["--kv-cache-dtype"] = "fp8_e4m3fn"
    if deployment.adapters:
        # The graphs that TGI records for decoding have no adapter in them: the base model would answer.
        given |= {"--lora-adapters": "NAME=/PATH,...", "--cuda-graphs": 0}
    return ["text-generation-launcher", *(str(part) for pair in given.items() for part in pair)]


def vllm_arguments(deployment: Deployment, fit: Fit, model_id: str) -> list[str] | None:
    """The arguments of `vllm serve`; None where vLLM has no such weights."""
    format_ = format_of(deployment.weights)
    if format_.tgi and not format_.vllm:
        return None
    given = {
        "--tensor-parallel-size": fit.tensor_parallel,
        "--max-model-len": deployment.longest.tokens,
        "--max-num-seqs": max(1, min(SEQUENCES, *fit.concurrent)),
        "--max-num-batched-tokens": deployment.batch_tokens,
        "--gpu-memory-utilization": f"{deployment.utilisation:g}",
        **({"--quantization": format_.vllm} if format_.vllm else {"--dtype": deployment.weights}),
    }
    if deployment.kv_cache == "fp8":
        given["--kv-cache-dtype"] = "fp8"
    if deployment.adapters:
        rank = next((rank for rank in VLLM_RANKS if rank >= deployment.adapter_rank), deployment.adapter_rank)
        given |= {"--max-loras": deployment.adapters, "--max-lora-rank": rank}
    flags = ["--enable-lora"] if deployment.adapters else []
    return ["vllm", "serve", model_id, *(str(part) for pair in given.items() for part in pair), *flags]
