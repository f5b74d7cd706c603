"""The stages, one row each.

A new stage is a row here, a node function in :mod:`~clipcov_pipeline.experiment.graph`, and a file in
``assets/``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.training.spec import CHECKPOINT, EARLY_CHECKPOINT

GALLERY = "gallery.json"

OVERLAP = "overlap"  # the part of a subset's diagnostics that sets it beside the other methods' subsets


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: of the stage, its Dagster asset, and its folder in the store.
        code_version: raise it when the stage's code gives another result for the same input.
        each: what there is an entry for, and a Dagster partition: every shard, method, subset or arm; the
            experiment as a whole has one entry and no partitions.
        files: output -> the file whose sha256 is its digest. Not every entry has all of them.
        computed: output -> how its digest follows from the record, for those that are no single file.
        content: outputs whose digest the stage takes of what they hold, in whatever file.
        one_at_a_time: whether each partition gets a Dagster run of its own.
    """

    name: str
    code_version: str
    each: Literal["experiment", "shard", "method", "subset", "arm"] = "experiment"
    files: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Callable[[Record], str]] = field(default_factory=dict)
    content: tuple[str, ...] = ()
    one_at_a_time: bool = False

    @property
    def outputs(self) -> frozenset[str]:
        """What others can read of an entry."""
        return frozenset({*self.files, *self.computed, *self.content})


TABLE: dict[str, Stage] = {}  # by name, in the order in which they are built


def _row(stage: Stage) -> str:
    TABLE[stage.name] = stage
    return stage.name


def _manifest(record: Record) -> str:
    return digest_of([record.files["manifest.parquet"], record.stats["sha256"]])


def _inputs(record: Record) -> str:
    return digest_of(dict(record.inputs))


RAW_SHARDS = _row(
    Stage(
        "raw_shards",
        "2",
        "shard",
        files={"places": "places.parquet"},
        computed={"manifest": _manifest},
        content=("source_ids",),  # a column of the manifest
    )
)

PROXY_MODEL = _row(Stage("proxy_model", "1", files={"weights": CHECKPOINT, "early": EARLY_CHECKPOINT}))

EMBEDDINGS = _row(Stage("embeddings", "2", "shard", content=("rows",)))  # they lie in LanceDB

EARLY_SIMILARITIES = _row(
    Stage("early_similarities", "2", "shard", files={"similarities": "similarities.parquet"})
)

PSEUDO_LABELS = _row(
    Stage(
        "pseudo_labels",
        "2",
        files={"labels": "labels.parquet", "holdout": "holdout.parquet"},
        computed={"pool": _inputs},
    )
)

SAMPLE_INDEX = _row(Stage("sample_index", "1", files={"index": "index.parquet"}))

RANKINGS = _row(Stage("rankings", "3", "method", files={"ranking": "ranking.parquet"}))

SUBSETS = _row(Stage("subsets", "2", "subset", content=("samples", "subset")))  # wherever the samples lie

POOL_MAP = _row(Stage("pool_map", "1", files={"map": "map.parquet"}))

SUBSET_DIAGNOSTICS = _row(
    Stage("subset_diagnostics", "2", "subset", files={"table": "table.parquet", OVERLAP: "overlap.parquet"})
)

SUBSET_GALLERIES = _row(Stage("subset_galleries", "2", "subset", files={"gallery": GALLERY}))

CHECKPOINTS = _row(
    # long enough to deserve a run each: a failure or a kill costs one
    Stage("checkpoints", "2", "arm", content=("weights",), one_at_a_time=True)
)

SCORES = _row(Stage("scores", "4", "arm", files={"scores": "scores.json", "neighbours": "neighbours.json"}))

LEADERBOARD = _row(Stage("leaderboard", "3", files={"scores": "scores.parquet"}))

CHECKPOINT_GALLERIES = _row(Stage("checkpoint_galleries", "2", "arm", files={"gallery": GALLERY}))

REPORT = _row(Stage("report", "2", files={"report": "report.html"}))


STAGES = tuple(TABLE)

CODE_VERSIONS = {name: stage.code_version for name, stage in TABLE.items()}

PARTITIONED = tuple(name for name, stage in TABLE.items() if stage.each != "experiment")

PER_SHARD = tuple(name for name, stage in TABLE.items() if stage.each == "shard")

SIDE_BY_SIDE = (CHECKPOINTS, SCORES)  # of the pool ``gpu``, those with many partitions

ONE_AT_A_TIME = frozenset(name for name, stage in TABLE.items() if stage.one_at_a_time)


def derived_digests(record: Record) -> Mapping[str, str]:
    """Return the output digests that follow from a record's files, statistics and inputs."""
    if (stage := TABLE.get(record.stage)) is None:
        return {}
    files = {output: record.files[name] for output, name in stage.files.items() if name in record.files}
    return {**files, **{output: compute(record) for output, compute in stage.computed.items()}}
