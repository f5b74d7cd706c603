"""uids in the forms in which people keep them, as text: 128 bits in binary are 32 hex digits."""

from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError


def uid_bytes(values: Any, where: str = "uid") -> np.ndarray:
    """Return uids as UTF-8 bytes [n].

    Args:
        values: [n], a pyarrow or numpy array or a list: text, integers (their decimal digits), or 16 bytes
            each (binary, fixed-size binary, Arrow's uuid, ``uuid.UUID``: their 32 hex digits).
        where: begins the line of an error.

    Raises:
        InputError: a uid is missing, or they are of another type.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "SUVui":
        return _from_numpy(values, where)
    import pyarrow as pa

    if not isinstance(values, pa.Array | pa.ChunkedArray):
        values = _to_arrow(values, where)
    return _from_arrow(values, where)


def _from_numpy(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype.kind == "V":
        if values.dtype.itemsize != 16 or values.dtype.names:
            raise InputError(f"{where}: found {values.dtype}, expected text, integers or 16 bytes each")
        return _hex(np.ascontiguousarray(values).tobytes())
    if values.dtype.kind == "S":
        plain = np.ascontiguousarray(values)
        if plain.size and plain.view(np.uint8).max() > 127:
            try:
                np.char.decode(plain, "utf-8")
            except UnicodeDecodeError:
                raise InputError(
                    f"{where}: found bytes that are no text, expected text, hex digits, or V16 for 128 bits"
                ) from None
        return values
    return np.char.encode(values.astype(str), "utf-8")


def _to_arrow(values: Any, where: str) -> Any:
    import uuid

    import pyarrow as pa

    if isinstance(values, np.ndarray) and values.dtype.kind == "O":
        values = values.tolist()
    if isinstance(values, list | tuple):
        values = [value.hex if isinstance(value, uuid.UUID) else value for value in values]
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise InputError(
            f"{where}: found uids of several types, expected all text, all integers or 16 bytes each"
        ) from None


def _from_arrow(column: Any, where: str) -> np.ndarray:
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        _refuse_missing(column, where)
        parts = [_from_arrow(chunk, where) for chunk in column.chunks if len(chunk)]
        return np.concatenate(parts) if parts else np.empty(0, "S1")
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    _refuse_missing(column, where)
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _from_arrow(column.dictionary_decode(), where)
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        column = column.cast(pa.large_binary())
        if len(column) and _width(column) == 16:
            return _hex(_data(column))
    elif not (
        pa.types.is_integer(kind) or pa.types.is_null(kind) or pa.types.is_string(kind)
        or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):  # fmt: skip
        raise InputError(f"{where}: found the type {kind}, expected text, integers or 16 bytes each")
    return _text(column, where)


def _refuse_missing(column: Any, where: str) -> None:
    if column.null_count:
        first = int(np.argmax(column.is_null().to_pylist()))
        raise InputError(
            f"{where}: found {column.null_count} of {len(column)} uids missing, first in row {first},"
            " expected one each; give them uids, or leave these rows out"
        )


def _text(column: Any, where: str) -> np.ndarray:
    """Bytes of text, with no Python object for each where all have one length."""
    import pyarrow as pa

    try:
        column = column.cast(pa.large_string())
    except pa.ArrowInvalid:
        raise InputError(
            f"{where}: found bytes that are neither text nor 16 each, expected text, integers or 16 bytes"
        ) from None
    width = _width(column) if len(column) else 0
    if width:
        return np.frombuffer(_data(column), np.uint8).view(f"S{width}").copy()
    return np.char.encode(np.asarray(column.to_pylist(), str), "utf-8")


def _width(column: Any) -> int:
    """Bytes of each value of a large binary or string column, 0 where they differ."""
    offsets = _offsets(column)
    width = int(offsets[1] - offsets[0])
    return width if (np.diff(offsets) == width).all() else 0


def _data(column: Any) -> memoryview:
    offsets = _offsets(column)
    return memoryview(column.buffers()[2])[int(offsets[0]) : int(offsets[-1])]


def _offsets(column: Any) -> np.ndarray:
    return np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]


def _hex(data: bytes | memoryview) -> np.ndarray:
    return np.frombuffer(bytes(data).hex().encode(), "S32")
