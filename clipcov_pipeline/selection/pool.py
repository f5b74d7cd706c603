"""The pool of image-caption pairs that a selection method ranks: embeddings sorted by class, and columns."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.columns import (
    BLOCK_BYTES,
    NORM_TOLERANCE,
    OPTIONAL_COLUMNS,
    Blocks,
    OptionalColumns,
    RowFile,
    array_blocks,
    caption_columns,
    captions_of,
    check_classes,
    check_column,
    check_embeddings,
    check_similarity,
    check_uids,
    make_rows,
    other_names,
    remove_scratch,
    sort_by_class,
    sortable,
)
from clipcov_pipeline.selection.methods import Captions
from clipcov_pipeline.selection.naming import find_named


class Pool:
    """Embeddings of N pairs with their latent classes, in the order the caller gave (the pool order).

    Made by ``from_arrays`` or ``from_lance``. Everything a caller sees is in pool order; inside, the rows
    ``[image; caption]`` lie sorted by class (stable), in memory or in a memory-mapped scratch file that
    goes away with the pool.

    Attributes:
        latent_class: int32 [N]; label_similarity: float32 [N].
        uid: bytes array [N] or None; source_id: bytes array [N] (empty: none) or None; the other
            `OptionalColumns`: [N] or None.
        pairs: float16 or float32 [N, 2d], sorted by class; order: int64 [N], pool row of each sorted
            position; starts: int64 [K+1], where each class begins.
    """

    def __init__(
        self, pairs: np.ndarray, order: np.ndarray, starts: np.ndarray, latent_class: np.ndarray,
        label_similarity: np.ndarray, columns: dict[str, np.ndarray | None], scratch: Path | None = None,
    ) -> None:  # fmt: skip
        self.pairs, self.order, self.starts = pairs, order, starts
        self.latent_class, self.label_similarity = latent_class, label_similarity
        self.uid = columns.get("uid")
        self.image_hash = sortable(columns.get("image_hash"))
        self.caption_hash = sortable(columns.get("caption_hash"))
        self.source_id = other_names(columns.get("source_id"))
        self.caption_length = columns.get("caption_length")
        self.caption_words = columns.get("caption_words")
        self.caption = columns.get("caption")
        self.width = columns.get("width")
        self.height = columns.get("height")
        self.early_similarity = columns.get("early_similarity")
        self.clip_l14_similarity_score = columns.get("clip_l14_similarity_score")
        self.clip_b32_similarity_score = columns.get("clip_b32_similarity_score")
        self._scratch_dir = scratch.parent if scratch else None
        self._remove = weakref.finalize(self, remove_scratch, scratch) if scratch else None
        self._position: np.ndarray | None = None
        self._statistics: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @classmethod
    def from_arrays(
        cls,
        image_embedding: np.ndarray,
        text_embedding: np.ndarray,
        latent_class: np.ndarray,
        label_similarity: np.ndarray | None = None,
        uid: Sequence[str] | np.ndarray | None = None,
        *,
        n_classes: int | None = None,
        scratch_dir: str | Path | None = None,
        **optional: Unpack[OptionalColumns],
    ) -> "Pool":
        """A pool over arrays (memory-mapped ones are read in blocks).

        Args:
            image_embedding, text_embedding: [N, d], unit norm, float16 or float32 (float64 is narrowed).
            latent_class: integers [N], at least 0.
            label_similarity: floats [N], <caption embedding, class prompt embedding>; None counts as 0.
            uid: N distinct names; without them rows are named by their number.
            n_classes: when given, every latent class has to be below it.
            scratch_dir: put the sorted rows into a temporary file in this folder instead of memory.
            **optional: `OptionalColumns`.

        Raises:
            InputError: lengths or widths differ, an empty pool, a row that is not of unit norm, a label
                outside the class list, a repeated uid.
        """
        n = check_embeddings(image_embedding, text_embedding)
        latent_class = check_classes(latent_class, n, n_classes)
        labels = check_similarity(np.zeros(n) if label_similarity is None else label_similarity, n)
        columns = {"uid": None if uid is None else check_uids(uid, n)}
        given = {name: check_column(name, optional.get(name), n) for name in OPTIONAL_COLUMNS}
        if given["caption"] is not None:
            made = caption_columns(captions_of(given["caption"]))
            given |= {name: values for name, values in made.items() if given[name] is None}
        columns |= given
        half = image_embedding.dtype == np.float16 and text_embedding.dtype == np.float16
        dtype = np.float16 if half else np.float32
        blocks = array_blocks(image_embedding, text_embedding)
        return cls.from_blocks(
            blocks, image_embedding.shape[1], dtype, latent_class, labels, columns, scratch_dir=scratch_dir
        )

    @classmethod
    def from_blocks(
        cls, blocks: Blocks, d: int, dtype: Any, latent_class: np.ndarray, label_similarity: np.ndarray,
        columns: dict[str, np.ndarray | None], *, scratch_dir: str | Path | None = None,
    ) -> "Pool":  # fmt: skip
        """A pool from a stream; what the other constructors come to.

        Args:
            blocks: (pool rows int64 [b], image [b, d], text [b, d]), every pool row once, in any order.
            d, dtype: width of an embedding, and float16 or float32 to keep it in.
            latent_class, label_similarity: int32 [N], float32 [N], checked; columns: "uid" and any of
                ``OPTIONAL_COLUMNS``.
        """
        order, starts = sort_by_class(latent_class)
        pairs, scratch = make_rows((len(order), 2 * d), dtype, scratch_dir)
        # made before it is filled: a failure on the way removes the scratch file with the pool
        pool = cls(pairs, order, starts, latent_class, label_similarity, columns, scratch)
        pool._fill(blocks, scratch)
        pool.statistics()
        return pool

    @classmethod
    def from_lance(
        cls,
        table: Any,
        labels: Any = None,
        *,
        version: int | None = None,
        shards: Sequence[str] | None = None,
        n_classes: int | None = None,
        captions: Captions = False,
        scratch_dir: str | Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> "Pool":
        """A pool over a LanceDB table, read in batches into a memory-mapped scratch file sorted by class.

        The order of the pool is that of ``labels`` (of the uids, when there are none), never that of the
        table's fragments.

        Args:
            table: an open LanceDB table with ``uid`` and ``image_embedding``, ``text_embedding``
                (fixed-size-list of float16, unit norm); ``shard`` when ``shards`` is given.
            labels: a polars frame, or the path of a parquet file, with ``uid``, ``latent_class``,
                ``label_similarity`` and any of ``OPTIONAL_COLUMNS``: the pool is these uids (and, with a
                column ``shard``, their rows of this shard). None when the table has these columns.
            version: read the table as of this version (the handle is left where it was).
            shards: read these shards only; every labelled uid has to be in them.
            n_classes: when given, every latent class has to be below it.
            captions: also read ``caption``, for ``caption_hash``, ``caption_length`` and ``caption_words``;
                "text" keeps the text, too.
            scratch_dir: folder of the scratch file; when None, pools over 256 MB go to the system's
                temporary folder and smaller ones stay in memory.
            progress: called with the number of rows just read.

        Raises:
            InputError: a column or a labelled uid is missing, a uid comes twice, an embedding is missing or
                not of unit norm, no label at all, no room for the scratch file.
        """
        from clipcov_pipeline.selection.lance import read_table

        options = {"n_classes": n_classes, "captions": captions, "progress": progress}
        with read_table(table, labels, version, shards, **options) as found:
            return cls.from_blocks(
                found.blocks,
                found.dim,
                np.float16,
                found.latent_class,
                found.label_similarity,
                found.columns,
                scratch_dir=scratch_dir or found.folder,
            )

    def __len__(self) -> int:
        return len(self.order)

    @property
    def dim(self) -> int:
        """Width d of one embedding."""
        return self.pairs.shape[1] // 2

    @property
    def n_classes(self) -> int:
        """One more than the largest latent class."""
        return len(self.starts) - 1

    @property
    def class_sizes(self) -> np.ndarray:
        """int64 [K]."""
        return np.diff(self.starts)

    @property
    def position(self) -> np.ndarray:
        """int64 [N]: where each pool row lies among the rows sorted by class."""
        if self._position is None:
            self._position = np.empty_like(self.order)
            self._position[self.order] = np.arange(len(self.order))
        return self._position

    def names(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """uids of pool rows as text; row numbers where the pool has none."""
        if self.uid is None:
            return [str(int(row)) for row in rows]
        return [uid.decode() for uid in self.uid[np.asarray(rows, np.int64)].tolist()]

    def row_of(self, uid: str) -> int:
        """The pool row of a uid, also of a UUID written another way or a source id (or of a row number, where
        the pool has no uids).

        Raises:
            InputError: not in the pool, or the source id of several samples.
        """
        if self.uid is None:
            if uid.isdecimal() and int(uid) < len(self):
                return int(uid)
            raise InputError(
                f"uid: found {uid!r}, expected a row number from 0 to {len(self) - 1} (pool has no uids)"
            )
        rows = find_named(self, np.array([uid.encode()], np.bytes_)).rows
        if len(rows) == 0:
            raise InputError(f"uid: found {uid!r}, which is none of the {len(self)} in the pool")
        if len(rows) > 1:
            raise InputError(
                f"uid: found {uid!r}, the source id of {len(rows)} samples, expected one's: give its uid, as"
                f" {' or '.join(self.names(rows[:3]))}"
            )
        return int(rows[0])

    def column(self, name: str, reader: str) -> np.ndarray:
        """An optional column.

        Raises:
            InputError: the pool has none; ``reader`` is what asked for it.
        """
        values = getattr(self, name)
        if values is None:
            raise InputError(f"{reader}: needs the column {name}, which this pool has not; give it to Pool")
        return values

    def statistics(self, threads: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Class sums (float64 [K, 2d], of rows [v; t]), pair similarities (float32 [N], sorted by class), and
        the largest |v|^2 + |t|^2 of each class (float64 [K]).

        Read once from the embeddings, then kept.

        Raises:
            InputError: a row is not of unit norm (NaN, infinite and zero rows are not).
        """
        if self._statistics is None:
            from clipcov_pipeline.selection import kernels
            from clipcov_pipeline.selection.parallel import over_classes

            sums = np.zeros((self.n_classes, self.pairs.shape[1]))
            similarity, largest = np.empty(len(self), np.float32), np.zeros(self.n_classes)
            rows, tolerance = kernels.bits(self.pairs), 2 * NORM_TOLERANCE

            def read(classes: np.ndarray) -> int:
                return kernels.class_statistics(
                    rows, self.starts, classes, sums, similarity, largest, tolerance
                )

            bad = [position for position in over_classes(read, self.class_sizes, threads) if position >= 0]
            if bad:
                self._refuse(min(bad))
            self._statistics = sums, similarity, largest
        return self._statistics

    def pair_similarity(self) -> np.ndarray:
        """float32 [N] in pool order: e_i = <v_i, t_i>."""
        similarity = np.empty(len(self), np.float32)
        similarity[self.order] = self.statistics()[1]
        return similarity

    def take(self, rows: np.ndarray) -> "Pool":
        """A pool of some rows only, in the order given.

        Raises:
            InputError: no rows.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) == 0:
            raise InputError("pool: found 0 pairs after the filters, expected at least 1; loosen the filters")
        return self._copy(rows, self.latent_class[rows], self.label_similarity[rows])

    def relabelled(self, latent_class: np.ndarray, label_similarity: np.ndarray) -> "Pool":
        """The same pairs with other latent classes (integers [N]) and label similarities (floats [N]).

        Raises:
            InputError: as in ``from_arrays``.
        """
        n = len(self)
        classes = check_classes(latent_class, n, None)
        return self._copy(np.arange(n), classes, check_similarity(label_similarity, n))

    def _copy(self, rows: np.ndarray, latent_class: np.ndarray, label_similarity: np.ndarray) -> "Pool":
        names = ("uid", *OPTIONAL_COLUMNS)
        columns = {name: None if (c := getattr(self, name)) is None else c[rows] for name in names}
        step = max(1, BLOCK_BYTES // (self.pairs.shape[1] * self.pairs.itemsize))
        # read the way the rows lie, write where they go
        by = np.argsort(self.position[rows])
        parts = (by[at : at + step] for at in range(0, len(by), step))
        blocks = ((part, *self.sides(rows[part])) for part in parts)
        folder = self._scratch_dir
        return Pool.from_blocks(
            blocks, self.dim, self.pairs.dtype, latent_class, label_similarity, columns, scratch_dir=folder
        )

    def sides(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image and caption embeddings of pool rows, each [len(rows), d]."""
        both = np.asarray(self.pairs[self.position[rows]])
        return both[:, : self.dim], both[:, self.dim :]

    def _fill(self, blocks: Blocks, scratch: Path | None) -> None:
        """Put all blocks where they belong, while the next ones are read."""
        from clipcov_pipeline.selection.parallel import over_stream

        self.position  # noqa: B018  worked out once, before threads ask for it
        file = RowFile(scratch) if scratch else None
        try:
            for _ in over_stream(lambda block: self._write(*block, file), blocks, 1):
                pass
        finally:
            if file is not None:
                file.close()

    def _write(self, rows: np.ndarray, image: np.ndarray, text: np.ndarray, file: RowFile | None) -> None:
        from clipcov_pipeline.selection import kernels

        if image.shape != (len(rows), self.dim) or text.shape != image.shape:
            raise InputError(
                f"embeddings: found image {image.shape} and text {text.shape}, "
                f"expected ({len(rows)}, {self.dim})"
            )
        into = self.position[rows]
        by = np.argsort(into)
        sides = [kernels.bits(np.ascontiguousarray(side, self.pairs.dtype)) for side in (image, text)]
        if file is None:
            kernels.scatter(kernels.bits(self.pairs), into[by], sides[0], sides[1], by)
            return
        joined = file.room((len(rows), 2 * self.dim), self.pairs.dtype)
        kernels.scatter(kernels.bits(joined), np.arange(len(rows)), sides[0], sides[1], by)
        file.put(joined, into[by])

    def close(self) -> None:
        """Remove the scratch file now instead of with the last reference."""
        if self._remove is not None:
            self._remove()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _refuse(self, position: int) -> None:
        row = int(self.order[position])
        halves = np.asarray(self.pairs[position], np.float64).reshape(2, -1)
        norms = np.sqrt((halves**2).sum(axis=1))
        name = self.names([row])[0]
        raise InputError(
            f"embedding of uid {name} (row {row}): found norms {norms[0]:.4g} (image) and {norms[1]:.4g} "
            "(caption), expected 1; normalise the embeddings and drop rows with NaN, infinity or only zeros"
        )
