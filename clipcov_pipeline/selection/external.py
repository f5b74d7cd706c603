"""A list of uids that somebody else chose, as a ranking: the listed samples first."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcov_pipeline.errors import InputError, near_file
from clipcov_pipeline.selection.naming import find_named
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.uids import uid_bytes

FORMATS = "a .parquet or .csv with a column uid (and, if you like, weight), or DataComp's .npy (dtype u8,u8)"


class Listed(NamedTuple):
    """The samples of a pool that a file lists.

    rows: int64 [m], distinct pool rows in the file's order. unknown: distinct uids of the file that the pool
    has not. missing: rows of the file without a uid. ordered: whether the file's order means something (that
    of an .npy does not). weight: float64 [m], above 0, how often each is listed, or the sum of its values in
    the file's column weight. never_drawn: int64 [k], pool rows that are listed with the weight 0: they would
    take places of a subset and never be trained on, so that they are in no ranking.
    """

    rows: np.ndarray
    unknown: int
    missing: int
    ordered: bool
    weight: np.ndarray
    never_drawn: np.ndarray


def check_uids_file(path: Path) -> None:
    """Look whether a file can hold uids, without reading them.

    Raises:
        InputError: no such file, another format, or no column uid.
    """
    import polars as pl

    if not path.is_file():
        raise InputError(f"uids: found no file {path}{near_file(path)}, expected {FORMATS}")
    if path.suffix not in (".parquet", ".csv", ".npy"):
        raise InputError(f"uids: found {path}, expected {FORMATS}")
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.ndim != 1 or array.dtype != np.dtype("u8,u8"):
                raise InputError(
                    f"uids: found {array.dtype} of shape {array.shape} in {path}, expected dtype u8,u8, [n]"
                )
            return
        scan = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path)
        names = scan.collect_schema().names()
    except InputError:
        raise
    except (ValueError, OSError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"uids: {path} is not readable as {path.suffix}: {' '.join(str(error).split())}"
        ) from error
    if "uid" not in names:
        raise InputError(f"uids: found the columns {', '.join(names)} in {path}, expected one named uid")


def read_uids(path: Path) -> np.ndarray:
    """Return the uids of a file in its order, as bytes [n]; rows without one are left out.

    Raises:
        InputError: as `check_uids_file`.
    """
    check_uids_file(path)
    if path.suffix == ".npy":
        halves = np.load(path, allow_pickle=False)
        # 128 bits as two unsigned 64-bit halves, high half first: mlfoundations/datacomp, resharder.py
        digits = np.stack([halves["f0"], halves["f1"]], axis=1).astype(">u8").tobytes().hex().encode()
        return np.frombuffer(digits, "S32")
    return uid_bytes(_table(path)["uid"].drop_nulls().to_arrow(), f"uids: {path}")


def _table(path: Path) -> Any:
    """The columns uid and weight of a file, those that there are."""
    import polars as pl

    # as text: a uid of digits alone keeps its zeros
    scan = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path, infer_schema=False)
    try:
        names = scan.collect_schema().names()
        return scan.select([name for name in ("uid", "weight") if name in names]).collect()
    except pl.exceptions.PolarsError as error:
        text = " ".join(str(error).split())
        raise InputError(f"uids: {path} is not readable as {path.suffix}: {text}") from error


def _weights(path: Path) -> np.ndarray | None:
    """The weights of the rows that have a uid, float64 [n]; None where the file has none.

    Raises:
        InputError: weights that samples cannot be drawn by.
    """
    import polars as pl

    table = None if path.suffix == ".npy" else _table(path).drop_nulls("uid")
    if table is None or "weight" not in table.columns:
        return None
    weight = table["weight"]
    if weight.dtype != pl.String and not weight.dtype.is_numeric():
        raise InputError(f"uids: found weights of type {weight.dtype} in {path}, expected numbers")
    found = weight.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy()
    if (bad := ~np.isfinite(found) | (found < 0)).any():
        row = int(bad.argmax())
        raise InputError(
            f"uids: found the weight {table['weight'][row]} of {table['uid'][row]} in {path}, expected finite"
            " numbers of at least 0"
        )
    return found


def check_weights_file(path: Path) -> None:
    """Read a list's weights, where it has any, and look whether samples can be drawn by them.

    Raises:
        InputError: as `check_uids_file`; a weight that is negative, not finite or no number, or none above 0.
    """
    check_uids_file(path)
    weight = _weights(path)
    if weight is not None and len(weight) and not weight.any():
        raise InputError(
            f"uids: found {len(weight)} weights of 0 in {path}, expected at least one above: no sample would"
            " be drawn"
        )


def listed(pool: Pool, path: str | Path, *, allow_none: bool = False) -> Listed:
    """Find the samples of a pool that a file lists, as `find_named`; one that comes again weighs more.

    ``allow_none``: a file without any uid of the pool is no mistake, as in a part of a pool.

    Raises:
        InputError: as `check_weights_file`; the pool has no uids, or none of the file's.
    """
    path = Path(path)
    check_weights_file(path)
    uids = read_uids(path)
    if pool.uid is None:
        raise InputError("external: needs the column uid, which this pool has not; give it to Pool")
    found = find_named(pool, uids, _weights(path))
    if len(found.rows) == 0 and not allow_none:
        example = f", first {uids[0].decode()}" if len(uids) else ""
        raise InputError(
            f"uids: found none of the {len(uids)} uids of {path}{example} in the pool, expected some:"
            f" is it a list of other samples? The pool's first uid is {pool.names([0])[0]}"
        )
    missing = 0 if path.suffix == ".npy" else _table(path)["uid"].null_count()
    drawn = found.weight > 0
    if len(found.rows) and not drawn.any() and not allow_none:
        raise InputError(
            f"uids: found {len(found.rows)} samples of the pool in {path}, all with the weight 0,"
            " expected one above for at least one of them"
        )
    ordered = path.suffix != ".npy"
    return Listed(found.rows[drawn], found.unknown, missing, ordered, found.weight[drawn], found.rows[~drawn])


def external(
    pool: Pool,
    count: int,
    params: dict[str, Any],
    threads: int | None,  # noqa: ARG001
) -> tuple[np.ndarray, np.ndarray]:
    """Listed samples first (gain 1), in the file's order or a random one; with ``fill`` "random" then the
    rest, random (gain 0)."""
    found = listed(pool, params["uids"], allow_none=True)  # rank looks at the whole pool
    drawn = np.random.default_rng(params["seed"]).random(len(pool))
    rows = found.rows
    if params["shuffle"] or not found.ordered:
        rows = rows[np.lexsort((rows, drawn[rows]))]
    gains = np.ones(len(rows))
    if params["fill"] == "random":
        rest = np.setdiff1d(np.arange(len(pool)), np.concatenate([rows, found.never_drawn]))
        rows = np.concatenate([rows, rest[np.argsort(drawn[rest], kind="stable")]])
        gains = np.concatenate([gains, np.zeros(len(rest))])
    return rows[:count], gains[:count]


def check_listed(pool: Pool, params: dict[str, Any], count: int | None) -> None:
    """Look whether a list serves a count (None: any); nothing is filled up that was not asked for.

    Raises:
        InputError: as `listed`, or fewer than ``count`` are listed and ``fill`` is not set.
    """
    found = len(listed(pool, params["uids"]).rows)
    if count is not None and params["fill"] is None and count > found:
        raise InputError(
            f"budget: found {count}, expected at most {found}, which {params['uids']} lists of this pool;"
            " ask for fewer, or have the rest drawn (fill: random)"
        )
