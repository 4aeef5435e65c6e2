"""One LoRA run, top to bottom: verify, load, train, keep the adapter, write the manifest.

    hallmark-train train train.toml                                        # one process: a CPU or one GPU
    accelerate launch --config_file deploy/accelerate-fsdp.yaml -m finetune train train.toml        # many

The main rule: the same inputs give the same adapter, also when the run was killed and went on. So the data's order
comes from the seed, every checkpoint holds all that the next step depends on, and only whole ones are gone on from.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from finetune.config import TrainConfig
from finetune.curves import draw_curve, loss_rows, write_curve
from finetune.dataset import Dataset, Row, read_dataset
from finetune.errors import BadConfig, BadDataset
from finetune.manifest import (
    FORMAT,
    Base,
    adapter_digest,
    hardware,
    library_versions,
    read_manifest,
    verify_files,
    why_bytes_may_differ,
    write_adapter,
    write_manifest,
)
from finetune.prompts import asked
from finetune.resuming import Work, callbacks

WORK = "work"
"""The folder in the output where checkpoints lie until the run is finished."""

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""What the libraries read when they are imported. Spinning OpenMP threads cost a busy machine most of its speed; nobody
is told of a run; and cuBLAS adds up in one order."""

Watch = Callable[[dict[str, float]], None]


def train(config: TrainConfig, watch: Watch = lambda _: None) -> dict[str, Any]:
    """Train an adapter and return its manifest; a run that was cut off goes on, one that is finished is left as it is.

    `watch` is told the step, the last step, the loss and the held-out loss, as they come.

    Raises:
        TrainingError: says which setting, row or folder is wrong, and what to do.
    """
    os.environ.update(ENVIRONMENT | dict(os.environ))  # noqa: TID251 - before the libraries that read it are imported.
    dataset, base = read_dataset(config.dataset), Base(config)
    if dataset.manifest.purpose != "training":
        raise BadDataset(f"{dataset.folder}: it was made to evaluate with; what is trained on cannot measure any more")
    device = _device(config)
    config = config.model_copy(update=_resolved(config, device))
    inputs = {
        "base_model": base.model,
        "base_revision": base.revision,
        "base_digest": base.digest,
        "dataset_digest": dataset.manifest.digest,
        "config": config.recipe,
        "libraries": library_versions(),
    }
    work = Work(config.output / WORK, inputs)
    finished = work.finished_manifest(read_manifest(config.output))
    if finished:
        verify_files(config.output, finished)
        return finished
    from datasets import disable_progress_bars
    from transformers import AutoTokenizer, PrinterCallback
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base.location, revision=base.revision_on_hub)
    examples = {
        name: _examples(dataset, name, config, tokenizer) for name in ("train", "heldout") if dataset.splits.get(name)
    }
    if not examples.get("train"):
        raise BadDataset(f"{dataset.folder}: there is nothing to train on; the split `train` has no rows that fit")
    with work, _torch_set_up(config):
        started = time.time()
        trainer = _trainer(config, base, tokenizer, examples, work, watch)
        trainer.remove_callback(PrinterCallback)  # Progress is told to `watch`.
        saved = work.folder / "adapter"
        if ended := work.ended(_patience(config, examples)):
            trainer.state, saved = ended
        else:
            trainer.train(resume_from_checkpoint=work.checkpoint)
            trainer.save_model(str(saved))  # Every process takes part; the first one writes.
        if not trainer.is_world_process_zero():
            return {}
        write_adapter(saved, config.output, base)
        rows = loss_rows(trainer.state.log_history)
        write_curve(config.output / "loss.csv", rows)
        draw_curve(config.output / "loss.png", rows, trainer.state.best_global_step)
        manifest = {
            "format": FORMAT,
            "run": work.run,
            "adapter_digest": adapter_digest(config.output),
            **inputs,
            **_circumstances(config, dataset, examples, trainer.accelerator.num_processes),
            "metrics": _metrics(trainer.state, rows),
            "started_at": int(work.started_at),
            "seconds": round(time.time() - started, 1),
            "resumed_from_step": work.resumed_from_step,
        }
        write_manifest(config.output, manifest)
    work.clear()
    return manifest


