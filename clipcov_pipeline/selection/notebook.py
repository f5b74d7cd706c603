"""The authors' batch rule inside one class, compiled."""

import numpy as np
from numba import njit

from clipcov_pipeline.selection.kernels import add_swapped, clipped_similarity, dot


@njit(nogil=True, cache=True)
def batch_classes(
    pairs, starts, classes, base, lasting, passing, scale, clip, batch, most, out_row, out_gain
):
    """The authors' batch rule inside some classes (``clip_core.ipynb`` of their repository).

    By score, the best ``batch - 1`` are taken, then ``batch`` at a time. After each batch every score of the
    class falls by scale x (similarities to the batch + ``lasting`` over all taken so far + ``passing`` over
    the batch).

    Args:
        lasting: float64 [n], the class term; passing: float64 [n], half the label similarity.
        The others as in ``greedy_classes``.
    """
    d = pairs.shape[1] // 2
    chosen = np.empty(2 * d)
    scaled = np.empty(2 * d, np.float32)
    for c in classes:
        start, stop = starts[c], starts[c + 1]
        left = np.arange(stop - start)
        score = base[start:stop].copy()
        taken = 0
        constant = 0.0
        while taken < most[c]:
            order = np.argsort(-score, kind="mergesort")
            want = min(batch - 1 if taken == 0 else batch, most[c] - taken)
            chosen[:] = 0.0
            passed = 0.0
            for rank in range(want):
                i = left[order[rank]]
                out_row[start + taken] = i
                out_gain[start + taken] = score[order[rank]]
                taken += 1
                constant += lasting[start + i]
                passed += passing[start + i]
                if not clip:
                    add_swapped(pairs, start + i, d, chosen, scaled, scale[c])
            # rows keep their order, so that ties still go to the first
            rest = np.sort(order[want:])
            left, score = left[rest], score[rest]
            fall = (constant + passed) * scale[c]
            for r in range(left.shape[0]):
                i = start + left[r]
                if clip:
                    similar = 0.0
                    for b in range(start + taken - want, start + taken):
                        similar += clipped_similarity(pairs, i, start + out_row[b], d)
                    score[r] -= scale[c] * similar + fall
                else:
                    score[r] -= float(dot(pairs, i, scaled)) + fall
