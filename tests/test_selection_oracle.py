"""Subsets of 2,000 random pairs in 20 classes (sizes 0, 1, 2, long-tailed) against float64 brute force."""

import numpy as np
import pytest

from clipcov_pipeline.selection import Pool, budget_count, rank
from dense import unit

N, CLASSES, DIM = 2000, 20, 48
SIZES = [0, 1, 2, *(round(900 * 0.62**place) for place in range(17))]
FRACTIONS = (0.1, 0.25, 0.5)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    """Float16 embeddings as they are stored; the oracle works on the same numbers in float64."""
    rng = np.random.default_rng(7)
    sizes = np.array(SIZES)
    sizes[3] += N - sizes.sum()
    label = rng.permutation(np.repeat(np.arange(CLASSES), sizes))
    centres = unit(rng.standard_normal((CLASSES, DIM)))
    noise = rng.standard_normal((2, N, DIM)) / np.sqrt(DIM)
    image, text = (unit(centres[label] + 1.2 * part).astype(np.float16) for part in noise)
    similarity = np.einsum("ij,ij->i", text.astype(np.float64), centres[label]).astype(np.float32)
    return {"image": image, "text": text, "label": label.astype(np.int32), "similarity": similarity}


def pool_of(data: dict[str, np.ndarray]) -> Pool:
    return Pool.from_arrays(data["image"], data["text"], data["label"], data["similarity"], n_classes=CLASSES)


@pytest.fixture(scope="module")
def greedy(data: dict[str, np.ndarray]) -> list[int]:
    """The objective by the book: every gain anew from the full similarity matrix at every step."""
    v, t = data["image"].astype(np.float64), data["text"].astype(np.float64)
    s = v @ t.T + t @ v.T
    same = data["label"][:, None] == data["label"][None, :]
    size = same.sum(axis=1)
    there = [k for k in range(CLASSES) if (data["label"] == k).any()]
    u_image, u_text = (unit(np.stack([x[data["label"] == k].mean(axis=0) for k in there])) for x in (v, t))
    to_centres = v @ u_text.T + t @ u_image.T
    own = np.array([there.index(k) for k in data["label"]])
    inter = (to_centres.sum(axis=1) - to_centres[np.arange(N), own]) / (len(there) - 1)
    base = (s * same).sum(axis=1) / size + 2 * np.einsum("ij,ij->i", v, t)
    base = base + data["similarity"].astype(np.float64) / 2 - inter
    within, chosen = s * same, list[int]()
    for _ in range(budget_count(max(FRACTIONS), N)):
        gain = base - within[:, chosen].sum(axis=1) / size
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
    return chosen


def semdedup(data: dict[str, np.ndarray], count: int) -> set[int]:
    """One cluster: from the farthest to the nearest of its centre, drop what is most like an earlier one."""
    v = data["image"].astype(np.float64)
    order = np.argsort(v @ unit(v.mean(axis=0)[None])[0], kind="stable")
    similarity = v[order] @ v[order].T
    nearest = np.array([-1.0, *(similarity[row, :row].max() for row in range(1, N))])
    return set(order[np.argsort(nearest, kind="stable")[:count]].tolist())


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("mode", ["greedy", "strict"])
def test_clipcov(data: dict[str, np.ndarray], greedy: list[int], fraction: float, mode: str) -> None:
    count = budget_count(fraction, N)
    found = rank(pool_of(data), "clipcov", fraction, mode=mode, class_balance="global").rows.tolist()
    assert len(found) == count
    assert set(found) == set(greedy[:count])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_clip_score(data: dict[str, np.ndarray], fraction: float) -> None:
    count = budget_count(fraction, N)
    score = np.einsum("ij,ij->i", data["image"].astype(np.float64), data["text"].astype(np.float64))
    expected = set(np.argsort(-score, kind="stable")[:count].tolist())
    assert set(rank(pool_of(data), "clip_score", fraction).rows.tolist()) == expected


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_semdedup(data: dict[str, np.ndarray], fraction: float) -> None:
    count = budget_count(fraction, N)
    found = rank(pool_of(data), "semdedup", fraction, n_clusters=1).rows.tolist()
    assert set(found) == semdedup(data, count)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_random(data: dict[str, np.ndarray], fraction: float) -> None:
    count = budget_count(fraction, N)
    found = rank(pool_of(data), "random", fraction, seed=5).rows.tolist()
    drawn = np.random.default_rng(5).random(N)
    assert set(found) == {row for row in range(N) if (drawn > drawn[row]).sum() < count}
