"""The columns of a pool: checked, and sorted by class."""

import os
import tempfile
import threading
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.uids import uid_bytes

# distance of a norm from 1 that rounding to float16 explains several times over
NORM_TOLERANCE = 1e-2

# of embeddings that are moved at once; several such blocks are on their way at a time
BLOCK_BYTES = 32 << 20

OPTIONAL_COLUMNS = (
    "image_hash",
    "caption_hash",
    "caption_length",
    "caption_words",
    "caption",
    "width",
    "height",
    "early_similarity",
    "clip_l14_similarity_score",
    "clip_b32_similarity_score",
    "source_id",
)


# numbers that only filters read
FOR_FILTERS = ("width", "height", "clip_l14_similarity_score", "clip_b32_similarity_score")

# what DataComp, img2dataset and clip-retrieval call a column: the first that there is counts. A size is that
# of the image as it was found, before it was made smaller
NAMES = {
    "caption": ("caption", "text"),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
}


class OptionalColumns(TypedDict, total=False):
    """Columns that only some methods read, [N] each; None where they are not known.

    image_hash, caption_hash: equal where image bytes or captions are (for ``dedup``, filters).
    caption_length, caption_words: integers, in characters, and in words between white space (for filters).
    caption: text (for filters); the three above follow from it where they are not given.
    width, height: of the image, in pixels (for the filter basic).
    early_similarity: floats, <v, t> by an early proxy (for ``c_rho``).
    clip_l14_similarity_score, clip_b32_similarity_score: floats, as in DataComp's metadata (for filters).
    source_id: text, another id by which people may name a sample; None where it has none.
    """

    image_hash: np.ndarray | None
    caption_hash: np.ndarray | None
    caption_length: np.ndarray | None
    caption_words: np.ndarray | None
    caption: np.ndarray | None
    width: np.ndarray | None
    height: np.ndarray | None
    early_similarity: np.ndarray | None
    clip_l14_similarity_score: np.ndarray | None
    clip_b32_similarity_score: np.ndarray | None
    source_id: np.ndarray | None


# (pool rows [b], image embeddings [b, d], caption embeddings [b, d])
Blocks = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


