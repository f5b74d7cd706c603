"""``report.html``: all that is known of an experiment on one page that needs no other file and no network."""

import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from clipcov_pipeline.experiment.checks import CheckOutcome, evaluate_checks
from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.plan import Plan
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import GALLERY, PER_SHARD, STAGES
from clipcov_pipeline.files import write_text_at_once
from clipcov_pipeline.redaction import without_secrets
from clipcov_pipeline.report import leaderboard
from clipcov_pipeline.report import tables as report_tables
from clipcov_pipeline.report.drawing import render
from clipcov_pipeline.report.gallery import Gallery, read_gallery
from clipcov_pipeline.report.lineage import combined_digest
from clipcov_pipeline.training.spec import RECORD as TRAINING

REPORT = "report.html"

PACKAGES = ("clipcov-pipeline", "torch", "open_clip_torch", "lancedb", "polars", "numpy", "dagster", "mlflow")


NOT_MADE = "not made"


@dataclass(frozen=True)
class Table:
    """A table as it is printed; an empty one says why."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture (WebP) and what to see in it."""

    webp: bytes
    caption: str


@dataclass(frozen=True)
class DiagnosisPlots:
    """The plots of one subset's diagnostics."""

    name: str
    plots: list[Plot] = field(default_factory=list)


def write_report(project: Project, plan: Plan, path: Path) -> None:
    """Write the report of what the plan finds up to date; what is missing is said to be.

    Raises:
        InputError: an entry that it reads is damaged.
    """
    write_text_at_once(path, html_report(project, plan))


def html_report(project: Project, plan: Plan) -> str:
    """Return the report as HTML."""
    config = project.config
    subsets = _galleries(project, plan, "subset_galleries")
    arms = _galleries(project, plan, "checkpoint_galleries")
    outcomes = evaluate_checks(config, plan.records)
    board, plots = _leaderboard(project, plan)
    return render(
        "report.html.j2",
        name=config.name,
        made=datetime.now().astimezone().isoformat(" ", "minutes"),
        summary=summary(config, plan),
        leaderboard=board,
        plots=plots,
        costs=costs(config, plan),
        checks=checks_table(outcomes),
        n_checks=len(outcomes),
        learning=learning_curves(project, plan),
        diagnostics=diagnostics_table(project, plan),
        diagnoses=_diagnoses(project, plan),
        subset_galleries=subsets,
        checkpoint_galleries=arms,
        stages=stages_table(plan),
        entries=entries_table(plan),
        versions=versions(),
        yaml=shown_config(config),
    )


def summary(config: Config, plan: Plan) -> str:
    """Say in a line what the experiment is."""
    labels = plan.by_name["pseudo_labels"].record
    pool = "the pool (not labelled yet)"
    if labels is not None:
        pool = f"{labels.stats['pool']:,} samples in {_count(labels.stats['classes'], 'latent class', 'es')}"
    counts = (
        _count(len(config.select.methods), "method"),
        _count(len(config.select.fractions), "fraction"),
        _count(len(config.train.seeds), "seed"),
        _count(len(recipes(config)), "trained arm"),
    )
    return (
        f"{pool[0].upper()}{pool[1:]}; {', '.join(counts)}. Primary metric: {config.evaluate.primary_metric}."
    )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _leaderboard(project: Project, plan: Plan) -> tuple[Table, list[Plot]]:
    record = plan.by_name["leaderboard"].record
    if record is None:
        return Table((), (), NOT_MADE), []
    folder, primary = project.store.checked(record), project.config.evaluate.primary_metric
    board = pl.read_parquet(folder / "leaderboard.parquet")
    headings, rows = report_tables.to_rows(board, primary, leaderboard.subset_sizes(plan))
    caption = "The primary metric over the share of the pool; dashed: the full pool, dotted: chance."
    plots = [Plot(webp(folder / "leaderboard.png"), caption)]
    notes = [*report_tables.notes(board, primary), *leaderboard.score_notes(project, board)]
    return Table(headings, rows, "\n".join(notes)), plots


