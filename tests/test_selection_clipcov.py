"""ClipCov against a dense float64 implementation, and the properties a ranking must have."""

import ast
import hashlib
import importlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipcov_pipeline.bench.notebook_route import notebook_route
from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.selection import DEFAULT_WEIGHTS, Pool, Ranking, objective, rank
from dense import GLOBAL, Dense, assert_greedy, pools, unit_rows

FAST = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FAST
@given(pools(), st.booleans(), st.sampled_from(["greedy", "strict"]))
def test_full_ranking_is_the_dense_greedy(data, clip, mode):
    ranking = rank(Pool.from_arrays(*data), mode=mode, clip_negative=clip, **GLOBAL)
    assert_greedy(Dense(*data, clip=clip), ranking)


@FAST
@given(pools(), st.data())
def test_weights_and_redundancy_scale(data, draw):
    weights = {term: draw.draw(st.sampled_from([0.0, 0.3, 1.0, 2.5]), label=term) for term in DEFAULT_WEIGHTS}
    count = draw.draw(st.integers(1, len(data[0])), label="count")
    dense = Dense(*data, weights=weights, size=count / len(data[0]))
    pool = Pool.from_arrays(*data)
    ranking = rank(pool, budget=count, weights=weights, redundancy="budget_share", **GLOBAL)
    assert_greedy(dense, ranking, tolerance=4e-6)
    value = objective(pool, ranking.rows, weights, redundancy="budget_share")
    assert value["F"] == pytest.approx(dense.value(ranking.rows), abs=1e-4)


@FAST
@given(pools(), st.data())
def test_properties(data, draw):
    n = len(data[0])
    pool = Pool.from_arrays(*data)
    clip = draw.draw(st.booleans(), label="clip")
    options = {
        "mode": draw.draw(st.sampled_from(["greedy", "strict", "notebook"]), label="mode"),
        "class_balance": draw.draw(
            st.sampled_from(["global", "proportional", "quota", "sqrt", "uniform"]), label="balance"
        ),
        "class_floor": draw.draw(st.integers(0, 3), label="floor"),
        "clip_negative": clip,
        "batch_size": draw.draw(st.sampled_from([2, 5, 200]), label="batch"),
    }
    count = draw.draw(st.integers(1, n), label="count")
    whole, part = rank(pool, **options), rank(pool, budget=count, **options)
    assert len(part) == count
    assert sorted(whole.rows) == list(range(n))
    np.testing.assert_allclose(part.gains, whole.gains[:count], atol=2e-6)
    for at in np.flatnonzero(part.rows != whole.rows[:count]):
        near = np.abs(whole.gains - whole.gains[at]) < 4e-6
        assert near.sum() > 1, f"rank {at} differs without a tie"
    for threads in (1, 2, 3):
        again = rank(pool, budget=count, threads=threads, **options)
        np.testing.assert_array_equal(again.rows, part.rows)
        np.testing.assert_array_equal(again.gains, part.gains)
    if options["mode"] != "notebook":
        value = objective(pool, part.rows, clip_negative=clip)
        assert value["F"] == pytest.approx(part.gains.sum(), abs=1e-4)
        assert value["F"] == pytest.approx(sum(value[term] for term in value if term != "F"))
        assert value["F"] == pytest.approx(Dense(*data, clip=clip).value(part.rows), abs=1e-4)


@FAST
@given(pools(), st.randoms(use_true_random=False))
def test_permuting_the_input_permutes_the_output(data, random):
    order = np.array(random.sample(range(len(data[0])), len(data[0])))
    ranking = rank(Pool.from_arrays(*data), **GLOBAL)
    permuted = rank(Pool.from_arrays(*(column[order] for column in data)), **GLOBAL)
    np.testing.assert_allclose(permuted.gains, ranking.gains, atol=2e-6)
    assert_greedy(Dense(*data), Ranking(order[permuted.rows], permuted.gains))


@FAST
@given(pools(positive=True), st.booleans())
def test_gains_fall_inside_a_class_where_similarities_are_positive(data, clip):
    ranking = rank(Pool.from_arrays(*data), clip_negative=clip)
    for k in np.unique(data[2]):
        assert (np.diff(ranking.gains[data[2][ranking.rows] == k]) <= 1e-6).all()


