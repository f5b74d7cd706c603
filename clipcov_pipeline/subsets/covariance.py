"""Centred cross-covariance of images and captions: a subset's against the pool's, overall and by class.

With m pairs (v_i, t_i) of means a and b, C = (1/m) sum (v_i - a)(t_i - b)^T, a d x d matrix. Random subsets
preserve it best (their error is the smallest by construction), and a method that picks clear pairs makes it
larger; so what is compared first is **alignment**, the cosine between the two matrices, and **scale**, the
ratio of their norms, and only then the error.

The pool is read once, class after class, in blocks: a block's rows are shifted by their class's mean, which
keeps the fp32 products small, and added up in fp64. No more than a few classes' matrices are in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipcov_pipeline.selection.parallel import over_stream, tasks, thread_count
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.subsets.tables import Undefined

RANK = 10  # leading singular vectors that are compared

ZERO = 1e-8  # a matrix of a smaller norm is rounding: unit embeddings that vary give more

_BLOCK = 4096

_CLASSES = 32

_MEMORY = 8 << 30  # bytes that all threads may take together

QUANTITIES = ("alignment", "scale", "frobenius_error", "spectral_error", "subspace_overlap")


@dataclass(frozen=True)
class ClassSums:
    """What similarities within and between classes are made of, for one set of pairs.

    All by class: counts int64 [K]; image, caption, cross float64 [K]: |sum v|^2, |sum t|^2, <sum v, sum t>;
    matched float64 [K]: sum of <v_i, t_i>. total: float64 [2d], the sum of all rows [v; t].
    """

    counts: np.ndarray
    image: np.ndarray
    caption: np.ndarray
    cross: np.ndarray
    matched: np.ndarray
    total: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Sets of pairs against the pool.

    Attributes:
        sums: of the pool, then of every set.
        overall: float64 [S, 5], ``QUANTITIES`` of every set; NaN where not defined.
        by_class: float64 [S, K, 5]; the last two are worked out for the first set only (NaN for the others).
        overall_notes, class_notes: reasons, (set, quantity) and (class, quantity) -> text; of the first set
            only for classes.
    """

    sums: list[ClassSums]
    overall: np.ndarray
    by_class: np.ndarray
    overall_notes: dict[tuple[int, str], str]
    class_notes: dict[tuple[int, str], str]


def compare(pool: Pool, sets: Sequence[np.ndarray], threads: int | None = None) -> Comparison:
    """Compare sets of pairs with the pool.

    Args:
        pool: N pairs.
        sets: boolean masks [N] over the pool's **sorted positions** (see `Pool.position`), the subset first
            and random ones after it.
        threads: all processors when None, in either case no more than memory allows; the result does not
            depend on it.
    """
    threads = _affordable(thread_count(threads), len(sets) + 1, pool.dim)
    work = _Work(pool, np.stack([np.ones(len(pool), np.bool_), *sets]))
    groups = [part for group in tasks(pool.class_sizes) for part in _few(group)]
    n_sets, d = len(sets) + 1, pool.dim
    cross, total = np.zeros((n_sets, d, d)), np.zeros((n_sets, 2 * d))
    scalars = np.zeros((4, n_sets, pool.n_classes))
    counts = np.zeros((n_sets, pool.n_classes), np.int64)
    by_class = np.full((len(sets), pool.n_classes, len(QUANTITIES)), np.nan)
    notes: dict[tuple[int, str], str] = {}
    for group, part in zip(groups, over_stream(work, groups, threads), strict=True):  # in order
        cross += part.cross
        total += part.total
        scalars[:, :, group] = part.scalars
        counts[:, group] = part.counts
        by_class[:, group] = part.figures
        notes |= part.notes
    matrices = [
        _centred(cross[s], total[s] - counts[s].sum() * work.centre, counts[s].sum()) for s in range(n_sets)
    ]
    overall = np.full((len(sets), len(QUANTITIES)), np.nan)
    overall_notes: dict[tuple[int, str], str] = {}
    reference = _Reference(matrices[0], int(counts[0].sum()), "the pool")
    others = zip(matrices[1:], counts[1:].sum(axis=1), strict=True)
    found = over_stream(
        lambda some: _figures(reference, some[0], int(some[1]), spectral=True), others, threads
    )
    for s, (values, why) in enumerate(found):
        overall[s] = values
        overall_notes |= {(s, name): text for name, text in why.items()}
    image, caption, own, matched = scalars
    sums = [ClassSums(counts[s], image[s], caption[s], own[s], matched[s], total[s]) for s in range(n_sets)]
    return Comparison(sums, overall, by_class, overall_notes, notes)


