"""Training on an index over the original shards, through open_clip_train itself."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.proxy.models import register_model_configs
from clipcov_pipeline.training.launch import launch
from clipcov_pipeline.training.result import digest_of_weights, finish
from clipcov_pipeline.training.spec import CHECKPOINT, from_json, steps, to_json
from index_of import Data, columns_of, index_spec, same, write_index
from make_training import parsed, write_shards


@pytest.fixture
def tars(tmp_path) -> list[Path]:
    (tmp_path / "pool").mkdir()
    write_shards(tmp_path / "pool", [20, 12, 16])
    return sorted((tmp_path / "pool").glob("*.tar"))


@pytest.mark.parametrize("change", [{"workers": 1}, {"workers": 2}, {"kept_bytes": 0}])
def test_what_is_trained_on_does_not_depend_on_processes_or_memory(tmp_path, tars, change):
    spec = index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns_of(tars)))
    kept = change.pop("kept_bytes", 2**28)
    plain, other = Data(spec), Data(dataclasses.replace(spec, **change), kept_bytes=kept)
    for epoch in (0, 1, 0):
        same(plain.epoch(epoch), other.epoch(epoch))


def test_images_and_tokens_are_those_of_open_clip_train(tmp_path, tars):
    """Each sample is what webdataset decodes and open_clip's evaluation preprocessing makes of it."""
    import torch
    from open_clip import create_model_and_transforms, get_tokenizer
    from open_clip_train.data import get_wds_dataset

    spec = index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns_of(tars)), samples_seen=48)
    spec = dataclasses.replace(spec, num_checkpoints=1)
    register_model_configs()
    _, _, preprocess = create_model_and_transforms(spec.model)
    args = parsed(dataclasses.replace(spec, workers=0))
    args.train_data = "::".join(map(str, tars))
    wds = get_wds_dataset(args, preprocess, is_train=True, tokenizer=get_tokenizer(spec.model)).dataloader

    def rows(batches):
        images, texts = (torch.cat(part) for part in zip(*batches, strict=True))
        return sorted(
            (image.numpy().tobytes(), text.numpy().tobytes())
            for image, text in zip(images, texts, strict=True)
        )

    assert rows(Data(spec, preprocess=preprocess).epoch(0)) == rows(wds)


def test_gpus_and_parts_share_a_batch_without_overlap(tmp_path, tars):
    import torch

    spec = index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns_of(tars)))
    whole = Data(spec).epoch(1)
    parts = dataclasses.replace(spec, accum_freq=2)
    shares = [Data(parts, rank=rank, gpus=2).epoch(1) for rank in range(2)]
    for step, (images, texts) in enumerate(whole):
        pieces = [shares[rank][2 * step + part] for part in range(2) for rank in range(2)]
        assert torch.cat([piece[0] for piece in pieces]).equal(images)
        assert torch.cat([piece[1] for piece in pieces]).equal(texts)


def test_an_epoch_goes_on_in_the_middle_of_a_pass(tmp_path, tars):
    """Five epochs of 40 samples: passes of 48 end inside of them, and each sample comes as often as due."""
    spec = index_spec(
        tmp_path, write_index(tmp_path / "index.parquet", columns_of(tars)), batch_size=8, samples_seen=240,
        num_checkpoints=6,
    )  # fmt: skip
    data = Data(spec)
    counts = Counter(
        text.numpy().tobytes() for epoch in range(6) for _, texts in data.epoch(epoch) for text in texts
    )
    assert len(counts) == 48
    assert set(counts.values()) == {5}
    same(Data(spec, epoch=4).epoch(4), data.epoch(4))


def weights_of(spec):
    import torch

    path = spec.folder / "checkpoints" / f"epoch_{steps(spec).virtual_epochs}.pt"
    return digest_of_weights(torch.load(path, weights_only=True)["state_dict"])