def _circumstances(
    config: TrainConfig, dataset: Dataset, examples: dict[str, list[dict[str, Any]]], processes: int
) -> dict[str, Any]:
    """What else there is to say of a run: its rows, its machine, and whether it would give the same bytes again."""
    reasons = why_bytes_may_differ(config, processes)
    described = dataset.manifest
    return {
        "dataset": {"name": described.name, "version": described.version, "licence": described.licence},
        "task": described.task,
        "licence": config.licence,
        "seeds": {"model": config.seed, "data": config.seed},
        "rows": {name: len(found) for name, found in examples.items()},
        "rows_dropped": {name: len(dataset.splits[name]) - len(found) for name, found in examples.items()},
        "hardware": hardware(config.device, processes),
        "same_bytes_again": not reasons,
        "why_bytes_may_differ": reasons,
    }


def _device(config: TrainConfig) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise BadConfig("device: torch sees no GPU; set device to `cpu`, or install torch for CUDA")
    device = "cuda" if has_gpu and config.device != "cpu" else "cpu"
    if config.quantize != "none" and device == "cpu":
        raise BadConfig("quantize: bitsandbytes needs a GPU, and torch sees none; set quantize to `none`")
    for setting, value, package in (
        ("quantize", config.quantize == "nf4", "bitsandbytes"),
        ("report_to", config.report_to == "tensorboard", "tensorboard"),
        ("report_to", config.report_to == "mlflow", "mlflow"),
    ):
        if value and not _installed(package):
            raise BadConfig(f"{setting}: it needs the package {package}; `pip install {package}`, or choose `none`")
    return device


def _resolved(config: TrainConfig, device: str) -> dict[str, Any]:
    """What `auto` and None stand for on this machine, by what it can do and not by a measurement, which would vary."""
    import torch

    if device == "cuda":
        multiplies_in_bf16 = torch.cuda.is_bf16_supported()
    else:
        multiplies_in_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    best = "bf16" if multiplies_in_bf16 else "fp32"
    saves_memory = config.activation_checkpointing
    return {
        "device": device,
        "threads": config.threads or torch.get_num_threads(),
        "precision": best if config.precision == "auto" else config.precision,
        "activation_checkpointing": device == "cuda" if saves_memory is None else saves_memory,
    }


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@contextmanager
def _torch_set_up(config: TrainConfig) -> Iterator[None]:
    """Set threads and determinism as configured, and back as they were for whoever else uses this process."""
    import torch

    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    torch.set_num_threads(config.threads or before[0])
    if config.deterministic:
        torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(mode=before[1])


