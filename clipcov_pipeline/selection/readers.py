"""Reads embeddings and the columns beside them from arrays, parquet files, and clip-retrieval's folders."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.columns import (
    FOR_FILTERS,
    NAMES,
    OPTIONAL_COLUMNS,
    Blocks,
    array_blocks,
    called,
    caption_columns,
    captions_of,
)
from clipcov_pipeline.selection.methods import Captions
from clipcov_pipeline.selection.uids import uid_bytes

EMBEDDINGS = ("image_embedding", "text_embedding")
LABELS = ("latent_class", "label_similarity")
_BATCH_ROWS = 16384


class Arrays:
    """Image and caption embeddings in one or more pairs of arrays (memory-mapped), and columns beside them.

    Raises:
        InputError: shapes that differ, or no floats.
    """

    def __init__(self, pairs: list[tuple[np.ndarray, np.ndarray]], columns: dict[str, Any]) -> None:
        for image, text in pairs:
            if image.ndim != 2 or image.shape != text.shape or image.shape[1] != pairs[0][0].shape[1]:
                raise InputError(
                    f"embeddings: found image {image.shape} and text {text.shape}, expected one shape [n, d]"
                )
            if image.dtype.kind != "f" or text.dtype.kind != "f":
                raise InputError(
                    f"embeddings: found {image.dtype} and {text.dtype}, expected float16 or float32"
                )
        self._pairs, self._columns = pairs, columns

    def columns(self, captions: Captions) -> dict[str, Any]:
        """The columns there are; those that are made of captions where captions are asked for."""
        found = dict(self._columns)
        found |= {name: found[own] for name, own in called(NAMES, found).items()}
        return _with_captions(found, captions)

    def shape(self) -> tuple[int, int, Any]:
        """N, d, and the type to keep the embeddings in; raises InputError where there is no pair."""
        n = sum(len(image) for image, _ in self._pairs)
        if n == 0:
            raise InputError("pool: found 0 pairs, expected at least 1")
        half = all(image.dtype == text.dtype == np.float16 for image, text in self._pairs)
        return n, self._pairs[0][0].shape[1], np.float16 if half else np.float32

    def blocks(self) -> Blocks:
        """All pairs, as `Pool.from_blocks` takes them."""
        at = 0
        for image, text in self._pairs:
            for rows, one, other in array_blocks(image, text):
                yield rows + at, one, other
            at += len(image)


class Parquet:
    """A parquet file, or several one after the other, whose embeddings are lists of floats.

    Raises:
        InputError: a file that is not readable or lacks the embeddings.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [(path, _open(path)) for path in paths]
        for path, file in self._files:
            names = file.schema_arrow.names
            if missing := [name for name in EMBEDDINGS if name not in names]:
                raise InputError(f"{path}: missing column {', '.join(missing)}; found {', '.join(names)}")

    def columns(self, captions: Captions) -> dict[str, Any]:
        """The columns there are; those that are made of captions where captions are asked for."""
        wanted = ["uid", *LABELS, *OPTIONAL_COLUMNS]
        without_text = [name for name in wanted if name != "caption"]
        return _with_captions(_read_columns(self._files, wanted if captions else without_text), captions)

    def shape(self) -> tuple[int, int, Any]:
        """N, d, and the type to keep the embeddings in; raises InputError where there is no pair."""
        n = sum(file.metadata.num_rows for _, file in self._files)
        if n == 0:
            raise InputError(f"{self._files[0][0]}: found 0 pairs, expected at least 1")
        _, image, text = next(self.blocks())
        half = image.dtype == text.dtype == np.float16
        return n, image.shape[1], np.float16 if half else np.float32

    def blocks(self) -> Blocks:
        """All pairs, as `Pool.from_blocks` takes them."""
        at = 0
        for path, file in self._files:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(EMBEDDINGS)):
                rows = np.arange(at, at + len(batch))
                yield rows, _matrix(path, batch, EMBEDDINGS[0]), _matrix(path, batch, EMBEDDINGS[1])
                at += len(batch)


