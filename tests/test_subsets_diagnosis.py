"""Diagnostics of a subset against dense numpy, and on pools where quantities are not defined."""

import tracemalloc

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.cli import cli
from clipcov_pipeline.selection import Pool, objective, rank
from clipcov_pipeline.selection.methods import DEFAULT_WEIGHTS
from clipcov_pipeline.subsets import covariance, plots
from clipcov_pipeline.subsets.covariance import compare, random_masks
from clipcov_pipeline.subsets.diagnosis import contrastive_loss, diagnose, near_duplicates, terms_along
from clipcov_pipeline.subsets.overlap import overlap
from clipcov_pipeline.subsets.pool_map import pool_map
from clipcov_pipeline.subsets.tables import SCHEMA

N, K, D = 1500, 12, 32


@pytest.fixture(scope="module")
def pool() -> Pool:
    image, text, classes, similarity = synthetic_arrays(N, K, D, seed=3)
    hashes = np.arange(N) // 2 * (np.arange(N) < 200) + np.arange(N) * (np.arange(N) >= 200)
    return Pool.from_arrays(image, text, classes, similarity, image_hash=hashes, caption_hash=hashes % 50)


@pytest.fixture(scope="module")
def rows(pool: Pool) -> np.ndarray:
    return rank(pool, method="clipcov", budget=0.2).rows


def mask_of(pool: Pool, rows: np.ndarray) -> np.ndarray:
    mask = np.zeros(len(pool), np.bool_)
    mask[pool.position[rows]] = True
    return mask


def dense(pool: Pool, rows: np.ndarray) -> np.ndarray:
    """The centred cross-covariance, in fp64 throughout."""
    image, text = (side.astype(np.float64) for side in pool.sides(rows))
    return (image - image.mean(axis=0)).T @ (text - text.mean(axis=0)) / len(rows)


def dense_figures(reference: np.ndarray, matrix: np.ndarray) -> list[float]:
    r = covariance.RANK
    (u, s, v), (x, _, y) = np.linalg.svd(reference), np.linalg.svd(matrix)
    left, right = u[:, :r].T @ x[:, :r], v[:r] @ y[:r].T
    norm = np.linalg.norm
    return [
        float((reference * matrix).sum() / norm(reference) / norm(matrix)),
        float(norm(matrix) / norm(reference)),
        float(norm(matrix - reference) / norm(reference)),
        float(norm(matrix - reference, 2) / s[0]),
        float((norm(left) ** 2 + norm(right) ** 2) / (2 * r)),
    ]


# --- cross-covariance ---------------------------------------------------------------------------------


def test_overall_and_by_class_agree_with_dense_numpy(pool: Pool, rows: np.ndarray) -> None:
    masks = [mask_of(pool, rows), *random_masks(N, len(rows), 2, seed=0)]
    found = compare(pool, masks)
    everyone = np.arange(N)
    for s, mask in enumerate(masks):
        members = pool.order[np.flatnonzero(mask)]
        expected = dense_figures(dense(pool, everyone), dense(pool, members))
        np.testing.assert_allclose(found.overall[s], expected, rtol=1e-5)
    for c in range(K):
        whole = everyone[pool.latent_class == c]
        some = rows[pool.latent_class[rows] == c]
        expected = dense_figures(dense(pool, whole), dense(pool, some))
        defined = 5 if len(some) > covariance.RANK else 4
        np.testing.assert_allclose(found.by_class[0, c, :defined], expected[:defined], rtol=1e-5)
        drawn = pool.order[np.flatnonzero(masks[1])]
        drawn = drawn[pool.latent_class[drawn] == c]
        np.testing.assert_allclose(
            found.by_class[1, c, :3], dense_figures(dense(pool, whole), dense(pool, drawn))[:3], rtol=1e-5
        )


def test_threads_and_blocks_change_nothing(pool: Pool, rows: np.ndarray, monkeypatch) -> None:
    masks = [mask_of(pool, rows)]
    whole = compare(pool, masks, threads=1)
    assert np.array_equal(whole.overall, compare(pool, masks, threads=2).overall)
    monkeypatch.setattr(covariance, "_BLOCK", 17)
    monkeypatch.setattr(covariance, "_CLASSES", 5)
    np.testing.assert_allclose(compare(pool, masks).overall, whole.overall, rtol=1e-6)


