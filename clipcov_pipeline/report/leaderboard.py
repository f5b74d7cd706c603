"""Collects the scores of all arms and compares them: spread over seeds, paired differences, the best arm."""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.config.evaluate import Suite
from clipcov_pipeline.experiment.plan import Plan
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.recipes import Recipe, evaluation_sets, recipes

CHANCE = "chance"

CLIPCOV = "clipcov"

RANDOM = "random"

NOT_BASELINES = {CLIPCOV, "oracle", "external"}  # methods: the one that is judged, and what knows the truth

SCORE_SCHEMA = {
    "arm": pl.String,
    "method": pl.String,
    "fraction": pl.Float64,
    "protocol": pl.String,
    "seed": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
    "chance": pl.Float64,
    "n_samples": pl.Int64,
}

GROUP = ["method", "fraction", "protocol"]  # a row of the leaderboard: the arms that differ in the seed

DRAWS = 10_000  # of the bootstrap


def collect_scores(files: Iterable[tuple[Recipe, str, Path]]) -> pl.DataFrame:
    """Read score records into one tidy table (`SCORE_SCHEMA`): one row an arm and metric.

    Args:
        files: (arm, evaluation set, path of its ``scores.json``).
    """
    rows: list[dict[str, Any]] = []
    for recipe, name, path in files:
        for record in json.loads(path.read_text()):
            for metric, value in record["metrics"].items():
                rows.append(
                    {
                        "arm": recipe.key,
                        "method": recipe.method,
                        "fraction": recipe.fraction,
                        "protocol": recipe.protocol,
                        "seed": recipe.seed,
                        "metric": f"{name}/{metric}",
                        "value": value,
                        "chance": record["chance"][metric],
                        "n_samples": record["n_samples"],
                    }
                )
    return pl.DataFrame(rows, schema=SCORE_SCHEMA)


def with_suites(
    scores: pl.DataFrame, suites: Mapping[str, Suite], absent: Container[str] = ()
) -> pl.DataFrame:
    """Put a metric ``SUITE/METRIC`` before the others: the mean over the suite's sets that are there.

    An arm that lacks the score of one of them has no average, so that all averages are over the same sets.
    A set on which nothing can be missed (chance level 1, as acc5 of under 5 classes) says nothing and is in
    none. ``chance`` is averaged too, ``n_samples`` added up.

    Args:
        scores: `collect_scores`'s table.
        suites: label -> suite.
        absent: evaluation sets without a folder: in no average.
    """
    keys = [name for name in scores.columns if name not in ("metric", "value", "chance", "n_samples")]
    parts = []
    empty = certain(scores)
    for name, suite in suites.items():
        members = [f"{member}/{suite.metric}" for member in suite.sets if member not in absent]
        members = [metric for metric in members if metric not in empty]
        mean = (
            scores.filter(pl.col("metric").is_in(members))
            .group_by(keys, maintain_order=True)
            .agg(
                pl.len(),
                pl.lit(f"{name}/{suite.metric}").alias("metric"),
                pl.col("value").mean(),
                pl.col("chance").mean(),
                pl.col("n_samples").sum(),
            )
        )
        parts.append(mean.filter(pl.col("len") == len(members)).select(scores.columns))
    return pl.concat([*parts, scores])


def certain(scores: pl.DataFrame) -> set[str]:
    """Return the metrics ``SET/METRIC`` whose chance level is 1, as of acc5 with under 5 classes."""
    return set(scores.filter(pl.col("chance") >= 1)["metric"])


def suite_notes(
    suites: Mapping[str, Suite], absent: Container[str] = (), empty: Container[str] = ()
) -> list[str]:
    """Return a line a suite that names the sets it is the mean of, and those it is not.

    ``absent``: sets without a folder; ``empty``: metrics that say nothing (`certain`).
    """
    lines = []
    for name, suite in suites.items():
        gone = [member for member in suite.sets if member in absent]
        few = [member for member in suite.sets if f"{member}/{suite.metric}" in empty]
        found = [member for member in suite.sets if member not in (*gone, *few)]
        text = f"mean of {len(found)} of its {len(suite.sets)} sets ({', '.join(found)})"
        text = text if found else f"not defined, none of its {len(suite.sets)} sets has a folder"
        text = f"not defined, none of its {len(suite.sets)} sets can be missed" if few and not found else text
        rest = f"; left out, folder absent: {', '.join(gone)}" if gone else ""
        rest += f"; left out, chance level is 100 %: {', '.join(few)}" if few else ""
        lines.append(f"{name}/{suite.metric}: {text}{rest}")
    return lines


TIES_TEXT = {
    "expected": "a tie with wrong answers counts its share of a random order (evaluate.ties: expected)",
    "clip_benchmark": "ties fall as torch.topk orders them (evaluate.ties: clip_benchmark)",
    "miss": "a tie with a wrong answer is a miss (evaluate.ties: miss)",
}


def score_notes(project: Project, scores: pl.DataFrame) -> list[str]:
    """Return lines on ties, on what each suite is the mean of, and on the sets that are left out."""
    world, settings = project.world, project.config.evaluate
    notes = suite_notes(settings.suites, world.absent, certain(scores))
    return [TIES_TEXT[settings.ties], *notes, *world.warnings()]


def scores_so_far(project: Project) -> tuple[pl.DataFrame, list[str]]:
    """Return the scores of the arms that are up to date, and the names of those that are missing."""
    plan, store, files, missing = project.plan(), project.store, [], []
    absent = project.world.absent
    for arm in recipes(project.config):
        for name in evaluation_sets(project.config, absent):
            step = plan.by_name[f"scores/{arm.key}@{name}"]
            if step.record is None:
                missing.append(step.node.partition)
            else:
                files.append((arm, name, store.folder(step.record) / "scores.json"))
    return with_suites(collect_scores(files), project.config.evaluate.suites, absent), missing