def test_chunk_size_does_not_matter(monkeypatch):
    parallel, pool_module, objective_module = (
        importlib.import_module(f"clipcov_pipeline.selection.{name}")
        for name in ("parallel", "pool", "objective")
    )
    data, options = synthetic_arrays(3000, 7, 33), {"budget": 0.3, **GLOBAL}
    whole = [rank(Pool.from_arrays(*data), clip_negative=clip, **options) for clip in (False, True)]
    monkeypatch.setattr(pool_module, "BLOCK_BYTES", 33 * 4 * 17)
    monkeypatch.setattr(objective_module, "_TILE", 61)
    monkeypatch.setattr(parallel, "_TASK_ROWS", 100)
    again = [rank(Pool.from_arrays(*data), clip_negative=clip, **options) for clip in (False, True)]
    np.testing.assert_array_equal(again[0].rows, whole[0].rows)
    assert len(np.intersect1d(again[1].rows, whole[1].rows)) >= 0.999 * len(whole[1])


def test_identical_rows_are_taken_in_order():
    row = unit_rows(np.random.default_rng(0), 1, 16)
    same = np.repeat(row, 50, axis=0)
    pool = Pool.from_arrays(same, same, np.repeat([1, 0], 25), np.zeros(50))
    for mode in ("greedy", "strict"):
        rows = rank(pool, mode=mode).rows
        for k in (0, 1):
            of_class = rows[pool.latent_class[rows] == k]
            np.testing.assert_array_equal(of_class, np.sort(of_class))


def test_all_similarities_negative():
    # images on one side, captions on the other: gains rise as others are taken, which lazy bounds must notice
    rng = np.random.default_rng(1)
    image, text = unit_rows(rng, 300, 24, shift=2.0), -unit_rows(rng, 300, 24, shift=2.0)
    data = (image, text, rng.integers(0, 3, 300), np.zeros(300, np.float32))
    dense = Dense(*data)
    expected_rows, expected_gains = dense.greedy(300)
    assert all((block < 0).all() for block in dense.s.values())
    assert (np.diff(expected_gains) > 0).any()
    for mode in ("greedy", "strict"):
        ranking = rank(Pool.from_arrays(*data), mode=mode, **GLOBAL)
        assert_greedy(dense, ranking)
        assert (ranking.rows == expected_rows).mean() > 0.99


def test_gains_below_zero_do_not_end_the_ranking():
    data = synthetic_arrays(400, 3, 24)
    ranking = rank(Pool.from_arrays(*data), weights={"class": 0, "self": 0, "label": 0})
    assert len(ranking) == 400
    assert (ranking.gains < 0).sum() > 100


def test_shares_are_the_default_and_the_notebook_mode_has_none():
    pool = Pool.from_arrays(*synthetic_arrays(2000, 7, 33))
    for mode in ("greedy", "strict", "notebook"):
        balance = "global" if mode == "notebook" else "proportional"
        by_default = rank(pool, budget=0.2, mode=mode)
        explicit = rank(pool, budget=0.2, mode=mode, class_balance=balance)
        np.testing.assert_array_equal(by_default.rows, explicit.rows)


def test_proportional_balance_keeps_shares_and_floor():
    labels = np.repeat(np.arange(4), [700, 250, 45, 5])
    rng = np.random.default_rng(0)
    data = (unit_rows(rng, 1000, 16), unit_rows(rng, 1000, 16), labels, np.zeros(1000))
    pool = Pool.from_arrays(*data)
    taken = np.bincount(labels[rank(pool, budget=0.1).rows], minlength=4)
    assert np.abs(taken - [70, 25, 4.5, 0.5]).max() <= 1
    floored = rank(pool, budget=0.1, class_floor=4).rows
    taken = np.bincount(labels[floored], minlength=4)
    assert taken.min() >= 4
    # inside a class the order is that of the class's own greedy
    alone = rank(pool, **GLOBAL).rows
    for k in range(4):
        mine = floored[labels[floored] == k]
        np.testing.assert_array_equal(mine, alone[labels[alone] == k][: len(mine)])


