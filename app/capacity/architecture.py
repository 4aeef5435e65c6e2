"""What a model is made of, read from its `config.json`: its matrices, and so how many parameters it has.

A family is counted tensor by tensor; tests hold the counts to the sizes that the models' publishers give. A family that
is not known here is refused rather than guessed at: then the parameters, layers and heads are given by hand (`plain`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.errors import InvalidRequest

MAX_COUNT = 10**15
"""No larger number of parameters, layers, tokens, ... is taken: what comes of them can still be divided and printed."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers that every engine can load an adapter on."""


@dataclass(frozen=True)
class Family:
    """How models of one `model_type` differ from Llama."""

    qkv_bias: bool = False
    norms: int = 2
    """RMSNorms of a layer, each with one weight per hidden unit."""
    head_norms: bool = False
    """Whether queries and keys are normalised head by head."""
    tied: bool = False
    """Whether input and output embeddings are one matrix where the config does not say."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "phi3": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms=4, tied=True),
}


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder; counts are of the whole model, whatever it is spread over."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context_tokens: int | None
    linear_parameters: int
    """Those in the layers' matrices, which quantisation makes smaller."""
    other_parameters: int
    """Embeddings, norms, biases and routers, which it leaves as they are."""
    experts: int = 1
    active_experts: int = 1
    dtype: str | None = None
    """How the checkpoint stores its weights."""
    quantised: str | None = None
    """The method and bits the checkpoint is quantised by, as `formats.FORMATS` names them."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.linear_parameters + self.other_parameters

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values that one token leaves in the cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps, by name; a mixture's experts are one each."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


def read_config(config: Mapping[str, Any]) -> Architecture:
    """Make an architecture of a `config.json`.

    Raises:
        InvalidRequest: the family is not known, or a field is missing or out of its range; names the field.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise InvalidRequest(
            f"`model_type`: {kind!r} is none of {', '.join(sorted(FAMILIES))}; give --parameters, --layers, --heads "
            "and --hidden instead.",
            param="model_type",
        )
    heads = _count(config, "num_attention_heads")
    hidden = _count(config, "hidden_size")
    shape = Architecture(
        layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads", heads),
        head_size=_count(config, "head_dim", hidden // heads),
        intermediate=_count(config, "intermediate_size"),
        vocabulary=_count(config, "vocab_size"),
        context_tokens=_count(config, "max_position_embeddings") if "max_position_embeddings" in config else None,
        linear_parameters=0,
        other_parameters=0,
        experts=_count(config, "num_local_experts", 1),
        active_experts=_count(config, "num_experts_per_tok", 1),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        quantised=_quantised(config.get("quantization_config")),
    )
    if shape.heads % shape.kv_heads:
        raise InvalidRequest(
            f"`num_key_value_heads`: {shape.kv_heads} does not divide the {shape.heads} heads.",
            param="num_key_value_heads",
        )
    biased = family.qkv_bias or bool(config.get("attention_bias"))
    tied = config.get("tie_word_embeddings")
    return _counted(shape, family, biased=biased, tied=family.tied if tied is None else bool(tied))


def plain(
    *, parameters: int, layers: int, heads: int, hidden: int, kv_heads: int | None = None, head_size: int | None = None
) -> Architecture:
    """An architecture of which only the totals are known; every parameter counts as one of a matrix.

    Raises:
        InvalidRequest: a number is out of its range, or the heads do not fit each other.
    """
    given = {"parameters": parameters, "layers": layers, "heads": heads, "hidden": hidden}
    given |= {"kv-heads": heads if kv_heads is None else kv_heads}
    given |= {"head-size": hidden // max(heads, 1) if head_size is None else head_size}
    for name, value in given.items():
        check_range(name, value)
    if heads % given["kv-heads"]:
        raise InvalidRequest(f"`--kv-heads`: {kv_heads} does not divide the {heads} heads.", param="kv-heads")
    queries, keys = heads * given["head-size"], given["kv-heads"] * given["head-size"]
    attention = hidden * (2 * queries + 2 * keys)
    return Architecture(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=given["kv-heads"],
        head_size=given["head-size"],
        intermediate=max(hidden, (parameters // layers - attention) // (3 * hidden)),
        vocabulary=0,
        context_tokens=None,
        linear_parameters=parameters,
        other_parameters=0,
    )


def check_range(option: str, value: float, least: float = 1, most: float = MAX_COUNT) -> None:
    """Refuse an option's value that is not between the two, or no number at all.

    Raises:
        InvalidRequest: names the option and its range.
    """
    if not least <= value <= most:  # So that NaN is refused.
        raise InvalidRequest(f"`--{option}`: {value} is not from {least:g} to {most:g}.", param=option)


def _counted(shape: Architecture, family: Family, *, biased: bool, tied: bool) -> Architecture:
    """The shape with its parameters counted."""
    linear, other = 0, 0
    for name, (inputs, outputs) in shape.linear_shapes().items():
        copies = shape.experts if name in ("gate_proj", "up_proj", "down_proj") else 1
        linear += copies * inputs * outputs
        if biased and name in ("q_proj", "k_proj", "v_proj"):
            other += outputs
    other += family.norms * shape.hidden
    if family.head_norms:
        other += 2 * shape.head_size
    if shape.experts > 1:
        other += shape.experts * shape.hidden  # The router.
    embeddings = shape.vocabulary * shape.hidden * (1 if tied else 2)
    return replace(
        shape,
        linear_parameters=shape.layers * linear,
        other_parameters=shape.layers * other + embeddings + shape.hidden,  # And the last norm.
    )


def _count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        said = "is missing" if value is None else f"{value!r} is no whole number from 1 to {MAX_COUNT:g}"
        raise InvalidRequest(f"`{name}`: {said} in the model's config.json.", param=name)
    return value


def _quantised(config: Any) -> str | None:
    """The format a checkpoint is in, by its `quantization_config`."""
    if not isinstance(config, Mapping):
        return None
    method = str(config.get("quant_method", ""))
    if method in ("gptq", "awq"):
        bits = config.get("bits", 4)
        if bits == 4:
            return method
    elif method == "fp8":
        return "fp8"
    elif method == "bitsandbytes":
        return "nf4" if config.get("load_in_4bit") else "int8"
    raise InvalidRequest(
        f"`quantization_config`: {method or 'this'} with {config.get('bits', 'these')} bits is not known; known are "
        "gptq and awq with 4 bits, fp8 and bitsandbytes.",
        param="quantization_config",
    )
