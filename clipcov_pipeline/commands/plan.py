"""``clipcov plan``: what would run, and why."""

import json
from collections import Counter

import click

from clipcov_pipeline.plan import STAGES, Plan, Status
from clipcov_pipeline.project import Project


@click.command()
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a step.")
def command(config: str | None, as_json: bool) -> None:
    """Print what would run, and why; run nothing."""
    project = Project.open(config)
    for line in project.world.warnings():
        click.echo(f"WARNING: {line}", err=True)
    plan = project.plan()
    click.echo(as_json_lines(plan) if as_json else as_text(plan))


def as_json_lines(plan: Plan) -> str:
    """Return a JSON object a step that is not current."""
    return "\n".join(
        json.dumps({"step": step.node.name, "status": step.status, "why": list(step.why)})
        for step in plan.todo
    )


def as_text(plan: Plan) -> str:
    """Return a line a step that is not current, and the counts of each stage."""
    lines = [f"{step.status:8} {step.node.name:40} {'; '.join(step.why)}" for step in plan.todo]
    if not lines:
        return f"Nothing to do: all {len(plan.steps)} entries are up to date."
    counts = []
    for stage in STAGES:
        found = Counter(step.status for step in plan.of(stage))
        todo = [
            f"{found[status]} {status}" for status in Status if found[status] and status is not Status.CURRENT
        ]
        if todo:
            counts.append(f"{stage}: {', '.join(todo)}")
    return "\n".join([*lines, "", "; ".join(counts)])
