"""A list of uids that somebody else chose, as a ranking: the listed samples first."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.uids import uid_bytes

FORMATS = "a .parquet or .csv with a column uid, or DataComp's .npy (dtype u8,u8)"


class Listed(NamedTuple):
    """The samples of a pool that a file lists.

    rows: int64 [m], distinct pool rows in the file's order. unknown: distinct uids of the file that the pool
    has not. ordered: whether the file's order means something (that of an .npy does not).
    """

    rows: np.ndarray
    unknown: int
    ordered: bool


def check_uids_file(path: Path) -> None:
    """Look whether a file can hold uids, without reading them.

    Raises:
        InputError: no such file, another format, or no column uid.
    """
    import polars as pl

    if not path.is_file():
        raise InputError(f"uids: found no file {path}, expected {FORMATS}")
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
    """Return the uids of a file in its order, as bytes [n].

    Raises:
        InputError: as `check_uids_file`.
    """
    import polars as pl

    check_uids_file(path)
    if path.suffix == ".npy":
        halves = np.load(path, allow_pickle=False)
        # 128 bits as two unsigned 64-bit halves, high half first: mlfoundations/datacomp, resharder.py
        digits = np.stack([halves["f0"], halves["f1"]], axis=1).astype(">u8").tobytes().hex().encode()
        return np.frombuffer(digits, "S32")
    if path.suffix == ".parquet":
        uids = pl.read_parquet(path, columns=["uid"])["uid"]
    else:  # as text: a uid of digits alone keeps its zeros; a blank line is none
        uids = pl.read_csv(path, columns=["uid"], schema_overrides={"uid": pl.String})["uid"].drop_nulls()
    return uid_bytes(uids.to_arrow(), f"uids: {path}")


def listed(pool: Pool, path: str | Path, *, allow_none: bool = False) -> Listed:
    """Find the samples of a pool that a file lists; a uid that comes again counts once.

    ``allow_none``: a file without any uid of the pool is no mistake, as in a part of a pool.

    Raises:
        InputError: as `check_uids_file`; the pool has no uids, or none of the file's.
    """
    path = Path(path)
    uids = read_uids(path)
    if pool.uid is None:
        raise InputError("external: needs the column uid, which this pool has not; give it to Pool")
    uids = uids[np.sort(np.unique(uids, return_index=True)[1])]
    order = np.argsort(pool.uid, kind="stable")
    place = np.searchsorted(pool.uid, uids, sorter=order).clip(max=len(pool) - 1)
    rows = order[place]
    known = pool.uid[rows] == uids
    if not known.any() and not allow_none:
        example = f", first {uids[0].decode()}" if len(uids) else ""
        raise InputError(
            f"uids: found none of the {len(uids)} uids of {path}{example} in the pool, expected some:"
            f" is it a list of other samples? The pool's first uid is {pool.names([0])[0]}"
        )
    return Listed(rows[known], int((~known).sum()), path.suffix != ".npy")


def external(
    pool: Pool,
    count: int,
    params: dict[str, Any],
    threads: int | None,  # noqa: ARG001
) -> tuple[np.ndarray, np.ndarray]:
    """Listed samples first (gain 1), in the file's order or a random one; then the rest, random (gain 0)."""
    found = listed(pool, params["uids"], allow_none=True)  # rank looks at the whole pool
    drawn = np.random.default_rng(params["seed"]).random(len(pool))
    first = found.rows
    if params["shuffle"] or not found.ordered:
        first = first[np.lexsort((first, drawn[first]))]
    rest = np.setdiff1d(np.arange(len(pool)), first)
    rows = np.concatenate([first, rest[np.argsort(drawn[rest], kind="stable")]])
    return rows[:count], (np.arange(count) < len(first)).astype(np.float64)
