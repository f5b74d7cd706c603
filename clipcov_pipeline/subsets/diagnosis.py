"""All numbers of one subset beside its pool and beside random subsets of the same size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from clipcov_pipeline.selection.baselines import log_sum_exp
from clipcov_pipeline.selection.methods import DEFAULT_WEIGHTS
from clipcov_pipeline.selection.objective import TERMS, directions, project, subset_sums
from clipcov_pipeline.selection.parallel import over_classes, over_stream, single_blas
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.subsets.covariance import QUANTITIES, RANK, ClassSums, Comparison, compare, random_masks
from clipcov_pipeline.subsets.tables import QuantityRows

RARE = 10  # a class of fewer members is rare

NEAR = 0.95  # images of a larger cosine are near-duplicates

NEAR_BLOCK = 4096  # members of a class that are compared with each other

BATCH, BATCHES = 512, 20  # of the contrastive loss

POINTS = 10  # places along the ranking at which the terms of F are given

COVARIANCE_TEXT = {
    "alignment": "cosine between the subset's and the pool's matrix: the figure to judge by, 1 is best",
    "scale": "ratio of the norms; above 1: the subset's pairs agree more clearly than the pool's",
    "frobenius_error": "relative; random subsets have the least by construction",
    "spectral_error": "relative; random subsets have the least by construction",
    "subspace_overlap": f"of the {RANK} leading singular directions, 1 is best",
}


@dataclass(frozen=True)
class Sizes:
    """Members of every latent class, int64 [K]: in the pool and in the subset."""

    pool: np.ndarray
    subset: np.ndarray


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` finds.

    Attributes:
        table: of `tables.SCHEMA`.
        sizes: of the classes.
        alignments: float64 [1 + draws, K]: of every class, the subset's, then the random ones'; NaN where not
            defined.
        stats: what the checks look at, and a few headline numbers.
    """

    table: pl.DataFrame
    sizes: Sizes
    alignments: np.ndarray
    stats: dict[str, Any]


def diagnose(
    pool: Pool,
    rows: np.ndarray,
    *,
    draws: int = 10,
    seed: int = 0,
    logit_scale: float = 100.0,
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    threads: int | None = None,
) -> Diagnosis:
    """Compare a subset with its pool.

    Args:
        pool: with ``image_hash`` and ``caption_hash`` for exact duplicates.
        rows: pool rows of the subset in the order in which the method takes them.
        draws: random subsets of the same size.
        logit_scale: the proxy's, by which cosines are multiplied in its loss.
        weights: of the terms of F.
    """
    masks = [np.zeros(len(pool), np.bool_), *random_masks(len(pool), len(rows), draws, seed)]
    masks[0][pool.position[rows]] = True
    found = compare(pool, masks, threads)
    table = QuantityRows()
    _add_covariance(table, found)
    _add_classes(table, found.sums)
    _add_similarities(table, found.sums)
    _add_loss(table, pool, masks, logit_scale, seed, threads)
    _add_duplicates(table, pool, masks, threads)
    shares = _add_terms(table, pool, rows, weights, threads)
    _add_covariance_by_class(table, found)
    sizes = Sizes(found.sums[0].counts, found.sums[1].counts)
    alignments = found.by_class[:, :, 0]
    frame = table.frame()
    return Diagnosis(frame, sizes, alignments, _stats(frame, sizes, shares))


def _add_covariance(table: QuantityRows, found: Comparison) -> None:
    for at, name in enumerate(QUANTITIES):
        value = found.overall[0, at]
        why = found.overall_notes.get((0, name), "")
        table.add(name, value, random=found.overall[1:, at].tolist(), note=why or COVARIANCE_TEXT[name])


def _add_covariance_by_class(table: QuantityRows, found: Comparison) -> None:
    for c in np.flatnonzero(found.sums[0].counts):
        for at, name in enumerate(QUANTITIES):
            table.add(
                name,
                found.by_class[0, c, at],
                random=found.by_class[1:, c, at].tolist(),
                scope="class",
                latent_class=int(c),
                note=found.class_notes.get((int(c), name), ""),
            )


