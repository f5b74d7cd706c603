"""The experiment's configuration: one YAML file, one section a stage, checked before anything runs.

Every section is a frozen pydantic model that refuses unknown keys. Fields that cannot change a result
(batch size of inference, worker counts, device) are marked :data:`KNOB` and stay out of fingerprints.
"""

import difflib
import os
import re
from calendar import monthrange
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from clipcov_pipeline.errors import InputError

KNOB = "knob"  # marks a field that changes speed or place, never a result
FULL = "full"  # the arm that trains on the whole pool
DEFAULT_PRESET = "sample"
LABEL = re.compile(r"[a-z0-9][a-z0-9_]*(-[a-z0-9_]+)*\Z")

CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
CRON_PART = re.compile(r"(\*|[0-9]+(-[0-9]+)?)(/[0-9]+)?")
LEAP_YEAR = 2024
WEEKDAYS = re.compile("sun|mon|tue|wed|thu|fri|sat", re.IGNORECASE)

# strict: otherwise `true` counts as 1 and "128" as 128
Fraction = Annotated[float, Field(gt=0, lt=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Momentum = Annotated[float, Field(ge=0, lt=1, strict=True)]
Port = Annotated[int, Field(gt=0, lt=65_536, strict=True)]


def _architecture(name: str) -> str:
    if ":" in name:
        raise ValueError(
            f"found {name!r}, expected the name of an architecture: weights are named by pretrained, a tag or"
            " the path of a checkpoint"
        )
    return name


def _cron(text: str) -> str:
    if len(fields := text.split(" ")) != len(CRON_FIELDS):
        raise ValueError(
            f"found {text!r}, expected five fields such as '0 3 * * *': minute hour day month weekday"
        )
    fields[-1] = WEEKDAYS.sub("0", fields[-1])
    for field, (name, low, high) in zip(fields, CRON_FIELDS, strict=True):
        if not all(CRON_PART.fullmatch(part) for part in field.split(",")):
            raise ValueError(
                f"found {text!r}, expected as {name} *, a number, a range (1-5), steps (*/5), commas between"
            )
        for step, number in re.findall(r"(/?)([0-9]+)", field):
            if step and not int(number):
                raise ValueError(f"found a step of 0 as {name} of {text!r}, expected at least 1")
            if not step and not low <= int(number) <= high:
                raise ValueError(f"found {number} as {name} of {text!r}, expected {low} to {high}")
    days, months = (field.split(",") for field in fields[2:4])
    plain = all(part.isdigit() for part in days + months)
    if plain and min(map(int, days)) > max(monthrange(LEAP_YEAR, int(month))[1] for month in months):
        raise ValueError(f"found {text!r}, expected a day that one of its months has")
    return text


Architecture = Annotated[str, AfterValidator(_architecture)]

# how the length of the arms' trainings is made comparable
Protocol = Literal["samples_seen", "epochs"]

# what an evaluation task gives, as CLIP_benchmark names it
METRICS: dict[str, tuple[str, ...]] = {
    "retrieval": tuple(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)),
    "zeroshot_names": ("acc1", "acc5", "mean_per_class_recall"),
    "zeroshot_classification": ("acc1", "acc5", "mean_per_class_recall"),
    "linear_probe": ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"),
    "knn": ("knn_acc1",),  # CLIP_benchmark has none
}
EvaluationTask = Literal["retrieval", "zeroshot_names", "zeroshot_classification", "linear_probe", "knn"]
SHARDS_TASKS = ("retrieval", "zeroshot_names")
BENCHMARK_TASKS = ("retrieval", "zeroshot_classification", "linear_probe", "knn")
TRAINED_TASKS = ("linear_probe", "knn")  # these read the folder's train split too


def _checked_templates(value: Any, otherwise: str = "") -> tuple[str, ...]:
    """Return prompt templates as a tuple; raise ValueError where one has no place for the class name."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"found {value!r}, expected {otherwise}a list of prompt templates with {{}}")
    for template in value:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"found {template!r}, expected exactly one {{}} in each prompt template")
    return tuple(value)


class Section(BaseModel):
    """Base of every section: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def semantic(self) -> dict[str, Any]:
        """Return the fields that can change a result, nested sections included, as JSON-able values."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if KNOB in field.metadata:
                continue
            value = getattr(self, name)
            if isinstance(value, dict):
                value = {k: v.semantic() if isinstance(v, Section) else v for k, v in value.items()}
            values[name] = value.semantic() if isinstance(value, Section) else value
        return values


class Shards(Section):
    """Where the pool's WebDataset shards are (img2dataset layout) and which images are too large."""

    source: str = "sample"
    """``sample`` (shipped in the package), a local folder, a brace pattern, or an fsspec URL of these."""
    storage_options: Annotated[dict[str, Any], KNOB] = Field(default_factory=dict)
    max_image_pixels: PositiveInt = 89_478_485  # Pillow's own bound against decompression bombs
    settle_seconds: Annotated[NonNegativeFloat, KNOB] = 0.0
    """A local shard that was written to within this time is left for the next scan."""
    expected_samples: Annotated[PositiveInt | None, KNOB] = None
    """Size of a pool that is not here yet: only ``clipcov check`` reads it, and counts where it can."""


class AugCfg(Section):
    """How training images are varied, open_clip's ``--aug-cfg``; what is left out has open_clip's default."""

    scale: tuple[Share, Share] | None = None
    """Least and largest area of the random crop, as a share of the image; open_clip crops 0.9 to 1."""
    ratio: tuple[PositiveFloat, PositiveFloat] | None = None
    color_jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] | None = None
    """Brightness, contrast, saturation and hue."""
    color_jitter_prob: Share | None = None
    gray_scale_prob: Share | None = None

    def semantic(self) -> dict[str, Any]:
        """Leave out what is not given."""
        return {key: value for key, value in super().semantic().items() if value is not None}

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"found {name} {list(pair)}, expected the smaller number first")
        if (self.color_jitter is None) != (self.color_jitter_prob is None):
            raise ValueError("found one of color_jitter and color_jitter_prob, expected both or neither")
        return self