def sort_by_class(latent_class: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stable order by class (int64 [N]) and where each class begins (int64 [K+1])."""
    starts = np.zeros(int(latent_class.max()) + 2, np.int64)
    np.cumsum(np.bincount(latent_class, minlength=len(starts) - 1), out=starts[1:])
    return np.argsort(latent_class, kind="stable"), starts


def make_rows(
    shape: tuple[int, int], dtype: Any, scratch_dir: str | Path | None
) -> tuple[np.ndarray, Path | None]:
    """Room for the sorted rows: memory, or a new memory-mapped file in ``scratch_dir`` (and its path).

    Raises:
        InputError: the disk has not the room.
    """
    if scratch_dir is None:
        return np.empty(shape, dtype), None
    folder = Path(scratch_dir)
    folder.mkdir(parents=True, exist_ok=True)
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < size:
        raise InputError(
            f"scratch folder {folder}: found {free / 1e9:.1f} GB free, "
            f"expected {size / 1e9:.1f} GB; choose another"
        )
    handle, name = tempfile.mkstemp(prefix="pool-", suffix=".rows", dir=folder)
    # not opened as a new file: some file systems write a file that was emptied to the disk when it is closed
    os.ftruncate(handle, size)
    os.close(handle)
    return np.memmap(name, dtype, "r+", shape=shape), Path(name)


class RowFile:
    """Writes rows to their places in a scratch file; threads may share it.

    By the system's calls for files, not through the memory map: a page that is first touched by a store costs
    a fault of its own, and those were most of the time of reading a table.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._own = os.open(path, os.O_RDWR), threading.local()

    def room(self, shape: tuple[int, int], dtype: Any) -> np.ndarray:
        """An array to join rows in, the thread's own: new memory for a block costs as much as the block."""
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        if len(getattr(self._own, "room", b"")) < size:
            self._own.room = np.empty(size, np.uint8)
        return self._own.room[:size].view(dtype).reshape(shape)

    def put(self, rows: np.ndarray, into: np.ndarray) -> None:
        """Write rows [b, 2d], contiguous, to places that ascend."""
        if len(rows) == 0:
            return
        width, data = rows.strides[0], memoryview(rows).cast("B")  # type: ignore[arg-type]  # an array is a buffer
        ends = np.append(np.flatnonzero(np.diff(into) != 1) + 1, len(into)).tolist()
        at = 0
        for end, place in zip(ends, into[[0, *ends[:-1]]].tolist(), strict=True):
            done = 0
            while done < (end - at) * width:
                part = data[at * width + done : end * width]
                done += os.pwrite(self._file, part, place * width + done)
            at = end

    def close(self) -> None:
        os.close(self._file)


def array_blocks(image: np.ndarray, text: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Two arrays (memory-mapped ones are fine) in blocks of ``BLOCK_BYTES``, with their rows."""
    step = max(1, BLOCK_BYTES // (2 * image.shape[1] * image.itemsize))
    for at in range(0, len(image), step):
        stop = min(at + step, len(image))
        yield np.arange(at, stop), image[at:stop], text[at:stop]


def called(wanted: Iterable[str], names: Container[str]) -> dict[str, str]:
    """Those of the wanted columns that there are among ``names``, and what they are called there."""
    found = {name: next((own for own in NAMES.get(name, (name,)) if own in names), None) for name in wanted}
    return {name: own for name, own in found.items() if own is not None}


def captions_of(values: Any) -> Any:
    """Captions as a polars series of text, one that is missing as an empty one."""
    import polars as pl

    array = np.asarray(values)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    return pl.Series(array.tolist(), dtype=pl.String, strict=False).fill_null("")


def caption_columns(captions: Any) -> dict[str, np.ndarray]:
    """``caption_hash``, ``caption_length`` (characters) and ``caption_words`` of captions, [n] each.

    captions: a polars series of text without nulls. Words are what Python's ``str.split()`` gives.
    """
    return {
        "caption_hash": captions.hash(seed=0).to_numpy(),
        "caption_length": captions.str.len_chars().to_numpy(),
        "caption_words": captions.str.count_matches(r"[^\s\x1c-\x1f]+").to_numpy(),
    }


def sortable(values: np.ndarray | None) -> np.ndarray | None:
    """Hashes as numbers or bytes; text and Python objects become bytes (a missing one is its own value)."""
    if values is None or values.dtype.kind not in "OU":
        return values
    return np.asarray(
        [value if isinstance(value, bytes) else str(value).encode() for value in values.tolist()]
    )


def other_names(values: np.ndarray | None) -> np.ndarray | None:
    """Other ids as bytes, empty where a sample has none."""
    if values is None or values.dtype.kind == "S":
        return values
    return np.asarray([b"" if value is None else str(value).encode() for value in values.tolist()], np.bytes_)


def remove_scratch(path: Path) -> None:
    path.unlink(missing_ok=True)


def check_column(name: str, values: Any, n: int) -> Any:
    if values is None:
        return None
    values = np.asarray(values)
    if values.shape != (n,):
        raise InputError(f"{name}: found shape {values.shape}, expected ({n},), one value a pair")
    return values


def check_classes(values: Any, n: int, n_classes: int | None) -> np.ndarray:
    """Latent classes as int32 [n].

    Raises:
        InputError: another shape, no integers, below 0, or not below ``n_classes``.
    """
    values = check_column("latent_class", values, n)
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"latent_class: found {values.dtype}, expected integers")
    low, high = int(values.min()), int(values.max())
    if low < 0 or (n_classes is not None and high >= n_classes):
        wrong, limit = (low if low < 0 else high), ("" if n_classes is None else f" to {n_classes - 1}")
        raise InputError(
            f"latent_class: found {wrong}, expected 0{limit or ' or more'}, a place in the class list"
        )
    if high >= 2**31 - 1:
        raise InputError(f"latent_class: found {high}, expected less than {2**31 - 1}")
    return np.ascontiguousarray(values, np.int32)


def check_similarity(values: Any, n: int) -> np.ndarray:
    """Label similarities as float32 [n].

    Raises:
        InputError: another shape, or a value that is not finite.
    """
    values = np.ascontiguousarray(check_column("label_similarity", values, n), np.float32)
    if not np.isfinite(values).all():
        bad = int(np.argmin(np.isfinite(values)))
        raise InputError(f"label_similarity: found {values[bad]} at row {bad}, expected finite numbers")
    return values


def check_uids(values: Any, n: int) -> np.ndarray:
    """uids as bytes [n].

    Raises:
        InputError: as `uid_bytes`; another number of them, or one that comes again.
    """
    uid = check_column("uid", uid_bytes(values), n)
    ordered = np.sort(uid)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]].tolist()
    if repeated:
        raise InputError(f"uid: found {repeated[0].decode()!r} more than once, expected distinct uids")
    return uid


def check_embeddings(image_embedding: np.ndarray, text_embedding: np.ndarray) -> int:
    """Return the number of pairs of two [N, d] arrays of floats.

    Raises:
        InputError: no pair, two shapes, or no floats.
    """
    n = len(image_embedding)
    if n == 0:
        raise InputError("pool: found 0 pairs, expected at least 1")
    if image_embedding.ndim != 2 or image_embedding.shape != text_embedding.shape:
        raise InputError(
            f"embeddings: found image {image_embedding.shape} and text {text_embedding.shape}, "
            "expected two [N, d] arrays of one shape"
        )
    if not all(np.issubdtype(a.dtype, np.floating) for a in (image_embedding, text_embedding)):
        raise InputError(
            f"embeddings: found {image_embedding.dtype} and {text_embedding.dtype}, "
            "expected float16 or float32"
        )
    return n
