"""``clipcov run``: executes what the plan says, in dependency order, in the project's Dagster instance."""

import sys
import time
from collections import Counter
from collections.abc import Sequence

import click
import dagster as dg

from assets.display.asset_checks import report_checks
from assets.display.staleness import report_staleness
from assets.partitions import sync_partitions
from assets.running.execution import deal, execute_all, execute_side_by_side, visible_gpus
from assets.running.instance import project_instance
from assets.steps.orphans import close_orphans, notices
from clipcov_pipeline.cli import guarded
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.batches import check_batches
from clipcov_pipeline.experiment.plan import Plan, Status, Step
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.rates import arms_side_by_side
from clipcov_pipeline.experiment.recipes import method_names
from clipcov_pipeline.experiment.records import node_name
from clipcov_pipeline.experiment.stages import SIDE_BY_SIDE
from clipcov_pipeline.report import leaderboard, tables
from clipcov_pipeline.training.parent import end_with_parent


@click.command()
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option(
    "--only", multiple=True, help="Run this STAGE or STAGE/PARTITION only, where what it reads is up to date."
)
def main(config: str | None, only: tuple[str, ...]) -> None:
    """Run what is out of date, and only that."""
    end_with_parent()
    started = time.monotonic()
    project = Project.open(config)
    for line in project.world.warnings():
        click.echo(f"WARNING: {line}", err=True)
    _check_stages(project.plan(), only)
    instance = project_instance(project.config)
    for line in notices(close_orphans(instance, project.config)):
        click.echo(line, err=True)
    try:
        executed, failed = run_plan(instance, config, only)
    except KeyboardInterrupt:
        click.echo("Interrupted. What is finished is kept; run again to go on where it was.", err=True)
        sys.exit(130)
    click.echo(summary(executed, failed, time.monotonic() - started))
    show_result(Project.open(config), config)
    if failed:
        sys.exit(1)


def _check_stages(plan: Plan, only: Sequence[str]) -> None:
    known = list(dict.fromkeys(step.node.stage for step in plan.steps))
    for name in only:
        stage, _, partition = name.partition("/")
        if stage not in known:
            raise InputError(f"--only {name}: unknown stage, expected one of {', '.join(known)}")
        if partition and not plan.of(stage, partition):
            raise InputError(f"--only {name}: unknown, expected one of {', '.join(plan.keys(stage))}")


def run_plan(
    instance: dg.DagsterInstance, config: str | None, only: Sequence[str] = ()
) -> tuple[Counter[str], list[str]]:
    """Execute until nothing is ready; return (built or restored partitions by stage, failed partitions).

    The plan is made again after every stage: what turns out identical leaves the rest untouched.
    """
    executed: Counter[str] = Counter()
    failed: dict[tuple[str, str], None] = {}
    waiting: set[tuple[str, str]] = set()
    while True:
        project = Project.open(config)
        plan = project.plan()
        check_batches(project, plan)
        sync_partitions(instance, plan)
        ready = plan.ready(skip=failed, only=only)
        if ready is None:
            report_staleness(instance, plan)
            report_checks(instance, project.config, plan)
            held_up = (Status.BLOCKED, Status.WAIT) if only else (Status.BLOCKED,)
            left = [step for step in plan.steps if step.status in held_up and _is_asked_for(step, only)]
            reasons = [f"{step.node.name} ({'; '.join(step.why)})" for step in left]
            return executed, [*(node_name(stage, key) for stage, key in failed), *reasons]
        stage, keys = ready
        places = arms_side_by_side(project.config) if stage in SIDE_BY_SIDE else 1
        if places > 1:  # a single one too: with other threads it would come out otherwise
            # what takes several GPUs itself sees all of them
            gpus = visible_gpus() if stage != "checkpoints" or project.config.train.gpus == 1 else []
            execute_side_by_side(config, stage, deal(stage, keys, places), places, gpus)
        else:
            execute_all(instance, plan, stage, keys)
        after = Project.open(config).plan()
        for key in keys:
            statuses = {step.status for step in after.of(stage, key)}
            if statuses == {Status.CURRENT}:
                executed[stage] += 1
            elif not statuses:
                continue  # the YAML was changed meanwhile: it is no longer in the experiment
            elif Status.WAIT in statuses and (stage, key) not in waiting:
                waiting.add((stage, key))  # what it reads turned out damaged and is built again first
            else:
                failed[stage, key] = None


def _is_asked_for(step: Step, only: Sequence[str]) -> bool:
    stage = step.node.stage
    return not only or stage in only or node_name(stage, step.key) in only


def summary(executed: Counter[str], failed: Sequence[str], seconds: float) -> str:
    """Say in one or two lines what was executed."""
    total = sum(executed.values())
    if not total and not failed:
        return f"Nothing to do: everything is up to date, 0 assets executed ({seconds:.1f} s)."
    parts = ", ".join(f"{count} {stage}" for stage, count in executed.items())
    lines = [f"Executed {total} materializations in {seconds:,.0f} s: {parts}."]
    if failed:
        lines.append(f"FAILED: {', '.join(failed)}. Mend the cause and run again; the rest is kept.")
    return "\n".join(lines)


def show_result(project: Project, config: str | None) -> None:
    """Print the leaderboard and how to open the user interfaces."""
    if table := standing(project):
        click.echo(f"\n{table.rstrip()}")
    ui = project.config.ui
    command = "make ui" if config is None else f"clipcov ui --config {config}"
    click.echo(
        f"\nOpen both user interfaces with:  {command}\n"
        f"  Dagster  http://{ui.host}:{ui.dagster_port}\n"
        f"  MLflow   http://{ui.host}:{ui.mlflow_port}"
    )


def standing(project: Project) -> str:
    """Return the leaderboard; while arms are missing, that of the others, and which ones are missing."""
    step = project.plan().by_name["leaderboard"]
    if step.status is Status.CURRENT and step.record is not None:
        return (project.store.folder(step.record) / "leaderboard.txt").read_text()
    scores, missing = leaderboard.scores_so_far(project)
    primary = project.config.evaluate.primary_metric
    if primary not in scores["metric"]:
        return ""
    board = leaderboard.leaderboard(scores, method_names(project.config))
    sizes, more = leaderboard.subset_sizes(project.plan()), leaderboard.score_notes(project, scores)
    return tables.as_text(board, primary, sizes, missing, more)


if __name__ == "__main__":
    guarded(main, "clipcov run")