class Training(Section):
    """One open_clip_train run, in open_clip's own terms."""

    samples_seen: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 1e-3
    wd: NonNegativeFloat = 0.2
    beta1: Momentum = 0.9
    beta2: Momentum = 0.98
    eps: PositiveFloat = 1e-6
    warmup: Count = 50
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    precision: Literal["fp32", "amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16"] = "fp32"
    num_checkpoints: PositiveInt = 4
    """Virtual epochs that samples_seen is cut into; a killed run goes on from the last one."""
    aug_cfg: AugCfg | None = None
    workers: Annotated[Count, KNOB] = 1
    device: Annotated[Literal["auto", "cpu", "cuda"], KNOB] = "auto"
    gpus: Annotated[PositiveInt, KNOB] = 1
    """For each training, by torchrun; they share the batch, and BatchNorm is over all their shares."""
    accum_freq: PositiveInt = 1
    """Parts, one after another, that a GPU cuts its share of the batch into, to need less memory. The loss is
    still over the whole batch, and a model without BatchNorm learns the same; BatchNorm is over a part, so
    that this is no knob."""
    grad_checkpointing: Annotated[bool, KNOB] = False
    """Compute activations again instead of keeping them, in transformers: slower, and needs less memory."""

    def semantic(self) -> dict[str, Any]:
        """Leave out what came later than the first experiments, where it is not given."""
        not_given: dict[str, tuple[Any, ...]] = {"aug_cfg": (None, {}), "accum_freq": (1,)}
        values = super().semantic()
        return {key: value for key, value in values.items() if value not in not_given.get(key, ())}

    @property
    def parts(self) -> int:
        """Parts after each of which there is a checkpoint: epochs, or what samples_seen is cut into."""
        if self.epochs is not None:
            return self.epochs
        assert self.samples_seen is not None
        return min(self.num_checkpoints, -(-self.samples_seen // self.batch_size))

    @model_validator(mode="after")
    def _equal_parts(self) -> Self:
        parts = self.gpus * self.accum_freq
        if self.batch_size % parts:
            raise ValueError(
                f".batch_size: found {self.batch_size} with gpus={self.gpus} and"
                f" accum_freq={self.accum_freq}, expected a multiple of {parts}: the parts must be equal"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.samples_seen is None) == (self.epochs is None):
            raise ValueError(
                f"found samples_seen={self.samples_seen} and epochs={self.epochs}, expected exactly one"
            )
        return self


class Proxy(Section):
    """The model whose embeddings selection works on."""

    model: Architecture
    pretrained: str | None = None
    """An open_clip tag or a local checkpoint; ``null`` trains ``model`` on the pool by ``train``."""
    early: str | None = None
    """Of ``pretrained``, an earlier tag or checkpoint, for ``c_rho``; a proxy trained here keeps its own."""
    train: Training | None = None
    seed: Count = 0
    retrain_with_pool: bool = False
    """False: a proxy trained once stays when shards come and go, so that embeddings stay comparable."""

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.pretrained is None and self.train is None:
            raise ValueError(
                "found neither pretrained nor train, expected one: a checkpoint or how to train one"
            )
        if self.pretrained is not None and self.train is not None:
            raise ValueError("found both pretrained and train, expected one: remove the other")
        if self.early is not None and self.train is not None:
            raise ValueError(
                ".early: has no effect with train, whose first checkpoint is the early proxy: remove it"
            )
        return self

    def semantic(self) -> dict[str, Any]:
        """Leave ``early`` out where none is named: it came later than the first experiments."""
        return {key: value for key, value in super().semantic().items() if key != "early" or value}


class Embed(Section):
    """How samples are embedded; the precision of storage is always fp16."""

    batch_size: Annotated[PositiveInt, KNOB] = 256
    device: Annotated[Literal["auto", "cpu", "cuda"], KNOB] = "auto"
    workers: Annotated[Count, KNOB] = 2


class Labels(Section):
    """How latent classes are found."""

    latent_classes: Literal["prompts", "clusters"] = "prompts"
    class_names: str = "imagenet1k"
    """``imagenet1k``, ``sample``, or a text file with one class name a line (for ``prompts``)."""
    templates: str | tuple[str, ...] = "imagenet"
    """``imagenet`` (open_clip's 80) or a list of strings with ``{}`` (for ``prompts``)."""
    n_clusters: int | Literal["auto"] = 100
    """``auto``: the number of largest silhouette on a sample of the pool (for ``clusters``)."""
    seed: Count = 0

    @field_validator("n_clusters", mode="before")
    @classmethod
    def _n_clusters(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
            raise ValueError(f"found {value!r}, expected auto or a whole number of at least 2")
        return value

    @field_validator("templates", mode="before")
    @classmethod
    def _templates(cls, value: Any) -> Any:
        return value if value == "imagenet" else _checked_templates(value, "imagenet or ")

    def semantic(self) -> dict[str, Any]:
        """Leave out what the chosen kind of latent class does not read."""
        unused = {"n_clusters", "seed"} if self.latent_classes == "prompts" else {"class_names", "templates"}
        return {key: value for key, value in super().semantic().items() if key not in unused}


class Select(Section):
    """The methods that rank the pool and the fractions that are cut from each ranking."""

    fractions: tuple[Fraction, ...] = (0.1, 0.25, 0.5)
    methods: dict[str, dict[str, Any]]
    """Label -> parameters of ``selection.rank``; ``method`` defaults to the label."""
    samples_per_shard: PositiveInt = 1000
    threads: Annotated[PositiveInt | None, KNOB] = None

    def labels_of(self, method: str) -> list[str]:
        """Return the labels under which a method is configured."""
        return [label for label, params in self.methods.items() if params.get("method", label) == method]

    @field_validator("fractions")
    @classmethod
    def _fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("found an empty list, expected at least one fraction between 0 and 1")
        names = [f"{fraction:g}" for fraction in value]  # as in the names of subsets
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"found {', '.join(repeated)} more than once, expected each fraction once")
        return tuple(sorted(value))

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        if isinstance(value, list):
            for label in value:
                if not isinstance(label, str) or value.count(label) > 1:
                    raise ValueError(
                        f"found {label!r} in a list, expected each method's name once: to give parameters,"
                        " write a mapping of names to parameters"
                    )
            value = dict.fromkeys(value)
        if isinstance(value, dict):
            return {label: {} if params is None else params for label, params in value.items()}
        return value

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        from clipcov_pipeline.selection import validate_method

        if not value:
            raise ValueError("found no method, expected at least one")
        for label, params in value.items():
            if not LABEL.match(label) or label == FULL:
                raise ValueError(
                    f"found the label {label!r}, expected lower-case words with - or _, not {FULL!r}"
                )
            method = params.get("method", label)
            if not isinstance(method, str):
                raise ValueError(f".{label}.method: found {method!r}, expected a method's name")
            try:
                validate_method(method, {key: item for key, item in params.items() if key != "method"})
            except InputError as error:
                raise ValueError(f".{label}{_below(str(error), method)}") from error
            if params.get("redundancy") == "budget_share":
                raise ValueError(
                    f".{label}.redundancy: found 'budget_share', expected 'class_size': one ranking serves"
                    " all fractions here, and that one is for a single budget (clipcov select takes it)"
                )
        return value


def _below(text: str, method: str) -> str:
    """Return a message about a method's parameter with its path below the method's label."""
    return text.removeprefix(method) if text.startswith((f"{method}.", f"{method}:")) else f".{text}"


class Train(Training):
    """How every arm is trained: the same model, schedule and length; only the subset and the seed differ.

    With both ``samples_seen`` and ``epochs`` every arm is trained twice, once to each length.
    """

    model: Architecture
    pretrained: str | None = None
    seeds: tuple[Count, ...] = (0,)

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The lengths that are given: samples_seen (DataComp's protocol), epochs (the paper's), or both."""
        given: tuple[tuple[Protocol, int | None], ...] = (
            ("samples_seen", self.samples_seen),
            ("epochs", self.epochs),
        )
        return tuple(name for name, value in given if value is not None)

    def under(self, protocol: Protocol) -> Self:
        """Return the settings of the arms under one protocol: the other length is left out."""
        return self.model_copy(update={name: None for name in self.protocols if name != protocol})

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if not self.protocols:
            raise ValueError("found neither samples_seen nor epochs, expected one of them, or both")
        return self

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"found {list(value)}, expected at least one seed, each once")
        return value


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
        if not value or len(set(value)) != len(value):
            raise ValueError(f"found {list(value)}, expected one or more of {list(METRICS)}, each once")
        return value

    @field_validator("templates", mode="before")
    @classmethod
    def _templates(cls, value: Any) -> Any:
        return None if value is None else _checked_templates(value)

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
        if not value or len(set(value)) != len(value):
            raise ValueError(f"found {list(value)}, expected at least one evaluation set, each once")
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
    batch_size: Annotated[PositiveInt, KNOB] = 256
    device: Annotated[Literal["auto", "cpu", "cuda"], KNOB] = "auto"

    @field_validator("sets", "suites")
    @classmethod
    def _labels(cls, value: dict[str, Any]) -> dict[str, Any]:
        for label in value:
            if not LABEL.match(label) or label == "holdout":
                raise ValueError(
                    f"found the label {label!r}, expected lower-case words with - or _, not 'holdout'"
                )
        return value

    @property
    def tasks(self) -> dict[str, tuple[EvaluationTask, ...]]:
        """The tasks of every set, the held-out part of the pool included."""
        tasks = {name: evaluation_set.tasks for name, evaluation_set in self.sets.items()}
        return {**tasks, "holdout": ("retrieval",)} if self.holdout_fraction else tasks

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


class Bound(Section):
    """Where a check draws the line, and how bad it is to be beyond it."""

    bound: Annotated[float, Field(strict=True)]
    severity: Literal["warn", "error"] = "warn"
    """``error`` keeps everything that follows from the entry from being built."""


class Checks(Section):
    """The bounds of the checks (``clipcov_pipeline.checks`` says what each one measures); ``severity`` or
    ``bound`` may be given alone."""

    bad_samples: Bound = Bound(bound=0.1)
    """raw_shards: largest share of a shard's samples that is kept aside."""
    refused_embeddings: Bound = Bound(bound=0.01)
    """embeddings: largest share of a shard's samples whose embedding is not finite or has no norm."""
    unit_norm: Bound = Bound(bound=0.01, severity="error")
    """embeddings: largest distance of a stored embedding's norm from 1."""
    matched_pairs: Bound = Bound(bound=3.0, severity="error")
    """embeddings: smallest lead of the cosine of matched pairs over shuffled ones, in standard errors."""
    largest_class: Bound = Bound(bound=0.25)
    """pseudo_labels: largest share of the pool in one latent class."""
    mean_margin: Bound = Bound(bound=0.002)
    """pseudo_labels: smallest mean lead of the chosen class over the next best, in cosine."""
    alignment: Bound = Bound(bound=0.2, severity="error")
    """subset_diagnostics: smallest cosine of the subset's and the pool's centred cross-covariance."""
    dominant_term: Bound = Bound(bound=0.9)
    """subset_diagnostics: largest share of one term in the sum of the terms' absolute values."""
    empty_class: Bound = Bound(bound=9.0)
    """subset_diagnostics: most members that a latent class left empty may have in the pool."""
    duplicates: Bound = Bound(bound=0.5)
    """subset_diagnostics: largest share of the subset that repeats an image of it, exactly or nearly."""
    loss: Bound = Bound(bound=1.0)
    """checkpoints: largest ratio of the last loss to the first."""
    above_chance: Bound = Bound(bound=-3.0)
    """scores: smallest distance of a metric above chance, in standard errors."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Fill in what a check's entry leaves out by that check's own default."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {
            name: {**defaults[name], **value} if name in defaults and isinstance(value, dict) else value
            for name, value in values.items()
        }


class Diagnostics(Section):
    """What is worked out for every subset beside the pool, and when a check fails."""

    random_draws: Annotated[int, Field(ge=1, strict=True)] = 10
    """Random subsets of the same size that a subset's cross-covariance is compared with."""
    tsne_samples: Annotated[int, Field(ge=10, le=20_000, strict=True)] = 5000
    """Most samples of the pool that are drawn as a map."""
    seed: Count = 0
    checks: Annotated[Checks, KNOB] = Checks()
    """A bound changes no result: the checks are evaluated again, nothing else."""


class Automation(Section):
    """Unattended rebuilds; both are switched on in the Dagster UI."""

    cron: Annotated[str, AfterValidator(_cron), KNOB] = "0 3 * * *"
    """When the shard source is listed again: minute, hour, day of month, month, day of week."""
    sensor_seconds: Annotated[PositiveInt, KNOB] = 30
    settle_seconds: Annotated[NonNegativeFloat, KNOB] = 10.0
    """A tick waits while a local shard was written to within this time: it may still be growing."""
    max_retries: Annotated[Count, KNOB] = 2
    """How often a failed run of the sensor or schedule is tried again."""
    retry_seconds: Annotated[PositiveInt, KNOB] = 30
    """Wait before the first retry; it doubles with each."""
    pools: Annotated[dict[Literal["gpu", "embed"], PositiveInt], KNOB] = Field(
        default_factory=lambda: {"gpu": 1, "embed": 1}
    )
    """How many steps may train or evaluate (``gpu``) and embed (``embed``) at a time. Of several GPUs (those
    in ``CUDA_VISIBLE_DEVICES``, else all) ``clipcov run`` gives arms side by side one each, in turns, unless
    ``train.gpus`` is more than 1; runs of the Dagster UI and the sensor share the first. On a CPU they divide
    the cores among them (then ``train.workers: 0`` is best)."""


class Ui(Section):
    """Where the two user interfaces listen; links between them are made of these."""

    host: Annotated[str, KNOB] = "127.0.0.1"
    dagster_port: Annotated[Port, KNOB] = 3000
    mlflow_port: Annotated[Port, KNOB] = 5000


class Config(Section):
    """One experiment."""

    name: str
    work_dir: Annotated[str, KNOB] = "work"
    shards: Shards = Shards()
    proxy: Proxy
    embed: Embed = Embed()
    labels: Labels = Labels()
    select: Select
    train: Train
    evaluate: Evaluate
    diagnostics: Diagnostics = Diagnostics()
    automation: Automation = Automation()
    ui: Ui = Ui()

    @model_validator(mode="after")
    def _early_proxy(self) -> Self:
        labels = self.select.labels_of("c_rho")
        if not labels:
            return self
        found = f"select.methods.{labels[0]}: c_rho compares with an early proxy, found none: "
        if self.proxy.train is None:
            if self.proxy.early is None:
                raise ValueError(f"{found}give proxy.early, a tag or checkpoint from earlier in its training")
        elif self.proxy.train.parts < 2:
            name = "epochs" if self.proxy.train.epochs else "num_checkpoints"
            raise ValueError(f"{found}give proxy.train.{name} 2 or more: it is the proxy after the first")
        return self

    _base: Path = PrivateAttr(default_factory=Path.cwd)
    _path: Path | None = PrivateAttr(default=None)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(f"found {value!r}, expected letters, digits, dots, dashes or underscores")
        return value

    @property
    def path(self) -> Path | None:
        """The YAML file this was read from."""
        return self._path

    @property
    def work(self) -> Path:
        """Absolute path of the folder that holds everything that is produced."""
        return self.resolve(os.environ.get("CLIPCOV_WORK_DIR") or self.work_dir)

    def resolve(self, path: str) -> Path:
        """Return ``path`` absolute: relative paths start at the YAML's folder (presets: the current one)."""
        return (self._base / Path(path).expanduser()).resolve()

    def location(self, source: str) -> str:
        """Return a shard source with a relative local path made absolute; URLs stay as they are."""
        return source if "://" in source else str(self._base / Path(source).expanduser())


def preset_path(name: str) -> Path:
    """Return the path of a preset shipped in the package; raise InputError when there is none."""
    folder = Path(str(resources.files("clipcov_pipeline") / "presets"))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(entry.stem for entry in folder.glob("*.yaml"))
        raise InputError(f"preset {name!r} not found, expected one of {known} or the path of a YAML file")
    return path


def find_config(given: str | None = None) -> Path:
    """Return the YAML to use: ``given`` (path or preset name), else $CLIPCOV_CONFIG, else the sample."""
    given = given or os.environ.get("CLIPCOV_CONFIG") or DEFAULT_PRESET
    if given.endswith((".yaml", ".yml")):
        path = Path(given)
        if not path.is_file():
            raise InputError(f"config {given!r} not found, expected a YAML file: check the path")
        return path.resolve()
    return preset_path(given)


def load_config(given: str | None = None) -> Config:
    """Read and check the experiment's YAML.

    Args:
        given: path of a YAML file or name of a preset; None means $CLIPCOV_CONFIG or the sample.

    Raises:
        InputError: one line with the key's path, the value found and the value expected.
    """
    return read_config(given)[0]


def read_config(given: str | None = None) -> tuple[Config, str]:
    """As `load_config`; also return the YAML's text: the file may be edited for the next experiment."""
    path = find_config(given)
    try:
        text = path.read_bytes().decode()
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise InputError(f"{path}: found {found}, expected a mapping of sections")
    try:
        config = Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {_one_line(error)}") from error
    is_preset = path.parent == Path(str(resources.files("clipcov_pipeline") / "presets"))
    config._base = Path.cwd() if is_preset else path.parent
    config._path = path
    return config, text


class _Loader(yaml.SafeLoader):
    """YAML as its users write it: a key given twice is refused, and ``1e-3`` is a number (as in YAML 1.2)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found the key {key.value!r} twice, expected it once", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def _one_line(error: pydantic.ValidationError) -> str:
    return " ".join("; ".join(_describe(item) for item in error.errors()).split())


def _describe(item: Any) -> str:
    parts = [str(part) for part in item["loc"] if part != "[key]"]
    path, found = ".".join(parts), item.get("input")
    match item["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key{_suggestion(item['loc'])}"
        case "missing":
            return f"{path}: missing, expected a value"
        case "value_error":
            # a check of several keys names the one that is wrong, as `.KEY: ...`
            text = str(item["ctx"]["error"])
            if not path:  # a check of several sections names its key itself
                return text
            return f"{path}{text}" if text.startswith(".") else f"{path}: {text}"
        case "model_type" | "dict_type":
            return f"{path}: found {found!r}, expected a mapping (KEY: VALUE)"
        case "tuple_type":
            return f"{path}: found {found!r}, expected a list ([A, B])"
        case _:
            expected = item["msg"][0].lower() + item["msg"][1:]
            return f"{path}: found {found!r}, expected: {expected.removeprefix('input should be ')}"


def _suggestion(loc: tuple[Any, ...]) -> str:
    """Name the known key that is nearest to a misspelt one."""
    section = Config
    for part in loc[:-1]:
        if part in section.model_fields:  # else a set's own name: its section was found at `sets`
            annotation = section.model_fields[part].annotation
            kinds = [annotation, *getattr(annotation, "__args__", ())]
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f", did you mean {near[0]!r}?" if near else (f", expected one of {known}" if known else "")
