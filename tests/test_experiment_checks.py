"""Failure signatures: each check fails on really broken data, passes on sound data, and says its figure."""

import math
from typing import Any

import numpy as np
import pytest

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.experiment.checks import CHECKS, CheckOutcome, checks_of, evaluate_checks
from clipcov_pipeline.experiment.config.diagnostics import Checks
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.proxy.embeddings import pair_figures
from clipcov_pipeline.selection import Pool
from clipcov_pipeline.subsets.diagnosis import diagnose


def config(**checks: Any) -> Config:
    return Config.model_validate(
        {
            "name": "checks",
            "proxy": {"model": "RN50", "pretrained": "openai"},
            "select": {"methods": ["random"]},
            "train": {"model": "RN50", "epochs": 1},
            "evaluate": {"primary_metric": "holdout/image_retrieval_recall@1"},
            "diagnostics": {"checks": checks},
        }
    )


def outcome(stage: str, name: str, stats: dict[str, Any], **checks: Any) -> CheckOutcome:
    """The verdict of one check on an entry with these statistics."""
    record = Record(stage, "x", "f", "1", {}, {}, {}, {}, stats=stats)
    (found,) = [o for o in evaluate_checks(config(**checks), [record]) if o.name == name]
    assert (found.asset, found.partition) == (stage, "x")
    return found


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


# --- the list -----------------------------------------------------------------------------------------


def test_every_check_has_its_bound_in_the_yaml_and_every_bound_its_check() -> None:
    assert {check.name for check in CHECKS} == Checks.model_fields.keys()
    assert {check.name for check in checks_of("embeddings")} == {
        "refused_embeddings",
        "unit_norm",
        "matched_pairs",
    }


def test_a_bound_given_alone_keeps_the_severity_of_its_check() -> None:
    checks = config(matched_pairs={"bound": 5.0}, bad_samples={"severity": "error"}).diagnostics.checks
    assert (checks.matched_pairs.bound, checks.matched_pairs.severity) == (5.0, "error")
    assert (checks.bad_samples.bound, checks.bad_samples.severity) == (0.1, "error")
    assert checks.loss == Checks().loss


def test_a_bound_is_no_part_of_what_is_built() -> None:
    assert "checks" not in config(loss={"bound": 2.0}).diagnostics.semantic()


# --- shards -------------------------------------------------------------------------------------------


def test_bad_samples() -> None:
    stats: dict[str, Any] = {"samples": 100, "kept_aside": 10, "quarantined": ""}
    assert outcome("raw_shards", "bad_samples", stats).passed
    failed = outcome("raw_shards", "bad_samples", {**stats, "kept_aside": 11})
    assert (failed.passed, failed.value, failed.threshold, failed.severity) == (False, 0.11, 0.1, "warn")
    assert failed.text == "share of bad samples (11 of 100): 0.11, expected at most 0.1"
    assert not failed.blocks
    assert outcome(
        "raw_shards", "bad_samples", {**stats, "kept_aside": 11}, bad_samples={"bound": 0.2}
    ).passed


def test_a_quarantined_shard_is_all_bad_and_an_empty_one_is_not_judged() -> None:
    stats: dict[str, Any] = {"samples": 0, "kept_aside": 0, "quarantined": "no tar"}
    assert outcome("raw_shards", "bad_samples", stats).value == 1.0
    empty = outcome("raw_shards", "bad_samples", {**stats, "quarantined": ""})
    assert (empty.passed, empty.value) == (True, None)
    assert empty.text == "not defined, because the shard holds no sample"


# --- embeddings ---------------------------------------------------------------------------------------


