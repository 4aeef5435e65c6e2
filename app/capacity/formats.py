"""How many bytes a parameter takes in each format, scales and zero points included."""

from dataclasses import dataclass

from app.capacity.architecture import Architecture
from app.errors import InvalidRequest


@dataclass(frozen=True)
class Format:
    """Bits of a weight in the layers' matrices, and of every other parameter."""

    linear_bits: float
    other_bits: float
    tgi: str | None = None
    """What TGI's `--quantize` calls it; None where it is a dtype."""
    vllm: str | None = None
    on_the_fly: bool = False
    """Whether an engine makes it of a 16-bit checkpoint, or needs one that is quantised already."""


# AWQ and GPTQ store a 16-bit scale and a 4-bit zero point for each group of 128 weights. NF4's double quantisation
# stores 8 bits for each block of 64 and 32 bits for each 256 blocks (QLoRA, Dettmers et al. 2023, section 3).
FORMATS = {
    "float32": Format(32, 32),
    "float16": Format(16, 16),
    "bfloat16": Format(16, 16),
    "fp8": Format(8, 16, tgi="fp8", vllm="fp8", on_the_fly=True),
    "int8": Format(8, 16, tgi="bitsandbytes", vllm=None, on_the_fly=True),
    "awq": Format(4 + (16 + 4) / 128, 16, tgi="awq", vllm="awq"),
    "gptq": Format(4 + (16 + 4) / 128, 16, tgi="gptq", vllm="gptq"),
    "nf4": Format(4 + 8 / 64 + 32 / (64 * 256), 16, tgi="bitsandbytes-nf4", vllm="bitsandbytes", on_the_fly=True),
}

KV_BYTES = {"auto": 2.0, "float16": 2.0, "bfloat16": 2.0, "float32": 4.0, "fp8": 1.0}
"""Bytes of one key or value in the cache."""


def format_of(name: str) -> Format:
    """The format by its name; raises InvalidRequest with the names there are."""
    if name not in FORMATS:
        raise InvalidRequest(f"`--weights`: {name!r} is none of {', '.join(FORMATS)}.", param="weights")
    return FORMATS[name]


def weight_bytes(model: Architecture, name: str) -> int:
    """Bytes of all weights in a format."""
    format_ = format_of(name)
    return round((model.linear_parameters * format_.linear_bits + model.other_parameters * format_.other_bits) / 8)


def kv_bytes_per_token(model: Architecture, dtype: str) -> int:
    """Bytes that one token takes in the cache; no credit is given for sliding windows."""
    if dtype not in KV_BYTES:
        raise InvalidRequest(f"`--kv-cache`: {dtype!r} is none of {', '.join(KV_BYTES)}.", param="kv-cache")
    return round(model.kv_values_per_token * KV_BYTES[dtype])


def adapter_parameters(model: Architecture, rank: int, targets: tuple[str, ...]) -> int:
    """Parameters of one LoRA: a pair of matrices beside each target, of each expert where there are several."""
    shapes = model.linear_shapes()
    unknown = [target for target in targets if target not in shapes]
    if unknown or not targets:
        raise InvalidRequest(
            f"`--adapter-targets`: {', '.join(unknown) or 'nothing'} is none of {', '.join(shapes)}.",
            param="adapter-targets",
        )
    layer = 0
    for target in targets:
        copies = model.experts if target in ("gate_proj", "up_proj", "down_proj") else 1
        layer += copies * rank * sum(shapes[target])
    return model.layers * layer
