"""What training needs on each GPU: weights, gradients, optimiser and activations, by method."""

from dataclasses import dataclass
from typing import Literal, get_args

from app.capacity.architecture import LINEARS, Architecture, check_range
from app.capacity.formats import adapter_parameters, weight_bytes
from app.capacity.serving import GIB

Method = Literal["lora", "qlora", "full"]
METHODS: tuple[Method, ...] = get_args(Method)

# What is trained is kept in 32 bits and Adam keeps two moments beside it. Full training has a 16-bit copy
# too: 16 bytes a parameter in all (ZeRO, Rajbhandari et al. 2020, section 3.1). An adapter has no 16-bit copy.
_FULL = {"weights": 2 + 4, "gradients": 2, "optimiser": 8}
_ADAPTER = {"weights": 4, "gradients": 4, "optimiser": 8}


@dataclass(frozen=True)
class Training:
    """One run's shape; what is sharded is spread over `gpus` (FSDP or ZeRO-3), each of which has its own batch."""

    method: Method
    batch: int = 1
    sequence_tokens: int = 2048
    rank: int = 16
    targets: tuple[str, ...] = LINEARS
    checkpointing: bool = True
    """Whether activations are computed again instead of being kept."""
    gpus: int = 1
    reserve_bytes: int = GIB


@dataclass(frozen=True)
class Need:
    """What each GPU has to hold, in bytes; activations are an estimate."""

    method: Method
    trained_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimiser_bytes: int
    activation_bytes: int
    reserve_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        states = self.weight_bytes + self.gradient_bytes + self.optimiser_bytes
        return states + self.activation_bytes + self.reserve_bytes


def needs(model: Architecture, run: Training) -> Need:
    """What a run needs.

    Raises:
        InvalidRequest: a number is out of its range, or a target is not known.
    """
    for name, value in (("batch", run.batch), ("sequence-tokens", run.sequence_tokens), ("adapter-rank", run.rank)):
        check_range(name, value)
    if run.method == "full":
        trained, base, each = model.parameters, 0, _FULL
    else:
        trained, each = adapter_parameters(model, run.rank, run.targets), _ADAPTER
        base = weight_bytes(model, "nf4" if run.method == "qlora" else "bfloat16")
    sharded = {name: -(-trained * size // run.gpus) for name, size in each.items()}
    return Need(
        method=run.method,
        trained_parameters=trained,
        weight_bytes=-(-base // run.gpus) + sharded["weights"],
        gradient_bytes=sharded["gradients"],
        optimiser_bytes=sharded["optimiser"],
        activation_bytes=_activations(model, run),
        reserve_bytes=run.reserve_bytes,
    )


def largest_batch(model: Architecture, run: Training, gpu_bytes: int) -> int:
    """How many sequences a GPU can take at once; 0 where not even one fits."""
    one = needs(model, _with_batch(run, 1))
    two = needs(model, _with_batch(run, 2))
    if one.total_bytes > gpu_bytes:
        return 0
    return 1 + (gpu_bytes - one.total_bytes) // (two.activation_bytes - one.activation_bytes)


def _with_batch(run: Training, batch: int) -> Training:
    return Training(**{**vars(run), "batch": batch})


def _activations(model: Architecture, run: Training) -> int:
    """What a backward pass needs of the forward pass, with attention that keeps no scores, and the logits.

    A layer keeps, in 16 bits: inputs and outputs of its two norms and their 32-bit copies (8 hidden), queries, keys,
    values and what attention gave, gate and up before and after the product (4 intermediate). Checkpointing keeps each
    layer's input, and one layer in full while it is computed again. Logits are kept in 16 and 32 bits, with their
    gradient.
    """
    tokens = run.batch * run.sequence_tokens
    heads = (2 * model.heads + 2 * model.kv_heads) * model.head_size
    layer = 2 * (8 * model.hidden + heads + 4 * model.intermediate * model.active_experts)
    kept = 2 * model.hidden * model.layers + layer if run.checkpointing else layer * model.layers
    return tokens * (kept + model.vocabulary * (2 + 4 + 4))