def test_threads_keep_to_their_memory_and_change_nothing(pool: Pool, monkeypatch) -> None:
    masks = random_masks(N, N // 2, 60, seed=0)
    monkeypatch.setattr(covariance, "_CLASSES", 1)  # a task each

    def peak(memory: int) -> tuple[int, np.ndarray]:
        monkeypatch.setattr(covariance, "_MEMORY", memory)
        tracemalloc.start()
        found = compare(pool, masks, threads=16)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken, found.overall

    one_set = 61 * D * D * 8
    peak(0)  # what is imported and worked out once
    free, expected = peak(1 << 30)
    bounded, found = peak(4 * one_set)
    assert free > 10 * one_set
    assert bounded < (4 + 3) * one_set  # besides threads: the sum, what is added to it, and what comes next
    assert np.array_equal(found, expected)


def test_the_pool_itself_is_aligned_at_scale_one(pool: Pool) -> None:
    found = compare(pool, [np.ones(N, np.bool_)])
    np.testing.assert_allclose(found.overall[0], [1, 1, 0, 0, 1], atol=1e-9)


def test_random_subsets_have_the_least_error_and_clipcov_a_larger_scale(pool: Pool, rows: np.ndarray) -> None:
    table = diagnose(pool, rows, draws=3).table
    get = {r["quantity"]: r for r in table.filter(pl.col("scope") == "overall").iter_rows(named=True)}
    assert get["frobenius_error"]["random_mean"] < get["frobenius_error"]["value"]
    assert get["scale"]["value"] > get["scale"]["random_mean"]


# --- the other quantities -----------------------------------------------------------------------------


def overall(table: pl.DataFrame) -> dict[str, dict]:
    return {r["quantity"]: r for r in table.filter(pl.col("scope") == "overall").iter_rows(named=True)}


def test_class_distribution_and_similarities_by_hand(pool: Pool, rows: np.ndarray) -> None:
    found = overall(diagnose(pool, rows, draws=2).table)
    p = np.bincount(pool.latent_class, minlength=K) / N
    q = np.bincount(pool.latent_class[rows], minlength=K) / len(rows)
    assert found["class_total_variation"]["value"] == pytest.approx(np.abs(p - q).sum() / 2)
    assert found["class_coverage"]["value"] == pytest.approx((q > 0).mean())
    for side, (a, b) in {"image": (0, 0), "caption": (1, 1), "cross": (0, 1)}.items():
        for column, members in (("value", rows), ("pool", np.arange(N))):
            halves = [half.astype(np.float64) for half in pool.sides(members)]
            cosines = halves[a] @ halves[b].T
            same = pool.latent_class[members][:, None] == pool.latent_class[members][None]
            within, between = same & ~np.eye(len(members), dtype=bool), ~same
            assert found[f"{side}_within"][column] == pytest.approx(cosines[within].mean(), rel=1e-3)
            assert found[f"{side}_between"][column] == pytest.approx(cosines[between].mean(), rel=1e-3)


def test_the_loss_is_open_clips(pool: Pool) -> None:
    torch = pytest.importorskip("torch")
    from open_clip.loss import ClipLoss

    positions = np.arange(0, 200, 3)
    image, text = pool.sides(pool.order[positions])
    expected = ClipLoss()(torch.tensor(image).float(), torch.tensor(text).float(), torch.tensor(20.0))
    assert contrastive_loss(pool, positions, 20.0) == pytest.approx(float(expected), rel=1e-5)


def test_terms_along_the_ranking_are_those_of_the_objective(pool: Pool, rows: np.ndarray) -> None:
    for count, terms in terms_along(pool, rows, DEFAULT_WEIGHTS).items():
        expected = objective(pool, rows[:count])
        assert terms == pytest.approx({name: expected[name] for name in terms}, rel=1e-5, abs=1e-6)
    assert count == len(rows)


def test_duplicates_are_counted(pool: Pool) -> None:
    rows = np.arange(400)
    found = overall(diagnose(pool, rows, draws=1).table)
    assert found["duplicate_images"]["value"] == pytest.approx(100 / 400)
    assert found["duplicate_captions"]["value"] == pytest.approx(1 - 50 / 400)


def test_near_duplicates_of_a_class_are_found() -> None:
    image, text, classes, _ = synthetic_arrays(300, 3, D, seed=1)
    image[:] = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0][np.arange(300) % D]
    classes[:] = np.arange(300) // D % 3
    pool = Pool.from_arrays(image, text, classes)
    members = np.arange(2 * D)  # class 0 and class 1 hold the same images
    assert near_duplicates(pool, mask_of(pool, members)).sum() == 0
    again = np.concatenate([members, np.arange(3 * D, 3 * D + 5)])  # five images of class 0 once more
    assert near_duplicates(pool, mask_of(pool, again)).sum() == 5


