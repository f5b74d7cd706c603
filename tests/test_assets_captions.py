"""A pool whose captions are in the json: the assets hand `shards.caption` on to what reads them."""

import io
import json
import tarfile

import pytest

from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.tars import iter_groups
from lab import TRAINING, Lab

pytestmark = pytest.mark.slow


def move_captions(lab: Lab, index: int) -> dict[str, list[str]]:
    """Put the captions of a shard into the json, a second one beside each; return them by key."""
    groups = list(iter_groups(Shard("x", str(lab.shard(index)), ""), None))
    found = {}
    with tarfile.open(lab.shard(index), "w") as tar:
        for group in groups:
            text = (group.get("txt") or b"").decode()
            found[group.key] = [f"again {text}", text.strip()]
            meta = json.dumps({**(group.meta() or {}), "re": found[group.key]}).encode()
            kept = [(suffix, data) for suffix, data in group.members if suffix not in ("json", "txt")]
            for suffix, data in [*kept, ("json", meta)]:
                info = tarfile.TarInfo(f"{group.key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return found


def test_captions_of_the_json_are_trained_on_and_embedded(lab: Lab) -> None:
    captions = {}
    for index in range(3):
        captions |= move_captions(lab, index)
    rule = {"from": ["txt", "json:re"], "rule": "random"}
    lab.edit(lambda settings: settings["shards"].update(caption=rule))
    executed = lab.run(only=("raw_shards", "proxy_model", "embeddings"))
    assert executed == {"raw_shards": 3, "proxy_model": 1, "embeddings": 3}
    project = lab.project()
    steps = project.plan().by_name
    proxy = json.loads((project.store.folder(steps["proxy_model"].record) / "training.json").read_text())
    assert proxy["spec"]["caption"] == rule
    assert proxy["seen"]["samples"] == TRAINING["samples_seen"]
    for name in project.shards:
        stats = steps[f"embeddings/{name}"].record.stats
        for batch in project.vectors.batches(stats["table"], stats["version"], [name], ("key", "caption")):
            found = zip(batch["key"].to_pylist(), batch["caption"].to_pylist(), strict=True)
            assert all(caption == captions[key][0] for key, caption in found)
