"""The selection engine: ClipCov and its baselines over a pool of unit embeddings, usable on its own.

    from clipcov_pipeline.selection import Pool, rank
    pool = Pool.from_arrays(image_embedding, text_embedding, latent_class, label_similarity)
    subset = rank(pool, budget=0.1).rows

Importing this loads numpy; numba is loaded when something is ranked.
"""

from clipcov_pipeline.selection.explain import Explanation, explain
from clipcov_pipeline.selection.methods import (
    DEFAULT_WEIGHTS,
    METHODS,
    NEEDS,
    budget_count,
    columns_read,
    files_of,
    reads_captions,
    validate_method,
    with_files_at,
)
from clipcov_pipeline.selection.objective import objective
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.ranking import Ranking, rank

__all__ = [
    "DEFAULT_WEIGHTS",
    "METHODS",
    "NEEDS",
    "Explanation",
    "Pool",
    "Ranking",
    "budget_count",
    "columns_read",
    "explain",
    "files_of",
    "objective",
    "rank",
    "reads_captions",
    "validate_method",
    "with_files_at",
]
