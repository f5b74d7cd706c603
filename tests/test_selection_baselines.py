"""Baselines and filters, each against its definition written out."""

import numpy as np
import pytest

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import METHODS, Pool, rank
from clipcov_pipeline.selection.methods import FILTER_METHODS

N = 800


@pytest.fixture(scope="module")
def arrays():
    return synthetic_arrays(N, 6, 32)


@pytest.fixture(scope="module")
def pool(arrays):
    rng = np.random.default_rng(2)
    return Pool.from_arrays(
        *arrays,
        image_hash=rng.integers(0, 500, N),
        caption_hash=np.array([b"%d" % (i % 600) for i in range(N)]),
        caption_length=np.arange(N) % 90,
        early_similarity=rng.random(N),
    )


def pair_similarity(arrays):
    return (arrays[0].astype(np.float64) * arrays[1].astype(np.float64)).sum(axis=1)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "external" and m not in FILTER_METHODS])
def test_every_method_ranks_everything_once_and_nests(pool, method):
    whole = rank(pool, method)
    assert sorted(whole.rows) == list(range(N))
    assert whole.rows.dtype == np.int64
    assert whole.gains.dtype == np.float64
    for budget in (1, 0.1, 333):
        part = rank(pool, method, budget)
        np.testing.assert_array_equal(part.rows, whole.rows[: len(part)])
        np.testing.assert_array_equal(part.gains, whole.gains[: len(part)])
    np.testing.assert_array_equal(rank(pool, method, threads=1).rows, whole.rows)


