"""``clipcov report``: what is known of the experiment, on the terminal."""

import json
import math
import os
import sys
from dataclasses import asdict
from typing import Any

import click
import polars as pl

from clipcov_pipeline.experiment.project import Project

# the quantities that a terminal has room for: heading, name in the diagnostics' table
SUMMARY = {
    "alignment": "alignment",
    "class distance": "class_total_variation",
    "class coverage": "class_coverage",
    "rare covered": "rare_class_coverage",
    "proxy loss": "proxy_loss",
    "repeated images": "duplicate_images",
    "near images": "near_duplicate_images",
}


@click.command()
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(config: str | None, as_json: bool) -> None:
    """Print the leaderboard, the diagnostics of every subset, the failed checks, and where report.html is.

    What is not built yet is said to be missing. Colours are for terminals; NO_COLOR turns them off.
    """
    known = _known(Project.open(config))
    if as_json:
        known.pop("text")
        click.echo(json.dumps(known, allow_nan=False))
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    click.echo(_as_text(known), color=colour)


def _known(project: Project) -> dict[str, Any]:
    """Return everything as JSON-able values, and the leaderboard's ``text``."""
    from clipcov_pipeline.experiment.checks import evaluate_checks
    from clipcov_pipeline.experiment.recipes import method_names
    from clipcov_pipeline.report import leaderboard
    from clipcov_pipeline.report import tables as report_tables
    from clipcov_pipeline.report.page import REPORT, diagnostics, failed_first

    plan, primary = project.plan(), project.config.evaluate.primary_metric
    scores, missing = leaderboard.scores_so_far(project)
    board = leaderboard.leaderboard(scores, method_names(project.config))
    more, is_scored = leaderboard.score_notes(project, scores), primary in scores["metric"]
    sizes = leaderboard.subset_sizes(plan)
    outcomes = evaluate_checks(project.config, plan.records)
    made = plan.by_name["report"].record
    return {
        "experiment": project.config.name,
        "primary_metric": primary,
        "leaderboard": board.to_dicts(),
        "missing": missing,
        "diagnostics": [
            {"subset": subset, **row}
            for subset, table in diagnostics(project, plan)
            for row in table.to_dicts()
        ],
        "checks": {
            "made": len(outcomes),
            "failed": [_finite(asdict(outcome)) for outcome in failed_first(outcomes)],
        },
        "report": str(project.store.folder(made) / REPORT) if made else None,
        "text": report_tables.as_text(board, primary, sizes, missing, more) if is_scored else "",
    }


def _finite(outcome: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: the loss of a training that diverged."""
    value = outcome["value"]
    return {**outcome, "value": value if value is not None and math.isfinite(value) else None}


def _as_text(known: dict[str, Any]) -> str:
    board = known["text"] or "not made: no arm has a score of the primary metric yet\n"
    lines = [_title(f"{known['experiment']}: leaderboard"), board]
    lines += [_title("Diagnostics"), *(_diagnostics(known["diagnostics"]) or ["not made"])]
    lines += ["", _title("Failed checks")]
    lines += _checks(known["checks"])
    lines += ["", f"report.html: {known['report'] or 'not made'}"]
    return "\n".join(lines)


def _title(text: str) -> str:
    return click.style(text, bold=True)


def _diagnostics(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line a subset with the figures that a terminal has room for, and what is not defined."""
    from clipcov_pipeline.report.page import undefined
    from clipcov_pipeline.report.tables import to_text

    tables = [
        (subset, [row for row in rows if row["subset"] == subset])
        for subset in dict.fromkeys(row["subset"] for row in rows)
    ]
    known = {row["quantity"] for row in rows}
    shown = {title: name for title, name in SUMMARY.items() if name in known}
    if not shown:
        return []
    lines = []
    for subset, table in tables:
        of = {row["quantity"]: row for row in table}
        lines.append([subset, *(_figure(of.get(name)) for name in shown.values())])
    kept = [row for row in rows if row["quantity"] in shown.values()]
    frames = [(subset, pl.DataFrame([r for r in kept if r["subset"] == subset])) for subset, _ in tables]
    return [
        to_text(["subset", *shown], lines),
        "in brackets the mean of random subsets of the same size; report.html and --json have every quantity",
        *undefined(frames),
    ]


def _figure(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    beside = "" if row["random_mean"] is None else f" ({row['random_mean']:.3g})"
    return f"{row['value']:.3g}{beside}"


def _checks(checks: dict[str, Any]) -> list[str]:
    if not checks["made"]:
        return ["not made"]
    if not checks["failed"]:
        return [click.style(f"none: all {checks['made']:,} passed or are not defined", fg="green")]
    return [
        click.style(f"{one['severity']:5}", fg="red" if one["severity"] == "error" else "yellow")
        + f"  {one['asset']}/{one['partition']}  {one['name']}: {one['text']}"
        for one in checks["failed"]
    ]
