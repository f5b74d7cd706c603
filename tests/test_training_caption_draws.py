"""`shards.caption` with the rule `random`: which caption a pass gives, whatever processes and subset."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.captions import CaptionRule
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.subsets.index import training_rows, whole_index
from clipcov_pipeline.training.folder import claim_folder
from clipcov_pipeline.training.index_loader import Batches, IndexData, _Steps, held_out_data, order_of
from clipcov_pipeline.training.spec import from_json, to_json
from clipcov_pipeline.training.training_index import read_training_index, write_training_index
from index_of import Data, index_spec, same
from make_shards import image_bytes, write_tar
from make_training import parsed

RANDOM = {"from": ["txt", "json:re"], "rule": "random"}
N, BATCH = 48, 8


def captions_of(number: int) -> list[str]:
    """Four captions, of which the alt text is shared by three samples, and another one by all of two."""
    own = [f"drawing {number} seen {way}" for way in ("near", "far")]
    return [f"file {number // 3}", *own, f"recaption {number // 2}"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for shard in range(2):
        members = []
        for number in range(shard * N // 2, (shard + 1) * N // 2):
            text, *more = captions_of(number)
            members += [
                (f"{number:03d}.png", image_bytes(number)),
                (f"{number:03d}.json", json.dumps({"re": more}).encode()),
                (f"{number:03d}.txt", text.encode()),
            ]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def write_index(pool: Path, path: Path, rule: object = RANDOM, keep: slice = slice(None)) -> list[int]:
    """Write an index of the pool; the number of the sample in each row."""
    shards = scan(str(pool))
    read = [read_shard(shard, max_pixels=10_000, captions=CaptionRule.of(rule)) for shard in shards]
    named = zip(read, shards, strict=True)
    places = pl.concat(one.places.with_columns(shard=pl.lit(shard.name)) for one, shard in named)
    rows = whole_index(places).sort("key")[keep]
    table = training_rows(rows, shards)
    write_training_index(path, {column.name: column.to_arrow() for column in table})
    return [int(key) for key in rows.sort("uid")["key"]]


def spec_of(folder: Path, **changes):
    settings = {
        "index": str(folder / "index.parquet"),
        "caption": RANDOM,
        "samples_seen": 2 * N,
        "n_samples": N,
    }
    return index_spec(folder, **{**settings, "batch_size": BATCH, "num_checkpoints": 4, **changes})


def given(pool: Path, path: Path, passes: int, seed: int = 0, keep: slice = slice(None)) -> list[list[tuple]]:
    """(sample, caption) of every batch, by the line of the training alone."""
    numbers = write_index(pool, path, keep=keep)
    index = read_training_index(path, CaptionRule.of(RANDOM))
    settings = IndexData(str(path), BATCH, seed, captions=CaptionRule.of(RANDOM))
    steps = _Steps(BATCH, 0, 1, 1, passes * len(numbers))
    batches = Batches(order_of(settings, index), steps, 0, index.captions)
    found = []
    for wanted in batches:
        pairs = zip(wanted.rows.tolist(), wanted.captions.tolist(), strict=True)
        found.append([(numbers[row], captions_of(numbers[row])[caption]) for row, caption in pairs])
    assert batches.repeated == 0
    return found


def by_pass(batches: list[list[tuple]], size: int = N) -> list[dict[int, str]]:
    line = [pair for batch in batches for pair in batch]
    return [dict(line[start : start + size]) for start in range(0, len(line), size)]


def test_each_pass_gives_every_sample_with_one_of_its_captions(pool, tmp_path) -> None:
    passes = by_pass(given(pool, tmp_path / "index.parquet", 40))
    assert all(sorted(one) == list(range(N)) for one in passes)
    for number in range(N):
        times = Counter(one[number] for one in passes)
        assert set(times) == set(captions_of(number))
    drawn = Counter(captions_of(number).index(text) for one in passes for number, text in one.items())
    # 1,920 draws of four: 480 each with a deviation of 19
    assert all(abs(count - 480) < 100 for count in drawn.values())


def test_no_batch_holds_a_caption_twice_though_samples_share_some(pool, tmp_path) -> None:
    for batch in given(pool, tmp_path / "index.parquet", 40):
        samples, texts = zip(*batch, strict=True)
        assert len(set(samples)) == len(set(texts)) == BATCH


def test_what_a_sample_is_given_follows_from_seed_and_pass_whatever_else_is_chosen(pool, tmp_path) -> None:
    whole = by_pass(given(pool, tmp_path / "index.parquet", 5))
    part = by_pass(given(pool, tmp_path / "index.parquet", 5, keep=slice(5, 21)), 16)
    assert [{number: one[number] for number in range(5, 21)} for one in whole] == part
    other = by_pass(given(pool, tmp_path / "index.parquet", 5, seed=1))
    assert all(sum(a[n] != b[n] for n in range(N)) > 0 for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("change", [{"workers": 2}, {"kept_bytes": 0}])
def test_tokens_are_those_of_the_caption_for_any_number_of_processes(pool, tmp_path, change) -> None:
    from open_clip import get_tokenizer

    line = by_pass(given(pool, tmp_path / "index.parquet", 2))
    spec = spec_of(tmp_path)
    kept = change.pop("kept_bytes", 2**28)
    plain, other = Data(spec), Data(dataclasses.replace(spec, **change), kept_bytes=kept)
    tokenize = get_tokenizer(spec.model)
    for epoch in (3, 0):  # two to a pass
        batches = plain.epoch(epoch)
        same(batches, other.epoch(epoch))
        same(batches, Data(spec, epoch=epoch).epoch(epoch))  # as a run that goes on begins
        texts = list(line[epoch // 2].values())[epoch % 2 * N // 2 :][: N // 2]
        tokens = np.concatenate([tokens.numpy() for _, tokens in batches])
        assert tokens.tolist() == tokenize(texts).tolist()


def test_held_out_pairs_have_the_first_caption(pool, tmp_path) -> None:
    from open_clip import create_model_and_transforms, get_tokenizer

    numbers = write_index(pool, tmp_path / "index.parquet")
    spec = spec_of(tmp_path)
    tokenize = get_tokenizer(spec.model)
    preprocess = create_model_and_transforms(spec.model)[2]
    settings = IndexData(
        "", BATCH, 0, held_out=str(tmp_path / "index.parquet"), captions=CaptionRule.of(RANDOM)
    )
    loader = held_out_data(settings, parsed(spec), preprocess, tokenize).dataloader
    tokens = [row for _, texts in loader for row in texts.tolist()]
    assert tokens == tokenize([captions_of(number)[0] for number in numbers]).tolist()


def test_a_training_goes_on_under_its_own_rule_only(pool, tmp_path) -> None:
    write_index(pool, tmp_path / "index.parquet")
    spec = spec_of(tmp_path)
    assert from_json(to_json(spec)) == spec
    claim_folder(spec)
    claim_folder(spec)
    with pytest.raises(InputError, match="holds a run with caption"):
        claim_folder(dataclasses.replace(spec, caption="txt"))


def test_a_training_of_before_there_were_rules_goes_on(pool, tmp_path) -> None:
    write_index(pool, tmp_path / "index.parquet", "txt")
    spec = spec_of(tmp_path, caption="txt")
    claim_folder(spec)
    note = spec.folder / "spec.json"
    settings = json.loads(note.read_text())
    del settings["caption"]
    note.write_text(json.dumps(settings))
    claim_folder(spec)


def test_a_caption_that_is_not_drawn_is_checked_too(pool, tmp_path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    for tar in pool.glob("*.tar"):
        (folder / tar.name).write_bytes(tar.read_bytes())
    write_index(folder, tmp_path / "index.parquet")
    tar = folder / "00000.tar"
    stat, data = tar.stat(), tar.read_bytes()
    tar.write_bytes(data.replace(b"drawing 7 seen far", b"drawing 7 seen FAR"))
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match=r"the caption at byte \d+ is another"):
        Data(spec_of(tmp_path)).epoch(0), Data(spec_of(tmp_path)).epoch(1)


def test_an_index_without_what_the_rule_reads_is_refused(pool, tmp_path) -> None:
    write_index(pool, tmp_path / "index.parquet", "txt")
    with pytest.raises(InputError, match="no column caption_hashes"):
        read_training_index(tmp_path / "index.parquet", CaptionRule.of(RANDOM))
