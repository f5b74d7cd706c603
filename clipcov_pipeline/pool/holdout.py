"""Which samples are held out: a share of the pool, by a hash of the uid."""

import hashlib

import polars as pl


def is_held_out(uid: str, fraction: float) -> bool:
    """Return whether a sample belongs to the held-out share; depends on its uid alone.

    The uid is hashed again, because a json's own uid need not be uniform.
    """
    return int(hashlib.sha256(uid.encode()).hexdigest()[:8], 16) < fraction * 2**32


def split_holdout(samples: pl.DataFrame, fraction: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return (pool, held out) by uid."""
    mask = pl.Series([is_held_out(uid, fraction) for uid in samples["uid"]], dtype=pl.Boolean)
    return samples.filter(~mask), samples.filter(mask)
