"""Pools from what lies on disk: a LanceDB table, a parquet file, ``.npz`` or ``.npy`` arrays."""

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
    called,
    check_classes,
    check_similarity,
)
from clipcov_pipeline.selection.lance import scratch_folder
from clipcov_pipeline.selection.methods import Captions
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.readers import LABELS, Arrays, Metadata, Parquet, open_reader, read_array
from clipcov_pipeline.selection.uids import uid_bytes

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
    captions: Captions = False,
    scratch_dir: Path | None = None,
    progress: Progress | None = None,
) -> Pool:
    """A pool from files.

    Args:
        source: ``NAME.lance`` (a LanceDB table's folder); a ``.parquet`` (a file, or a folder of them) with
            ``image_embedding`` and ``text_embedding`` (lists of d floats) and any of uid, latent_class,
            label_similarity, image_hash, ...; a ``.npz`` with arrays of these names; the ``.npy`` of the
            image embeddings; a folder as clip-retrieval writes it (``img_emb/``, ``text_emb/`` and, for
            uids, ``metadata/``), or DataComp's metadata (parquet files with an ``.npz`` beside each).
        text: the ``.npy`` of the caption embeddings, when source is one.
        labelling: where latent classes come from.
        need_classes: whether the method reads them; if not, pairs without classes are one class.
        captions: also read captions, for duplicates and lengths, where there are any; "text" keeps them.
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
    reader = open_reader(source, text)
    n, d, dtype = reader.shape()
    columns = _columns(source, reader, n, captions)
    given = _given_labels(labelling, columns, n)
    if given is None and need_classes and labelling.class_embedding is None and labelling.clusters is None:
        raise InputError(
            f"latent classes: {source} has no columns {', '.join(LABELS)}; "
            "give --labels, --class-embedding or --clusters"
        )
    classes, similarity = given or (np.zeros(n, np.int32), np.zeros(n, np.float32))
    checked = check_classes(classes, n, None), check_similarity(similarity, n)
    folder = scratch_dir or scratch_folder(2 * n * d * np.dtype(dtype).itemsize)
    blocks = _counted(reader.blocks(), progress)
    kept: dict[str, Any] = {name: columns.get(name) for name in ("uid", *OPTIONAL_COLUMNS)}
    pool = Pool.from_blocks(blocks, d, dtype, *checked, kept, scratch_dir=folder)
    return pool if given else _labelled(pool, labelling)


def _columns(source: Path, reader: Arrays | Parquet | Metadata, n: int, captions: Captions) -> dict[str, Any]:
    """The columns beside the embeddings, each with a value a pair; uids as bytes."""
    columns = reader.columns(captions)
    for name in ("uid", *LABELS, *OPTIONAL_COLUMNS):
        values = columns.get(name)
        if values is not None and len(values) != n:
            raise InputError(f"{source}: found {len(values)} values of {name}, expected {n}, one a pair")
    if (uid := columns.get("uid")) is not None:
        columns["uid"] = _encoded(uid, f"{source}: uid")
    return columns


def _from_table(
    source: Path, labelling: Labelling, need_classes: bool, captions: Captions, scratch_dir: Path | None,
    progress: Progress | None,
) -> Pool:  # fmt: skip
    import lancedb
    import polars as pl

    table = lancedb.connect(source.parent).open_table(source.stem)
    captions = captions if called(["caption"], table.schema.names) else False
    labels: Any = read_labels(labelling.labels) if labelling.labels else None
    own = set(LABELS) <= set(table.schema.names)
    compute = labels is None and (labelling.class_embedding is not None or labelling.clusters is not None)
    if compute or (labels is None and not own and not need_classes):
        uids = pl.from_arrow(table.search().select(["uid"]).to_batches().read_all())
        labels = uids.sort("uid").with_columns(latent_class=pl.lit(0, pl.Int32), label_similarity=pl.lit(0.0))  # type: ignore[union-attr]
    elif labels is None and not own:
        raise InputError(
            f"latent classes: table {source} has no columns {', '.join(LABELS)}; "
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
        own = [columns.get(name) for name in LABELS]
        return (own[0], own[1]) if own[0] is not None and own[1] is not None else None
    frame = read_labels(labelling.labels)
    uid = columns.get("uid")
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
        columns["uid"] = uid_bytes(frame["uid"].to_arrow())
    return frame["latent_class"].to_numpy(), frame["label_similarity"].to_numpy()


def _unit_rows(path: Path) -> np.ndarray:
    """Class embeddings; a long one would draw samples to its class by its length."""
    rows = read_array(path)
    norms = np.linalg.norm(np.asarray(rows, np.float64), axis=-1)
    if not np.allclose(norms, 1, rtol=0, atol=NORM_TOLERANCE):
        worst = int(np.argmax(np.nan_to_num(np.abs(norms - 1), nan=np.inf)))
        raise InputError(
            f"{path}: found norm {np.ravel(norms)[worst]:.4g} in row {worst}, expected 1: normalise the class"
            " embeddings"
        )
    return rows


def read_labels(path: Path) -> Any:
    """Return labels as a polars frame: latent_class, label_similarity and what else there is; uid as text.

    Raises:
        InputError: no such file, not parquet, a missing column or value, a uid that comes again.
    """
    import polars as pl

    if not path.exists():
        raise InputError(f"labels: {path} does not exist; expected a parquet file")
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(
            f"labels: {path} is not readable as parquet: {' '.join(str(error).split())}"
        ) from None
    if missing := [name for name in LABELS if name not in frame.columns]:
        raise InputError(f"labels {path}: missing column {', '.join(missing)}")
    for name in LABELS:
        if lost := frame[name].null_count():
            raise InputError(
                f"labels {path}: found {lost} of {len(frame)} values of {name} missing, first in row"
                f" {frame[name].is_null().arg_max()}, expected one each: leave these rows out or label them"
            )
    if "uid" in frame.columns:
        uid = _encoded(frame["uid"].to_arrow(), f"labels {path}: uid")
        if frame["uid"].dtype != pl.String:
            frame = frame.with_columns(uid=pl.Series([name.decode() for name in uid.tolist()]))
    return frame


def _encoded(uid: Any, where: str) -> np.ndarray:
    encoded = uid_bytes(uid, where)
    if repeated := len(encoded) - len(np.unique(encoded)):
        raise InputError(f"{where}: found {repeated} repeated uids, expected distinct ones")
    return encoded


def _counted(blocks: Blocks, progress: Progress | None) -> Blocks:
    for rows, image, text in blocks:
        yield rows, image, text
        if progress is not None:
            progress(len(rows))
