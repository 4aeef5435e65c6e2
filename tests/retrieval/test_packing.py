"""The packed forward pass against the library's own, on small models with random weights."""

from typing import Any

import pytest

from retrieval.packing import pack

ROWS = [[2, 17, 4, 3], [2, 3], [2, 5, 6, 7, 8, 9, 3]]
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 1,
}


class Transformer:
    """What sentence-transformers wraps a model in."""

    def __init__(self, model: Any) -> None:
        self.auto_model = model.eval()

    def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
        return {"token_embeddings": self.auto_model(**features).last_hidden_state}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "Roberta"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [ROWS[2], ROWS[2][::-1]]], ids=["mixed", "lone", "same length"])
def test_a_packed_model_gives_the_numbers_of_its_own_code(name: str, rows: list[list[int]]) -> None:
    import torch
    import transformers

    torch.manual_seed(7)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SIZES)).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]
        found = pack(Transformer(model), 1)(rows)
    assert found["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    for own, row in zip(expected, found["token_embeddings"], strict=True):
        torch.testing.assert_close(row[: len(own)], own, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_unusual_bert_runs_by_its_own_code() -> None:
    import torch
    import transformers

    model = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="relu")).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ROWS[:1])).last_hidden_state
        found = pack(Transformer(model), 1)(ROWS[:1])
    torch.testing.assert_close(found["token_embeddings"], expected, rtol=1e-4, atol=1e-5)
