"""A run's settings: one file, options on top, and errors that name the field."""

from pathlib import Path
from typing import Any

import pytest

from finetune.config import TrainConfig, load_config
from finetune.errors import BadConfig

GIVEN: dict[str, Any] = {"dataset": "d", "base": "b", "output": "o"}


def test_options_go_on_top_of_the_file_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    file = tmp_path / "train.toml"
    file.write_text('dataset = "data"\nbase = "base"\noutput = "adapter"\nrank = 4\nepochs = 2')
    config = load_config(file, {"rank": 8, "epochs": None})
    assert (config.rank, config.epochs) == (8, 2)
    assert (config.dataset, config.output) == (tmp_path / "data", tmp_path / "adapter")
    assert config.base == str(tmp_path / "base")


def test_a_base_that_is_no_folder_beside_the_file_is_a_hub_id(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text('dataset = "data"\nbase = "org/model"\noutput = "adapter"')
    assert load_config(file, {}).base == "org/model"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"base": None}, "base: is missing; give it in the file or as --base"),
        ({"rnak": 4}, "rnak: there is no such setting; known are accumulate, .* rank"),
        ({"rank": 0}, "rank: .*greater than or equal to 1, not 0"),
        ({"learning_rate": "fast"}, "learning_rate: .*number.*, not 'fast'"),
        ({"device": "cpu", "quantize": "nf4"}, "quantize: bitsandbytes needs a GPU"),
        ({"prompt": "Which team?"}, r"prompt: the template has no `\{question\}`"),
    ],
)
def test_a_wrong_setting_is_told_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(BadConfig, match=told):
        load_config(None, GIVEN | given)


def test_a_file_that_is_no_toml_is_told(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text("rank: 4")
    with pytest.raises(BadConfig, match=r"train\.toml: "):
        load_config(file, GIVEN)


def test_the_recipe_leaves_out_where_things_lie() -> None:
    here, there = (TrainConfig(**(GIVEN | {"output": where, "dataset": where})) for where in ("here", "there"))
    assert here.recipe == there.recipe
    assert here.recipe != TrainConfig(**GIVEN, seed=1).recipe