def _add_classes(table: QuantityRows, sums: Sequence[ClassSums]) -> None:
    """Class distribution; the random columns are exact for the draws."""
    pool = sums[0].counts
    filled, rare = pool > 0, (pool > 0) & (pool < RARE)

    def distance(counts: np.ndarray) -> float:
        return float(np.abs(counts / counts.sum() - pool / pool.sum()).sum() / 2)

    def covered(counts: np.ndarray, among: np.ndarray) -> float:
        return float((counts[among] > 0).mean())

    own, drawn = sums[1].counts, [s.counts for s in sums[2:]]
    table.add(
        "class_total_variation",
        distance(own),
        pool=0.0,
        random=[distance(c) for c in drawn],
        note="between the class shares of subset and pool; 0: the same, 1: nothing in common",
    )
    table.add(
        "class_coverage",
        covered(own, filled),
        pool=1.0,
        random=[covered(c, filled) for c in drawn],
        note=f"share of the {filled.sum():,} latent classes with a member in the subset",
    )
    if rare.any():
        table.add(
            "rare_class_coverage",
            covered(own, rare),
            pool=1.0,
            random=[covered(c, rare) for c in drawn],
            note=f"share of the {rare.sum():,} classes of under {RARE} members with one in the subset",
        )
    else:
        table.add("rare_class_coverage", None, note=f"no class of the pool has under {RARE} members")
    _add_left_out(table, pool, [own, *drawn])
    empty = pool[filled & (own == 0)]
    table.add(
        "largest_empty_class",
        float(empty.max(initial=0)),
        pool=0.0,
        random=[float(pool[filled & (c == 0)].max(initial=0)) for c in drawn],
        note=f"pool members of the largest of {len(empty):,} latent classes that the subset leaves empty",
    )


def _add_left_out(table: QuantityRows, pool: np.ndarray, taken: Sequence[np.ndarray]) -> None:
    """How many classes, and samples in these, have nobody in the subset; ``taken`` begins with its own."""
    empty = [pool[(pool > 0) & (counts == 0)] for counts in taken]
    text = f"of the {(pool > 0).sum():,} latent classes have nobody in the subset"
    classes = [float(len(sizes)) for sizes in empty]
    samples = [float(sizes.sum()) for sizes in empty]
    table.add("classes_left_out", classes[0], pool=0.0, random=classes[1:], note=f"so many {text}")
    part = (
        f"pool samples ({samples[0] / pool.sum():.1%}) are in latent classes that have nobody in the subset"
    )
    table.add("samples_left_out", samples[0], pool=0.0, random=samples[1:], note=f"so many {part}")


def _add_similarities(table: QuantityRows, sums: Sequence[ClassSums]) -> None:
    """Mean cosine of pairs of one class and of different classes, all pairs counted alike."""
    sides = (("image", "images"), ("caption", "captions"), ("cross", "images and other pairs' captions"))
    for side, words in sides:
        found = [_within_between(s, side) for s in sums]
        for kind in ("within", "between", "separation"):
            values = [getattr(some, kind) for some in found]
            text = {
                "within": f"mean cosine of {words} of one latent class",
                "between": f"mean cosine of {words} of different latent classes",
                "separation": f"within less between, {words}: a larger one is easier to tell apart",
            }[kind]
            why = found[1].why if values[1] is None else ""
            table.add(f"{side}_{kind}", values[1], pool=values[0], random=values[2:], note=why or text)


class _Cosines(NamedTuple):
    """Means of one set of pairs; None where there is no such pair, and why."""

    within: float | None
    between: float | None
    why: str

    @property
    def separation(self) -> float | None:
        return None if self.within is None or self.between is None else self.within - self.between


def _within_between(sums: ClassSums, side: str) -> _Cosines:
    d, m = len(sums.total) // 2, sums.counts.astype(np.float64)
    halves = {"image": (0, 0), "caption": (1, 1), "cross": (0, 1)}[side]
    total = [sums.total[half * d : (half + 1) * d] for half in halves]
    squares: np.ndarray = getattr(sums, side)
    own = sums.matched if side == "cross" else m  # a pair with itself; unit rows have cosine 1
    same, others = (m * (m - 1)).sum(), m.sum() ** 2 - (m**2).sum()
    within = float((squares - own).sum() / same) if same else None
    between = float((total[0] @ total[1] - squares.sum()) / others) if others else None
    why = "" if same else "no latent class has two samples in the subset"
    why = why if others else "all samples of the subset are of one latent class"
    return _Cosines(within, between, why)


