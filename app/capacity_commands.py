"""`hallmark capacity`: what a model needs and how many requests fit, as tables, JSON and engine arguments."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from app.capacity import (
    GIB,
    GPUS,
    LINEARS,
    METHODS,
    TGI_SHARE,
    Architecture,
    Deployment,
    Fit,
    Request,
    Training,
    adapter_parameters,
    check_range,
    fits,
    kv_bytes_per_token,
    largest_batch,
    needs,
    plain,
    read_config,
    smallest,
    tgi_arguments,
    tgi_cache_tokens,
    vllm_arguments,
    weight_bytes,
)
from app.errors import InvalidRequest
from app.terminal import explained, out

_SERVING_ROWS = (
    ("weight_bytes", "weights"),
    ("adapter_bytes", "adapters"),
    ("activation_bytes", "activations*"),
    ("reserve_bytes", "reserve*"),
    ("cache_bytes", "cache"),
)
_TRAINING_ROWS = (
    ("weight_bytes", "weights"),
    ("gradient_bytes", "gradients"),
    ("optimiser_bytes", "optimiser"),
    ("activation_bytes", "activations*"),
    ("reserve_bytes", "reserve*"),
    ("total_bytes", "total"),
)

Number = Annotated[int | None, typer.Option(help="By hand, instead of a config.json.")]


def capacity(
    config: Annotated[Path | None, typer.Argument(help="The model's config.json, or its folder.", exists=True)] = None,
    parameters: Annotated[float | None, typer.Option(help="By hand, as 7e9, instead of a config.json.")] = None,
    layers: Number = None,
    heads: Number = None,
    hidden: Number = None,
    kv_heads: Number = None,
    head_size: Number = None,
    weights: Annotated[
        str | None, typer.Option(help="float16, bfloat16, fp8, int8, awq, gptq or nf4; by default as stored.")
    ] = None,
    kv_cache: Annotated[str, typer.Option(help="auto (as the weights: 16 bits, or 32) or fp8.")] = "auto",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "a100-80gb",
    gpu_memory_gib: Annotated[float | None, typer.Option(help="Instead of --gpu.")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=64, help="How many there are.")] = 1,
    request: Annotated[
        list[str] | None, typer.Option(help="A kind of request, as prompt+answer in tokens: 1000+300; repeat for more.")
    ] = None,
    concurrent: Annotated[int, typer.Option(min=1, help="How many of the longest request must fit at once.")] = 1,
    utilisation: Annotated[float, typer.Option(help="The share of a GPU's memory that the engine may take.")] = 0.9,
    reserve_gib: Annotated[float, typer.Option(help="CUDA context, buffers, fragmentation, for each GPU.")] = 1.0,
    adapters: Annotated[int, typer.Option(help="How many LoRA adapters are loaded at once.")] = 0,
    adapter_rank: int = 16,
    adapter_targets: Annotated[str, typer.Option(help="Linear layers with an adapter.")] = ",".join(LINEARS),
    batch: Annotated[int, typer.Option(help="Sequences that a GPU trains on at once.")] = 1,
    sequence_tokens: Annotated[int, typer.Option(help="Length of a training sequence.")] = 2048,
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again instead of keeping them.")] = True,
    model_id: Annotated[str, typer.Option(help="What the engine's arguments call the model.")] = "MODEL",
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,
) -> None:
    """Plan memory: weights, cache, adapters, how many requests fit on which GPUs, and what training needs.

    Exits with 1 where what was asked for does not fit.
    """
    with explained():
        by_hand = {"parameters": parameters, "layers": layers, "heads": heads, "hidden": hidden}
        model = _model(config, by_hand, kv_heads=kv_heads, head_size=head_size)
        targets = tuple(part.strip() for part in adapter_targets.split(","))
        deployment = Deployment(
            gpu_bytes=_gpu_bytes(gpu, gpu_memory_gib),
            weights=weights or _stored(model),
            kv_cache=kv_cache,
            requests=tuple(_request(text) for text in request or ["1000+300"]),
            utilisation=utilisation,
            reserve_bytes=_bytes("reserve-gib", reserve_gib),
            adapters=adapters,
            adapter_rank=adapter_rank,
            adapter_targets=targets,
        )
        found = fits(model, deployment, gpus)
        chosen = smallest(found, deployment, concurrent)
        reserve_bytes = deployment.reserve_bytes
        run = Training("lora", batch, sequence_tokens, adapter_rank, targets, checkpointing, gpus, reserve_bytes)
        plan = {
            "model": _described(model, deployment),
            "serving": {
                "gpu_bytes": deployment.gpu_bytes,
                "gpus": gpus,
                "requests": [asdict(each) for each in deployment.requests],
                "fits": [asdict(fit) for fit in found],
                "tensor_parallel": chosen and chosen.tensor_parallel,
                "replicas": gpus // chosen.tensor_parallel if chosen else 0,
                "tgi_cache_tokens": chosen and tgi_cache_tokens(deployment, chosen),
                "tgi": chosen and tgi_arguments(deployment, chosen, model_id),
                "vllm": chosen and vllm_arguments(deployment, chosen, model_id),
            },
            "training": _training(model, run, deployment.gpu_bytes),
        }
    if as_json:
        out.print_json(data=plan)
    else:
        _show(plan, deployment, found, chosen)
    if chosen is None:
        raise typer.Exit(1)


def _model(
    config: Path | None, by_hand: dict[str, float | None], *, kv_heads: int | None, head_size: int | None
) -> Architecture:
    given = {name: value for name, value in by_hand.items() if value is not None}
    if config is None:
        missing = [f"--{name}" for name in by_hand if name not in given]
        if missing:
            raise InvalidRequest(f"`{missing[0]}`: give a config.json, or all of --{', --'.join(by_hand)}.")
        for name, value in given.items():
            check_range(name, value)  # As they were given: infinity is no whole number.
        return plain(**{name: int(value) for name, value in given.items()}, kv_heads=kv_heads, head_size=head_size)
    if given:
        raise InvalidRequest(f"`--{next(iter(given))}`: the config.json says that already.")
    file = config / "config.json" if config.is_dir() else config
    try:
        read = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InvalidRequest(f"`CONFIG`: there is no {file}.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"`CONFIG`: {file} is not JSON: {error}.") from None
    if not isinstance(read, dict):
        raise InvalidRequest(f"`CONFIG`: {file} does not hold an object.")
    return read_config(read)


def _stored(model: Architecture) -> str:
    """The weights' format unless one is chosen; engines load 32-bit checkpoints in 16 bits."""
    return model.quantised or (model.dtype if model.dtype in ("float16", "bfloat16") else "bfloat16")


