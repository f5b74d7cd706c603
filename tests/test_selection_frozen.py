"""Rankings that must never move: digests of fixed pools, and the same picks by two routes, bit for bit."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest

from clipcov_pipeline.selection import Pool, rank

# members, classes, width, seed; digests: all by shares, 30 % merged by gain, 40 % by the notebook's rule
POOLS = {
    "few large classes": ((1500, 3, 64, 1), ("f66fe20a209e695b", "954ae4f959c5dbfe", "6e549a68085e8245")),
    "many small classes": ((1200, 150, 32, 2), ("acad40439e2e7305", "e13a79174ba4ae73", "56ab002e1840a4a4")),
    "wide embeddings": ((800, 8, 256, 3), ("aa975f182dbdd1da", "01e30dac7e197a8b", "69c62079adfc46ba")),
}
WAYS = (
    {},
    {"class_balance": "global", "budget": 0.3},
    {"mode": "notebook", "budget": 0.4, "clip_negative": False},
)
# the same by shares as long as equal claims went to the lower class, by which nothing else was moved
EQUAL_BY_GAIN = {
    "few large classes": "e24c578051395dec",
    "many small classes": "e645953caa4a7bf7",
    "wide embeddings": "18c19f7ace2493dc",
}


def fixed_pool(n: int, classes: int, dim: int, seed: int, dtype: type = np.float16) -> Pool:
    """Whole numbers over the root of a whole number: the same on every machine."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    sides = 40 + rng.integers(-60, 60, (classes, 2, dim))[label] + rng.integers(-80, 80, (n, 2, dim))
    sides = (sides / np.sqrt((sides**2).sum(axis=2, keepdims=True))).astype(np.float16).astype(dtype)
    return Pool.from_arrays(sides[:, 0], sides[:, 1], label, rng.integers(0, 1000, n) / 1000)


def digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_rankings_of_fixed_pools_are_frozen(name, dtype):
    shape, digests = POOLS[name]
    pool = fixed_pool(*shape, dtype)
    by_shares, *others = (rank(pool, **way).rows for way in WAYS)
    assert digest(by_shares) == EQUAL_BY_GAIN[name]
    assert [digest(rows) for rows in (lower_class_first(pool, by_shares), *others)] == list(digests)


def lower_class_first(pool: Pool, rows: np.ndarray) -> np.ndarray:
    """A ranking by shares with equal claims given to the lower class."""
    met, claims = dict.fromkeys(range(pool.n_classes), 0), []
    for k in pool.latent_class[rows].tolist():
        met[k] += 1
        claims.append((Fraction(2 * met[k] - 1, int(pool.class_sizes[k])), k))
    return rows[sorted(range(len(rows)), key=claims.__getitem__)]


@pytest.mark.parametrize("shape", [(5000, 2, 48, 4), (4000, 700, 16, 5), (3000, 5, 512, 6)])
@pytest.mark.parametrize("options", [{}, {"class_balance": "global"}, {"redundancy": "budget_share"}])
@pytest.mark.parametrize("budget", [0.15, 1.0])
def test_blocks_pick_what_the_plain_heap_picks(shape, options, budget):
    """``strict`` knows no more than that embeddings are of unit norm; rows and gains are equal to the bit."""
    pool = fixed_pool(*shape)
    ours = rank(pool, budget=budget, threads=2, **options)
    plain = rank(pool, budget=budget, mode="strict", threads=1, **options)
    np.testing.assert_array_equal(ours.rows, plain.rows)
    np.testing.assert_array_equal(ours.gains, plain.gains)


@pytest.mark.parametrize("copies", [2, 40])
def test_copies_go_to_the_lower_row(copies):
    pool = fixed_pool(60, 2, 24, 7)
    rows = np.tile(np.arange(60), copies)
    image, text = pool.sides(rows)
    many = Pool.from_arrays(image, text, pool.latent_class[rows], pool.label_similarity[rows])
    ours, plain = rank(many), rank(many, mode="strict")
    np.testing.assert_array_equal(ours.rows, plain.rows)
    np.testing.assert_array_equal(ours.gains, plain.gains)


def test_a_part_of_the_notebooks_ranking_is_the_beginning_of_all_of_it():
    pool = fixed_pool(4000, 9, 32, 8)
    whole = rank(pool, mode="notebook")
    for budget in (0.01, 0.2, 0.7):
        part = rank(pool, mode="notebook", budget=budget)
        np.testing.assert_array_equal(part.rows, whole.rows[: len(part)])
        np.testing.assert_array_equal(part.gains, whole.gains[: len(part)])


def test_a_scratch_file_holds_what_memory_holds(tmp_path):
    pool = fixed_pool(700, 6, 16, 9)
    rows = np.random.default_rng(0).permutation(700)
    image, text = (np.ascontiguousarray(side) for side in pool.sides(np.arange(700)))
    blocks = ((part, image[part], text[part]) for part in np.array_split(rows, 9))
    with Pool.from_blocks(
        blocks, 16, np.float16, pool.latent_class, pool.label_similarity, {}, scratch_dir=tmp_path
    ) as other:
        np.testing.assert_array_equal(np.asarray(other.pairs), pool.pairs)
        np.testing.assert_array_equal(rank(other).rows, rank(pool).rows)
    assert not list(tmp_path.iterdir())