class Metadata:
    """Parquet files with, beside each, an ``.npz`` of CLIP ViT-L/14 embeddings: DataComp's metadata.

    Raises:
        InputError: a file that is not readable, or of another number of rows than the one beside it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [(path, _open(path)) for path in paths]

    def columns(self, captions: Captions) -> dict[str, Any]:
        """As `Parquet.columns`."""
        wanted = ["uid", *(["caption"] if captions else []), *FOR_FILTERS]
        return _with_captions(_read_columns(self._files, wanted), captions)

    def shape(self) -> tuple[int, int, Any]:
        """As `Parquet.shape`."""
        n = sum(file.metadata.num_rows for _, file in self._files)
        if n == 0:
            raise InputError(f"{self._files[0][0]}: found 0 pairs, expected at least 1")
        _, image, _ = next(self.blocks())
        return n, image.shape[1], image.dtype

    def blocks(self) -> Blocks:
        """All pairs, as `Pool.from_blocks` takes them."""
        at = 0
        for path, file in self._files:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                image, text = arrays["l14_img"], arrays["l14_txt"]
            if not len(image) == len(text) == file.metadata.num_rows:
                raise InputError(
                    f"{path}: found {file.metadata.num_rows} rows, and {len(image)} images and {len(text)}"
                    " captions in the .npz beside it, expected as many; download both again"
                )
            for rows, one, other in array_blocks(image, text):
                yield rows + at, one, other
            at += len(image)


def open_reader(source: Path, text: Path | None) -> Arrays | Parquet | Metadata:
    """What reads a source; ``text``: the caption embeddings, where source is an ``.npy``.

    Raises:
        InputError: another kind of source, or one whose parts do not fit each other.
    """
    if source.is_dir():
        if (source / "img_emb").is_dir() and (source / "text_emb").is_dir():
            return _clip_retrieval(source)
        if parts := _parquet_parts(source):
            beside = [part.with_suffix(".npz").exists() for part in parts]
            return Metadata(parts) if all(beside) else Parquet(parts)
    elif source.suffix == ".parquet":
        return Parquet([source])
    elif source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as arrays:
            if missing := [name for name in EMBEDDINGS if name not in arrays]:
                raise InputError(f"{source}: missing array {', '.join(missing)}; found {', '.join(arrays)}")
            found = {name: arrays[name] for name in arrays}
        return Arrays([(found.pop("image_embedding"), found.pop("text_embedding"))], found)
    elif source.suffix == ".npy":
        if text is None:
            raise InputError(
                f"source: {source} holds image embeddings; give those of the captions with --text"
            )
        return Arrays([(read_array(source), read_array(text))], {})
    raise InputError(
        f"source: found {source}, expected a .lance table, .parquet (a file, or a folder of them), .npz, "
        ".npy, or a folder with img_emb and text_emb"
    )


def _parquet_parts(folder: Path) -> list[Path]:
    """The parquet files of a folder as Spark writes one, by name; hidden files (``_`` and ``.``) are none."""
    parts = []
    for path in sorted(folder.rglob("*.parquet")):
        inside = path.relative_to(folder).parts
        if path.is_dir() or any(part.startswith(("_", ".")) for part in inside):
            continue
        if split := next((part for part in inside[:-1] if "=" in part), None):
            raise InputError(
                f"{folder}: found the folder {split}, whose name is a column, expected plain parquet files:"
                " write them without partitionBy"
            )
        parts.append(path)
    return parts


def _clip_retrieval(folder: Path) -> Arrays:
    """``img_emb/img_emb_N.npy``, ``text_emb/text_emb_N.npy``, ``metadata/metadata_N.parquet``, N in numeric
    order."""
    images, texts = (_numbered(folder / name, "*.npy") for name in ("img_emb", "text_emb"))
    metadata = _numbered(folder / "metadata", "*.parquet")
    numbers = [[_numbers(path) for path in files] for files in (images, texts, metadata or images)]
    if not images or numbers[0] != numbers[1] or numbers[0] != numbers[2]:
        raise InputError(
            f"{folder}: found {len(images)} image, {len(texts)} text and {len(metadata)} metadata files,"
            " expected those of the same numbers (metadata may be left out)"
        )
    pairs = [(read_array(i), read_array(t)) for i, t in zip(images, texts, strict=True)]
    for image, text, (i, t) in zip(images, texts, pairs, strict=True):
        if len(i) != len(t):
            raise InputError(
                f"{folder}: found {len(i)} rows in {image.name} and {len(t)} in {text.name}, expected as many"
            )
    rows = [len(image) for image, _ in pairs]
    return Arrays(pairs, _metadata(images, rows, metadata) if metadata else {})


def _metadata(images: list[Path], rows: list[int], metadata: list[Path]) -> dict[str, Any]:
    """uid and caption of all parts; what else the json held, and in which order, may differ."""
    files = [(path, _open(path)) for path in metadata]
    for image, n, (path, file) in zip(images, rows, files, strict=True):
        if file.metadata.num_rows != n:
            raise InputError(
                f"{path}: found {file.metadata.num_rows} rows, expected {n} as in {image.name}: uids would"
                " go to other pairs; write this part again"
            )
    return _read_columns(files, ["uid", "caption", *FOR_FILTERS])


def _read_columns(files: list[tuple[Path, Any]], wanted: Sequence[str]) -> dict[str, Any]:
    """Columns of parquet files, one file after the other, under our names; those that there are."""
    shared = _in_every_part([(path, file.schema_arrow.names) for path, file in files], wanted)
    tables = [file.read(columns=list(shared.values())) for _, file in files]
    found: dict[str, Any] = {}
    for name, own in shared.items():
        columns = [table[own] for table in tables]
        if name == "uid":
            found[name] = _joined(columns, [path for path, _ in files])
        else:
            # as text, else a missing one makes floats of numbers
            columns = [part.cast("string") for part in columns] if name == "source_id" else columns
            found[name] = np.concatenate([part.to_numpy() for part in columns])
    return found


def _with_captions(columns: dict[str, Any], captions: Captions) -> dict[str, Any]:
    """The columns, and in place of the captions what is asked for of them."""
    text = columns.pop("caption", None)
    if not captions or text is None:
        return columns
    texts = captions_of(text)
    kept = {"caption": texts.to_numpy()} if captions == "text" else {}
    return columns | caption_columns(texts) | kept


def _in_every_part(parts: list[tuple[Path, list[str]]], wanted: Sequence[str]) -> dict[str, str]:
    """Those of the wanted columns that there are, and what they are called; InputError where a part has one
    and another has not (but for those that few methods read)."""
    shared = {}
    for name in wanted:
        for own in NAMES.get(name, (name,)):
            without = [path for path, names in parts if own not in names]
            if without and len(without) < len(parts) and name not in FOR_FILTERS:
                raise InputError(
                    f"{without[0]}: missing column {own}, which other parts have ({len(without)} of"
                    f" {len(parts)} parts lack it); write it into all of them or into none"
                )
            if not without:
                shared.setdefault(name, own)
    return shared


def _joined(parts: list[Any], paths: Sequence[Path]) -> np.ndarray:
    """uids of several parts, which may store them in different types."""
    return np.concatenate([uid_bytes(part, f"{path}: uid") for part, path in zip(parts, paths, strict=True)])


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from None


def _matrix(path: Path, batch: Any, name: str) -> np.ndarray:
    column = batch.column(name)
    values = column.flatten().to_numpy(zero_copy_only=False) if hasattr(column, "flatten") else np.empty(0)
    if column.null_count or len(values) == 0 or len(values) % len(column):
        raise InputError(f"{path}: {name} has rows of unequal length or none; expected d floats in each")
    return values.reshape(len(column), -1)


def _numbered(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=_numbers)


def _numbers(path: Path) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", path.stem)]


def read_array(path: Path) -> np.ndarray:
    """An ``.npy`` file, memory-mapped.

    Raises:
        InputError: no such file, or not one array.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; expected an .npy file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path}: not a readable .npy file ({error})") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: found several arrays, expected one, an .npy file")
    return array
