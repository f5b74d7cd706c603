"""A project at work: the configuration with its store, its LanceDB tables, and the plan of this moment."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.load import read_config
from clipcov_pipeline.experiment.plan import Plan, Step, make_plan
from clipcov_pipeline.experiment.records import WHOLE, Record, node_name
from clipcov_pipeline.experiment.stages import RAW_SHARDS
from clipcov_pipeline.experiment.store import Entry, Store, require
from clipcov_pipeline.experiment.world import World, observe
from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.packing import PACKED
from clipcov_pipeline.proxy.vectors import Vectors


@dataclass(frozen=True)
class Project:
    """Configuration and outside world as they were when it was opened; open anew to see changes."""

    config: Config
    world: World
    config_text: str

    @classmethod
    def open(cls, config: str | None = None) -> "Project":
        """Read the YAML (path, preset name, or None for the default) and list the shards.

        Raises:
            InputError: an unusable YAML, a missing folder, an unknown model.
        """
        loaded, text = read_config(config)
        return cls(loaded, observe(loaded), text)

    @cached_property
    def store(self) -> Store:
        """The content-addressed store below the work folder."""
        return Store(self.config.work / "store", self.config_text)

    @cached_property
    def vectors(self) -> Vectors:
        """The LanceDB tables below the work folder."""
        return Vectors(self.config.work / "lancedb")

    @cached_property
    def shards(self) -> Mapping[str, Shard]:
        """The pool's shards by name, as they were listed."""
        return {shard.name: shard for shard in self.world.shards}

    @cached_property
    def tars(self) -> Mapping[str, Shard]:
        """Where each shard's tar lies, by name: the one listed, or what `raw_shards` packed of rows.

        A shard that is not packed yet is left out.
        """
        found = {name: self._packed(shard) if shard.rows else shard for name, shard in self.shards.items()}
        return {name: shard for name, shard in found.items() if shard is not None}

    def _packed(self, shard: Shard) -> Shard | None:
        record = self.store.current(RAW_SHARDS, shard.name)
        path = self.store.folder(record) / PACKED if record is not None else None
        if path is None or not path.is_file():
            return None
        (packed,) = scan(str(path))
        return replace(packed, name=shard.name)

    @property
    def scratch(self) -> Path:
        """Where unfinished work lies; may be removed when nothing runs."""
        return self.config.work / "scratch"

    def plan(self) -> Plan:
        """Compare what should exist with what the store holds now."""
        with self.store.many_reads():
            return make_plan(self.config, self.world, self.store)


@dataclass(frozen=True)
class Task:
    """One entry being built: what it reads comes from the plan that asked for it, never from "the latest"."""

    project: Project
    plan: Plan
    step: Step
    entry: Entry

    @property
    def config(self) -> Config:
        """The experiment."""
        return self.project.config

    @property
    def partition(self) -> str:
        """The partition of the store that is being built."""
        return self.step.node.partition

    @property
    def scratch(self) -> Path:
        """A folder for this fingerprint's unfinished work; it survives a kill, so that work can go on."""
        assert self.step.fingerprint is not None
        return self.project.scratch / f"{self.step.node.stage}-{self.step.fingerprint[:16]}"

    def record(self, stage: str, partition: str = WHOLE) -> Record:
        """Return the record of an entry that is up to date.

        Raises:
            InputError: it is not, and has to be materialized first.
        """
        name = node_name(stage, partition)
        return require(self.plan.by_name[name].record, name)

    def path(self, stage: str, partition: str = WHOLE, file: str = "") -> Path:
        """Return the path of a file (or folder) of an entry that is up to date, its content checked.

        Raises:
            InputError: the entry has to be materialized first, or is damaged.
        """
        return self.project.store.checked(self.record(stage, partition), file)

    def done(self, digests: Mapping[str, str], **stats: Any) -> None:
        """Set the entry's output digests and its statistics."""
        self.entry.digests.update(digests)
        self.entry.stats.update(stats)
