"""ClipCov as it is written down, dense and in float64, and random pools to compare it on."""

import numpy as np
import pytest
from hypothesis import strategies as st

from clipcov_pipeline.selection import DEFAULT_WEIGHTS

GLOBAL: dict = {"class_balance": "global"}  # one merge by gain: the greedy order of F


class Dense:
    """The method as it is written down: float64, with every class's matrix."""

    def __init__(self, image, text, labels, similarity, weights=DEFAULT_WEIGHTS, clip=False, size=None):
        v, t, self.labels = image.astype(np.float64), text.astype(np.float64), labels
        classes = np.unique(labels)
        unit = lambda x: x / max(np.linalg.norm(x), 1e-300)  # noqa: E731
        centre_v = {k: unit(v[labels == k].mean(axis=0)) for k in classes}
        centre_t = {k: unit(t[labels == k].mean(axis=0)) for k in classes}
        self.base, self.place, self.s, self.size = np.zeros(len(v)), np.zeros(len(v), int), {}, {}
        self.class_term = np.zeros(len(v))
        for k in classes:
            rows = np.flatnonzero(labels == k)
            cross = v[rows] @ t[rows].T
            own = cross.diagonal().copy()
            if clip:
                cross = np.maximum(cross, 0)
            self.s[k] = cross + cross.T
            self.place[rows] = np.arange(len(rows))
            self.size[k] = len(rows) if size is None else max(1.0, len(rows) * size)
            inter = np.zeros(len(rows))
            for q in classes:
                if q != k:
                    inter += (v[rows] @ centre_t[q] + t[rows] @ centre_v[q]) / (len(classes) - 1)
            self.class_term[rows] = self.s[k].mean(axis=1)
            self.base[rows] = (
                weights["class"] * self.class_term[rows]
                + weights["self"] * own
                + weights["label"] * similarity[rows].astype(np.float64)
                - weights["inter"] * inter
            )
        self.redundancy = weights["redundancy"]

    def take(self, gain, i):
        k = self.labels[i]
        gain[self.labels == k] -= self.redundancy * self.s[k][self.place[i]] / self.size[k]
        gain[i] = -np.inf

    def greedy(self, count):
        gain, rows, gains = self.base.copy(), [], []
        for _ in range(count):
            rows.append(int(gain.argmax()))
            gains.append(gain[rows[-1]])
            self.take(gain, rows[-1])
        return np.array(rows), np.array(gains)

    def value(self, rows):
        total = self.base[rows].sum()
        for k in np.unique(self.labels[rows]):
            place = self.place[rows[self.labels[rows] == k]]
            block = self.s[k][np.ix_(place, place)]
            total -= self.redundancy * (block.sum() - block.diagonal().sum()) / 2 / self.size[k]
        return total


def unit(rows: np.ndarray) -> np.ndarray:
    """The rows at length one."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def unit_rows(rng, n, d, dtype=np.float32, shift=0.0):
    x = rng.standard_normal((n, d)) + shift
    return unit(x).astype(dtype)


@st.composite
def pools(draw, positive=False):
    """Random pools: few rows or many, classes missing, of one and of two members, any width."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d, k = draw(st.integers(1, 120)), draw(st.integers(2, 37)), draw(st.integers(1, 9))
    # three standard deviations off the origin all similarities are positive
    shift = 3.0 if positive else draw(st.sampled_from([0.0, 0.5, 3.0]))
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    labels = rng.integers(0, k, n) * draw(st.sampled_from([1, 3]))
    sides = unit_rows(rng, n, d, dtype, shift), unit_rows(rng, n, d, dtype, shift)
    return (*sides, labels, rng.random(n).astype(np.float32))


def assert_greedy(dense, ranking, tolerance=2e-6):
    """Every row taken has the largest gain of its turn, and that gain: a near-tie may go either way."""
    gain = dense.base.copy()
    for turn, (i, recorded) in enumerate(zip(ranking.rows, ranking.gains, strict=True)):
        assert gain[i] == pytest.approx(recorded, abs=tolerance), f"gain at turn {turn}"
        assert gain[i] >= gain.max() - tolerance, f"turn {turn}: {gain.max()} was to be had"
        dense.take(gain, i)