def champion(scores: pl.DataFrame, primary: str) -> str | None:
    """Return the best arm: of the row with the best mean of ``primary`` the seed that is best.

    The row is chosen by its mean, so that one lucky seed does not win; None without scores of ``primary``.
    """
    arms = scores.filter(pl.col("metric") == primary)
    means = arms.with_columns(mean=pl.col("value").mean().over(GROUP))
    best = means.sort("mean", "value", *GROUP, "seed", descending=[True, True, False, False, False, False])
    return best["arm"].first() if best.height else None  # type: ignore[return-value]


def subset_sizes(plan: Plan) -> dict[str, int]:
    """Return the number of samples of every subset that is up to date, by its partition."""
    steps = plan.of("subsets")
    return {step.node.partition: step.record.stats["samples"] for step in steps if step.record is not None}


def leaderboard(scores: pl.DataFrame, methods: Mapping[str, str] | None = None) -> pl.DataFrame:
    """Return one row a method, fraction, protocol and metric.

    Columns: mean, std (ddof 1, null for one seed), seeds, chance, n_samples; the paired differences to the
    random subset of the same fraction (``random_*``) and to the full pool (``full_*``), as `differences`
    gives them; and for ClipCov's rows ``best_baseline``, the best other method at the same fraction (random
    and heuristics; nothing that is told the truth), and ``baseline_ratio``, mean / mean of that method. A
    figure that is not defined (nothing to compare with, one seed, a baseline of 0) is null.

    Args:
        scores: `collect_scores`'s table.
        methods: label -> name of the method behind it; a label that is missing is its own method.
    """
    grouped = scores.group_by(*GROUP, "metric", maintain_order=True)
    board = grouped.agg(
        mean=pl.col("value").mean(),
        std=pl.col("value").std(),
        seeds=pl.len(),
        chance=pl.col("chance").first(),
        n_samples=pl.col("n_samples").first(),
    )
    labels: list[str] = scores["method"].unique(maintain_order=True).to_list()
    kind = {label: (methods or {}).get(label, label) for label in labels}
    at_random = next((label for label, method in kind.items() if method == RANDOM), None)

    def of_method(label: str | None) -> pl.DataFrame:
        return scores.clear() if label is None else scores.filter(pl.col("method") == label)

    for name, reference, on in (
        (RANDOM, at_random, ["fraction", "protocol", "seed", "metric"]),
        (FULL, FULL, ["protocol", "seed", "metric"]),
    ):
        pairs = differences(scores, of_method(reference), on, name)
        board = board.join(pairs, on=[*GROUP, "metric"], how="left", maintain_order="left")
    return _with_best_baseline(board, kind)


def differences(scores: pl.DataFrame, reference: pl.DataFrame, on: Sequence[str], name: str) -> pl.DataFrame:
    """Return the mean difference to ``reference``, its arms paired with each row's by ``on`` (seed included).

    One row a method, fraction, protocol and metric: ``NAME_difference`` (mean over the pairs), ``NAME_pairs``
    (how many seeds have both), and ``NAME_low`` and ``NAME_high``, the 95 % interval of `bootstrap_interval`
    over the pairs: null for one pair. The interval is about the seeds, that is about initial weights and
    order of samples; it does not cover the choice of the evaluation samples or of the pool.
    """
    other = reference.select(*on, other="value", theirs="method")
    pairs = scores.join(other, on=list(on), maintain_order="left").filter(
        pl.col("method") != pl.col("theirs")
    )
    rows = []
    for key, group in pairs.group_by(*GROUP, "metric", maintain_order=True):
        values = (group["value"] - group["other"]).to_numpy()
        rows.append((*key, values.mean(), *(bootstrap_interval(values) or (None, None)), len(values)))
    schema = {name: scores.schema[name] for name in (*GROUP, "metric")}
    figures = {f"{name}_{part}": pl.Float64 for part in ("difference", "low", "high")}
    return pl.DataFrame(rows, schema={**schema, **figures, f"{name}_pairs": pl.Int64}, orient="row")


def bootstrap_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean [n] -> (low, high); None for n < 2.

    The percentile interval is too narrow for a handful of values (with 3 of them it covers about 75 %, with
    5 about 83 %): it shows the spread of the seeds and is no test. The draws are the same in every call.
    """
    if len(values) < 2:
        return None
    low, high = np.percentile(values[_draws(len(values))].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@lru_cache
def _draws(n: int) -> np.ndarray:
    """Rows [DRAWS, n] that the bootstrap draws with replacement."""
    return np.random.default_rng(0).integers(n, size=(DRAWS, n))


def _with_best_baseline(board: pl.DataFrame, kind: Mapping[str, str]) -> pl.DataFrame:
    place = ["fraction", "protocol", "metric"]
    baselines = [label for label, method in kind.items() if method not in NOT_BASELINES and label != FULL]
    best = (
        board.filter(pl.col("method").is_in(baselines))
        .sort("mean", "method", descending=[True, False])
        .group_by(place, maintain_order=True)
        .agg(best_baseline=pl.col("method").first(), best_mean=pl.col("mean").first())
    )
    judged = pl.col("method").is_in([label for label, method in kind.items() if method == CLIPCOV])
    ratio = pl.when(judged & (pl.col("best_mean") > 0)).then(pl.col("mean") / pl.col("best_mean"))
    return (
        board.join(best, on=place, how="left", maintain_order="left")
        .with_columns(best_baseline=pl.when(judged).then("best_baseline"), baseline_ratio=ratio)
        .drop("best_mean")
    )