@pytest.mark.parametrize("method", ["random", "semdedup", "dedup", "s_cliploss"])
def test_the_seed_decides(pool, method):
    options = {"semdedup": {"keep": "random"}, "s_cliploss": {"batch_size": 50}}.get(method, {})
    one, again, other = (rank(pool, method, 0.3, seed=seed, **options).rows for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_random_is_uniform(arrays):
    pool = Pool.from_arrays(*(column[:20] for column in arrays))
    first = np.bincount([rank(pool, "random", 1, seed=seed).rows[0] for seed in range(2000)], minlength=20)
    assert first.min() > 60
    assert first.max() < 150


def test_clip_score(pool, arrays):
    exact = pair_similarity(arrays)
    ranking = rank(pool, "clip_score")
    assert (np.diff(exact[ranking.rows]) <= 1e-6).all()
    np.testing.assert_allclose(ranking.gains, exact[ranking.rows], atol=1e-6)


def test_clip_score_per_class(pool, arrays):
    exact, sizes = pair_similarity(arrays), np.bincount(arrays[2])
    rows = rank(pool, "clip_score_per_class", 0.25).rows
    taken = np.bincount(arrays[2][rows], minlength=6)
    assert np.abs(taken - sizes * 0.25).max() <= 1
    for k in range(6):
        members = np.flatnonzero(arrays[2] == k)
        best = members[np.argsort(-exact[members])][: taken[k]]
        assert set(best) == set(rows[arrays[2][rows] == k])


def test_c_rho_and_its_column(pool, arrays):
    ranking = rank(pool, "c_rho")
    gain = pair_similarity(arrays) - pool.early_similarity
    assert (np.diff(gain[ranking.rows]) <= 1e-6).all()
    early = np.where(np.arange(N) == 7, np.nan, pool.early_similarity)
    with pytest.raises(InputError, match="early_similarity: found nan for uid 7"):
        rank(Pool.from_arrays(*arrays, early_similarity=early), "c_rho")
    with pytest.raises(InputError, match="c_rho: needs the column early_similarity"):
        rank(Pool.from_arrays(*arrays), "c_rho")


@pytest.mark.parametrize("by", ["image", "caption", "image_or_caption", "pair"])
def test_dedup_puts_copies_last(pool, by):
    ranking = rank(pool, "dedup", by=by, seed=4)
    seen_image, seen_caption, seen_pair = set(), set(), set()
    copies = []
    for row, gain in zip(ranking.rows, ranking.gains, strict=True):
        image, caption = pool.image_hash[row], pool.caption_hash[row]
        old = {
            "image": image in seen_image,
            "caption": caption in seen_caption,
            "pair": (image, caption) in seen_pair,
        }
        old["image_or_caption"] = old["image"] or old["caption"]
        if gain == 1:
            # nothing before it in the ranking has its image or caption
            assert not old[by]
        copies.append(gain == 0)
        seen_image.add(image)
        seen_caption.add(caption)
        seen_pair.add((image, caption))
    assert copies == sorted(copies)
    unique = {"image": len(seen_image), "caption": len(seen_caption), "pair": len(seen_pair)}
    if by in unique:
        assert copies.count(False) == unique[by]


def test_hashes_of_any_kind(pool, arrays):
    expected = rank(pool, "dedup", seed=4).rows
    kinds = {"image_hash": pool.image_hash.astype(str), "caption_hash": pool.caption_hash.astype(object)}
    np.testing.assert_array_equal(rank(Pool.from_arrays(*arrays, **kinds), "dedup", seed=4).rows, expected)


def test_dedup_needs_hashes(arrays):
    with pytest.raises(InputError, match="dedup: needs the column image_hash"):
        rank(Pool.from_arrays(*arrays), "dedup")


def test_semdedup_is_the_threshold_rule(arrays):
    # one cluster: the rule can be written down whole
    image = arrays[0].astype(np.float64)
    centre = image.mean(axis=0)
    order = np.argsort(image @ centre / np.linalg.norm(centre), kind="stable")
    nearest = np.full(N, -1.0)
    for place, row in enumerate(order[1:], 1):
        nearest[row] = (image[order[:place]] @ image[row]).max()
    ranking = rank(Pool.from_arrays(*arrays), "semdedup", n_clusters=1)
    np.testing.assert_allclose(ranking.gains, np.sort(1 - nearest)[::-1], atol=2e-3)
    kept = set(np.flatnonzero(nearest <= 0.9))
    assert len(kept ^ set(ranking.rows[: len(kept)])) <= 0.02 * N


def test_semdedup_drops_planted_copies_first(arrays):
    columns = [np.concatenate([column, column[:100]]) for column in arrays]
    last = rank(Pool.from_arrays(*columns), "semdedup", n_clusters=5).rows[-100:]
    # of each planted pair one is kept
    assert len({row % N for row in last}) == 100
    assert all(row < 100 or row >= N for row in last)


def test_s_cliploss(arrays):
    image, text = (side.astype(np.float64) for side in arrays[:2])
    logits = image @ text.T / 0.05
    loss = np.log(np.exp(logits).mean(axis=1)) + np.log(np.exp(logits).mean(axis=0))
    gain = 0.05 * (logits.diagonal() - loss / 2)
    # one batch that holds everything
    ranking = rank(Pool.from_arrays(*arrays), "s_cliploss", batch_size=N, n_batches=1, temperature=0.05)
    np.testing.assert_allclose(ranking.gains, gain[ranking.rows], atol=1e-5)
    small = rank(Pool.from_arrays(*arrays), "s_cliploss", 0.2, batch_size=100, n_batches=20, temperature=0.05)
    assert len(set(small.rows) & set(ranking.rows[: len(small)])) > 0.8 * len(small)


def test_s_cliploss_at_a_low_temperature(arrays):
    """Where a row's logits all lie far below the batch's largest: no exponential may overflow or vanish."""
    image, text = (side.astype(np.float64) for side in arrays[:2])
    logits = image @ text.T / 0.0005
    own, means = logits.diagonal(), np.zeros(N)
    for axis in (0, 1):
        highest = logits.max(axis=axis, keepdims=True)
        means += np.log(np.exp(logits - highest).mean(axis=axis)) + highest.squeeze(axis)
    gain = 0.0005 * (own - means / 2)
    found = rank(Pool.from_arrays(*arrays), "s_cliploss", batch_size=N, n_batches=1, temperature=0.0005)
    np.testing.assert_allclose(found.gains, gain[found.rows], atol=1e-5)


def test_filters(pool, arrays):
    filters = {
        "min_similarity": 0.2,
        "caption_length": [10, 60],
        "drop_duplicate_images": True,
        "drop_duplicate_captions": True,
    }
    exact = pair_similarity(arrays)
    passing = [i for i in range(N) if exact[i] >= 0.2 and 10 <= pool.caption_length[i] <= 60]
    for column in (pool.image_hash, pool.caption_hash):
        best = {}
        for i in passing:
            if column[i] not in best or exact[i] > exact[best[column[i]]]:
                best[column[i]] = i
        passing = sorted(best.values())
    for method in ("clipcov", "random", "clip_score_per_class"):
        assert sorted(rank(pool, method, filters=filters).rows) == passing
    part = Pool.from_arrays(*(column[passing] for column in arrays))
    ranking = rank(pool, filters=filters, budget=20)
    np.testing.assert_array_equal(ranking.rows, np.array(passing)[rank(part, budget=20).rows])
    with pytest.raises(
        InputError, match=f"found {N}, expected at most {len(passing)}, which pass the filters"
    ):
        rank(pool, budget=1.0, filters=filters)
    with pytest.raises(InputError, match="found 0 pairs after the filters"):
        rank(pool, filters={"min_similarity": 2.0})
    with pytest.raises(InputError, match="filter caption_length: needs the column caption_length"):
        rank(Pool.from_arrays(*arrays), filters={"caption_length": [1, 2]})


@pytest.mark.parametrize("method", ["clipcov", "clip_score", "random"])
def test_what_filters_reject_can_come_last(pool, method):
    filters = {"drop_duplicate_captions": True}
    first = rank(pool, method, filters=filters)
    whole = rank(pool, method, filters={**filters, "rejected": "last"})
    np.testing.assert_array_equal(whole.rows[: len(first.rows)], first.rows)
    np.testing.assert_array_equal(np.sort(whole.rows), np.arange(len(pool)))
    rest = pool.take(np.setdiff1d(np.arange(len(pool)), first.rows))
    kept = np.setdiff1d(np.arange(len(pool)), first.rows)
    np.testing.assert_array_equal(whole.rows[len(first.rows) :], kept[rank(rest, method).rows])
    shorter = rank(pool, method, budget=len(first.rows) + 3, filters={**filters, "rejected": "last"})
    np.testing.assert_array_equal(np.sort(shorter.rows[-3:]), np.sort(rank_of_rest(pool, kept, method, 3)))


def rank_of_rest(pool: Pool, kept: np.ndarray, method: str, count: int) -> np.ndarray:
    with pool.take(kept) as rest:
        return kept[rank(rest, method, budget=count).rows]
