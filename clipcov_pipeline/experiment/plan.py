"""What is out of date, and why: a pure function of the configuration, what lies outside, and the store.

The entries and what they read are written out in :mod:`~clipcov_pipeline.experiment.graph`. A node's
fingerprint covers its stage's code version, its configuration, change tokens of what it reads from outside,
and the *output digests* of what it reads from the store. Upstream that is itself out of date leaves a node
waiting: its fingerprint is not known yet, and a re-run upstream that gives the same digest leaves the node
untouched (early cutoff).
"""

import gc
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from clipcov_pipeline.experiment.checks import stands_against
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.digests import fingerprint_from
from clipcov_pipeline.experiment.graph import Input, Node, nodes
from clipcov_pipeline.experiment.reasons import own_reasons, reasons_for, waits_for
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import CODE_VERSIONS, EMBEDDINGS, REPORT, STAGES
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.experiment.world import World


class Status(StrEnum):
    """What has to be done for a node."""

    CURRENT = "current"  # nothing
    RESTORE = "restore"  # an earlier entry fits again: nothing is built
    BUILD = "build"
    WAIT = "wait"  # known only after what it reads has been built
    BLOCKED = "blocked"  # a failed check stands against building it


@dataclass(frozen=True)
class Step:
    """A node, what has to be done for it, and why in words."""

    node: Node
    status: Status
    why: tuple[str, ...] = ()
    fingerprint: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    record: Record | None = None

    @property
    def key(self) -> str:
        """The Dagster partition: parts of one partition (``RECIPE@SET``) share it."""
        return self.node.partition.partition("@")[0]


@dataclass(frozen=True)
class Plan:
    """All steps in dependency order."""

    steps: tuple[Step, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Step]:
        """Steps by ``STAGE/PARTITION``."""
        return {step.node.name: step for step in self.steps}

    def of(self, stage: str, key: str | None = None) -> list[Step]:
        """Return the steps of a stage, or of one Dagster partition of it."""
        return list(self._by_key.get((stage, key), ()))

    @cached_property
    def _by_key(self) -> Mapping[tuple[str, str | None], list[Step]]:
        found: dict[tuple[str, str | None], list[Step]] = {}
        for step in self.steps:
            for key in (None, step.key):
                found.setdefault((step.node.stage, key), []).append(step)
        return found

    @property
    def todo(self) -> list[Step]:
        """Return every step that is not current."""
        return [step for step in self.steps if step.status is not Status.CURRENT]

    @property
    def records(self) -> list[Record]:
        """Return the records of everything that is current."""
        current = (step.record for step in self.steps if step.status is Status.CURRENT)
        return [record for record in current if record is not None]

    def keys(self, stage: str) -> list[str]:
        """Return the Dagster partitions of a stage, in order."""
        return list(dict.fromkeys(step.key for step in self.of(stage)))

    def ready(
        self, skip: Container[tuple[str, str]] = (), only: Sequence[str] = ()
    ) -> tuple[str, list[str]] | None:
        """Return the first stage with something to build or restore, and its partitions; None when done.

        Args:
            skip: (stage, partition) pairs to leave alone, because they have failed.
            only: what to look at, ``STAGE`` or ``STAGE/PARTITION`` each; everything when empty.
        """
        for name in only or STAGES:
            stage, _, partition = name.partition("/")
            found = self.of(stage, partition) if partition else self.of(stage)
            steps = [s for s in found if s.status in (Status.BUILD, Status.RESTORE)]
            keys = list(dict.fromkeys(s.key for s in steps if (stage, s.key) not in skip))
            if keys:
                return stage, keys
        return None


def make_plan(config: Config, world: World, store: Store) -> Plan:
    """Compare what should exist with what the store holds; reads records only, changes nothing."""
    with _no_collection():
        return Plan(tuple(_steps(config, world, store)))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within it nothing looks for cycles: among hundreds of thousands of new objects, all kept, that is
    half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _steps(config: Config, world: World, store: Store) -> Iterator[Step]:
    done: dict[str, Step] = {}
    against: dict[str, tuple[str, ...]] = {}  # what stands against building anything from an entry
    for node in nodes(config, world):
        step = _step(node, done, store)
        reasons = sorted({reason for item in (*node.inputs, *node.after) for reason in against[item.entry]})
        # the report shows what failed: it is never held up
        if reasons and step.status is Status.BUILD and node.stage != REPORT:
            rest = (f"and {len(reasons) - 1} more",) if len(reasons) > 1 else ()
            step = replace(step, status=Status.BLOCKED, why=(reasons[0], *rest))
        done[node.name] = step
        own = stands_against(config, step.record) if step.record else ()
        against[node.name] = (*reasons, *own)
        yield step


def fingerprint_of(node: Node, inputs: Mapping[str, str]) -> str:
    """Return the fingerprint (64 hex) of a node that reads outputs with these digests."""
    return fingerprint_from(
        stage=node.stage,
        code_version=CODE_VERSIONS[node.stage],
        params=node.params,
        sources=node.sources,
        inputs=inputs,
    )


def _step(node: Node, done: Mapping[str, Step], store: Store) -> Step:
    blocking = _unreadable(node.inputs, done)
    if blocking:
        return Step(node, Status.WAIT, why=(*own_reasons(node, store), waits_for(blocking)))
    inputs = {item.name: _digest(done, item) for item in node.inputs}
    fingerprint = fingerprint_of(node, inputs)
    record = store.find(node.stage, node.partition, fingerprint)
    damage = _unfit(node, store, record) if record is not None else None
    if damage is not None:
        record = None  # never served
    current = store.current_fingerprint(node.stage, node.partition)
    if record is not None and current == fingerprint:
        return Step(node, Status.CURRENT, (), fingerprint, inputs, record)
    blocking = _unreadable(node.after, done)
    if record is None and blocking:
        return Step(node, Status.WAIT, why=(waits_for(blocking),))
    previous = store.find(node.stage, node.partition, current) if current else None
    why = (damage,) if damage is not None else tuple(reasons_for(node, inputs, previous))
    status = Status.RESTORE if record is not None else Status.BUILD
    return Step(node, status, why, fingerprint, inputs, record)


def _unfit(node: Node, store: Store, record: Record) -> str | None:
    """Say why an entry cannot serve although its fingerprint fits; None when it can."""
    if missing := [name for name in node.needs if name not in record.digests]:
        return f"was built without {missing[0]}, which is read now"
    damage = store.glance(record)
    return f"damaged: {damage}" if damage is not None else None


def _unreadable(inputs: Sequence[Input], done: Mapping[str, Step]) -> list[str]:
    names = dict.fromkeys(item.entry for item in inputs)
    return [name for name in names if not _is_readable(done[name])]


def _is_readable(step: Step) -> bool:
    """What will be restored can be read already, but for embeddings, whose rows have to come back."""
    if step.status is Status.RESTORE:
        return step.node.stage != EMBEDDINGS
    return step.status is Status.CURRENT


def _digest(done: Mapping[str, Step], item: Input) -> str:
    record = done[item.entry].record
    assert record is not None  # it is readable
    return record.digests[item.output]
