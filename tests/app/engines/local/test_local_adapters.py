"""Adapters come, serve and go while the base model answers on."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.app.engines.local.tiny_engine import chat, text_of

# peft asks transformers by a name that transformers has deprecated: nothing of ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),  # It is no more than warned of.
]

SaveAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def adapter(save_adapter: SaveAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def fresh(serve_tiny: Callable[..., Any]) -> Iterator[httpx.Client]:
    with serve_tiny(max_adapters=2) as client:
        yield client


def load(client: httpx.Client, name: str, folder: Path, **fields: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder), **fields})


def unload(client: httpx.Client, name: str) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def served(client: httpx.Client) -> dict[str, str | None]:
    return {entry["id"]: entry["parent"] for entry in client.get("/v1/models").json()["data"]}


def test_a_loaded_adapter_answers_by_its_name_and_the_base_stays_as_it_was(fresh: httpx.Client, adapter: Path) -> None:
    base = text_of(fresh)
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(load, fresh, "tuned", adapter)
        meanwhile = pool.submit(lambda: [text_of(fresh) for _ in range(10)])
    assert loading.result().status_code == 200, loading.result().text
    assert meanwhile.result() == [base] * 10
    assert text_of(fresh, model="tuned") != base
    assert text_of(fresh) == base
    assert served(fresh) == {"tiny-llama": None, "tuned": "tiny-llama"}
    assert fresh.post("/v1/chat/completions", json=chat(model="tuned")).json()["model"] == "tuned"


def test_the_answer_is_the_one_peft_gives(fresh: httpx.Client, adapter: Path, tiny_folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer, LlamaForCausalLM

    load(fresh, "tuned", adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_folder), str(adapter))
    prompt = tokenizer.apply_chat_template(chat()["messages"], add_generation_prompt=True, return_dict=False)
    ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert text_of(fresh, model="tuned") == tokenizer.backend_tokenizer.decode(ids[0, len(prompt) :].tolist())


def test_base_and_adapter_answer_at_the_same_time(fresh: httpx.Client, adapter: Path) -> None:
    load(fresh, "tuned", adapter)
    names = ["tgi", "tuned"] * 4
    alone = {name: text_of(fresh, model=name) for name in set(names)}
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(lambda name: text_of(fresh, model=name), names)) == [alone[name] for name in names]


def test_an_unloaded_adapter_is_unknown(fresh: httpx.Client, adapter: Path) -> None:
    load(fresh, "tuned", adapter)
    assert unload(fresh, "tuned").status_code == 200
    assert fresh.post("/v1/chat/completions", json=chat(model="tuned")).status_code == 404
    assert unload(fresh, "tuned").status_code == 404
    assert served(fresh) == {"tiny-llama": None}


def test_a_request_under_way_outlives_its_adapter(fresh: httpx.Client, adapter: Path) -> None:
    load(fresh, "tuned", adapter)
    whole = text_of(fresh, model="tuned", max_tokens=400)
    request = chat(model="tuned", max_tokens=400, stream=True)
    with fresh.stream("POST", "/v1/chat/completions", json=request) as response:
        lines = response.iter_lines()
        first = next(lines)
        assert unload(fresh, "tuned").status_code == 200
        events = [line.removeprefix("data: ") for line in (first, *lines) if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events) == whole


def test_a_name_is_loaded_once_unless_it_is_to_be_replaced(
    fresh: httpx.Client, adapter: Path, save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "other", seed=2)
    load(fresh, "tuned", adapter)
    before = text_of(fresh, model="tuned")
    repeated = load(fresh, "tuned", other)
    assert repeated.status_code == 400
    assert "already loaded" in repeated.json()["error"]
    assert text_of(fresh, model="tuned") == before
    assert load(fresh, "tuned", other, load_inplace=True).status_code == 200
    assert text_of(fresh, model="tuned") != before


def test_beyond_the_limit_the_least_recently_used_adapter_goes(fresh: httpx.Client, adapter: Path) -> None:
    for name in ("first", "second"):
        load(fresh, name, adapter)
    text_of(fresh, model="first")
    assert "second" in load(fresh, "third", adapter).text
    assert list(served(fresh)) == ["tiny-llama", "first", "third"]


def test_it_says_how_many_it_holds_and_which_of_them_goes_next(fresh: httpx.Client, adapter: Path) -> None:
    assert fresh.get("/info").json()["max_adapters"] == 2
    for name in ("first", "second"):
        load(fresh, name, adapter)
    assert list(served(fresh)) == ["tiny-llama", "first", "second"]
    text_of(fresh, model="first")
    assert list(served(fresh)) == ["tiny-llama", "second", "first"]


def test_adapters_of_the_settings_are_there_from_the_start(serve_tiny: Callable[..., Any], adapter: Path) -> None:
    with serve_tiny(adapters=(("tuned", adapter),)) as client:
        assert "tuned" in served(client)


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reweigh(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        pytest.param(shutil.rmtree, "adapter_config.json", id="no folder"),
        pytest.param(lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json", id="no config"),
        pytest.param(
            lambda folder: (folder / "adapter_config.json").write_text("[]"),
            "adapter_config.json",
            id="config is a list",
        ),
        pytest.param(
            lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors", id="no weights"
        ),
        pytest.param(
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no weights"),
            "cannot be read",
            id="broken weights",
        ),
        pytest.param(
            lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
            "adapter_config.json",
            id="config is deep",
        ),
        pytest.param(
            lambda folder: reweigh(folder, lambda weights: {name: each.flatten() for name, each in weights.items()}),
            "does not fit",
            id="weights in one dimension",
        ),
        pytest.param(
            lambda folder: reweigh(folder, lambda weights: dict(sorted(weights.items())[:2])),
            "10 tensors are missing and 0 too many",
            id="most weights missing",
        ),
        pytest.param(
            lambda folder: rewrite(folder, target_modules=["q_proj"]),
            "0 tensors are missing and 8 too many",
            id="weights of layers that are not named",
        ),
        pytest.param(lambda folder: rewrite(folder, rank_pattern="x"), "does not fit", id="ranks are a word"),
        pytest.param(lambda folder: rewrite(folder, target_modules=5), "does not fit", id="layers are a number"),
        pytest.param(
            lambda folder: rewrite(folder, base_model_name_or_path="org/" + "x" * 5_000),
            "too long",
            id="an endless base",
        ),
        pytest.param(lambda folder: rewrite(folder, peft_type="IA3"), "LORA", id="not LoRA"),
        pytest.param(lambda folder: rewrite(folder, r=0), "r of at least 1", id="rank 0"),
        pytest.param(lambda folder: rewrite(folder, r=3), "does not fit", id="wrong rank"),
        pytest.param(lambda folder: rewrite(folder, target_modules=["nowhere"]), "does not fit", id="no such layer"),
        pytest.param(
            lambda folder: rewrite(folder, modules_to_save=["lm_head"]), "modules_to_save", id="whole modules"
        ),
        pytest.param(
            lambda folder: rewrite(folder, base_model_name_or_path="org/another-model"),
            "org/another-model",
            id="other base",
        ),
    ],
)
def test_what_is_no_fitting_adapter_is_a_400(
    engine: httpx.Client, adapter: Path, tmp_path: Path, spoil: Callable[[Path], Any], word: str
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "spoilt")
    spoil(folder)
    response = load(engine, "spoilt", folder)
    assert response.status_code == 400
    assert response.json()["error_type"] == "adapter"
    assert word in response.json()["error"]
    assert set(served(engine)) == {"tiny-llama"}


def test_an_adapter_for_a_model_of_another_size_is_a_400(engine: httpx.Client, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = LlamaConfig(
        vocab_size=347, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    peft = get_peft_model(LlamaForCausalLM(wider), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    peft.save_pretrained(tmp_path)
    response = load(engine, "wider", tmp_path)
    assert response.status_code == 400
    assert "q_proj" in response.json()["error"]


@pytest.mark.parametrize("name", ["tiny-llama", "tgi"])
def test_the_base_models_names_are_taken(engine: httpx.Client, adapter: Path, name: str) -> None:
    refused = load(engine, name, adapter)
    assert (refused.status_code, refused.json()["error_type"]) == (400, "adapter")
    assert name in refused.json()["error"]
    assert set(served(engine)) == {"tiny-llama"}


def test_a_path_longer_than_any_is_a_400(engine: httpx.Client) -> None:
    refused = load(engine, "far", Path("/" + "x" * 5_000))
    assert (refused.status_code, refused.json()["error"]) == (
        400,
        "lora_path: the adapter cannot be read: File name too long",
    )