# --- where nothing is to be compared ------------------------------------------------------------------


def assert_tidy(table: pl.DataFrame) -> None:
    """Every quantity has a value or says why not; nothing is NaN or infinite, nothing left out."""
    assert table.schema == pl.Schema(SCHEMA)
    for row in table.iter_rows(named=True):
        if row["value"] is None:
            assert row["note"].startswith("not defined, because "), row
        for name in ("value", "pool", "random_mean", "random_std"):
            assert row[name] is None or np.isfinite(row[name]), row


QUANTITIES = {
    *("alignment", "scale", "frobenius_error", "spectral_error", "subspace_overlap"),
    *("class_total_variation", "class_coverage", "rare_class_coverage", "largest_empty_class"),
    *("classes_left_out", "samples_left_out"),
    *(f"{side}_{kind}" for side in ("image", "caption", "cross")
      for kind in ("within", "between", "separation")),
    *("proxy_loss", "duplicate_images", "duplicate_captions", "near_duplicate_images"),
    *(f"term_{name}" for name in ("class", "self", "label", "inter", "redundancy")),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "case",
    ["one sample", "two samples", "one class", "captions alike", "images alike", "all alike", "singles"],
)
def test_every_quantity_has_a_value_or_a_reason(case: str) -> None:
    image, text, classes, similarity = synthetic_arrays(200, 5, 16, seed=2)
    chosen = np.arange(60)
    match case:
        case "one sample":
            chosen = chosen[:1]
        case "two samples":
            chosen = chosen[:2]
        case "one class":
            classes[:] = 0
        case "captions alike":
            text[:] = text[0]
        case "images alike":
            image[:] = image[0]
        case "all alike":
            text[:], image[:] = text[0], text[0]
        case "singles":
            classes[:] = np.arange(200)
    pool = Pool.from_arrays(image, text, classes, similarity)
    found = diagnose(pool, chosen, draws=2)
    assert_tidy(found.table)
    assert set(overall(found.table)) == QUANTITIES
    defined = {name for name, row in overall(found.table).items() if row["value"] is not None}
    covariances = {"alignment", "scale", "frobenius_error", "spectral_error", "subspace_overlap"}
    if case in ("one sample", "captions alike", "images alike", "all alike"):
        assert not defined & covariances
        assert "alignment_undefined" in found.stats
    else:
        assert covariances - {"subspace_overlap"} <= defined
    classes_with_rows = found.table.filter(pl.col("scope") == "class")["latent_class"].n_unique()
    assert classes_with_rows == len(np.unique(classes))


def test_why_a_class_is_not_compared() -> None:
    image, text, classes, similarity = synthetic_arrays(100, 3, 16, seed=2)
    classes[:99], classes[99] = np.arange(99) % 2, 2
    pool = Pool.from_arrays(image, text, classes, similarity)
    table = diagnose(pool, np.arange(0, 99, 2)[:30], draws=1).table
    notes = {
        (r["latent_class"], r["quantity"]): r["note"]
        for r in table.filter(pl.col("scope") == "class").iter_rows(named=True)
    }
    assert notes[2, "alignment"] == "not defined, because class 2 has 1 pair, expected at least 2"
    assert notes[1, "alignment"] == (
        "not defined, because the subset has 0 of the 49 pairs of class 1, expected at least 2"
    )