def _add_loss(
    table: QuantityRows,
    pool: Pool,
    masks: Sequence[np.ndarray],
    logit_scale: float,
    seed: int,
    threads: int | None,
) -> None:
    """The symmetric contrastive loss of random batches, of the same size for subset and pool."""
    count = int(masks[0].sum())
    batch = min(BATCH, count)
    if batch < 2:
        table.add("proxy_loss", None, note=f"the subset has {count} sample, a batch needs at least 2")
        return
    everyone = np.ones(len(pool), np.bool_)

    def loss(mask: np.ndarray) -> float:
        rng, positions = np.random.default_rng([seed, 7]), np.flatnonzero(mask)
        batches = [rng.choice(positions, batch, replace=False, shuffle=False) for _ in range(BATCHES)]
        return float(np.mean([contrastive_loss(pool, some, logit_scale) for some in batches]))

    losses = list(over_stream(loss, (everyone, *masks), threads))
    table.add(
        "proxy_loss",
        losses[1],
        pool=losses[0],
        random=losses[2:],
        note=f"mean of {BATCHES} random batches of {batch}, logit scale {logit_scale:.4g}; lower: the proxy"
        " tells these pairs apart more easily",
    )


def contrastive_loss(pool: Pool, positions: np.ndarray, logit_scale: float) -> float:
    """Return CLIP's loss of one batch, by sorted positions: mean of both directions' cross-entropy."""
    rows = pool.pairs[np.sort(positions)].astype(np.float32)
    logits = np.float32(logit_scale) * (rows[:, : pool.dim] @ rows[:, pool.dim :].T)
    own = np.diag(logits).astype(np.float64)
    both = [log_sum_exp(side) - own for side in (logits, np.ascontiguousarray(logits.T))]
    return float(np.mean(both))


def _add_duplicates(
    table: QuantityRows, pool: Pool, masks: Sequence[np.ndarray], threads: int | None
) -> None:
    """Share of a set that repeats another sample of it: exactly by hash, nearly by the images' cosine."""
    for name, words in (("image", "image bytes"), ("caption", "caption")):
        hashes = getattr(pool, f"{name}_hash")
        if hashes is None:
            table.add(f"duplicate_{name}s", None, note=f"the pool has no column {name}_hash")
            continue
        codes = np.unique(hashes, return_inverse=True)[1].reshape(-1)[pool.order]
        values = [_repeats(codes[mask]) for mask in masks]
        table.add(
            f"duplicate_{name}s",
            values[0],
            pool=_repeats(codes),
            random=values[1:],
            note=f"share of samples whose {words} the set has already",
        )
    values = [float(near_duplicates(pool, mask, threads).sum() / mask.sum()) for mask in masks[:2]]
    table.add(
        "near_duplicate_images",
        values[0],
        random=values[1:],
        note=f"share of samples with an image cosine above {NEAR:g} to an earlier sample of their class"
        f" in the set; in classes of over {NEAR_BLOCK:,} {NEAR_BLOCK:,} at a time are compared; one draw",
    )


def _repeats(codes: np.ndarray) -> float:
    return 1 - len(np.unique(codes)) / len(codes)


def near_duplicates(pool: Pool, mask: np.ndarray, threads: int | None = None) -> np.ndarray:
    """Return bool [N] in sorted order: members of ``mask`` with an earlier near-duplicate in their class."""
    found = np.zeros(len(mask), np.bool_)

    def one(classes: np.ndarray) -> None:
        for c in classes:
            begin = pool.starts[c]
            members = begin + np.flatnonzero(mask[begin : pool.starts[c + 1]])
            for at in range(0, len(members), NEAR_BLOCK):
                some = members[at : at + NEAR_BLOCK]
                images = pool.pairs[some, : pool.dim].astype(np.float32)
                similar = np.tril(images @ images.T, -1) > NEAR
                found[some] = similar.any(axis=1)

    with single_blas():
        over_classes(one, pool.class_sizes, threads)
    return found


