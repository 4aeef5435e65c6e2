"""What a training step costs on a GPU: `hallmark-train` beside a bare TRL loop, and beside what the planner said.

A Llama of random weights, by default of 1.2 billion parameters, in bf16; rows that fill `--tokens` each. Each way is a
process of its own, so that none sees what another has left in the GPU's memory. LoRA, and QLoRA where bitsandbytes is
installed.

    python -m tests.benchmarks.training_step --work DIR [--batch 8] [--tokens 1024] [--steps 20]

`--tiny` tries all of it on a CPU, with a model of two layers: its figures say nothing. The last line is JSON.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.capacity import GIB, Training, needs, read_config
from finetune.config import SEVEN_LINEAR_LAYERS, TrainConfig
from finetune.dataset import read_dataset, write_dataset
from finetune.train import train
from tests.tiny_model import save_tiny_model

WARM_UP_STEPS = 3
"""Left out of the times: kernels are chosen and memory is taken in the first."""
RANK = 16


def main() -> None:
    """Measure each way, or with `--way` one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where model, rows and adapters are written")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--way", choices=("hallmark", "bare"))
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(one_way(given)))
        return
    prepare(given)
    methods = ["lora"] if given.tiny or find_spec("bitsandbytes") is None else ["lora", "qlora"]
    found = {method: {"planned": planned(given, method), **measured(method)} for method in methods}
    print(table(found))
    print(json.dumps(found))


def measured(method: str) -> dict[str, Any]:
    """Both ways, each by a process of its own."""
    ways = {}
    for way in ("hallmark", "bare"):
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.training_step",
            *sys.argv[1:],
            "--way",
            way,
            "--method",
            method,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        ways[way] = json.loads(done.stdout.splitlines()[-1])
    return ways


def prepare(given: argparse.Namespace) -> None:
    """Write the model and the rows, each of the tokens asked for."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = save_tiny_model(given.work / "model")
    if not given.tiny:  # The shape of Llama 3.2 1B, with the tiny model's tokenizer.
        config = AutoConfig.from_pretrained(
            model, vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, initializer_range=0.02,
            tie_word_embeddings=True, max_position_embeddings=8192,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(0)
    rows = [_row(draw, tokenizer, given.tokens) for _ in range(given.batch * given.steps)]
    write_dataset(
        given.work / "dataset", {"train": rows}, name="filled", version="1", task="answer", labels=[],
        recipe={"made_by": "tests.benchmarks.training_step"}, parent=None, licence="CC0",
    )  # fmt: skip


def _row(draw: random.Random, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """A row whose answer fills it up."""

    def messages(letters: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer[:letters]}]

    answer = "".join(draw.choices("bcdfghjklmnpqrstvwxz", k=tokens))
    over = len(tokenizer.apply_chat_template(messages(tokens), return_dict=True)["input_ids"]) - tokens
    return {"task": "answer", "messages": messages(tokens - max(0, over))}


def planned(given: argparse.Namespace, method: Any) -> dict[str, Any]:
    """What `hallmark capacity` says that it needs."""
    model = read_config(json.loads((given.work / "model" / "config.json").read_text()))
    run = Training(method, batch=given.batch, sequence_tokens=given.tokens, rank=RANK, checkpointing=not given.tiny)
    need = needs(model, run)
    return {"parameters": model.parameters, "gib": (need.total_bytes - need.reserve_bytes) / GIB}


def one_way(given: argparse.Namespace) -> dict[str, Any]:
    """Train by one of the ways; gives tokens a second, and the most memory that tensors took."""
    import torch

    ends: list[float] = []
    config = TrainConfig(
        dataset=given.work / "dataset",
        base=str(given.work / "model"),
        output=given.work / f"{given.way}-{given.method}-{time.time_ns()}",
        max_steps=given.steps,
        batch_size=given.batch,
        max_tokens=given.tokens + 8,
        rank=RANK,
        check_every_steps=given.steps + 1,
        device="cpu" if given.tiny else "cuda",
        precision="fp32" if given.tiny else "bf16",
        quantize="nf4" if given.method == "qlora" else "none",
        deterministic=False,
    )
    if given.way == "hallmark":
        train(config, watch=lambda _: ends.append(time.perf_counter()))
    else:
        bare(config, ends)
    timed = ends[:-1] if given.way == "hallmark" else ends  # The last thing that is told is the run's summary.
    seconds = (timed[-1] - timed[WARM_UP_STEPS - 1]) / (len(timed) - WARM_UP_STEPS)
    of_tensors = 0 if given.tiny else torch.cuda.max_memory_allocated()
    taken = of_tensors or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_a_second": given.batch * given.tokens / seconds, "gib": taken / GIB, "steps": len(timed)}


def bare(config: TrainConfig, ends: list[float]) -> None:
    """What one would write with TRL alone, with the same model, rows and settings."""
    from datasets import Dataset as Table
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    on_cpu = config.device == "cpu"
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    rows = [
        {"prompt": messages[:-1], "completion": messages[-1:]}
        for row in read_dataset(config.dataset).split("train")
        for messages in [[{"role": each.role, "content": each.content} for each in row.messages]]
    ]
    SFTTrainer(
        model=config.base,
        args=SFTConfig(
            output_dir=str(config.output), max_steps=config.max_steps or -1, use_cpu=on_cpu, bf16=not on_cpu,
            per_device_train_batch_size=config.batch_size, max_length=config.max_tokens,
            gradient_checkpointing=not on_cpu,
            optim="paged_adamw_8bit" if config.quantize == "nf4" else "adamw_torch", learning_rate=config.learning_rate,
            model_init_kwargs={"dtype": "float32" if on_cpu else "bfloat16"}, save_strategy="no", report_to="none",
            disable_tqdm=True, completion_only_loss=True,
        ),
        train_dataset=Table.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(config.base),
        peft_config=LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(SEVEN_LINEAR_LAYERS), task_type="CAUSAL_LM"
        ),
        quantization_config=four_bits if config.quantize == "nf4" else None,
        callbacks=[Clock()],
    ).train()  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| method | way | tokens a second | GiB | GiB planned |", "|---|---|---|---|---|"]
    for method, ways in found.items():
        for way in ("hallmark", "bare"):
            speed, gib = ways[way]["tokens_a_second"], ways[way]["gib"]
            lines.append(f"| {method} | {way} | {speed:,.0f} | {gib:.2f} | {ways['planned']['gib']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
