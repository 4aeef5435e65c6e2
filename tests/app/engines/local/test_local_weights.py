import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from app.engines.local import EngineSettings
from app.engines.local.model import LoadedModel, load
from app.engines.local.protocol import Fault
from app.engines.local.service import EngineService
from app.engines.local.weights import Weights, WeightsUnavailable, find_weights, is_hub_id


def test_a_folder_is_loaded_where_it_lies(tiny_folder: Path, tmp_path: Path) -> None:
    weights = find_weights(str(tiny_folder), tmp_path)
    assert weights.location == str(tiny_folder)
    assert weights.model_id == tiny_folder.name


def test_a_hub_id_is_left_to_the_hub(tmp_path: Path) -> None:
    assert find_weights("org/model", tmp_path).location == "org/model"


@pytest.mark.parametrize(
    ("model", "hub"),
    [
        ("org/model", True),
        ("smollm2-135m-instruct", False),
        ("/srv/model", False),
        ("./model", False),
        ("x.gguf", False),
    ],
)
def test_only_names_that_are_nothing_else_are_hub_ids(model: str, hub: bool) -> None:
    assert is_hub_id(model) == hub


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "nowhere.gguf"])
def test_a_missing_path_is_told(model: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="there is no"):
        find_weights(model, tmp_path)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"config\.json"):
        find_weights(str(tmp_path), tmp_path)


def test_a_gguf_that_is_none_is_told_and_leaves_no_model(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF garbage")
    for _ in range(2):
        with pytest.raises(WeightsUnavailable, match=r"broken\.gguf cannot be converted"):
            find_weights(str(tmp_path / "broken.gguf"), tmp_path / "cache")


@pytest.mark.parametrize("content", ['{"x": 1}', "[]", "{", '{"model_id": 1, "gguf_sha256": null}', "[" * 100_000])
def test_another_s_hallmark_json_is_told(tiny_folder: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "hallmark.json").write_text(content)
    with pytest.raises(WeightsUnavailable, match=r"hallmark\.json is not as this engine writes it"):
        find_weights(str(folder), tmp_path)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: cut(folder / "model.safetensors"), id="half copied"),
        pytest.param(lambda folder: (folder / "config.json").write_text('{"model_type":'), id="no config"),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("[]"), id="no tokenizer"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_told(
    tiny_folder: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    spoil(folder)
    with pytest.raises(WeightsUnavailable, match=f"{folder} cannot be loaded"):
        load(Weights(str(folder), "model"), "fp32")


def test_an_adapter_of_the_settings_that_is_none_is_told_before_anything_is_served(tiny: LoadedModel) -> None:
    with pytest.raises(Fault, match=r"/nowhere has no adapter_config\.json"):
        EngineService(tiny, EngineSettings(adapters=(("tone", Path("/nowhere")),)))