def _examples(dataset: Dataset, split: str, config: TrainConfig, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a split in TRL's form, none longer than the model may read.

    Raises:
        BadDataset: rows are too long, or the base model has no chat template.
    """
    if not tokenizer.chat_template:
        raise BadDataset(
            f"base: {config.base} has no chat template, so it cannot be told who says what; use a chat model"
        )
    kept, lengths = [], {}
    for row in dataset.splits[split]:
        example = _example(row, config, dataset)
        answers = [example[name] for name in ("completion", "chosen", "rejected") if name in example]
        tokens = max(
            len(tokenizer.apply_chat_template(example["prompt"] + answer, return_dict=True)["input_ids"])
            for answer in answers
        )
        if tokens <= config.max_tokens:
            kept.append(example)
        else:
            lengths[row.row] = tokens
    if lengths and config.long_rows == "refuse":
        raise BadDataset(
            f"{dataset.folder}: {len(lengths)} rows of {split} have more than max_tokens = {config.max_tokens} tokens, "
            f"the longest {max(lengths.values())}. Raise max_tokens, or set long_rows to `drop`."
        )
    return kept


def _example(row: Row, config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    def turns(messages: Any) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in messages]

    prompt = turns(asked(row, config.prompt, dataset.manifest))
    if row.task == "preference":
        return {"prompt": prompt, "chosen": turns(row.chosen), "rejected": turns(row.rejected)}
    return {"prompt": prompt, "completion": turns(row.messages[-1:])}


def _trainer(
    config: TrainConfig,
    base: Base,
    tokenizer: Any,
    examples: dict[str, list[dict[str, Any]]],
    work: Work,
    watch: Watch,
) -> Any:
    from datasets import Dataset as Table
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    patience = _patience(config, examples)
    arguments = _arguments(config, base, work, heldout=bool(examples.get("heldout")), keep_best=patience > 0)
    kind: Any = SFTTrainer
    if "chosen" in examples["train"][0]:
        if config.packing:
            raise BadConfig("packing: preference pairs are not packed; set it to false")
        kind, settings = DPOTrainer, DPOConfig(**arguments, beta=config.beta)
    else:
        settings = SFTConfig(**arguments, packing=config.packing, eval_packing=False, completion_only_loss=True)
    heldout = examples.get("heldout", [])[: config.check_rows]
    return kind(
        model=base.location,
        args=settings,
        train_dataset=Table.from_list(examples["train"]),
        eval_dataset=Table.from_list(heldout) if heldout else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
            task_type="CAUSAL_LM",
        ),
        quantization_config=_four_bits() if config.quantize == "nf4" else None,
        callbacks=callbacks(work, patience, watch),
    )


def _patience(config: TrainConfig, examples: dict[str, list[dict[str, Any]]]) -> int:
    return config.patience if examples.get("heldout") else 0


def _arguments(config: TrainConfig, base: Base, work: Work, *, heldout: bool, keep_best: bool) -> dict[str, Any]:
    """What both kinds of trainer are told."""
    on_cpu = config.device == "cpu"
    return {
        "output_dir": str(work.folder),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "max_length": config.max_tokens,
        "optim": "paged_adamw_8bit" if config.quantize == "nf4" else "adamw_torch",
        "use_cpu": on_cpu,
        "bf16": config.precision == "bf16",
        # On a CPU the weights stay in 32 bits and bf16 is what it multiplies in: that was the faster of the two.
        "model_init_kwargs": {
            "dtype": "float32" if on_cpu or config.precision == "fp32" else "bfloat16",
            "revision": base.revision_on_hub,
        },
        "activation_checkpointing": config.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": 1,
        "eval_strategy": "steps" if heldout else "no",
        "eval_steps": config.check_every_steps,
        "save_strategy": "steps",
        "save_steps": config.check_every_steps,
        "save_total_limit": None,  # The library would remove older checkpoints before the newest one is marked whole.
        "load_best_model_at_end": keep_best,
        "metric_for_best_model": "loss" if keep_best else None,
        "greater_is_better": False if keep_best else None,
        "report_to": config.report_to,
        "run_name": config.output.name,
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
    }


def _four_bits() -> Any:
    """QLoRA's way to keep the base model (Dettmers and others 2023); the storage type is what FSDP can shard."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )


def _metrics(state: Any, rows: list[dict[str, float]]) -> dict[str, Any]:
    """What the run came to; how good the adapter is, is measured where it is served."""
    losses = [row["loss"] for row in rows if "loss" in row]
    heldout = {int(row["step"]): row["heldout_loss"] for row in rows if "heldout_loss" in row}
    kept = state.best_global_step or state.global_step
    return {
        "steps": state.global_step,
        "kept_step": kept,
        "epochs": round(state.epoch or 0.0, 3),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "heldout_loss": heldout.get(kept),
        "first_heldout_loss": next(iter(heldout.values()), None),
    }