def _bytes(option: str, gib: float, least_gib: float = 0.0) -> int:
    check_range(option, gib, least_gib, 1e6)
    return round(gib * GIB)


def _gpu_bytes(name: str, gib: float | None) -> int:
    if gib is not None:
        return _bytes("gpu-memory-gib", gib, 0.1)
    if name.lower() not in GPUS:
        raise InvalidRequest(f"`--gpu`: {name!r} is none of {', '.join(GPUS)}; or give --gpu-memory-gib.")
    return GPUS[name.lower()]


def _request(text: str) -> Request:
    found = re.fullmatch(r"(\d{1,9})\+(\d{1,9})", text.replace("_", "").replace(" ", ""))
    if found is None:
        raise InvalidRequest(f"`--request`: {text[:40]!r} is not of the form prompt+answer, as 1000+300.")
    return Request(int(found[1]), int(found[2]))


def _described(model: Architecture, deployment: Deployment) -> dict[str, Any]:
    return {
        "parameters": model.parameters,
        "weights": deployment.weights,
        "weight_bytes": weight_bytes(model, deployment.weights),
        "kv_bytes_per_token": kv_bytes_per_token(model, deployment.cache_dtype),
        "adapter_parameters": adapter_parameters(model, deployment.adapter_rank, deployment.adapter_targets),
        "context_tokens": model.context_tokens,
    }