def _affordable(threads: int, n_sets: int, d: int) -> int:
    """Return as many threads as keep to `_MEMORY`.

    Each has its part's matrices and a class's, a part that waits to be added, and a comparison in work.
    """
    matrices = 3 * n_sets + 8
    return max(1, min(threads, _MEMORY // (matrices * d * d * 8)))


def _few(classes: np.ndarray) -> list[np.ndarray]:
    """Cut a group of classes so that sums by class stay small, however many tiny classes there are."""
    return [classes[at : at + _CLASSES] for at in range(0, len(classes), _CLASSES)]


@dataclass
class _Part:
    """What a group of classes adds; cross is about the pool's mean, not yet centred."""

    cross: np.ndarray
    total: np.ndarray
    scalars: np.ndarray
    counts: np.ndarray
    figures: np.ndarray
    notes: dict[tuple[int, str], str]


class _Work:
    """Reads groups of classes; one object for all threads, nothing in it changes."""

    def __init__(self, pool: Pool, masks: np.ndarray) -> None:
        self.pool, self.masks = pool, masks
        sums, self.similarity, _ = pool.statistics()
        # rows are taken about a point near their class's mean: any would do, but fp32 wants small numbers
        self.points = (sums / np.maximum(pool.class_sizes, 1)[:, None]).astype(np.float32)
        self.centre = sums.sum(axis=0) / len(pool)

    def __call__(self, group: np.ndarray) -> _Part:
        n_sets, d = len(self.masks), self.pool.dim
        part = _Part(
            np.zeros((n_sets, d, d)),
            np.zeros((n_sets, 2 * d)),
            np.zeros((4, n_sets, len(group))),
            np.zeros((n_sets, len(group)), np.int64),
            np.full((n_sets - 1, len(group), len(QUANTITIES)), np.nan),
            {},
        )
        shifted = np.zeros((n_sets, len(group), 2 * d))
        for at, c in enumerate(group):
            cross, shifted[:, at], part.counts[:, at] = self._moments(int(c), part.scalars[3, :, at])
            part.cross += cross
            self._compare(part, at, int(c), cross, shifted[:, at])
        self._add_means(part, group, shifted)
        return part

    def _moments(self, c: int, matched: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums of x y^T and of [x; y], about the class's point, and counts, for every set."""
        n_sets, d = len(self.masks), self.pool.dim
        cross, sums = np.zeros((n_sets, d, d)), np.zeros((n_sets, 2 * d))
        counts = np.zeros(n_sets, np.int64)
        begin, end = self.pool.starts[c], self.pool.starts[c + 1]
        for a in range(begin, end, _BLOCK):
            b = min(a + _BLOCK, end)
            rows = self.pool.pairs[a:b].astype(np.float32)
            rows -= self.points[c]
            for s in range(n_sets):
                members = np.flatnonzero(self.masks[s, a:b])
                if not len(members):
                    continue
                some = rows if len(members) == b - a else rows[members]
                cross[s] += some[:, :d].T @ some[:, d:]
                sums[s] += some.sum(axis=0, dtype=np.float64)
                counts[s] += len(members)
                matched[s] += self.similarity[a:b][members].sum(dtype=np.float64)
        return cross, sums, counts

    def _compare(self, part: _Part, at: int, c: int, cross: np.ndarray, shifted: np.ndarray) -> None:
        counts, where = part.counts[:, at], f"class {c}"
        reference = _Reference(_centred(cross[0], shifted[0], counts[0]), int(counts[0]), where)
        for s in range(1, len(cross)):
            matrix = _centred(cross[s], shifted[s], counts[s])
            figures, why = _figures(reference, matrix, int(counts[s]), spectral=s == 1)
            part.figures[s - 1, at] = figures
            if s == 1:
                part.notes |= {(c, name): text for name, text in why.items()}

    def _add_means(self, part: _Part, group: np.ndarray, shifted: np.ndarray) -> None:
        """From sums about the classes' points to sums about the pool's mean, and sums of the rows."""
        d, points = self.pool.dim, self.points[group].astype(np.float64)
        away = points - self.centre
        for s in range(len(self.masks)):
            counts = part.counts[s].astype(np.float64)[:, None]
            x, y = shifted[s, :, :d], shifted[s, :, d:]
            part.cross[s] += x.T @ away[:, d:] + away[:, :d].T @ (y + counts * away[:, d:])
            sums = shifted[s] + counts * points
            image, caption = sums[:, :d], sums[:, d:]
            part.total[s] = sums.sum(axis=0)
            part.scalars[0, s] = (image**2).sum(axis=1)
            part.scalars[1, s] = (caption**2).sum(axis=1)
            part.scalars[2, s] = (image * caption).sum(axis=1)


def _centred(cross: np.ndarray, sums: np.ndarray, count: int) -> np.ndarray:
    """Cross-covariance from sums of x y^T and of [x; y] (about any one point)."""
    d, m = len(cross), max(int(count), 1)
    return cross / m - np.outer(sums[:d] / m, sums[d:] / m)


class _Reference:
    """The pool's matrix, or a class's, with what every comparison needs of it."""

    def __init__(self, matrix: np.ndarray, count: int, where: str) -> None:
        self.matrix, self.count, self.where = matrix, count, where
        self.norm = float(np.linalg.norm(matrix))
        self._leading: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def leading(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Singular values and vectors, the largest ``RANK``."""
        if self._leading is None:
            self._leading = leading(self.matrix)
        return self._leading

    def why_undefined(self) -> str:
        """Return why nothing can be compared with it; empty when it can."""
        if self.count < 2:
            return f"{self.where} has {self.count} pair, expected at least 2"
        if self.norm <= ZERO:
            return f"the cross-covariance of {self.where} is zero: its images or its captions do not vary"
        return ""


def _figures(
    reference: _Reference, matrix: np.ndarray, count: int, *, spectral: bool
) -> tuple[np.ndarray, dict[str, str]]:
    """`QUANTITIES` of a matrix against the reference, and the reasons for those that are not defined."""
    values = np.full(len(QUANTITIES), np.nan)
    why = reference.why_undefined()
    if not why and count < 2:
        why = (
            f"the subset has {count} of the {reference.count} pairs of {reference.where}, expected at least 2"
        )
    if why:
        return values, dict.fromkeys(QUANTITIES, why)
    notes: dict[str, str] = {}
    norm = float(np.linalg.norm(matrix))
    values[1] = norm / reference.norm
    values[2] = np.linalg.norm(matrix - reference.matrix) / reference.norm
    if norm <= ZERO:
        notes["alignment"] = notes["subspace_overlap"] = (
            f"the subset's cross-covariance in {reference.where} is zero: its images or captions do not vary"
        )
    else:
        values[0] = np.vdot(matrix, reference.matrix) / (norm * reference.norm)
    if spectral:
        values[3] = largest(matrix - reference.matrix) / reference.leading[0][0]
        try:
            if norm > ZERO:
                values[4] = subspace_overlap(reference.leading, leading(matrix))
        except Undefined as reason:
            notes["subspace_overlap"] = f"{reason} in {reference.where}"
    return values, notes


def leading(matrix: np.ndarray, rank: int = RANK) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the largest singular values [r] and their left and right vectors [d, r], r = min(rank, d)."""
    from scipy.linalg import eigh

    d = len(matrix)
    rank = min(rank, d)
    squares, left = eigh(matrix @ matrix.T, subset_by_index=[d - rank, d - 1])
    values = np.sqrt(np.maximum(squares[::-1], 0))
    left = left[:, ::-1]
    right = matrix.T @ left / np.where(values > 0, values, 1)
    return values, left, right


def largest(matrix: np.ndarray) -> float:
    """Return the largest singular value."""
    from scipy.linalg import eigh

    d = len(matrix)
    square = eigh(matrix @ matrix.T, subset_by_index=[d - 1, d - 1], eigvals_only=True)[0]
    return float(np.sqrt(max(square, 0.0)))


def subspace_overlap(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> float:
    """Return the mean squared cosine of the principal angles between leading singular subspaces, 0 to 1.

    Mean over the left and right ones; ``one`` and ``other`` are what `leading` returns.

    Raises:
        Undefined: a matrix has a lower rank.
    """
    rank = len(one[0])
    for values, *_ in (one, other):
        found = int((values > 1e-5 * values[0]).sum())
        if found < rank:
            raise Undefined(f"a cross-covariance has rank {found}, expected at least {rank}")
    sides = [np.linalg.norm(one[side].T @ other[side]) ** 2 for side in (1, 2)]
    return float(sum(sides) / (2 * rank))


def random_masks(n: int, count: int, draws: int, seed: int) -> list[np.ndarray]:
    """Return masks [n] of ``draws`` random sets of ``count``."""
    masks = []
    for draw in range(draws):
        mask = np.zeros(n, np.bool_)
        mask[np.random.default_rng([seed, draw]).choice(n, count, replace=False, shuffle=False)] = True
        masks.append(mask)
    return masks