# --- the map and the plots ----------------------------------------------------------------------------


def test_the_map_is_the_same_every_time_and_keeps_classes_together() -> None:
    image, text, classes, similarity = synthetic_arrays(300, 3, 16, seed=2, mismatched=0)
    centres = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0][:3]
    image = (0.3 * image.astype(np.float32) + 0.9 * centres[classes]).astype(np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    pool = Pool.from_arrays(image, text, classes, similarity)
    frame, why = pool_map(pool, 120, seed=1)
    assert not why
    assert frame.equals(pool_map(pool, 120, seed=1)[0])
    assert frame.height == frame["row"].n_unique() == 120
    places = frame.select("x", "y").to_numpy()
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    of_class = frame["latent_class"].to_numpy()
    assert (of_class[distances.argmin(axis=1)] == of_class).mean() > 0.9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", ["sound", "one sample", "all alike"])
def test_plots_of_any_pool(case: str, tmp_path) -> None:
    image, text, classes, similarity = synthetic_arrays(60, 4, 16, seed=2)
    if case == "all alike":
        image[:], text[:] = image[0], text[0]
    pool = Pool.from_arrays(image, text, classes, similarity)
    rows = np.arange(1 if case == "one sample" else 30)
    plots.plot_all(diagnose(pool, rows, draws=2), tmp_path)
    frame, why = pool_map(pool, 50)
    assert why == ("all pairs of the pool have the same embeddings" if case == "all alike" else "")
    plots.plot_map(frame, tmp_path / "map.png", np.isin(frame["row"].to_numpy(), rows), why)
    names = ["covariance", "classes", "similarities", "terms", "map"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("methods", [["a"], ["a", "b", "c"]])
def test_overlap_by_hand(methods: list[str], tmp_path) -> None:
    uids = {"a": ["1", "2", "3"], "b": ["2", "3", "4"], "c": ["5", "6", "7"]}
    table, by_chance = overlap({m: pl.Series(uids[m]) for m in methods}, 12)
    cells = {(one, other): value for one, other, value, _ in table.iter_rows()}
    expected = {("a", "b"): 0.5, ("b", "a"): 0.5, ("a", "c"): 0, ("c", "a"): 0, ("b", "c"): 0, ("c", "b"): 0}
    assert cells == (expected if len(methods) > 1 else {})
    assert by_chance == pytest.approx(0.25 / 1.75)  # p^2 of the pool in both, 2p - p^2 in one of them
    plots.plot_overlap(table, methods, "a", by_chance, tmp_path / "overlap.png")
    assert (tmp_path / "overlap.png").stat().st_size > 1000


def test_the_benchmark_prints_seconds_and_memory() -> None:
    result = CliRunner().invoke(
        cli, ["bench", "diagnostics", "--pairs", "3000", "--classes", "20", "--dim", "32", "--draws", "2"]
    )
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("3,000 pairs, d=32, 20 classes, 10% kept, 2 random subsets")
    assert [line.split()[0] for line in lines[2:4]] == ["numbers", "plots"]
    seconds, _, memory = map(float, lines[2].split()[1:])
    assert 0 < seconds < 60
    assert 0 < memory < 4


def test_classes_and_samples_left_out_are_counted() -> None:
    image, text, classes, similarity = synthetic_arrays(60, 1, 16, seed=2)
    classes[:] = np.repeat([0, 1, 2, 4], [40, 12, 5, 3])  # there is no class 3
    rows = np.r_[np.arange(10), 53]
    found = overall(diagnose(Pool.from_arrays(image, text, classes, similarity), rows, draws=3).table)
    assert found["classes_left_out"]["value"] == 2
    assert found["samples_left_out"]["value"] == 15
    assert "(25.0%)" in found["samples_left_out"]["note"]
    assert found["samples_left_out"]["pool"] == 0
