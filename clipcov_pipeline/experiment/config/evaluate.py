"""The section `evaluate`: sets, suites and the primary metric."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from clipcov_pipeline.evaluation.tasks import (
    BENCHMARK_TASKS,
    METRICS,
    SHARDS_TASKS,
    TRAINED_TASKS,
    EvaluationTask,
    Ties,
)
from clipcov_pipeline.experiment.config.base import (
    HOLDOUT,
    KNOB,
    Device,
    PositiveInt,
    Section,
    check_each_once,
    check_label,
    checked_templates,
)


class EvaluationSet(Section):
    """A set that no arm trains on: image-caption pairs, or a folder as CLIP_benchmark lays it out."""

    shards: str | None = None
    """``sample`` (the held-out vendor), a folder, a brace pattern or an fsspec URL of WebDataset shards."""
    benchmark: str | None = None
    """A folder of CLIP_benchmark's ``webdataset`` type: ``SPLIT/nshards.txt``, ``SPLIT/0.tar``, ..."""
    split: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] = "test"
    """The split of the folder that is scored."""
    tasks: tuple[EvaluationTask, ...] = ("retrieval",)
    templates: tuple[str, ...] | None = None
    """Prompt templates with ``{}``; by default a folder's own file, and ``{}`` alone for shards."""
    probe_samples: PositiveInt = 10_000
    """Images of the train split, drawn by class, that a linear probe and k-NN learn from at most."""
    storage_options: Annotated[dict[str, Any], KNOB] = Field(default_factory=dict)

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_each_once(value, f"one or more of {list(METRICS)}")
        return value

    @field_validator("templates", mode="before")
    @classmethod
    def _templates(cls, value: Any) -> Any:
        return None if value is None else checked_templates(value)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.shards is None) == (self.benchmark is None):
            raise ValueError(
                f"found shards={self.shards!r} and benchmark={self.benchmark!r}, expected exactly one:"
                " shards of image-caption pairs, or a folder in CLIP_benchmark's layout"
            )
        if self.benchmark is not None and "://" in self.benchmark:
            raise ValueError(f".benchmark: found {self.benchmark!r}, expected a local folder: copy it here")
        kind, known = ("shards", SHARDS_TASKS) if self.benchmark is None else ("benchmark", BENCHMARK_TASKS)
        for task in self.tasks:
            if task not in known:
                raise ValueError(f".tasks: found {task!r}, expected of a set of {kind}: {list(known)}")
        unused = {
            "split": self.benchmark is None,
            "probe_samples": not set(self.tasks) & set(TRAINED_TASKS),
            "storage_options": self.benchmark is not None,
        }
        for name in sorted(self.model_fields_set):
            if unused.get(name):
                raise ValueError(
                    f".{name}: has no effect for {kind} with the tasks {list(self.tasks)}: remove it"
                )
        return self

    @property
    def reads_train(self) -> bool:
        """Whether a task learns from the folder's train split."""
        return bool(set(self.tasks) & set(TRAINED_TASKS))

    def semantic(self) -> dict[str, Any]:
        """Leave out what this kind of set does not read."""
        values = super().semantic()
        if self.benchmark is None:
            return {"shards": self.shards, "tasks": self.tasks, "templates": self.templates or ("{}",)}
        unused = {"shards"} if self.reads_train else {"shards", "probe_samples"}
        return {key: value for key, value in values.items() if key not in unused}


class Suite(Section):
    """Evaluation sets whose scores are averaged to one figure."""

    sets: tuple[str, ...]
    metric: str = "acc1"

    @field_validator("sets")
    @classmethod
    def _sets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_each_once(value, "at least one evaluation set")
        return value


class Evaluate(Section):
    """What every checkpoint is scored on."""

    holdout_fraction: Annotated[float, Field(ge=0, lt=0.9, strict=True)] = 0.1
    """Share of the pool, by a hash of the uid, that no arm trains on; 0 leaves the set out.

    At most 10,000 of its pairs are scored, the same ones for every arm.
    """
    sets: dict[str, EvaluationSet] = Field(default_factory=dict)
    suites: dict[str, Suite] = Field(default_factory=dict)
    """Averages over several sets; a set whose folder is absent is left out of the average, and named."""
    primary_metric: str
    """``SET/METRIC`` or ``SUITE/METRIC``, named before anything runs; the leaderboard is sorted by it."""
    ties: Ties = "expected"
    """What a right answer counts that ties with wrong ones (copies of captions or images): ``expected``, its
    share of a random order; ``clip_benchmark``, what torch.topk makes of it; ``miss``."""
    batch_size: Annotated[PositiveInt, KNOB] = 256
    device: Annotated[Device, KNOB] = "auto"

    @field_validator("sets", "suites")
    @classmethod
    def _labels(cls, value: dict[str, Any]) -> dict[str, Any]:
        for label in value:
            check_label(label, HOLDOUT)
        return value

    @property
    def tasks(self) -> dict[str, tuple[EvaluationTask, ...]]:
        """The tasks of every set, the held-out part of the pool included."""
        tasks = {name: evaluation_set.tasks for name, evaluation_set in self.sets.items()}
        return {**tasks, HOLDOUT: ("retrieval",)} if self.holdout_fraction else tasks

    @model_validator(mode="after")
    def _suites_fit(self) -> Self:
        for name, suite in self.suites.items():
            if name in self.tasks:
                raise ValueError(f".suites: found the label {name!r}, which is a set's: choose another")
            for member in suite.sets:
                if member not in self.tasks:
                    raise ValueError(
                        f".suites.{name}.sets: found {member!r}, expected some of {list(self.tasks)}"
                    )
                known = [metric for task in self.tasks[member] for metric in METRICS[task]]
                if suite.metric not in known:
                    raise ValueError(
                        f".suites.{name}.metric: found {suite.metric!r}, expected one that {member} gives:"
                        f" {known}"
                    )
        return self

    @model_validator(mode="after")
    def _primary(self) -> Self:
        name, _, metric = self.primary_metric.partition("/")
        known = {label: [m for task in tasks for m in METRICS[task]] for label, tasks in self.tasks.items()}
        known |= {label: [suite.metric] for label, suite in self.suites.items()}
        found = f".primary_metric: found {self.primary_metric!r}, expected SET/METRIC"
        if name not in known:
            raise ValueError(f"{found} with SET one of {list(known)}")
        if metric not in known[name]:
            raise ValueError(f"{found} with METRIC of {name} one of {known[name]}")
        return self
