"""Pools from what lies on disk: a LanceDB table, a parquet file, ``.npz`` or ``.npy`` arrays."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.columns import (
    NORM_TOLERANCE,
    OPTIONAL_COLUMNS,
    Blocks,
    array_blocks,
    check_classes,
    check_similarity,
)
from clipcov_pipeline.selection.lance import scratch_folder
from clipcov_pipeline.selection.pool import Pool

_BATCH_ROWS = 16384
_LABELS = ("latent_class", "label_similarity")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Labelling:
    """Where latent classes come from; the first that is set wins, else the source's own columns.

    Attributes:
        labels: parquet with ``latent_class``, ``label_similarity`` and, to match by, ``uid`` (without it:
            row by row).
        class_embedding: ``.npy`` float [K, d], unit norm: zero-shot classes of the images.
        clusters: that many clusters of the pairs instead; seed fixes them.
    """

    labels: Path | None = None
    class_embedding: Path | None = None
    clusters: int | None = None
    seed: int = 0


def open_pool(
    source: Path,
    text: Path | None = None,
    labelling: Labelling | None = None,
    *,
    need_classes: bool = True,
    captions: bool = False,
    scratch_dir: Path | None = None,
    progress: Progress | None = None,
) -> Pool:
    """A pool from files.

    Args:
        source: ``NAME.lance`` (a LanceDB table's folder); a ``.parquet`` with ``image_embedding`` and
            ``text_embedding`` (lists of d floats) and any of uid, latent_class, label_similarity,
            image_hash, ...; a ``.npz`` with arrays of these names; the ``.npy`` of the image embeddings; or a
            folder as clip-retrieval writes it (``img_emb/``, ``text_emb/`` and, for uids, ``metadata/``).
        text: the ``.npy`` of the caption embeddings, when source is one.
        labelling: where latent classes come from.
        need_classes: whether the method reads them; if not, pairs without classes are one class.
        captions: also read captions, where the source has them, for duplicates and lengths.
        progress: called with the number of rows just read.

    Raises:
        InputError: no such source, a missing column, and all that ``Pool.from_arrays`` refuses.
    """
    labelling = labelling or Labelling()
    if not source.exists():
        raise InputError(
            f"source: {source} does not exist; expected a .lance table, .parquet, .npz, .npy or a folder"
        )
    if source.suffix == ".lance":
        return _from_table(source, labelling, need_classes, captions, scratch_dir, progress)
    reader = _reader(source, text)
    n, d, dtype = reader.shape()
    columns = _columns(source, reader, n, captions)
    given = _given_labels(labelling, columns, n)
    if given is None and need_classes and labelling.class_embedding is None and labelling.clusters is None:
        raise InputError(
            f"latent classes: {source} has no columns {', '.join(_LABELS)}; "
            "give --labels, --class-embedding or --clusters"
        )
    classes, similarity = given or (np.zeros(n, np.int32), np.zeros(n, np.float32))
    checked = check_classes(classes, n, None), check_similarity(similarity, n)
    folder = scratch_dir or scratch_folder(2 * n * d * np.dtype(dtype).itemsize)
    blocks = _counted(reader.blocks(), progress)
    kept: dict[str, Any] = {name: columns.get(name) for name in ("uid", *OPTIONAL_COLUMNS)}
    pool = Pool.from_blocks(blocks, d, dtype, *checked, kept, scratch_dir=folder)
    return pool if given else _labelled(pool, labelling)


def _columns(source: Path, reader: "_Arrays | _Parquet", n: int, captions: bool) -> dict[str, Any]:
    """The columns beside the embeddings, each with a value a pair; uids as bytes."""
    columns = reader.columns(captions)
    for name in ("uid", "caption", *_LABELS, *OPTIONAL_COLUMNS):
        values = columns.get(name)
        if values is not None and len(values) != n:
            raise InputError(f"{source}: found {len(values)} values of {name}, expected {n}, one a pair")
    if (uid := columns.get("uid")) is not None:
        columns["uid"] = _encoded(uid)
    return columns


def _from_table(
    source: Path, labelling: Labelling, need_classes: bool, captions: bool, scratch_dir: Path | None,
    progress: Progress | None,
) -> Pool:  # fmt: skip
    import lancedb
    import polars as pl

    table = lancedb.connect(source.parent).open_table(source.stem)
    captions = captions and "caption" in table.schema.names
    labels: Any = labelling.labels
    own = set(_LABELS) <= set(table.schema.names)
    compute = labels is None and (labelling.class_embedding is not None or labelling.clusters is not None)
    if compute or (labels is None and not own and not need_classes):
        uids = pl.from_arrow(table.search().select(["uid"]).to_batches().read_all())
        labels = uids.sort("uid").with_columns(latent_class=pl.lit(0, pl.Int32), label_similarity=pl.lit(0.0))  # type: ignore[union-attr]
    elif labels is None and not own:
        raise InputError(
            f"latent classes: table {source} has no columns {', '.join(_LABELS)}; "
            "give --labels, --class-embedding or --clusters"
        )
    pool = Pool.from_lance(table, labels, captions=captions, scratch_dir=scratch_dir, progress=progress)
    return _labelled(pool, labelling) if compute else pool


def _labelled(pool: Pool, labelling: Labelling) -> Pool:
    """The pool with zero-shot or cluster classes, where one of these is asked for."""
    from clipcov_pipeline.selection.latent_classes import cluster_labels, zero_shot_labels

    # the pool is one class here, so its rows lie in pool order
    image, text = pool.pairs[:, : pool.dim], pool.pairs[:, pool.dim :]
    if labelling.class_embedding is not None:
        centres = _unit_rows(labelling.class_embedding)
        classes, similarity, _ = zero_shot_labels(image, centres, text)
    elif labelling.clusters is not None:
        sample = max(64 * labelling.clusters, 50_000)
        classes, similarity, _ = cluster_labels(
            image, text, labelling.clusters, labelling.seed, sample=sample
        )
    else:
        return pool
    with pool:
        return pool.relabelled(classes, similarity)


def _given_labels(labelling: Labelling, columns: dict[str, Any], n: int) -> tuple[Any, Any] | None:
    import polars as pl

    if labelling.labels is None:
        if labelling.class_embedding is not None or labelling.clusters is not None:
            return None
        own = [columns.get(name) for name in _LABELS]
        return (own[0], own[1]) if own[0] is not None and own[1] is not None else None
    frame = _read_frame(labelling.labels)
    if missing := [name for name in _LABELS if name not in frame.columns]:
        raise InputError(f"labels {labelling.labels}: missing column {', '.join(missing)}")
    uid = columns.get("uid")
    if "uid" in frame.columns and (repeated := len(frame) - frame["uid"].n_unique()):
        raise InputError(f"labels {labelling.labels}: found {repeated} repeated uids, expected distinct ones")
    if uid is not None and "uid" in frame.columns:
        names = pl.DataFrame({"uid": [name.decode() for name in uid.tolist()]})
        frame = names.join(frame, on="uid", how="left", maintain_order="left")
        if lost := frame.filter(pl.col("latent_class").is_null())["uid"].to_list():
            raise InputError(
                f"labels {labelling.labels}: found no row for {len(lost)} uids ({', '.join(lost[:3])})"
            )
    elif len(frame) != n:
        raise InputError(f"labels {labelling.labels}: found {len(frame)} rows, expected {n}, one a pair")
    elif uid is None and "uid" in frame.columns:
        columns["uid"] = _encoded(frame["uid"].to_list())
    return frame["latent_class"].to_numpy(), frame["label_similarity"].to_numpy()


class _Arrays:
    """Image and caption embeddings in one or more pairs of arrays (memory-mapped)."""

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

    def columns(self, captions: bool) -> dict[str, Any]:
        found = dict(self._columns)
        if captions and found.get("caption") is not None:
            found |= _caption_columns(found["caption"])
        return found

    def shape(self) -> tuple[int, int, Any]:
        n = sum(len(image) for image, _ in self._pairs)
        if n == 0:
            raise InputError("pool: found 0 pairs, expected at least 1")
        half = all(image.dtype == text.dtype == np.float16 for image, text in self._pairs)
        return n, self._pairs[0][0].shape[1], np.float16 if half else np.float32

    def blocks(self) -> Blocks:
        at = 0
        for image, text in self._pairs:
            for rows, one, other in array_blocks(image, text):
                yield rows + at, one, other
            at += len(image)


class _Parquet:
    """A parquet file whose embeddings are lists of floats."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path, self._file = path, pq.ParquetFile(path)
        names = self._file.schema_arrow.names
        if missing := [name for name in ("image_embedding", "text_embedding") if name not in names]:
            raise InputError(f"{path}: missing column {', '.join(missing)}; found {', '.join(names)}")

    def columns(self, captions: bool) -> dict[str, Any]:
        wanted = ["uid", *_LABELS, *OPTIONAL_COLUMNS] + (["caption"] if captions else [])
        table = self._file.read(columns=[name for name in wanted if name in self._file.schema_arrow.names])
        found: dict[str, Any] = {name: table[name].to_numpy() for name in table.column_names}
        return found | (_caption_columns(found["caption"]) if "caption" in found else {})

    def shape(self) -> tuple[int, int, Any]:
        if self._file.metadata.num_rows == 0:
            raise InputError(f"{self._path}: found 0 pairs, expected at least 1")
        _, image, text = next(self.blocks())
        half = image.dtype == text.dtype == np.float16
        return self._file.metadata.num_rows, image.shape[1], np.float16 if half else np.float32

    def blocks(self) -> Blocks:
        at, names = 0, ["image_embedding", "text_embedding"]
        for batch in self._file.iter_batches(_BATCH_ROWS, columns=names):
            rows = np.arange(at, at + len(batch))
            yield rows, self._matrix(batch, names[0]), self._matrix(batch, names[1])
            at += len(batch)

    def _matrix(self, batch: Any, name: str) -> np.ndarray:
        column = batch.column(name)
        values = (
            column.flatten().to_numpy(zero_copy_only=False) if hasattr(column, "flatten") else np.empty(0)
        )
        if column.null_count or len(values) == 0 or len(values) % len(column):
            raise InputError(
                f"{self._path}: {name} has rows of unequal length or none; expected d floats in each"
            )
        return values.reshape(len(column), -1)


def _reader(source: Path, text: Path | None) -> _Arrays | _Parquet:
    if source.suffix == ".parquet":
        return _Parquet(source)
    if source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as arrays:
            if missing := [name for name in ("image_embedding", "text_embedding") if name not in arrays]:
                raise InputError(f"{source}: missing array {', '.join(missing)}; found {', '.join(arrays)}")
            found = {name: arrays[name] for name in arrays}
        return _Arrays([(found.pop("image_embedding"), found.pop("text_embedding"))], found)
    if source.suffix == ".npy":
        if text is None:
            raise InputError(
                f"source: {source} holds image embeddings; give those of the captions with --text"
            )
        return _Arrays([(_array(source), _array(text))], {})
    if source.is_dir() and (source / "img_emb").is_dir() and (source / "text_emb").is_dir():
        return _clip_retrieval(source)
    raise InputError(
        f"source: found {source}, expected a .lance table, .parquet, .npz, .npy, "
        "or a folder with img_emb and text_emb"
    )


def _clip_retrieval(folder: Path) -> _Arrays:
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
    columns: dict[str, Any] = {}
    if metadata:
        import polars as pl

        frame = pl.concat([pl.read_parquet(path) for path in metadata], how="vertical_relaxed")
        if "uid" in frame.columns:
            columns["uid"] = frame["uid"].to_numpy()
        if "caption" in frame.columns:
            columns["caption"] = frame["caption"].to_numpy()
    return _Arrays([(_array(i), _array(t)) for i, t in zip(images, texts, strict=True)], columns)


def _numbered(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=_numbers)


def _numbers(path: Path) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", path.stem)]


def _array(path: Path) -> np.ndarray:
    if not path.exists():
        raise InputError(f"{path} does not exist; expected an .npy file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path}: not a readable .npy file ({error})") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: found several arrays, expected one, an .npy file")
    return array


def _unit_rows(path: Path) -> np.ndarray:
    """Class embeddings; a long one would draw samples to its class by its length."""
    rows = _array(path)
    norms = np.linalg.norm(np.asarray(rows, np.float64), axis=-1)
    if not np.allclose(norms, 1, rtol=0, atol=NORM_TOLERANCE):
        worst = int(np.argmax(np.nan_to_num(np.abs(norms - 1), nan=np.inf)))
        raise InputError(
            f"{path}: found norm {np.ravel(norms)[worst]:.4g} in row {worst}, expected 1: normalise the class"
            " embeddings"
        )
    return rows


def _read_frame(path: Path) -> Any:
    import polars as pl

    if not path.exists():
        raise InputError(f"labels: {path} does not exist; expected a parquet file")
    return pl.read_parquet(path)


def _encoded(uid: Any) -> np.ndarray:
    values = np.asarray(uid)
    encoded = values if values.dtype.kind == "S" else np.char.encode(values.astype(str), "utf-8")
    if len(np.unique(encoded)) < len(encoded):
        raise InputError(
            f"uid: found {len(encoded) - len(np.unique(encoded))} repeated uids, expected distinct ones"
        )
    return encoded


def _caption_columns(captions: Any) -> dict[str, np.ndarray]:
    import polars as pl

    values = np.asarray(captions)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    text = pl.Series(values.tolist(), dtype=pl.String, strict=False).fill_null("")
    return {"caption_hash": text.hash(seed=0).to_numpy(), "caption_length": text.str.len_chars().to_numpy()}


def _counted(blocks: Blocks, progress: Progress | None) -> Blocks:
    for rows, image, text in blocks:
        yield rows, image, text
        if progress is not None:
            progress(len(rows))
