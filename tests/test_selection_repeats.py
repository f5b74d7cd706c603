"""The penalty on repeats against its definition, written out with loops over a dense float64 greedy."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import Pool, objective, rank
from clipcov_pipeline.selection.explain import explain
from clipcov_pipeline.selection.repeats import places
from dense import GLOBAL, Dense, assert_greedy, pools, unit_rows


def lowered(dense: Dense, penalty: float, *groups: np.ndarray) -> Dense:
    """The same with base scores lowered: for every row, count the better ones of its groups."""
    base = dense.base
    means = {k: base[dense.labels == k].mean() for k in np.unique(dense.labels)}
    step = penalty * np.sqrt(np.mean([(b - means[k]) ** 2 for b, k in zip(base, dense.labels, strict=True)]))
    better = np.zeros(len(base))
    for group in groups:
        for i in range(len(base)):
            mine = np.flatnonzero(group == group[i])
            better[i] += sum(base[j] > base[i] for j in mine)
    dense.base = base - step * better
    return dense


def data_with_repeats(seed: int, n: int = 90):
    rng = np.random.default_rng(seed)
    data = (unit_rows(rng, n, 16), unit_rows(rng, n, 16), rng.integers(0, 3, n), np.zeros(n, np.float32))
    return data, rng.integers(0, 30, n), rng.integers(0, 60, n)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pools(), st.sampled_from([0.1, 0.5, 3.0]), st.integers(0, 2**32 - 1))
def test_ranking_is_the_dense_greedy_of_the_lowered_scores(data, penalty, seed):
    rng, n = np.random.default_rng(seed), len(data[0])
    captions, images = rng.integers(0, n, n), rng.integers(0, n, n)
    dense = Dense(*data)
    ties = np.diff(np.sort(dense.base)) < 1e-6  # float32 may see equal scores the other way round
    if ties.any():
        return
    pool = Pool.from_arrays(*data, caption_hash=captions, image_hash=images)
    ranking = rank(pool, repeat_penalty=penalty, **GLOBAL)
    assert_greedy(lowered(dense, penalty, captions, images), ranking, tolerance=1e-5)


def test_gains_add_up_to_the_objective_and_repeats_are_a_term_of_it():
    data, captions, images = data_with_repeats(0)
    pool = Pool.from_arrays(*data, caption_hash=captions, image_hash=images)
    ranking = rank(pool, budget=40, repeat_penalty=0.5, **GLOBAL)
    value = objective(pool, ranking.rows, repeat_penalty=0.5)
    assert value["F"] == pytest.approx(ranking.gains.sum(), abs=1e-4)
    expected = lowered(Dense(*data), 0.5, captions, images).value(ranking.rows)
    assert value["F"] == pytest.approx(expected, abs=1e-4)
    assert value["repeats"] < 0
    assert "repeats" not in objective(pool, ranking.rows)


def test_fewer_copies_are_taken_and_none_is_lost():
    data, captions, images = data_with_repeats(1)
    pool = Pool.from_arrays(*data, caption_hash=captions, image_hash=images)

    def distinct(penalty: float) -> int:
        return len(np.unique(captions[rank(pool, budget=25, repeat_penalty=penalty).rows]))

    assert distinct(0.0) < distinct(0.5) <= distinct(100.0) <= 25
    assert sorted(rank(pool, repeat_penalty=100.0).rows) == list(range(90))
    np.testing.assert_array_equal(rank(pool, repeat_penalty=0.0).rows, rank(pool).rows)


def test_places_against_a_hand_worked_table():
    values = np.array([0.5, 0.9, 0.5, 0.1, 0.9])
    group = np.array([7, 7, 7, 8, 8])
    # among equal values the lower row comes first
    np.testing.assert_array_equal(places(values, group, np.arange(5)), [1, 0, 2, 1, 0])
    np.testing.assert_array_equal(places(values, group, np.arange(5)[::-1]), [2, 0, 1, 1, 0])


def test_explain_names_the_term():
    data, captions, images = data_with_repeats(2)
    uids = [f"{i:032x}" for i in range(90)]
    pool = Pool.from_arrays(*data, uid=uids, caption_hash=captions, image_hash=images)
    ranking = rank(pool, repeat_penalty=0.5)
    dense = Dense(*data)
    plain = dense.base.copy()
    expected = lowered(dense, 0.5, captions, images).base - plain
    for row in range(0, 90, 9):
        found = explain(pool, uids[row], 0.2, {"repeat_penalty": 0.5})
        assert found.terms["repeats"] == pytest.approx(expected[row], abs=1e-5)
        assert found.base == pytest.approx(dense.base[row], abs=1e-5)
        assert found.rank == int(np.flatnonzero(ranking.rows == row)[0]) + 1
    assert "repeats" not in explain(pool, uids[0], 0.2).terms


def test_a_pool_without_the_columns_says_so():
    data, captions, _ = data_with_repeats(3)
    with pytest.raises(InputError, match=r"clipcov repeat_penalty: needs the column image_hash"):
        rank(Pool.from_arrays(*data, caption_hash=captions), repeat_penalty=0.5)
    with pytest.raises(InputError, match=r"clipcov.repeat_penalty: found -1, expected a finite number of at"):
        rank(Pool.from_arrays(*data), repeat_penalty=-1)
