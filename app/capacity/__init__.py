"""How much memory a model needs to be served and trained, and how many requests fit: arithmetic, no GPU.

The weights and the cache are counted, and held to published sizes by tests; activations and the reserve are estimates
and are named so. Nothing here reads settings or talks to an engine.
"""

from app.capacity.architecture import FAMILIES, LINEARS, Architecture, check_range, plain, read_config
from app.capacity.formats import FORMATS, KV_BYTES, adapter_parameters, kv_bytes_per_token, weight_bytes
from app.capacity.launching import TGI_SHARE, tgi_arguments, tgi_cache_tokens, vllm_arguments
from app.capacity.serving import GIB, GPUS, Deployment, Fit, Request, fits, smallest
from app.capacity.training import METHODS, Need, Training, largest_batch, needs

__all__ = [
    "FAMILIES",
    "FORMATS",
    "GIB",
    "GPUS",
    "KV_BYTES",
    "LINEARS",
    "METHODS",
    "TGI_SHARE",
    "Architecture",
    "Deployment",
    "Fit",
    "Need",
    "Request",
    "Training",
    "adapter_parameters",
    "check_range",
    "fits",
    "kv_bytes_per_token",
    "largest_batch",
    "needs",
    "plain",
    "read_config",
    "smallest",
    "tgi_arguments",
    "tgi_cache_tokens",
    "vllm_arguments",
    "weight_bytes",
]
