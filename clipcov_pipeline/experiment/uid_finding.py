"""What ``clipcov check`` says of a pool's uids: whether a subset's ``.npy`` is of use to other tools."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.tars import NotATarError, iter_all_groups
from clipcov_pipeline.pool.uids import source_id_of
from clipcov_pipeline.uuids import hex_of

LOOKED_AT = 100  # samples of the first shard


def uid_finding(shards: Sequence[Shard]) -> list[Finding]:
    """Look at the first samples of the first shard; nothing where that is no local readable tar."""
    if not shards or shards[0].rows is not None or not Path(shards[0].url).is_file():
        return []
    try:
        metas = [group.meta() for group in islice(iter_all_groups(shards[0], {"json"}), LOOKED_AT)]
    except (NotATarError, OSError):
        return []
    given = [(meta or {}).get("uid") for meta in metas]
    # DataComp's resharder reads int(uid, 16): no dashes
    own = sum(isinstance(uid, str) and "-" not in uid and hex_of(uid) is not None for uid in given)
    others = sum(source_id_of(meta) is not None for meta in metas)
    if own == len(metas):
        return [Finding("ok", "uids", "in the json: other tools find a subset.npy's samples in these tars")]
    text = (
        f"{len(metas) - own} of the first {len(metas)} samples have no uid of 32 hex digits in their json:"
        " other tools (DataComp's) do not find them by subset.npy in these tars; clipcov export writes it"
    )
    if others:
        text += f" ({others} have an id of another kind, kept as source_id)"
    return [Finding("note", "uids", text)]
