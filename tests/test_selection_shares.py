"""How classes share a budget: Webster's rule, quotas, floors, and who gets the last places."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.selection import Pool, rank, validate_method
from clipcov_pipeline.selection.merge import most_by_shares, order_by_shares
from dense import unit_rows


def one_by_one(sizes, floor, balance, gains):
    """The rule as it is written down, in fractions: who is next, and of equal claims the larger gain."""
    taken, order, starts = [0] * len(sizes), [], np.r_[0, np.cumsum(sizes)]
    floored = [min(n, floor) for n in sizes]
    rest = [n - f for n, f in zip(sizes, floored, strict=True)]
    for _ in range(sum(sizes)):
        claims = []
        for k, n in enumerate(sizes):
            j = taken[k]
            if j == n:
                continue
            gain = -gains[starts[k] + j]
            if j < floor:
                claims.append((0, j, gain, k))
            elif balance == "quota":
                done = len(order) - sum(floored) + 1
                due = -(-(j - floored[k] + 1) * sum(rest) // rest[k])
                early = (j - floored[k]) * sum(rest) // rest[k] + 1
                if early <= done:
                    claims.append((1, due, gain, k))
            else:
                claims.append((1, Fraction(2 * j + 1, n if balance == "proportional" else 1), gain, k))
        k = min(claims)[3]
        order.append(int(starts[k] + taken[k]))
        taken[k] += 1
    return order


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any), st.integers(0, 2), st.data())
def test_the_order_is_the_rule_s(sizes, floor, data):
    balance = data.draw(st.sampled_from(["proportional", "quota", "uniform"]))
    n = sum(sizes)
    gains = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), float)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    order = order_by_shares(classes, np.array(sizes), floor, balance, gains)
    assert order.tolist() == one_by_one(sizes, floor, balance, gains)
    for count in range(1, n + 1):
        most = most_by_shares(np.array(sizes), count, floor, balance)
        held = np.bincount(classes[order[:count]], minlength=len(sizes))
        assert (held <= most).all()
        assert (most <= np.minimum(held + 1, sizes)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_a_quota_is_rounded_up_or_down_and_never_left(sizes):
    classes = np.repeat(np.arange(len(sizes)), sizes)
    order = order_by_shares(classes, np.array(sizes), 0, "quota", np.zeros(len(classes)))
    held = np.zeros(len(sizes), int)
    for t, at in enumerate(order, 1):
        held[classes[at]] += 1
        for a, n in zip(held.tolist(), sizes, strict=True):
            assert abs(a - Fraction(t * n, sum(sizes))) < 1


@pytest.fixture(scope="module")
def long_tail():
    """A class of 1,000 and 1,000 classes of one."""
    rng = np.random.default_rng(3)
    labels = np.r_[np.zeros(1000, int), np.arange(1, 1001)]
    return Pool.from_arrays(unit_rows(rng, 2000, 16), unit_rows(rng, 2000, 16), labels, np.zeros(2000))


@pytest.mark.parametrize("method", ["clipcov", "clip_score_per_class"])
def test_classes_of_one_beside_a_class_of_a_thousand(long_tail, method):
    webster, quota = (
        rank(long_tail, method, 500, class_balance=balance) for balance in ("proportional", "quota")
    )
    big = lambda found: int((long_tail.latent_class[found.rows] == 0).sum())  # noqa: E731
    assert big(webster) == 500 - (webster.rows >= 1000).sum()
    assert big(webster) >= 499
    assert big(quota) == 250
    # of the classes of one, which have equal claims, those of largest gain
    whole = rank(long_tail, method, class_balance="quota")
    gain = dict(zip(whole.rows.tolist(), whole.gains.tolist(), strict=True))
    best = sorted(range(1000, 2000), key=lambda row: -gain[row])[:250]
    assert set(quota.rows[quota.rows >= 1000].tolist()) == set(best)
    assert min(best) != 1000 or max(best) != 1249  # not the lowest classes
    np.testing.assert_array_equal(whole.rows[:500], quota.rows)
    assert big(rank(long_tail, method, 1500, class_floor=1)) == 500


def test_equal_classes_too_small_for_a_place_are_told_apart_by_gain():
    image, text, _, similarity = synthetic_arrays(400, 4, 16)
    pool = Pool.from_arrays(image, text, np.arange(400) // 2, similarity)
    chosen = rank(pool, "clip_score_per_class", 50).rows
    score = np.einsum("nd,nd->n", image.astype(float), text.astype(float))
    best = score.reshape(200, 2).max(axis=1)
    assert set((chosen // 2).tolist()) == set(np.argsort(-best, kind="stable")[:50].tolist())


def test_the_notebook_mode_clips_unless_told_otherwise():
    assert validate_method("clipcov", {"mode": "notebook"})["clip_negative"] is True
    assert validate_method("clipcov", {"mode": "notebook", "clip_negative": False})["clip_negative"] is False
    assert validate_method("clipcov")["clip_negative"] is False
