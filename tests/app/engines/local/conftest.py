"""The embedded engine with a tiny random model, so that tests need no download and take milliseconds."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.engines.local.model import LoadedModel, load
from app.engines.local.weights import Weights
from tests.app.engines.local.tiny_engine import running_service
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    torch.set_num_threads(1)
    return load(Weights(str(tiny_folder), "tiny-llama", "r1"), "fp32")


@pytest.fixture(scope="session")
def save_adapter(tiny_folder: Path) -> Callable[..., Path]:
    """Write a random LoRA adapter for the tiny model and return its folder."""

    def save(folder: Path, *, seed: int = 1, **options: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaForCausalLM

        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
        model = LlamaForCausalLM.from_pretrained(tiny_folder)
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
        peft.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def serve_tiny(tiny: LoadedModel) -> Callable[..., Any]:
    def serve(**settings: Any) -> Any:
        return running_service(tiny, **settings)

    return serve


@pytest.fixture(scope="module")
def engine(serve_tiny: Callable[..., Any]) -> Iterator[httpx.Client]:
    with serve_tiny() as client:
        yield client
