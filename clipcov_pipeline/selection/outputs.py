"""What a selection writes: a parquet of the subset, a DataComp file of its uids, a JSON report."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.selection.measure import Phases
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.ranking import Ranking

_HEX = re.compile(rb"[0-9a-f]{32}")
DATACOMP_DTYPE = np.dtype("u8,u8")


def datacomp_uids(uids: np.ndarray) -> np.ndarray:
    """Sorted 128-bit uids as DataComp's resharder reads them: dtype ``u8,u8``, [m].

    Args:
        uids: bytes [m], 32 lower-case hex digits each.
    """
    halves = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids.tolist()]
    return np.sort(np.array(halves, DATACOMP_DTYPE))


def write_outputs(
    prefix: Path, pool: Pool, ranking: Ranking, report: dict[str, Any], phases: Phases
) -> list[Path]:
    """Write ``PREFIX.parquet``, ``PREFIX.npy`` and ``PREFIX.json``; all are whole before any has its name.

    The parquet has uid (row number as text, where the pool has none), rank from 1, gain and class, in the
    order taken. The ``.npy`` is written only where uids are 32 hex digits. The tables are the phase "write";
    the report comes last, so that it can hold it.

    Returns:
        The paths written.
    """
    import polars as pl

    frame = pl.DataFrame(
        {
            "uid": pool.names(ranking.rows),
            "rank": np.arange(1, len(ranking) + 1),
            "gain": ranking.gains,
            "class": pool.latent_class[ranking.rows],
        }
    )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{prefix.name}-", dir=prefix.parent))
    try:
        with phases("write"):
            frame.write_parquet(room / "parquet")
            if has_hex_uids(pool):
                assert pool.uid is not None
                with (room / "npy").open("wb") as file:
                    np.save(file, datacomp_uids(pool.uid[ranking.rows]))
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


def has_hex_uids(pool: Pool) -> bool:
    """Whether all uids are 32 lower-case hex digits, as DataComp wants them."""
    if pool.uid is None or pool.uid.dtype.itemsize != 32:
        return False
    return all(_HEX.fullmatch(uid) for uid in pool.uid.tolist())
