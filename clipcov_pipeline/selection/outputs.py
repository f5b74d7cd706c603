"""What a selection writes: a parquet of the subset, a DataComp file of its uids, a JSON report."""

import json
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.selection.measure import Phases
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.ranking import Ranking
from clipcov_pipeline.uuids import hex_of

_NOT_HEX = re.compile(r"[^0-9a-f]")

# 128 bits as two unsigned 64-bit halves, high half first: mlfoundations/datacomp, resharder.py
DATACOMP_DTYPE = np.dtype("u8,u8")


def datacomp_uids(uids: Collection[str]) -> np.ndarray:
    """Return 128-bit uids as DataComp's resharder reads them: sorted, dtype ``u8,u8``, [m].

    Raises:
        ValueError: a uid is not 32 lower-case hex digits, or is given twice (the resharder would copy its
            sample twice).
    """
    digits = "".join(uids)
    if any(len(uid) != 32 for uid in uids) or _NOT_HEX.search(digits):
        raise ValueError("subset: every uid must be 32 lower-case hex digits")
    halves = np.frombuffer(bytes.fromhex(digits), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    halves = halves[np.lexsort((halves[:, 1], halves[:, 0]))]
    if len(halves) > 1 and (halves[1:] == halves[:-1]).all(axis=1).any():
        raise ValueError("subset: a uid comes twice")
    return np.ascontiguousarray(halves).view(DATACOMP_DTYPE).reshape(-1)


def write_outputs(
    prefix: Path, pool: Pool, ranking: Ranking, report: dict[str, Any], phases: Phases
) -> list[Path]:
    """Write ``PREFIX.parquet``, ``PREFIX.npy`` and ``PREFIX.json``; all are whole before any has its name.

    The parquet has uid (row number as text, where the pool has none), rank from 1, gain and latent_class, in
    the order taken, as a pipeline's subset; and source_id where the pool has it. The ``.npy`` is written only
    where uids are UUIDs, with dashes or without. The tables are the phase "write"; the report comes last, so
    that it can hold it.

    Returns:
        The paths written.
    """
    import polars as pl

    uids = pool.names(ranking.rows)
    frame = pl.DataFrame(
        {
            "uid": uids,
            "rank": np.arange(1, len(ranking) + 1),
            "gain": ranking.gains,
            "latent_class": pool.latent_class[ranking.rows],
        }
    )
    if pool.source_id is not None:
        names = [name.decode() or None for name in pool.source_id[ranking.rows].tolist()]
        frame = frame.with_columns(pl.Series("source_id", names, dtype=pl.String))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{prefix.name}-", dir=prefix.parent))
    try:
        with phases("write"):
            frame.write_parquet(room / "parquet")
            digits = None if pool.uid is None else hex_uids(uids)
            if digits is not None:
                with (room / "npy").open("wb") as file:
                    np.save(file, datacomp_uids(digits))
        (room / "json").write_text(json.dumps(report, indent=2) + "\n")
        written = []
        for kind in ("parquet", "npy", "json"):
            target = prefix.with_name(f"{prefix.name}.{kind}")
            if (room / kind).exists():
                (room / kind).replace(target)
                written.append(target)
            else:
                # one of an earlier run would not belong to this subset
                target.unlink(missing_ok=True)
        return written
    finally:
        shutil.rmtree(room, ignore_errors=True)


def hex_uids(uids: Collection[str]) -> list[str] | None:
    """Return uids as 32 lower-case hex digits each, as DataComp wants them; None where one is no UUID, or two
    are one UUID written in two ways."""
    digits = [found for uid in uids if (found := hex_of(uid)) is not None]
    return digits if len(set(digits)) == len(uids) else None
