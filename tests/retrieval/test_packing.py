"""The packed forward pass against the library's own, on small models with random weights."""

from typing import Any

import pytest

from retrieval.packing import pack

ROWS = [[2, 17, 4, 3], [2, 3], [2, 5, 6, 7, 8, 9, 3]]
LONG = [[2, *range(4, 30), *range(4, 30), *range(4, 30), 3], [2, 4, 5, 3], [2, *range(4, 25), 3]]
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
@pytest.mark.parametrize(
    "rows",
    [ROWS, ROWS[:1], [ROWS[2], ROWS[2][::-1]], LONG, LONG[:1], [LONG[0], LONG[0][::-1]] * 4],
    ids=["mixed", "lone", "same length", "long", "long and lone", "long and of the same length"],
)
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
@pytest.mark.parametrize("rows", [ROWS, LONG], ids=["short", "long"])
def test_a_model_of_half_precision_stays_near_the_numbers_of_its_own_code(rows: list[list[int]]) -> None:
    import torch
    import transformers

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no instructions for products of bfloat16: the embedder does not choose it here")
    torch.manual_seed(7)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]
        found = pack(Transformer(model.to(torch.bfloat16)), 1)(rows)["token_embeddings"]
    assert found.dtype == torch.float32
    for own, row in zip(expected, found, strict=True):
        torch.testing.assert_close(row[: len(own)], own, rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("Bert", {8, 16, 24, 32, 40, 48}), ("Roberta", {16, 32, 48, 64, 80, 96})])
def test_linear_layers_meet_few_numbers_of_rows_whatever_the_lengths_of_the_texts(name: str, rows: set[int]) -> None:
    import torch
    import transformers

    met: set[int] = set()

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_linear_pointwise" in str(function):
                met.add(args[0].shape[:-1].numel())
            return function(*args, **(kwargs or {}))

    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SIZES))
    packed = pack(Transformer(model.eval()), 1)
    with torch.inference_mode(), Watching():
        for length in range(3, 40):
            packed([[2, *[4] * length, 3], [2, 5, 3]])
        assert {each for each in met if each > 2} == rows, "the pooler's row is one a text"
        packed([[2, 5, 3]])
    assert 3 in met, "a lone text is not padded"


@pytest.mark.slow
def test_an_unusual_bert_runs_by_its_own_code() -> None:
    import torch
    import transformers

    model = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="relu")).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ROWS[:1])).last_hidden_state
        found = pack(Transformer(model), 1)(ROWS[:1])
    torch.testing.assert_close(found["token_embeddings"], expected, rtol=1e-4, atol=1e-5)
