"""The baselines ClipCov has to answer to, as rankings: ``(pool, count, params, threads) -> (rows, gains)``.

Each orders the whole pool (or its first ``count``) by a score, ties going to the lower row.
"""

from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.external import external
from clipcov_pipeline.selection.merge import order_by_shares
from clipcov_pipeline.selection.parallel import over_classes, single_blas
from clipcov_pipeline.selection.pool import Pool

Ranked = tuple[np.ndarray, np.ndarray]
_TILE = 2048


def top(score: np.ndarray, count: int) -> Ranked:
    """The ``count`` rows of largest score (float [N]), and their scores; ties to the lower row."""
    rows = np.argsort(-score, kind="stable")[:count]
    return rows, score[rows].astype(np.float64)


def random(pool: Pool, count: int, params: dict[str, Any], threads: int | None) -> Ranked:  # noqa: ARG001
    """A uniformly random order; the gain is the random number drawn."""
    return top(np.random.default_rng(params["seed"]).random(len(pool)), count)


def clip_score(pool: Pool, count: int, params: dict[str, Any], threads: int | None) -> Ranked:  # noqa: ARG001
    """Largest pair similarity <v_i, t_i> first (CLIPScore)."""
    return top(pool.pair_similarity(), count)


def clip_score_per_class(pool: Pool, count: int, params: dict[str, Any], threads: int | None) -> Ranked:  # noqa: ARG001
    """Largest pair similarity first inside each latent class; classes by ``class_balance``."""
    score = pool.pair_similarity()
    rows = np.lexsort((-score, pool.latent_class))
    classes, gains = pool.latent_class[rows], score[rows].astype(np.float64)
    floor, balance = params["class_floor"], params["class_balance"]
    rows = rows[order_by_shares(classes, pool.class_sizes, floor, balance, gains)[:count]]
    return rows, score[rows].astype(np.float64)


def c_rho(pool: Pool, count: int, params: dict[str, Any], threads: int | None) -> Ranked:  # noqa: ARG001
    """Largest gain in pair similarity from an early proxy to the final one first (C-RHO, the ClipCov
    paper)."""
    early = pool.column("early_similarity", "c_rho").astype(np.float64)
    if not np.isfinite(early).all():
        row = int(np.argmin(np.isfinite(early)))
        raise InputError(
            f"early_similarity: found {early[row]} for uid {pool.names([row])[0]}, expected a number"
        )
    return top(pool.pair_similarity().astype(np.float64) - early, count)


def dedup(pool: Pool, count: int, params: dict[str, Any], threads: int | None) -> Ranked:  # noqa: ARG001
    """One of each set of exact duplicates first (gain 1), the copies last (gain 0); random order in both.

    ``by`` says what makes a copy: an image or a caption seen before, only one of these, or both at once.
    """
    order = np.random.default_rng(params["seed"]).permutation(len(pool))
    copies = np.zeros(len(pool), np.bool_)
    columns = {"image": ["image_hash"], "caption": ["caption_hash"]}.get(
        params["by"], ["image_hash", "caption_hash"]
    )
    codes = [_codes(pool.column(name, "dedup")) for name in columns]
    if params["by"] == "pair":
        codes = [codes[0].astype(np.int64) * (int(codes[1].max()) + 1) + codes[1]]
    for code in codes:
        _, first = np.unique(code[order], return_index=True)
        again = np.ones(len(pool), np.bool_)
        again[order[first]] = False
        copies |= again
    rows = order[np.argsort(copies[order], kind="stable")][:count]
    return rows, 1.0 - copies[rows]


def _codes(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1].reshape(-1)