def costs(config: Config, plan: Plan) -> Table:
    """Return what selection took beside what it saves of training, an arm a row, in seconds."""
    rows = []
    full = {
        (arm.protocol, arm.seed): _training_seconds(plan, arm.key)
        for arm in recipes(config)
        if arm.method == FULL
    }
    for arm in recipes(config):
        own = _training_seconds(plan, arm.key)
        if arm.method == FULL or own is None:
            continue
        ranking, whole = plan.by_name[f"rankings/{arm.method}"].record, full[arm.protocol, arm.seed]
        rows.append(
            [
                arm.key,
                _seconds(ranking.seconds if ranking else None),
                _seconds(own),
                _seconds(whole),
                _seconds(whole - own if whole is not None else None),
                _seconds(own / arm.fraction - own),
            ]
        )
    headings = ("arm", "selection", "training", "full pool's training", "saved", "saved at equal passes")
    note = (
        "Seconds. Selection is the ranking alone: the proxy, the embeddings and the classes are made once for"
        " all methods. Arms that see equally many samples train equally long whatever the fraction: what they"
        " save is what the full pool would need for as many passes (last column, from the arm's own speed)."
    )
    return Table(headings, rows, note if rows else NOT_MADE)


def _training_seconds(plan: Plan, arm: str) -> float | None:
    record = plan.by_name[f"checkpoints/{arm}"].record
    return None if record is None else record.stats["training_seconds"]


def _seconds(value: float | None) -> str:
    return NOT_MADE if value is None else f"{value:,.1f}"


def failed_first(outcomes: Sequence[CheckOutcome]) -> list[CheckOutcome]:
    """Return the failed checks, the blocking ones first."""
    return sorted((one for one in outcomes if not one.passed), key=lambda one: not one.blocks)


def checks_table(outcomes: Sequence[CheckOutcome]) -> Table:
    """Return the failed checks as a table."""
    rows = [[one.severity, one.entry, one.name, one.text] for one in failed_first(outcomes)]
    return Table(("severity", "entry", "check", "what was found"), rows)


def learning_curves(project: Project, plan: Plan) -> list[Plot]:
    """Draw the loss, and the held-out retrieval where it was followed, of every arm over its steps."""
    trainings = {
        step.key: json.loads((project.store.checked(step.record) / TRAINING).read_text())
        for step in plan.of("checkpoints")
        if step.record is not None
    }
    losses = {name: [(p["step"], p["loss"]) for p in t["learning_curve"]] for name, t in trainings.items()}
    if not trainings:
        return []
    plots = [_lines(losses, "contrastive loss")]
    captions = ["Loss of every arm. A smaller subset is learnt by heart sooner: a low loss is no merit."]
    metric = "text_retrieval_recall@5"
    followed = {
        name: [(p["step"], 100 * p[metric]) for p in t.get("held_out_retrieval", []) if metric in p]
        for name, t in trainings.items()
    }
    followed = {name: points for name, points in followed.items() if points}
    if followed:
        plots.append(_lines(followed, "held-out i2t R@5 (%)"))
        captions.append("Retrieval among held-out pairs while training; higher is better.")
    return [Plot(picture, caption) for picture, caption in zip(plots, captions, strict=True)]


