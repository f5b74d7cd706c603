"""Writes a chosen subset in the forms that other tools read: DataComp's `.npy`, WebDataset tars."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.files import written_at_once
from clipcov_pipeline.pool.captions import TXT, CaptionRule, NoCaptionError
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.tars import Group, iter_groups
from clipcov_pipeline.pool.uids import source_id_of
from clipcov_pipeline.selection.outputs import datacomp_uids


def write_datacomp_npy(path: Path, uids: Collection[str], draws: npt.NDArray[np.int64] | None = None) -> None:
    """Write uids as DataComp's resharder reads them, all at once; raises as `datacomp_uids`.

    draws: how often each is listed, int64 [n]: the resharder copies a sample as often.
    """
    found = datacomp_uids(uids)
    if draws is not None:  # `found` is in the order of the uids
        found = np.repeat(found, draws[np.argsort(np.asarray(list(uids)), kind="stable")])
    with written_at_once(path) as temporary, temporary.open("wb") as file:
        np.save(file, found)


class Members(NamedTuple):
    """What of a sample leaves in tars.

    captions: where captions are; by any rule but the default the caption (the first, where a training draws
    one) is written as the `.txt`, which other tools read. everything: also what is neither image nor caption
    nor a json that parses; open_clip_train decodes whatever there is, and drops a pair with one that it
    cannot.
    """

    captions: CaptionRule = TXT
    everything: bool = False


PAIR = Members()


def write_subset_tars(
    shards: Sequence[Shard],
    keys_by_shard: Mapping[str, Collection[str]],
    out_dir: Path,
    *,
    samples_per_shard: int = 1000,
    min_shards: int = 1,
    storage_options: dict | None = None,
    members: Members = PAIR,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Copy the chosen samples into WebDataset tars `00000.tar`, `00001.tar`, ... and return their paths.

    Image, caption and json of a sample are copied, bytes unchanged, in the order of `shards` and of each tar;
    the files are the same bytes at every call. If a key is chosen from two shards, all keys become
    `SHARD/KEY`. `sizes.json` beside the tars tells open_clip_train their sizes; it is written last.

    Args:
        shards: of the pool.
        keys_by_shard: shard name -> keys of its chosen samples; keys that are given with their uids, as a
            mapping, have the uid written into their json, where other tools (DataComp's) look for it.
        out_dir: for the tars.
        samples_per_shard, min_shards: most samples in a tar, and fewest tars (open_clip_train needs one a
            worker and GPU); the tars are of one size, give or take a sample, and none is empty.
        members: what of a sample is copied.
        progress: called with the number of further samples written, as tqdm's `update` is.

    Raises:
        ValueError: `out_dir` already holds tars.
        InputError: a chosen sample is not in its shard (the shard changed since the choice).
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(out_dir.glob("*.tar")):
        raise ValueError(f"{out_dir} already holds tars; give an empty folder")
    n_samples = sum(len(set(keys)) for keys in keys_by_shard.values())
    sizes = _even_sizes(n_samples, samples_per_shard, min_shards)
    chosen = _chosen(shards, keys_by_shard, storage_options, members)
    paths = [out_dir / f"{index:05d}.tar" for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        with tarfile.open(path, "w") as tar:
            for _ in range(size):
                _add(tar, *next(chosen))
                if progress is not None:
                    progress(1)
    next(chosen, None)  # the last shard may still be short of a sample
    by_name = {path.name: size for path, size in zip(paths, sizes, strict=True)}
    (out_dir / "sizes.json").write_text(json.dumps(by_name, indent=1) + "\n", encoding="utf-8")
    return paths


def _even_sizes(n_samples: int, most: int, min_shards: int) -> list[int]:
    """How many samples each tar gets: at most so many, in at least so many tars."""
    if most < 1 or min_shards < 1:
        raise ValueError(f"samples_per_shard {most} and min_shards {min_shards} must be at least 1")
    n_shards = max(-(-n_samples // most), min(min_shards, n_samples))
    return [n_samples // n_shards + (index < n_samples % n_shards) for index in range(n_shards)]


def _chosen(
    shards: Sequence[Shard],
    keys_by_shard: Mapping[str, Collection[str]],
    storage_options: dict | None,
    members: Members,
) -> Iterator[tuple[str, Group]]:
    """(key in the subset, members) of every chosen sample."""
    check_known(shards, keys_by_shard)
    uses = Counter(key for keys in keys_by_shard.values() for key in set(keys))
    prefixed = any(count > 1 for count in uses.values())
    for shard in shards:
        missing = set(keys_by_shard.get(shard.name, ()))
        if not missing:
            continue
        for group in iter_groups(shard, frozenset(missing), storage_options):
            if members.captions != TXT and not _put_caption(group, members.captions):
                continue
            missing.discard(group.key)
            if isinstance(keys := keys_by_shard[shard.name], Mapping):
                _put_uid(group, keys[group.key])
            if not members.everything:
                _keep_pair(group)
            yield (f"{shard.name}/{group.key}" if prefixed else group.key), group
        check_none_missing(shard, missing)


def check_known(shards: Sequence[Shard], chosen_from: Collection[str]) -> None:
    """Raise InputError where a shard that is chosen from, by name, is not among the pool's."""
    if unknown := sorted(set(chosen_from) - {shard.name for shard in shards}):
        raise InputError(
            f"subset: shard {unknown[0]} is chosen from but not in the pool; run the pipeline again"
        )


def check_none_missing(shard: Shard, missing: Collection[str]) -> None:
    """Raise InputError where a shard was read to its end and chosen keys were not in it."""
    if missing:
        raise InputError(
            f"subset: shard {shard.name} no longer holds {len(missing)} of its chosen samples, first "
            f"{min(missing)!r}; it changed since the choice: run the pipeline again"
        )


def _keep_pair(group: Group) -> None:
    """Leave out what is neither the image nor the caption nor a json that says something."""
    image = group.image()
    kept = {image[0] if image else "", "txt", *(["json"] if group.meta() is not None else [])}
    group.members = [(name, data) for name, data in group.members if name.lower() in kept]


def _put_caption(group: Group, captions: CaptionRule) -> bool:
    """Write the caption as the sample's `.txt`; return whether there is one."""
    try:
        text = captions.captions(group.get)[0].encode()
    except NoCaptionError:
        return False
    group.members = [(name, data) for name, data in group.members if name.lower() != "txt"]
    group.members.append(("txt", text))
    return True


def _put_uid(group: Group, uid: str) -> None:
    """Write the uid into the sample's json; one that is no object is kept as text beside it."""
    meta, old = group.meta(), group.get("json")
    if meta is None and old is not None:
        meta = {"original_json": old.decode("utf-8", "backslashreplace")}
    if meta is not None and meta.get("uid") == uid:
        return
    if (source_id := source_id_of(meta)) is not None and meta is not None:
        meta.setdefault("source_id", source_id)
    group.members = [(name, data) for name, data in group.members if name.lower() != "json"]
    group.members.append(("json", _as_json({**(meta or {}), "uid": uid})))


def _as_json(meta: dict[str, Any]) -> bytes:
    try:
        return json.dumps(meta, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character, which JSON can only escape
        return json.dumps(meta).encode()


def _add(tar: tarfile.TarFile, key: str, group: Group) -> None:
    """Append a sample; a fresh TarInfo has time, owner and group 0, so the bytes are always the same."""
    for suffix, data in group.members:
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