def _training(model: Architecture, run: Training, gpu_bytes: int) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        this = Training(**{**vars(run), "method": method})
        need = needs(model, this)
        rows.append(
            {
                **asdict(need),
                "total_bytes": need.total_bytes,
                "fits": need.total_bytes <= gpu_bytes,
                "largest_batch": largest_batch(model, this, gpu_bytes),
            }
        )
    return rows


def _show(plan: dict[str, Any], deployment: Deployment, found: list[Fit], chosen: Fit | None) -> None:
    model, gpus = plan["model"], plan["serving"]["gpus"]
    out.print(
        f"{model['parameters'] / 1e9:.2f} billion parameters, {model['weight_bytes'] / 1e9:.2f} GB as "
        f"{model['weights']}; cache {model['kv_bytes_per_token'] / 1024:g} KiB a token; an adapter of rank "
        f"{deployment.adapter_rank} has {model['adapter_parameters'] / 1e6:.1f} million parameters",
        soft_wrap=True,
    )
    if model["context_tokens"] and deployment.longest.tokens > model["context_tokens"]:
        out.print(f"[yellow]warning:[/] the model's context is {model['context_tokens']} tokens.")
    out.print(_serving_table(deployment, found, chosen))
    out.print(_training_table(plan["training"], deployment))
    out.print("* estimated; weights, cache and states are counted", style="dim")
    if chosen is None:
        remedy = "take more of them, larger ones, or --weights and --kv-cache of fewer bits."
        out.print(f"[red]does not fit[/] on {gpus} of these GPUs: {remedy}", soft_wrap=True)
        return
    out.print(f"{plan['serving']['replicas']} replica(s) on {chosen.tensor_parallel} GPU(s) each")
    if deployment.utilisation > TGI_SHARE:
        held = f"{plan['serving']['tgi_cache_tokens']} tokens in its cache"
        out.print(f"TGI takes no more than {TGI_SHARE:g} of a GPU: {held}", soft_wrap=True)
    for name in ("tgi", "vllm"):
        arguments = plan["serving"][name]
        out.print(escape(shlex.join(arguments) if arguments else _unable(name, deployment)), soft_wrap=True)


def _unable(engine: str, deployment: Deployment) -> str:
    """Why an engine has no arguments."""
    if engine == "tgi" and deployment.weights != "float32":
        return "tgi has no room for the longest request"
    return f"{engine} has no {deployment.weights} weights"


def _serving_table(deployment: Deployment, found: list[Fit], chosen: Fit | None) -> Table:
    """A column for each tensor-parallel degree; the chosen one is bold."""
    degrees = [f"{fit.tensor_parallel} GPU{'s' if fit.tensor_parallel > 1 else ''}" for fit in found]
    columns = [
        Column(degree, justify="right", style="bold" if fit is chosen else "")
        for degree, fit in zip(degrees, found, strict=True)
    ]
    table = Table(
        f"GiB of each GPU's {deployment.gpu_bytes / GIB:.1f}", *columns, title="Serving", title_justify="left"
    )
    for name, label in _SERVING_ROWS:
        table.add_row(label, *(f"{getattr(fit, name) / GIB:.2f}" for fit in found))
    table.add_row("tokens in the cache", *(str(fit.cache_tokens) for fit in found))
    for i, each in enumerate(deployment.requests):
        kind = f"{each.prompt_tokens}+{each.output_tokens} tokens, at once"
        table.add_row(kind, *(str(fit.concurrent[i]) for fit in found))
    return table


def _training_table(rows: list[dict[str, Any]], deployment: Deployment) -> Table:
    columns = (Column(row["method"], justify="right") for row in rows)
    table = Table(
        f"GiB of each GPU's {deployment.gpu_bytes / GIB:.1f}", *columns, title="Training", title_justify="left"
    )
    table.add_row("trained parameters", *(f"{row['trained_parameters'] / 1e6:.1f} M" for row in rows))
    for name, label in _TRAINING_ROWS:
        table.add_row(label, *(f"{row[name] / GIB:.2f}" for row in rows))
    table.add_row("largest batch", *(str(row["largest_batch"] or "does not fit") for row in rows))
    return table