def test_notebook_mode_is_the_batch_rule():
    # few pairs a class and a small batch: many batches, each with its constant
    data = synthetic_arrays(900, 5, 32)
    dense = Dense(*data, clip=True)  # the published notebook's, and this mode's default
    scores, left, new, taken, order = dense.base.copy(), set(range(900)), {}, {}, []
    while left:
        i = max(left, key=lambda row: (scores[row], -data[2][row], -row))
        left.remove(i)
        order.append(i)
        k = data[2][i]
        new.setdefault(k, []).append(i)
        taken.setdefault(k, []).append(i)
        if (len(taken[k]) + 1) % 20 == 0:
            members = np.flatnonzero(data[2] == k)
            similar = dense.s[k][:, dense.place[new[k]]].sum(axis=1)
            constant = dense.class_term[taken[k]].sum() + data[3][new[k]].sum() / 2
            scores[members] -= (similar + constant) / len(members)
            new[k] = []
    rows = rank(Pool.from_arrays(*data), mode="notebook", batch_size=20).rows
    assert (rows == order).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("clip", [False, True])
def test_notebook_mode_agrees_with_the_notebooks_route(tmp_path, clip):
    from clipcov_pipeline.selection.measure import Phases

    data = synthetic_arrays(30_000, 30, 128)
    for fraction in (0.1, 0.5):
        count = round(30_000 * fraction)
        theirs = notebook_route(*data, count, tmp_path, Phases(), clip_negative=clip)
        ours = rank(Pool.from_arrays(*data), budget=fraction, mode="notebook", clip_negative=clip).rows
        assert len(np.intersect1d(ours, theirs)) / len(np.union1d(ours, theirs)) >= 0.999


@pytest.mark.slow
def test_greedy_is_the_dense_greedy_on_forty_thousand_pairs():
    data = synthetic_arrays(40_000, 24, 256, seed=3)
    expected_rows, expected_gains = Dense(*data).greedy(20_000)
    pool = Pool.from_arrays(*data)
    for fraction in (0.1, 0.5):
        rankings = [rank(pool, budget=fraction, threads=threads, **GLOBAL) for threads in (1, 2)]
        np.testing.assert_array_equal(rankings[0].rows, rankings[1].rows)
        count = len(rankings[0])
        assert set(rankings[0].rows) == set(expected_rows[:count])
        np.testing.assert_allclose(rankings[0].gains, expected_gains[:count], atol=1e-6)


@pytest.mark.slow
def test_sums_of_a_large_class_are_exact():
    # summed in float16 this comes out wrong by most of its value
    n = 62_000
    image, text, _, similarity = synthetic_arrays(n, 1, 32)
    labels = np.zeros(n, np.int32)
    pool = Pool.from_arrays(image, text, labels, similarity)
    exact = np.concatenate([side.astype(np.float64).sum(axis=0) for side in (image, text)])
    np.testing.assert_allclose(pool.statistics()[0][0], exact, rtol=1e-6, atol=1e-2)
    mean = exact.reshape(2, -1) / n
    base = image.astype(np.float64) @ mean[1] + text.astype(np.float64) @ mean[0]
    base += 2 * (image.astype(np.float64) * text).sum(axis=1) + similarity.astype(np.float64) / 2
    ranking = rank(pool, budget=0.05)
    first = int(base.argmax())
    assert ranking.rows[0] == first
    assert ranking.gains[0] == pytest.approx(base[first], abs=1e-6)
    chosen = ranking.rows[:-1]
    sums = [side[chosen].astype(np.float64).sum(axis=0) for side in (image, text)]
    last = ranking.rows[-1]
    redundancy = (image[last].astype(np.float64) @ sums[1] + text[last].astype(np.float64) @ sums[0]) / n
    assert ranking.gains[-1] == pytest.approx(base[last] - redundancy, abs=1e-6)


@pytest.mark.parametrize("name", ["blocks", "greedy", "notebook"])
def test_machine_code_is_compiled_anew_where_what_it_calls_has_changed(name: str) -> None:
    """numba's cache on disk looks at a function's own file: it would serve the old kernels in the new one."""
    module = importlib.import_module(f"clipcov_pipeline.selection.{name}")
    folder = Path(module.__file__).parent  # type: ignore[arg-type]
    for file, known in module.COMPILED_WITH.items():
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()[:16]
        assert known == digest, f"{name}.py: write the digest {digest} of {file} into COMPILED_WITH"
    imported = {
        f"{node.module.rpartition('.')[2]}.py"
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("clipcov_pipeline.selection.")
    }
    assert imported <= set(module.COMPILED_WITH)
