"""The pool drawn as a map: t-SNE of a sample of it, worked out once and shared by all subsets."""

import numpy as np
import polars as pl

from clipcov_pipeline.selection.parallel import single_blas
from clipcov_pipeline.selection.pool import Pool

MAP_SCHEMA = {"row": pl.Int64, "latent_class": pl.Int32, "x": pl.Float32, "y": pl.Float32}

PERPLEXITY = 30

_COMPONENTS = 50  # t-SNE starts from so many principal components, as its authors do

_LEAST = 5


def pool_map(pool: Pool, samples: int, seed: int = 0) -> tuple[pl.DataFrame, str]:
    """Lay out a random sample of the pool so that similar pairs are near each other.

    Args:
        pool: rows [image; caption] are compared.
        samples: at most so many pairs.
        seed: of the sample and of t-SNE.

    Returns:
        (table of ``MAP_SCHEMA``, pool rows in rising order; why there is no map, empty when there is one).
        Without a map ``x`` and ``y`` are null.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n = min(samples, len(pool))
    rows = np.sort(np.random.default_rng(seed).choice(len(pool), n, replace=False))
    frame = pl.DataFrame({"row": rows, "latent_class": pool.latent_class[rows]})
    pairs = np.concatenate(pool.sides(rows), axis=1).astype(np.float32)
    why = ""
    if n < _LEAST:
        why = f"the pool has {n} pairs, a map needs at least {_LEAST}"
    elif np.ptp(pairs, axis=0).max() == 0:
        why = "all pairs of the pool have the same embeddings"
    if why:
        empty = pl.lit(None, pl.Float32)
        return frame.with_columns(x=empty, y=empty).cast(MAP_SCHEMA), why  # type: ignore[arg-type]
    kept = min(_COMPONENTS, n, pairs.shape[1])
    with single_blas():  # so few samples: several threads take many times the CPU, and no less time
        reduced = PCA(kept, random_state=seed).fit_transform(pairs)
        # scikit-learn's init="pca" divides by the spread of a component without looking
        start = reduced[:, :2] / max(float(reduced[:, 0].std()), 1e-12) * 1e-4
        perplexity = min(PERPLEXITY, (n - 1) / 3)
        places = TSNE(init=start, perplexity=perplexity, random_state=seed).fit_transform(reduced)
    frame = frame.with_columns(x=pl.Series(places[:, 0]), y=pl.Series(places[:, 1]))
    return frame.cast(MAP_SCHEMA), ""  # type: ignore[arg-type]
