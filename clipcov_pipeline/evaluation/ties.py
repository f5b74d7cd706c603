"""Where right answers stand among wrong ones, and what a tie counts.

Repeated captions and images make exact ties: nothing tells the copies apart, so which of them is among the
first k is chance. By default a tie counts what it is worth in a random order, its expected value;
``clip_benchmark`` takes the order that torch.topk happens to give, as that tool does; ``miss`` puts every
wrong answer of a tie before the right one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clipcov_pipeline.evaluation.tasks import Ties

# Similarities closer than this are ties: equal images of two batches differ by float32 rounding.
TIE = 1e-6


@dataclass(frozen=True)
class Standing:
    """Where the best right answer of each query stands; int64 [n].

    ahead: wrong answers that are better. tied: wrong answers as good (within `TIE`). right: right answers as
    good, itself included; 0 where no right answer has a score, which is a miss by any convention.
    top: k -> bool [n], whether torch.topk has a right answer among the first k; only where it was asked for.
    """

    ahead: np.ndarray
    tied: np.ndarray
    right: np.ndarray
    top: dict[int, np.ndarray]

    def hits(self, k: int, ties: Ties) -> np.ndarray:
        """How much of a hit each query is at k: float64 [n], from 0 to 1."""
        if ties == "clip_benchmark":
            return self.top[k].astype(np.float64)
        known = self.right > 0
        if ties == "miss":
            return (known & (self.ahead + self.tied < k)).astype(np.float64)
        places = np.clip(k - self.ahead, 0, self.tied + self.right)
        missed = np.ones(len(self.ahead))
        for drawn in range(k):  # without a right one among those drawn from the tie so far
            left = np.maximum(self.tied + self.right - drawn, 1)
            missed *= np.where(drawn < places, np.maximum(self.tied - drawn, 0) / left, 1.0)
        return np.where(known, 1.0 - missed, 0.0)


def standing(
    scores: np.ndarray, right: tuple[np.ndarray, np.ndarray], ks: Sequence[int], ties: Ties
) -> Standing:
    """Stand the right answers of some queries.

    Args:
        scores: float [n, m]; NaN is the worst.
        right: (query, candidate) of all right pairs.
        ks: that will be asked for.
        ties: `clip_benchmark` needs torch's own order.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best = np.full(len(scores), -np.inf, scores.dtype)
    np.maximum.at(best, right[0], scores[right])
    known = np.isfinite(best)
    near = np.abs(scores - np.where(known, best, 0)[:, None]) <= TIE
    better = scores > (best + TIE)[:, None]
    is_right = np.zeros(scores.shape, np.bool_)
    is_right[right] = True
    top = {k: _top(scores, is_right & known[:, None], k) for k in ks} if ties == "clip_benchmark" else {}
    return Standing(
        ahead=better.sum(axis=1),
        tied=(near & ~is_right).sum(axis=1),
        right=np.where(known, (near & is_right).sum(axis=1), 0),
        top=top,
    )


def standings(
    queries: np.ndarray,
    candidates: np.ndarray,
    own_pairs: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
    ks: Sequence[int],
    ties: Ties,
    block: int,
) -> Standing:
    """As `standing`, of the products of queries [n, d] and candidates [m, d], ``block`` queries at a time.

    own_pairs(start, stop): (query - start, candidate) of all right pairs of these queries.
    """
    queries = np.asarray(queries, dtype=np.float32)
    candidates = np.asarray(candidates, dtype=np.float32)
    parts = []
    for start in range(0, len(queries), block):
        stop = min(start + block, len(queries))
        parts.append(standing(queries[start:stop] @ candidates.T, own_pairs(start, stop), ks, ties))
    return Standing(
        np.concatenate([part.ahead for part in parts]),
        np.concatenate([part.tied for part in parts]),
        np.concatenate([part.right for part in parts]),
        {k: np.concatenate([part.top[k] for part in parts]) for k in parts[0].top},
    )


def _top(scores: np.ndarray, is_right: np.ndarray, k: int) -> np.ndarray:
    import torch

    first = torch.topk(torch.from_numpy(scores), min(k, scores.shape[1]), dim=1).indices.numpy()
    return np.asarray(np.take_along_axis(is_right, first, axis=1).any(axis=1))
