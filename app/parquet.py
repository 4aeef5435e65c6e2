"""Predictions as Parquet, written in row groups: what has been written can be sent on before the rest is known.

The main rule: columns and their types are fixed here, whatever the rows hold, so that every export fits every other;
what is JSON is a column of its text. pyarrow comes with `hallmark[export]` and is loaded when it is first needed.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from app.errors import InvalidRequest

_INTEGERS = frozenset({"prompt_tokens", "completion_tokens"})
_JSON = frozenset({"metadata", "passages", "citations", "tool_calls", "request", "messages"})


class _Pending:
    """A file that remembers what was written until it is taken."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._position = 0
        self.closed = False

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._position += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def take(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken


class ParquetWriter:
    """Makes one Parquet file of predictions, given as `Prediction.as_dict` or its JSON has them."""

    def __init__(self, columns: Sequence[str]) -> None:
        """Raise InvalidRequest where pyarrow is missing."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise InvalidRequest("Parquet needs pyarrow: pip install 'hallmark[export]'.", param="format") from error
        self._arrow = pyarrow
        self._schema = pyarrow.schema([(name, self._type(name)) for name in columns])
        self._file = _Pending()
        self._writer = parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Write rows as a group of their own; give the bytes that the file has grown by."""
        columns = [[_value(name, row.get(name)) for row in rows] for name in self._schema.names]
        arrays = [
            self._arrow.array(values, type=field.type) for values, field in zip(columns, self._schema, strict=True)
        ]
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema), row_group_size=len(rows))
        return self._file.take()

    def finish(self) -> bytes:
        """Write the file's end and give it."""
        self._writer.close()
        return self._file.take()

    def _type(self, name: str) -> Any:
        if name == "created_at":
            return self._arrow.timestamp("ms", tz="UTC")
        if name in ("stream", "store", "valid"):
            return self._arrow.bool_()
        if name in _INTEGERS:
            return self._arrow.int64()
        return self._arrow.float64() if name.endswith("_seconds") else self._arrow.string()


def _value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _JSON:
        return msgspec.json.encode(value).decode()
    if name == "created_at" and isinstance(value, str):
        return datetime.fromisoformat(value)
    return value