def _add_terms(
    table: QuantityRows, pool: Pool, rows: np.ndarray, weights: Mapping[str, float], threads: int | None
) -> dict[str, float]:
    """Share of each term of F at places along the ranking; returns those of the whole subset."""
    terms = terms_along(pool, rows, weights, threads)
    shares: dict[str, float] = {}
    for count, values in terms.items():
        total, whole = sum(abs(value) for value in values.values()), count == len(rows)
        for name, value in values.items():
            share = abs(value) / total if total else None
            why = (
                f"{value:.6g} of F; share of the terms' absolute values" if total else "all terms of F are 0"
            )
            table.add(f"term_{name}", share, scope="ranking", samples=count, note=why)
            if whole:
                table.add(f"term_{name}", share, note=why)
            if whole and share is not None:
                shares[name] = share
    return shares


def terms_along(
    pool: Pool, rows: np.ndarray, weights: Mapping[str, float], threads: int | None = None
) -> dict[int, dict[str, float]]:
    """Return the terms of F (see `objective`) of the first n rows, for about ``POINTS`` values of n.

    F of the weights alone: without ``repeat_penalty``, and similarities below 0 count as they are.
    """
    class_direction, inter_direction = directions(pool, threads)
    class_term, inter = project(pool, class_direction, inter_direction, threads=threads)
    similarity, sizes = pool.statistics(threads)[1], np.maximum(pool.class_sizes, 1)
    position = pool.position[rows]
    gains = {
        "class": weights["class"] * class_term[position].astype(np.float64),
        "self": weights["self"] * similarity[position].astype(np.float64),
        "label": weights["label"] * pool.label_similarity[rows].astype(np.float64),
        "inter": -weights["inter"] * inter[position].astype(np.float64),
    }
    stops = np.unique(np.ceil(np.linspace(0, len(rows), POINTS + 1)[1:]).astype(int))
    sums, own = np.zeros((pool.n_classes, 2 * pool.dim)), np.zeros(pool.n_classes)
    found, start, d = {}, 0, pool.dim
    for stop in stops:
        part = np.sort(position[start:stop])
        of_class = pool.latent_class[pool.order[part]]
        starts = np.searchsorted(of_class, np.arange(pool.n_classes + 1))
        sums += subset_sums(pool, part, starts, threads)
        own += np.bincount(of_class, similarity[part].astype(np.float64), pool.n_classes)
        pairs = ((sums[:, :d] * sums[:, d:]).sum(axis=1) - own) / sizes
        found[int(stop)] = {name: float(gains[name][:stop].sum()) for name in TERMS} | {
            "redundancy": -weights["redundancy"] * float(pairs.sum())
        }
        start = stop
    return found


def add_cost(table: pl.DataFrame, seconds: float, cpu_seconds: float | None) -> pl.DataFrame:
    """Return the table with what the ranking has cost that the subset is cut from."""
    cost = QuantityRows()
    cost.add("selection_seconds", seconds, note="of the whole ranking, reading the embeddings included")
    why = "" if cpu_seconds is not None else "the ranking was made before it was recorded"
    cost.add("selection_cpu_seconds", cpu_seconds, note=why or "over all processors")
    return pl.concat([table, cost.frame()])


def _stats(table: pl.DataFrame, sizes: Sizes, shares: Mapping[str, float]) -> dict[str, Any]:
    """What the checks look at; ``NAME_undefined`` holds the reason where a figure is not defined."""
    overall = {r["quantity"]: r for r in table.filter(pl.col("scope") == "overall").iter_rows(named=True)}
    stats: dict[str, Any] = {"samples": int(sizes.subset.sum()), "pool": int(sizes.pool.sum())}
    headline = ("alignment", "scale", "class_coverage", "largest_empty_class", "proxy_loss")
    repeated = ("duplicate_images", "duplicate_captions", "near_duplicate_images")
    for name in (*headline, *repeated):
        row = overall[name]
        if row["value"] is None:
            stats[f"{name}_undefined"] = row["note"].removeprefix("not defined, because ")
        else:
            stats[name] = row["value"]
    stats["alignment_of_random"] = overall["alignment"]["random_mean"]
    stats["empty_classes"] = int(((sizes.pool > 0) & (sizes.subset == 0)).sum())
    if shares:
        stats["dominant_term"] = max(shares, key=lambda name: shares[name])
        stats["dominant_share"] = shares[stats["dominant_term"]]
    else:
        stats["dominant_share_undefined"] = "all terms of F are 0"
    return stats
