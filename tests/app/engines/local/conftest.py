"""A tiny random Llama with a byte-level tokenizer, so that tests need no download and take milliseconds."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tiny_engine import running_service

from app.engines.local.model import LoadedModel, load
from app.engines.local.weights import Weights

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus Köln! 日本語のテキスト 🙂🙃",
    "user assistant system",
]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # Wide, so that the largest logit leads clearly and greedy text is well defined.
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[wrapped.eos_token_id] = 0  # Greedy never ends by itself: tests choose when it does.
    model.save_pretrained(folder)
    return folder


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
