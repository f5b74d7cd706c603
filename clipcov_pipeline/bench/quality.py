"""The controlled benchmark behind ``clipcov bench quality``: methods compared on a pool whose truth is known.

Each pool draw is an ordinary experiment in a folder of its own (``drawN/experiment.yaml``): planted by
`testbed`, run by the same graph as any other, and open to ``clipcov plan``, ``clipcov ui`` and editing. A
killed run goes on where it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from clipcov_pipeline.bench.captions import PROMPTS
from clipcov_pipeline.bench.testbed import plant
from clipcov_pipeline.bench.testbed_rule import SHIFTS, Rule
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.records import Record

PRIMARY = "photos/acc1"

EXPERIMENT = "experiment.yaml"

SCATTER = "covariance.png"


# what the paper compares with at small budgets, of what is here
PAPER_BASELINES = ("random", "clip_score", "semdedup")

MATRIX: dict[str, dict[str, Any]] = {
    "clipcov": {},
    "clip_score_per_class": {},
    "clip_score": {},
    "random": {},
    "semdedup": {},
    "s_cliploss": {},
    "c_rho": {},
    "oracle": {"method": "external", "uids": "oracle.parquet", "shuffle": True},
}


# not in the matrix unless asked for
FURTHER: dict[str, dict[str, Any]] = {
    "dedup": {},
    **{
        f"clipcov-{shares}": {"method": "clipcov", "class_balance": shares}
        for shares in ("global", "sqrt", "uniform")
    },
    "clipcov-plus": {"method": "clipcov", "class_balance": "sqrt", "repeat_penalty": 0.25},
    "clip_score_per_class-uniform": {"method": "clip_score_per_class", "class_balance": "uniform"},
    "clipcov-notebook": {"method": "clipcov", "mode": "notebook"},
    **{
        f"clipcov-no_{term}": {"method": "clipcov", "weights": {term: 0.0}}
        for term in ("class", "self", "label", "inter", "redundancy")
    },
}


# the same for the proxy and every arm: found on the sample
_TRAINING = {"lr": 0.002, "warmup": 20}


def matrix_methods(labels: Sequence[str], *, early_proxy: bool = True) -> dict[str, dict[str, Any]]:
    """Return the arms' labels and parameters; the default matrix for no labels.

    Args:
        early_proxy: whether the proxy is trained here, so that an early checkpoint of it is at hand: C-RHO
            needs one, and is left out without it.

    Raises:
        InputError: an unknown label, or C-RHO asked for without an early proxy.
    """
    known = MATRIX | FURTHER
    if not early_proxy:
        if "c_rho" in labels:
            raise InputError(
                "--methods: found c_rho, expected another beside --proxy-pretrained: it needs an early"
                " checkpoint of the proxy"
            )
        known.pop("c_rho")
    for label in labels:
        if label not in known:
            raise InputError(f"--methods: found {label!r}, expected any of {', '.join(known)}")
    return {label: known[label] for label in labels or MATRIX if label in known}


@dataclass(frozen=True)
class Arms:
    """The trainings that are compared.

    Attributes:
        methods: label -> parameters, as `matrix_methods` gives them.
        fractions, seeds: every method is trained at every fraction with every seed.
        samples_seen, batch_size: of every arm.
        crop_scale: least area of the random crop, as a share of the photo.
        model: an open_clip architecture, the proxy's too.
        pretrained: weights that every arm starts from (fine-tuning); None to train from scratch.
    """

    methods: Mapping[str, dict[str, Any]]
    fractions: Sequence[float]
    seeds: Sequence[int]
    samples_seen: int
    batch_size: int
    crop_scale: float
    model: str
    pretrained: Path | None = None


@dataclass(frozen=True)
class Proxy:
    """The model that selection looks through.

    Attributes:
        samples_seen, batch_size: of its training on the pool.
        pretrained: its weights (such as those of an arm of a first round); it is then not trained.
    """

    samples_seen: int
    batch_size: int
    pretrained: Path | None = None


def prepare(
    images: Path,
    test_images: Path | None,
    folder: Path,
    rule: Rule,
    arms: Arms,
    proxy: Proxy,
    jobs: int = 1,
) -> Path:
    """Plant the pool and write the experiment; return the path of its YAML.

    Args:
        images, test_images: as `plant`.
        folder: of the experiment.
        rule: by which the pool is planted.
        arms: the trainings.
        proxy: the model that selects.
        jobs: trainings side by side. A training of one has a data-loading process beside it, one of several
            decodes its images itself.

    Raises:
        InputError: as `plant`.
    """
    plant(images, test_images, folder, rule)
    settings = {
        "name": f"quality-draw{rule.draw}",
        "shards": {"source": "pool"},
        "proxy": {"model": arms.model} | _proxy_settings(proxy),
        "labels": {"latent_classes": "prompts", "class_names": "classnames.txt", "templates": list(PROMPTS)},
        "select": {
            "fractions": list(arms.fractions),
            "methods": {label: dict(params) for label, params in arms.methods.items()},
        },
        "train": _train_settings(arms, workers=1 if jobs == 1 else 0),
        "evaluate": _evaluate_settings(),
        "automation": {"pools": {"gpu": jobs}},
        # a benchmark measures every arm, whatever its subset looks like
        "diagnostics": {
            "tsne_samples": 2000,  # a map of ten classes; the default's 5000 take most of a minute
            "checks": {name: {"severity": "warn"} for name in ("matched_pairs", "alignment")},
        },
    }
    path = folder / EXPERIMENT
    text = yaml.safe_dump(settings, sort_keys=False)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return path


def _proxy_settings(proxy: Proxy) -> dict[str, Any]:
    if proxy.pretrained is not None:
        return {"pretrained": str(proxy.pretrained.resolve())}
    own = {"batch_size": proxy.batch_size, "samples_seen": proxy.samples_seen, "num_checkpoints": 4}
    return {"train": {**_TRAINING, **own}}


def _train_settings(arms: Arms, workers: int) -> dict[str, Any]:
    settings = {
        **_TRAINING,
        "batch_size": arms.batch_size,
        "aug_cfg": {"scale": [arms.crop_scale, 1.0]},
        "model": arms.model,
        "samples_seen": arms.samples_seen,
        "num_checkpoints": 1,
        "workers": workers,
        "seeds": list(arms.seeds),
    }
    return settings if arms.pretrained is None else settings | {"pretrained": str(arms.pretrained.resolve())}


def _evaluate_settings() -> dict[str, Any]:
    tasks = {"photos": ["zeroshot_classification", "linear_probe", "knn"]}
    tasks |= {shift: ["zeroshot_classification"] for shift in SHIFTS}
    sets: dict[str, Any] = {name: {"benchmark": f"eval/{name}", "tasks": of} for name, of in tasks.items()}
    return {
        "holdout_fraction": 0.0,
        "sets": sets | {"captions": {"shards": "eval/captions", "tasks": ["retrieval"]}},
        "suites": {"shifted": {"sets": list(SHIFTS), "metric": "acc1"}},
        "primary_metric": PRIMARY,
    }


def truth_of_subsets(project: Project) -> pl.DataFrame:
    """Return how good each subset is by the planted truth; reads what is built.

    Returns:
        one row a subset: method, fraction, samples, precision (share of captions that name the image's
        class), class_balance (entropy of the images' classes over its maximum, 1 is uniform),
        distinct_sources (share of samples whose photo is not in the subset already), alignment and scale of
        its cross-covariance (of ``subset_diagnostics``; null where that is not built, 1 for the full pool).
    """
    assert project.config.path is not None
    truth = pl.read_parquet(project.config.path.parent / "truth.parquet")
    subsets = dict.fromkeys((r.method, r.fraction, r.subset) for r in recipes(project.config))
    rows = [
        {"method": method, "fraction": fraction, **_truth_of(project, record, truth, method == FULL)}
        for method, fraction, subset in subsets
        if (record := project.store.current("subsets", subset)) is not None
    ]
    return pl.DataFrame(rows)


def _truth_of(project: Project, record: Record, truth: pl.DataFrame, is_full: bool) -> dict[str, Any]:
    n_classes = truth["class_name"].n_unique()
    chosen = pl.read_parquet(project.store.folder(record) / "subset.parquet").select("uid")
    chosen = chosen.join(truth, on="uid", how="inner")
    share = chosen["class_name"].value_counts()["count"].to_numpy() / chosen.height
    diagnosed = project.store.current("subset_diagnostics", record.partition)
    covariance = diagnosed.stats if diagnosed is not None else {}
    known = 1.0 if is_full else None
    return {
        "samples": chosen.height,
        "precision": float(chosen["right_class"].to_numpy().mean()),
        "class_balance": float(-(share * np.log(share)).sum() / np.log(n_classes)),
        "distinct_sources": chosen["source"].n_unique() / chosen.height,
        "alignment": covariance.get("alignment", known),
        "scale": covariance.get("scale", known),
    }


def covariance_and_accuracy(scores: pl.DataFrame, truth: pl.DataFrame) -> pl.DataFrame:
    """Return every subset with its mean primary metric beside what its cross-covariance looks like.

    Returns:
        one row a draw, method and fraction (the full pool left out): draw, method, fraction, accuracy
        (percent, mean over seeds), alignment, scale, and their product.
    """
    rows = scores.filter((pl.col("metric") == PRIMARY) & (pl.col("method") != FULL))
    keys = ["draw", "method", "fraction"]
    board = rows.group_by(keys, maintain_order=True).agg(accuracy=pl.col("value").mean() * 100)
    known = truth.select(*keys, "alignment", "scale").drop_nulls()
    return board.join(known, on=keys, maintain_order="left").with_columns(
        product=pl.col("alignment") * pl.col("scale")
    )


def rank_correlations(subsets: pl.DataFrame) -> pl.DataFrame:
    """Return Spearman correlations over the subsets of one fraction and draw, averaged over the draws.

    Args:
        subsets: as `covariance_and_accuracy` gives them.

    Returns:
        one row a fraction: subsets, and the correlation of accuracy with alignment, scale and product
        (NaN where one of them does not vary).
    """
    names = ("alignment", "scale", "product")
    by_draw = subsets.group_by("fraction", "draw").agg(
        pl.len().alias("subsets"),
        *(pl.corr("accuracy", name, method="spearman").alias(name) for name in names),
    )
    means = (pl.col(name).mean() for name in names)
    return by_draw.group_by("fraction").agg(pl.col("subsets").sum(), *means).sort("fraction")


def seconds_of_arms(project: Project) -> pl.DataFrame:
    """Return what every arm took; reads what is built.

    Returns:
        one row an arm: method, fraction, seed, and seconds: selection (the ranking, made once for all
        fractions and seeds), training, overhead (of the training's start, its record and tracking), scoring,
        saved (what as many passes over the full pool would take longer, by the arm's own speed).
    """
    plan = project.plan()
    rows = []
    for arm in recipes(project.config):
        checkpoint = plan.by_name[f"checkpoints/{arm.key}"].record
        if checkpoint is None:
            continue
        ranking = None if arm.method == FULL else plan.by_name[f"rankings/{arm.method}"].record
        training = float(checkpoint.stats["training_seconds"])
        rows.append(
            {
                "method": arm.method,
                "fraction": arm.fraction,
                "seed": arm.seed,
                "selection": ranking.seconds if ranking is not None else 0.0,
                "training": training,
                "overhead": checkpoint.seconds - training,
                "scoring": sum(s.record.seconds for s in plan.of("scores", arm.key) if s.record is not None),
                "saved": training / arm.fraction - training,
            }
        )
    return pl.DataFrame(rows)
