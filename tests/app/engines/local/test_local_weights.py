from pathlib import Path

import pytest

from app.engines.local.weights import WeightsUnavailable, find_weights, is_hub_id


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