def paired(n: int = 200, d: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Captions near their images."""
    image = unit_rows(n, d)
    text = image.astype(np.float32) + 0.5 * unit_rows(n, d, seed=1)
    return image, (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float16)


def embedding_outcomes(image: np.ndarray, text: np.ndarray) -> dict[str, CheckOutcome]:
    stats = {"rows": len(image), "refused": 0, **pair_figures(image, text)}
    return {name: outcome("embeddings", name, stats) for name in ("unit_norm", "matched_pairs")}


def test_sound_embeddings_pass() -> None:
    image, text = paired()
    found = embedding_outcomes(image, text)
    assert all(o.passed and o.value is not None for o in found.values())
    figures = pair_figures(image, text)
    cosines = np.einsum("ij,ij->i", image.astype(np.float64), text.astype(np.float64))
    assert figures["matched_cosine"] == pytest.approx(cosines.mean(), abs=1e-3)
    assert abs(figures["shuffled_cosine"]) < 0.1


def test_a_block_of_scaled_rows_fails_the_norm() -> None:
    image, text = paired()
    image[50:60] *= np.float16(1.5)
    found = embedding_outcomes(image, text)["unit_norm"]
    assert not found.passed
    assert found.blocks
    assert found.value == pytest.approx(0.5, abs=0.01)


def test_a_row_of_nan_fails_the_norm() -> None:
    image, text = paired()
    text[3] = np.nan
    found = embedding_outcomes(image, text)
    assert not found["unit_norm"].passed
    assert not found["matched_pairs"].passed
    assert found["unit_norm"].value is not None
    assert math.isnan(found["unit_norm"].value)


def test_shuffled_captions_are_no_nearer_than_others() -> None:
    image, text = paired()
    found = embedding_outcomes(image, text[np.random.default_rng(5).permutation(len(text))])["matched_pairs"]
    assert not found.passed
    assert found.blocks
    assert "lead of matched pairs" in found.text


def test_a_proxy_that_embeds_all_alike_has_no_lead() -> None:
    image = np.repeat(unit_rows(1, 16), 50, axis=0)
    found = embedding_outcomes(image, image)["matched_pairs"]
    assert (found.passed, found.value) == (False, 0.0)


@pytest.mark.parametrize("n", [0, 1, 29])
def test_too_few_pairs_are_not_judged(n: int) -> None:
    image, text = paired(max(n, 1))
    found = embedding_outcomes(image[:n], text[:n])
    assert found["matched_pairs"].text.startswith(f"not defined, because found {n} pairs")
    assert (found["unit_norm"].value is None) == (n == 0)
    assert all(o.passed for o in found.values())


def test_refused_embeddings() -> None:
    figures = pair_figures(*paired())
    assert outcome("embeddings", "refused_embeddings", {"rows": 100, "refused": 1, **figures}).passed
    assert not outcome("embeddings", "refused_embeddings", {"rows": 90, "refused": 10, **figures}).passed
    nothing = outcome("embeddings", "refused_embeddings", {"rows": 0, "refused": 0})
    assert nothing.text == "not defined, because the shard has no good sample"


def test_an_entry_from_before_a_figure_was_recorded_says_so() -> None:
    found = outcome("embeddings", "unit_norm", {"rows": 5, "refused": 0})
    assert found.passed
    assert found.text.endswith("before norm_error was recorded: materialize it again")


# --- subsets ------------------------------------------------------------------------------------------

SUBSET_CHECKS = ("alignment", "dominant_term", "empty_class", "duplicates")


def subset_outcomes(pool: Pool, rows: np.ndarray, **options: Any) -> dict[str, CheckOutcome]:
    stats = diagnose(pool, rows, draws=2, **options).stats
    return {name: outcome("subset_diagnostics", name, stats) for name in SUBSET_CHECKS}


def clip_pool() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image, text, classes, _ = synthetic_arrays(600, 6, 64, seed=4)
    return image, text, classes


def test_a_random_subset_passes_every_check() -> None:
    found = subset_outcomes(Pool.from_arrays(*clip_pool()), np.arange(0, 600, 3))
    assert all(o.passed and o.value is not None for o in found.values()), found


def test_shuffled_captions_fail_the_alignment() -> None:
    image, text = paired(600, 64)
    text[:100] = np.roll(text[:100], 1, axis=0)  # each has its neighbour's caption
    pool = Pool.from_arrays(image, text, np.arange(600) % 3)
    assert subset_outcomes(pool, np.arange(100, 200))["alignment"].passed
    found = subset_outcomes(pool, np.arange(100))["alignment"]
    assert not found.passed
    assert found.blocks
    assert "(random subsets " in found.text


def test_weights_that_leave_one_term_fail_its_bound() -> None:
    weights = {"class": 0.01, "self": 5.0, "label": 0.0, "inter": 0.01, "redundancy": 0.01}
    found = subset_outcomes(Pool.from_arrays(*clip_pool()), np.arange(0, 600, 3), weights=weights)
    assert not found["dominant_term"].passed
    assert found["dominant_term"].text.startswith("share of the term self in the sum")


def test_a_lost_class_fails() -> None:
    image, text, classes = clip_pool()
    size = int((classes == 2).sum())
    found = subset_outcomes(Pool.from_arrays(image, text, classes), np.flatnonzero(classes != 2))
    assert not found["empty_class"].passed
    assert found["empty_class"].value == size > 9


def test_copies_fail_the_duplicates() -> None:
    image, text, classes = clip_pool()
    image[100:200], classes[100:200] = image[100], classes[100]
    found = subset_outcomes(Pool.from_arrays(image, text, classes), np.arange(90, 200))
    assert not found["duplicates"].passed
    assert found["duplicates"].value == pytest.approx(99 / 110)


def test_a_subset_of_one_is_not_judged_where_nothing_is_defined() -> None:
    found = subset_outcomes(Pool.from_arrays(*clip_pool()), np.arange(1))
    assert found["alignment"].passed
    assert found["alignment"].text.startswith("not defined, because the subset has 1 of the 600 pairs")


def test_the_overlap_part_of_a_subset_has_no_checks() -> None:
    record = Record("subset_diagnostics", "x@overlap", "f", "1", {}, {}, {}, {})
    assert evaluate_checks(config(), [record]) == []


# --- labels, trainings, scores ------------------------------------------------------------------------


def test_a_class_that_takes_the_pool_and_classes_without_margin() -> None:
    sound = {"pool": 100, "largest_class": 20, "mean_margin": 0.05}
    for name in ("largest_class", "mean_margin"):
        assert outcome("pseudo_labels", name, sound).passed
    assert not outcome("pseudo_labels", "largest_class", {**sound, "largest_class": 60}).passed
    assert not outcome("pseudo_labels", "mean_margin", {**sound, "mean_margin": 1e-5}).passed


@pytest.mark.parametrize(
    ("last", "passes"), [(1.0, True), (6.0, False), (math.nan, False), (math.inf, False)]
)
def test_a_loss_that_does_not_fall_or_diverges(last: float, passes: bool) -> None:
    found = outcome("checkpoints", "loss", {"first_loss": 5.0, "last_loss": last})
    assert found.passed is passes


def test_scores_below_chance_by_more_than_noise() -> None:
    stats: dict[str, Any] = {"chance": {"acc1": 0.1, "acc5": 1.0}, "n_scored": {"acc1": 100, "acc5": 100}}
    noise = outcome("scores", "above_chance", {**stats, "acc1": 0.05, "acc5": 1.0})
    assert noise.passed
    assert noise.value == pytest.approx(-0.05 / math.sqrt(0.1 * 0.9 / 100))
    assert not outcome("scores", "above_chance", {**stats, "acc1": 0.0, "acc5": 1.0}).passed
