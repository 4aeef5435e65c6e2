"""Parquet, written in row groups: what has been written can be sent on before the rest is known. And Parquet read.

The main rule: columns and their types are given beforehand, whatever the rows hold, so that every export fits every
other; what is JSON is a column of its text. pyarrow comes with `hallmark[export]` and is loaded when first needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import IO, Any, Literal

import msgspec

from app.errors import InvalidRequest

Kind = Literal["text", "json", "flag", "integer", "number", "moment"]

PREDICTION_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("metadata", "passages", "citations", "tool_calls", "request", "messages", "features"), "json"),
    **dict.fromkeys(("stream", "store", "valid"), "flag"),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), "integer"),
    **dict.fromkeys(
        ("retrieve_seconds", "queue_seconds", "first_token_seconds", "engine_seconds", "total_seconds"), "number"
    ),
    "created_at": "moment",
}
"""The columns of predictions that are no plain text."""


MAX_ROW_BYTES = 4_000_000
"""Of a row that is read: what its values take."""
MAX_GROUP_BYTES = 256 << 20
"""Of a row group that is read: what it takes when it is no longer compressed."""
_ROWS_AT_ONCE = 500


class BadParquet(Exception):
    """A file that is no Parquet, is damaged, or takes too much memory."""


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
    """Makes one Parquet file of rows as JSON has them, for a start of predictions as `Prediction.as_dict` gives them.

    Args:
        columns: the columns, in their order.
        kinds: what columns hold that is no plain text.
    """

    def __init__(self, columns: Sequence[str], *, kinds: Mapping[str, Kind] = PREDICTION_KINDS) -> None:
        """Raise InvalidRequest where pyarrow is missing."""
        pyarrow, parquet = _loaded()
        self._arrow = pyarrow
        self._kinds = kinds
        self._schema = pyarrow.schema([(name, self._type(name)) for name in columns])
        self._file = _Pending()
        self._writer = parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Write rows as a group of their own; give the bytes that the file has grown by."""
        columns = [[_value(self._kinds.get(name), row.get(name)) for row in rows] for name in self._schema.names]
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
        arrow = self._arrow
        types = {
            "moment": arrow.timestamp("ms", tz="UTC"),
            "flag": arrow.bool_(),
            "integer": arrow.int64(),
            "number": arrow.float64(),
        }
        return types.get(self._kinds.get(name, "text"), arrow.string())


def read_parquet(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Give the rows of a Parquet file; a class that Hugging Face's `datasets` wrote as a number by its name.

    Raises:
        InvalidRequest: pyarrow is missing.
        BadParquet: the file cannot be read, also after some of its rows.
    """
    pyarrow, parquet = _loaded()
    try:
        metadata = parquet.read_metadata(file)
        texts = _checked_texts(metadata)
        file.seek(0)
        # A text that a file has once and refers to often is kept once: it is copied when a row's size is known.
        reader = parquet.ParquetFile(file, read_dictionary=texts)
        names = _class_names(reader.schema_arrow.metadata or {})
        for batch in reader.iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in _rows(batch):
                yield {key: _named(value, names.get(key)) for key, value in row.items()}
    except (pyarrow.ArrowException, OSError, ValueError, NotImplementedError) as error:
        raise BadParquet(f"it is no Parquet file that can be read ({type(error).__name__})") from error


def _checked_texts(metadata: Any) -> list[str]:
    """The columns of text; raises BadParquet where a row group would take too much memory."""
    columns = [metadata.schema.column(at) for at in range(metadata.num_columns)]
    for at in range(metadata.num_row_groups):
        group = metadata.row_group(at)
        chunks = [group.column(each) for each in range(group.num_columns)]
        for chunk in chunks:
            # Here a value is what it shares with the one before and a rest, so a few bytes can stand for very many.
            if "DELTA_BYTE_ARRAY" in chunk.encodings:
                raise BadParquet(f"`{chunk.path_in_schema}`: write it in another encoding than DELTA_BYTE_ARRAY")
        if sum(map(_bytes_of, columns, chunks)) > MAX_GROUP_BYTES:
            raise BadParquet(f"a row group takes more than {MAX_GROUP_BYTES >> 20} MiB; write it in smaller row groups")
    return [each.path for each in columns if each.physical_type == "BYTE_ARRAY" and each.logical_type.type != "DECIMAL"]


def _bytes_of(column: Any, chunk: Any) -> int:
    """What a column of a row group takes at most: lists come whole, so that their values count."""
    values = chunk.num_values * max(8, column.length) if column.max_repetition_level or column.length else 0
    return max(int(chunk.total_uncompressed_size), values)


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch, of which so many are made at a time as take no more than one may."""
    if sum(map(_size, batch.columns)) <= MAX_ROW_BYTES:
        yield from batch.to_pylist()
    elif batch.num_rows == 1:
        raise BadParquet(f"the row is longer than {MAX_ROW_BYTES:,} bytes")
    else:
        half = batch.num_rows // 2
        yield from _rows(batch.slice(0, half))
        yield from _rows(batch.slice(half))


def _size(array: Any) -> int:
    """The bytes that values take when each is there for itself."""
    from pyarrow import compute, types

    kind = array.type
    own = 8 * len(array)
    if types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return own + (compute.sum(lengths.cast("int64")).as_py() or 0)
    if types.is_struct(kind):
        return own + sum(map(_size, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        start, end = (array.offsets[0].as_py(), array.offsets[-1].as_py()) if len(array) else (0, 0)
        parts = (array.keys, array.items) if types.is_map(kind) else (array.values,)
        return own + sum(_size(part.slice(start, end - start)) for part in parts)
    return max(own, int(array.nbytes))


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of classes by column, where `datasets` has noted them."""
    try:
        features = msgspec.json.decode(metadata[b"huggingface"])["info"]["features"]
        return {name: each["names"] for name, each in features.items() if isinstance(each.get("names"), list)}
    except (KeyError, TypeError, AttributeError, msgspec.DecodeError):
        return {}


def _named(value: Any, names: list[str] | None) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return names[value] if names is not None and is_number and 0 <= value < len(names) else value


def _loaded() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise InvalidRequest("Parquet needs pyarrow: pip install 'hallmark[export]'.", param="format") from error
    return pyarrow, parquet


def _value(kind: Kind | None, value: Any) -> Any:
    if value is None:
        return None
    if kind == "json":
        return msgspec.json.encode(value).decode()
    if kind == "moment" and isinstance(value, str):
        return datetime.fromisoformat(value)
    return value
