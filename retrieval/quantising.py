"""A transformer's forward pass in integers of eight bits, by ONNX Runtime: made of the model once, and kept.

The main rule: what is loaded was made of exactly these weights, by these versions of the libraries: a file is found by
their digest. Its vectors differ from the model's own, so that it counts as another model.
"""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from retrieval.errors import IndexUnavailable
from retrieval.packing import Transform

_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
_NAMES = ["input_ids", "attention_mask"]


def quantise(transformer: Any, padding_id: int, *, threads: int, cache: Path) -> Transform:
    """Return the forward pass of a sentence-transformers `Transformer`, from `cache` if it is there.

    Raises:
        IndexUnavailable: The libraries are not installed, or they cannot express this model.
    """
    try:
        import onnxruntime

        path = cache / f"{_digest(transformer.auto_model)}.onnx"
        if not path.exists():
            _make(transformer.auto_model, path)
    except ImportError as error:
        raise IndexUnavailable(
            "The backend onnx-int8 needs packages that are not installed: `pip install 'hallmark[onnx]'`."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return _Quantised(session, padding_id)


def _digest(model: Any) -> str:
    found = hashlib.sha256(json.dumps([version(library) for library in _LIBRARIES]).encode())
    found.update(model.config.to_json_string().encode())
    for name, weights in model.state_dict().items():
        found.update(name.encode())
        found.update(weights.contiguous().numpy().data)
    return found.hexdigest()[:32]


def _make(model: Any, path: Path) -> None:
    """Export and quantise a model: half a minute of a core. The file is there as a whole or not at all."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    example = torch.ones(2, 8, dtype=torch.long)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        exported, quantised = Path(folder, "exported.onnx"), Path(folder, "quantised.onnx")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # The exporter warns of its own code, not of the model.
                torch.onnx.export(
                    Hidden().eval(),
                    (example, torch.ones_like(example)),  # One tensor twice would be taken for one input.
                    exported,
                    input_names=_NAMES,
                    output_names=["hidden"],
                    dynamic_shapes=(axes, axes),
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            raise IndexUnavailable(
                "The embedding model cannot be exported for the backend onnx-int8: use the backend torch."
            ) from error
        quantize_dynamic(exported, quantised, weight_type=QuantType.QInt8, per_channel=True)
        quantised.replace(path)


class _Quantised:
    def __init__(self, session: Any, padding_id: int) -> None:
        self._session = session
        self._padding_id = padding_id

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        import torch

        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self._padding_id] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        (hidden,) = self._session.run(None, dict(zip(_NAMES, (ids.numpy(), mask.numpy()), strict=True)))
        return {"token_embeddings": torch.from_numpy(hidden), "attention_mask": mask}
