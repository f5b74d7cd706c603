"""Asset: unit-norm embeddings of every good sample, in LanceDB."""

from typing import TYPE_CHECKING

import dagster as dg

from assets.display.asset_checks import check_specs
from assets.display.preview import COLUMN_SCHEMA, columns
from assets.partitions import partitions_of, same_key
from assets.resources import Experiment
from assets.steps.materialize import Events, materialize_partitions
from assets.steps.proxy_encoders import EmbeddedShard, embed_shard, proxy_encoder
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.plan import Status
from clipcov_pipeline.experiment.project import Project, Task
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.proxy.embeddings import pair_figures
from clipcov_pipeline.proxy.vectors import VECTORS, digest_of_rows, make_rows, table_name, vectors_of

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_COLUMNS = ("uid", "shard", "key", "caption", "image_sha256")
TYPES = {**dict.fromkeys(TEXT_COLUMNS, "string"), **dict.fromkeys(VECTORS, "fixed_size_list<float16>")}


@dg.asset(
    partitions_def=partitions_of("embeddings"),
    deps=[same_key("raw_shards"), "proxy_model"],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="pool",
    kinds={"lancedb", "pytorch"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["embeddings"],
    check_specs=check_specs("embeddings"),
    metadata={COLUMN_SCHEMA: columns(TYPES.items())},
    pool="embed",
)
def embeddings(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """Image and caption embeddings (float16, unit norm): a LanceDB row a good sample, a version a shard."""

    def build(task: Task) -> None:
        found = embed_shard(context, task, proxy_encoder)
        shard, refused = task.partition, found.embedded.refused
        if refused:
            context.log.warning(f"shard {shard}: {len(refused)} embeddings refused: {refused[:5]}")
        rows = _rows(shard, found)
        table = table_name(task.record("proxy_model").digests["weights"])
        # until the record is written nothing stands for this shard: a kill in between means embedding again
        task.project.store.clear_current("embeddings", shard)
        version = task.project.vectors.replace_shard(table, shard, rows)
        task.done(
            {"rows": digest_of_rows(rows)},
            rows=rows.num_rows,
            refused=len(refused),
            dim=found.embedded.image_embedding.shape[1],
            images_per_second=round(found.progress.rate, 1),
            table=table,
            version=version,
            **pair_figures(vectors_of(rows, VECTORS[0]), vectors_of(rows, VECTORS[1])),
        )

    restoring = Restoring(set(context.partition_keys))
    yield from materialize_partitions(context, experiment, build, restore=restoring.restore)


def _rows(shard: str, found: EmbeddedShard) -> "pa.Table":
    """Return the shard's rows of the table: the good samples that have both embeddings."""
    manifest, embedded = found.manifest, found.embedded
    kept = manifest.filter(~manifest["uid"].is_in([uid for uid, _ in embedded.refused]))
    return make_rows(
        uids=embedded.uids,
        shard=shard,
        keys=kept["key"].to_list(),
        captions=kept["caption"].to_list(),
        image_sha256=kept["image_sha256"].to_list(),
        image_embedding=embedded.image_embedding,
        text_embedding=embedded.text_embedding,
    )


class Restoring:
    """Brings earlier embeddings of these shards back; their rows in a table are looked up all at once."""

    def __init__(self, shards: set[str]) -> None:
        self._shards = shards
        self._found: dict[str, tuple[int, dict[str, tuple[int, str]]]] = {}
        """By table: the version that was looked through, and rows and digest of each shard in it."""

    def restore(self, project: Project, record: Record) -> None:
        """Bring an earlier embedding of a shard back: the table may still have it, else an old version has.

        Raises:
            InputError: clean-up has taken the version that it was written in.
        """
        if self._digest(project, record) != record.digests["rows"]:
            restore_rows(project, record)

    def _digest(self, project: Project, record: Record) -> str:
        """Return the digest of the rows that a shard has in the newest version of its table."""
        table, vectors = record.stats["table"], project.vectors
        version = vectors.open(table).version
        if table not in self._found:
            steps = [step for step in project.plan().of("embeddings") if step.status is Status.RESTORE]
            records = [step.record for step in steps if step.record and step.node.partition in self._shards]
            sizes = {r.partition: r.stats["rows"] for r in records if r.stats["table"] == table}
            self._found[table] = version, vectors.digests(table, version, sizes)
        seen, found = self._found[table]
        if seen == version and record.partition in found:
            return found[record.partition][1]
        return digest_of_rows(vectors.shard_rows(table, record.partition, version))  # it was written to since


def restore_rows(project: Project, record: Record) -> None:
    """Write the rows of an earlier embedding of a shard again, from the version that they were written in.

    Raises:
        InputError: clean-up has taken that version.
    """
    table, shard, version = record.stats["table"], record.partition, record.stats["version"]
    rows = project.vectors.shard_rows(table, shard, version)
    if digest_of_rows(rows) != record.digests["rows"]:
        raise InputError(f"{record.name}: rows in version {version} of {table} differ from their record")
    project.store.clear_current("embeddings", shard)
    project.vectors.replace_shard(table, shard, rows)
