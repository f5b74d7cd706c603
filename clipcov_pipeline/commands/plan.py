"""``clipcov plan``: what would run, and why."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import click

from clipcov_pipeline.experiment.plan import Plan, Status, Step
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import PER_SHARD, STAGES

COLLAPSE = 20  # more shards with the same to be done for the same reason than this are one line


@click.command()
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a step.")
@click.option(
    "--all", "every_line", is_flag=True, help="A line for every shard, where many with one reason are one."
)
def command(config: str | None, as_json: bool, every_line: bool) -> None:
    """Print what would run, and why; run nothing."""
    project = Project.open(config)
    for line in project.world.warnings():
        click.echo(f"WARNING: {line}", err=True)
    plan = project.plan()
    click.echo(as_json_lines(plan) if as_json else as_text(plan, every_line=every_line))


def as_json_lines(plan: Plan) -> str:
    """Return a JSON object a step that is not current."""
    return "\n".join(
        json.dumps({"step": step.node.name, "status": step.status, "why": list(step.why)})
        for step in plan.todo
    )


def as_text(plan: Plan, *, every_line: bool = False) -> str:
    """Return a line a step that is not current, and the counts of each stage.

    Many shards with the same reason are one line, unless every line is asked for.
    """
    groups = [[step] for step in plan.todo] if every_line else _groups(plan.todo)
    lines = [_line(group) for group in groups]
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


def _groups(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Put many shards that differ in their names only into one group, any other step into its own."""
    alike: dict[tuple[str, ...], list[Step]] = {}
    for step in steps:
        alike.setdefault(_likeness(step), []).append(step)
    for step in steps:
        group = alike[_likeness(step)]
        if step.node.stage not in PER_SHARD or len(group) <= COLLAPSE:
            yield [step]
        elif step is group[0]:
            yield group


def _likeness(step: Step) -> tuple[str, ...]:
    """Return stage, status and reasons, the shard's own name left out: it waits for its own raw shard."""
    own = rf"/{re.escape(step.node.partition)}(?=[# ]|$)"
    return (step.node.stage, step.status, *(re.sub(own, "/SHARD", reason) for reason in step.why))


def _line(group: Sequence[Step]) -> str:
    first, last = group[0], group[-1]
    if first is last:
        return f"{first.status:8} {first.node.name:40} {'; '.join(first.why)}"
    stage, status, *why = _likeness(first)
    shards = f"{first.node.partition} ... {last.node.partition}"
    return f"{status:8} {f'{stage}: {len(group):,} entries':40} {'; '.join(why)} ({shards})"