def _lines(curves: Mapping[str, Sequence[tuple[float, float]]], ylabel: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for index, (name, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 6 else None
        style = styles[index // 10 % len(styles)]
        axes.plot(steps, values, style, marker=marker, markersize=3, linewidth=1.2, label=name)
    axes.set(xlabel="step", ylabel=ylabel, ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return webp(file)


def webp(source: Path | io.BytesIO) -> bytes:
    """Return a picture as WebP, a third of the PNG's size at the same look."""
    from PIL import Image

    file = io.BytesIO()
    with Image.open(source) as image:
        image.convert("RGB").save(file, "WEBP", quality=88)
    return file.getvalue()


def _diagnostic_records(plan: Plan) -> list[Record]:
    return [step.record for step in plan.of("subset_diagnostics") if step.record is not None]


def diagnostics(project: Project, plan: Plan) -> list[tuple[str, pl.DataFrame]]:
    """Return what is known of every subset as a whole: (its name, rows of the diagnostics' table)."""
    tables = []
    for record in _diagnostic_records(plan):
        path = project.store.checked(record) / "table.parquet"
        if path.is_file():
            tables.append((record.partition, pl.read_parquet(path).filter(pl.col("scope") == "overall")))
    return tables


def diagnostics_table(project: Project, plan: Plan) -> Table:
    """Return the diagnostics of all subsets side by side, one row a quantity."""
    tables = diagnostics(project, plan)
    if not tables:
        return Table((), (), NOT_MADE)
    quantities = list(dict.fromkeys(name for _, table in tables for name in table["quantity"]))
    found = {
        (row["quantity"], subset): row for subset, table in tables for row in table.iter_rows(named=True)
    }
    rows = [
        [name.replace("_", " "), *(figure(found.get((name, subset))) for subset, _ in tables)]
        for name in quantities
    ]
    note = "In brackets the same of the whole pool, and after ~ the mean of random subsets of the same size."
    lines = [note, *undefined(tables)]
    return Table(("quantity", *(subset for subset, _ in tables)), rows, "\n".join(lines))


def undefined(tables: Sequence[tuple[str, pl.DataFrame]]) -> list[str]:
    """Return a line for every quantity that is not defined: of which subsets, and why."""
    subsets: dict[tuple[str, str], list[str]] = {}
    for subset, table in tables:
        for row in table.filter(pl.col("value").is_null()).iter_rows(named=True):
            subsets.setdefault((row["quantity"], row["note"]), []).append(subset)
    return [
        f"{name.replace('_', ' ')} ({'all subsets' if len(of) == len(tables) else ', '.join(of)}): {why}"
        for (name, why), of in subsets.items()
    ]


def figure(row: Mapping[str, Any] | None) -> str:
    """Return a row of the diagnostics' table in a few characters: value (pool) ~ random mean."""
    if row is None:
        return ""
    if row["value"] is None:
        return "not defined"
    text = f"{row['value']:.4g}"
    if row["pool"] is not None:
        text += f" ({row['pool']:.4g})"
    if row["random_mean"] is not None:
        text += f" ~ {row['random_mean']:.4g}"
    return text


def _diagnoses(project: Project, plan: Plan) -> list[DiagnosisPlots]:
    found: dict[str, DiagnosisPlots] = {}
    for record in _diagnostic_records(plan):
        subset = record.partition.partition("@")[0]  # the overlap with other subsets is a part of it
        plots = found.setdefault(subset, DiagnosisPlots(subset)).plots
        for path in sorted(project.store.checked(record).glob("*.png")):
            plots.append(Plot(webp(path), path.stem.replace("_", " ")))
    return [one for one in found.values() if one.plots]


def _galleries(project: Project, plan: Plan, stage: str) -> list[Gallery]:
    records = [step.record for step in plan.of(stage) if step.record is not None]
    return [read_gallery(project.store.checked(record, GALLERY)) for record in records]


def stages_table(plan: Plan) -> Table:
    """Return what made each stage: entries, their digests together, seconds, commits."""
    rows = []
    for stage in STAGES:
        steps = plan.of(stage)
        records = [step.record for step in steps if step.record is not None]
        if not steps:
            continue
        commits = sorted({record.commit[:12] for record in records if record.commit})
        rows.append(
            [
                stage,
                f"{len(records):,} of {len(steps):,}",
                combined_digest(records)[:12] if records else "",
                f"{sum(record.seconds for record in records):,.1f}",
                _when(max((record.finished for record in records), default=0)),
                ", ".join(commits[:3]) + (f" and {len(commits) - 3} more" if len(commits) > 3 else ""),
            ]
        )
    headings = ("stage", "entries", "digest", "seconds", "last finished", "git commit")
    return Table(headings, rows)


def entries_table(plan: Plan) -> Table:
    """Return every entry but those of single shards, with its fingerprint and output digests."""
    rows = [
        [
            record.name,
            record.fingerprint[:12],
            " ".join(f"{name or 'files'} {digest[:12]}" for name, digest in record.digests.items()),
            record.code_version,
            f"{record.seconds:,.1f}",
            _when(record.finished),
        ]
        for record in plan.records
        if record.stage not in PER_SHARD
    ]
    return Table(("entry", "fingerprint", "outputs", "code version", "seconds", "finished"), rows)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else ""


def versions() -> list[tuple[str, str]]:
    """Return the versions of what made the report, and the machine."""
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, "not installed"))
    return [*found, ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs")]


def shown_config(config: Config) -> str:
    """Return the whole configuration as YAML, defaults included; what may hold a secret is hidden."""
    return yaml.safe_dump(without_secrets(config.model_dump(mode="json")), sort_keys=False, width=100)