def test_two_runs_and_a_resumed_one_end_with_the_same_weights(tmp_path, tars):
    columns = columns_of(tars)
    spec = index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns), workers=1)
    launch(spec)
    record = finish(spec, tmp_path / "out")
    assert record["seen"] == {"samples": 96, "distinct": 48, "rows": 48, "repeated": 0, "most": 2}
    assert pl.read_parquet(tmp_path / "out" / "seen.parquet").sort("uid")["uid"].to_list() == sorted(
        columns["uid"]
    )
    again = dataclasses.replace(spec, name="again")
    launch(again)
    stopped = dataclasses.replace(spec, name="stopped", workers=0)

    def stop_in_the_second_epoch(point):
        if point["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(stopped, stop_in_the_second_epoch)
    launch(stopped)
    assert weights_of(spec) == weights_of(again) == weights_of(stopped)
    files = [finish(s, tmp_path / s.name) and (tmp_path / s.name / CHECKPOINT) for s in (again, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes() == (tmp_path / "out" / CHECKPOINT).read_bytes()


def test_weights_repeat_samples_and_no_batch_holds_one_twice(tmp_path, tars):
    weight = np.ones(48)
    weight[:6] = 3
    index = write_index(tmp_path / "index.parquet", columns_of(tars), weight=weight)
    spec = index_spec(tmp_path, index, n_samples=60, samples_seen=60, batch_size=15, num_checkpoints=1)
    launch(spec)
    seen = finish(spec, tmp_path / "out")["seen"]
    assert seen == {"samples": 60, "distinct": 48, "rows": 48, "repeated": 0, "most": 3}


def test_fresh_draws_fill_each_quota(tmp_path, tars):
    index = write_index(tmp_path / "index.parquet", columns_of(tars), latent_class=np.repeat([0, 1], 24))
    spec = index_spec(tmp_path, index, n_samples=16, quota=(12, 4), samples_seen=32)
    assert from_json(to_json(spec)) == spec
    launch(spec)
    assert finish(spec, tmp_path / "out")["seen"]["samples"] == 32
    uids = columns_of(tars)["uid"]
    times = dict(pl.read_parquet(tmp_path / "out" / "seen.parquet").iter_rows())
    assert sum(times.get(uid, 0) for uid in uids[:24]) == 24


# ---- bad input


def shift(tar: Path) -> None:
    """The same number of bytes and time of change, one member later."""
    stat = tar.stat()
    data = tar.read_bytes()
    tar.write_bytes(data[1024:] + bytes(1024))
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def swap_pixels(tar: Path) -> None:
    stat = tar.stat()
    data = bytearray(tar.read_bytes())
    data[600:610] = bytes(10)
    tar.write_bytes(data)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda tar: os.utime(tar, (1, 1)), "found token .*-1000000000, expected"),
        (shift, "no tar header|of .* bytes where"),
        (swap_pixels, "the image at byte 512 is another"),
        (lambda tar: tar.unlink(), "is gone: found no file, expected token .* 12 samples"),
        (lambda tar: os.truncate(tar, 5000), "changed since .* found token 5000-"),
    ],
)
def test_a_changed_shard_ends_the_training_with_both_tokens(tmp_path, tars, workers, damage, says):
    spec = index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns_of(tars)), workers=workers)
    damage(tars[1])
    with pytest.raises(InputError, match=f"shard {tars[1]} .*({says})") as error:
        launch(spec)
    assert "\n" not in str(error.value)


def test_a_shard_cut_short_under_its_own_token(tmp_path, tars):
    columns = columns_of(tars)
    os.truncate(tars[1], 5000)
    token = f"5000-{tars[1].stat().st_mtime_ns}"
    columns["shard_version"] = [
        token if shard == str(tars[1]) else old
        for shard, old in zip(columns["shard"], columns["shard_version"], strict=True)
    ]
    with pytest.raises(InputError, match=r"it ends before byte \d+"):
        launch(index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns)))


def test_a_changed_shard_found_by_a_process_of_its_own(tmp_path, tars):
    """The command ends with a code other than 0, and says why in one line."""
    spec = index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns_of(tars)), workers=1)
    os.utime(tars[2], (1, 1))
    (tmp_path / "spec.json").write_text(to_json(spec))
    argv = [
        sys.executable,
        "-m",
        "clipcov_pipeline.training.launch",
        str(tmp_path / "spec.json"),
        str(tmp_path / "out"),
    ]
    run = subprocess.run(argv, capture_output=True, check=False, text=True, timeout=120)
    assert run.returncode != 0
    last = [line for line in run.stderr.splitlines() if "InputError" in line][-1]
    assert f"shard {tars[2]} changed since" in last


def test_a_run_is_continued_with_its_own_subset_only(tmp_path, tars):
    columns = columns_of(tars)
    spec = index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns))
    launch(spec)
    moved = write_index(tmp_path / "moved.parquet", columns)
    launch(dataclasses.replace(spec, index=moved))
    other = write_index(tmp_path / "other.parquet", columns, range(47, -1, -1))
    with pytest.raises(InputError, match="samples = 'index of digest"):
        launch(dataclasses.replace(spec, index=other))
    assert json.loads((spec.folder / "spec.json").read_text())["samples"].startswith("index of digest")