def semdedup(pool: Pool, count: int, params: dict[str, Any], threads: int | None) -> Ranked:
    """Least similar to what stands before it in its cluster first (SemDeDup, Abbas et al. 2023, arXiv
    2303.09540).

    Image embeddings are clustered by spherical k-means; inside a cluster the rows stand in the order of
    ``keep`` ("hard": farthest from the centre first, as the authors' code), and the gain of a row is 1
    minus its largest similarity to a row before it. The first ``n`` of the ranking are what SemDeDup keeps
    at the threshold that keeps n. ``n_clusters`` is one a thousand rows unless given.
    """
    from clipcov_pipeline.selection.latent_classes import assign_clusters, spherical_kmeans

    rows = np.arange(len(pool))
    clusters = params["n_clusters"] or max(1, round(len(pool) / 1000))
    if clusters > len(pool):
        clusters = len(pool)
    images = pool.pairs[:, : pool.dim]
    sample = min(len(pool), max(64 * clusters, 50_000))
    centres = spherical_kmeans(images, clusters, params["seed"], n_iter=10, sample=sample)
    cluster, to_centre, _ = assign_clusters(images, centres)
    if params["keep"] == "random":
        place = np.random.default_rng(params["seed"]).random(len(pool))
    else:
        place = to_centre if params["keep"] == "hard" else -to_centre
    # ties by pool row, so that the order of classes does not decide
    order = np.lexsort((pool.order, place, cluster))
    sizes = np.bincount(cluster, minlength=len(centres))
    starts = np.r_[0, np.cumsum(sizes)]
    nearest = np.full(len(pool), -1.0, np.float32)

    def one(which: np.ndarray) -> None:
        for c in which:
            members = order[starts[c] : starts[c + 1]]
            nearest[members] = _nearest_before(images, members)

    with single_blas():
        over_classes(one, sizes, threads)
    score = np.empty(len(pool), np.float32)
    score[pool.order[rows]] = 1.0 - nearest[rows]
    return top(score, count)


def _nearest_before(images: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Largest similarity of each member to the members before it (-1 for the first), in tiles."""
    best = np.full(len(members), -1.0, np.float32)
    for a in range(0, len(members), _TILE):
        later = images[members[a : a + _TILE]].astype(np.float32)
        for b in range(0, a + 1, _TILE):
            similarity = later @ images[members[b : b + _TILE]].astype(np.float32).T
            if a == b:
                similarity[np.triu_indices_from(similarity)] = -1.0
            np.maximum(best[a : a + _TILE], similarity.max(axis=1), out=best[a : a + _TILE])
    return best


def s_cliploss(pool: Pool, count: int, params: dict[str, Any], threads: int | None) -> Ranked:  # noqa: ARG001
    """Smallest surrogate CLIP loss first (negCLIPLoss, Wang et al. 2024, arXiv 2405.19547).

    gain_i = <v_i,t_i> - (temperature / 2) [log mean_j exp(<v_i,t_j>/temperature) + log mean_j
    exp(<v_j,t_i>/temperature)],
    j over a random batch that holds i, averaged over ``n_batches`` random partitions into batches of about
    ``batch_size``. (The authors sum over j: a constant less for batches of one size.) The paper uses batches
    of 32,768; the cost is N x batch_size x n_batches x d.
    """
    rng = np.random.default_rng(params["seed"])
    temperature, d = params["temperature"], pool.dim
    batches = max(1, round(len(pool) / params["batch_size"]))
    total = np.zeros(len(pool))
    for _ in range(params["n_batches"]):
        for batch in np.array_split(rng.permutation(len(pool)), batches):
            rows = pool.pairs[pool.position[batch]].astype(np.float32)
            logits = rows[:, :d] @ rows[:, d:].T
            logits /= temperature
            own = logits.diagonal().astype(np.float64)
            by_image, by_text = log_sum_exp(logits), log_sum_exp(np.ascontiguousarray(logits.T))
            total[batch] += temperature * (own - (by_image + by_text) / 2 + np.log(len(batch)))
    return top(total / params["n_batches"], count)


def log_sum_exp(values: np.ndarray) -> np.ndarray:
    """log of the sum of the exponentials of each row: float64 [n].

    What a row has largest is subtracted in it, so that none overflows and none vanishes.
    """
    top = values.max(axis=1, keepdims=True)
    shifted = values - top
    return np.log(np.exp(shifted, out=shifted).sum(axis=1, dtype=np.float64)) + top[:, 0]


BASELINES = {
    "random": random,
    "clip_score": clip_score,
    "clip_score_per_class": clip_score_per_class,
    "semdedup": semdedup,
    "dedup": dedup,
    "c_rho": c_rho,
    "s_cliploss": s_cliploss,
    "external": external,
}
