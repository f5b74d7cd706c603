"""Parquet, DataComp's npy and WebDataset tars of a subset, read back by the tools they are for."""

import json
import random
import tarfile

import numpy as np
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.subsets.files import Members, write_datacomp_npy, write_subset_tars
from make_shards import image_bytes, sample_members, write_pool, write_tar


def members_of(paths) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                assert info.name not in found
                found[info.name] = file.read()
    return found


# --- DataComp's npy ------------------------------------------------------------------------------------


def test_npy_is_what_datacomp_s_resharder_looks_up(tmp_path):
    rng = random.Random(0)
    uids = [f"{rng.getrandbits(128):032x}" for _ in range(1000)]
    uids += ["0" * 32, "f" * 32, "0" * 16 + "f" * 16, "f" * 16 + "0" * 16]
    write_datacomp_npy(tmp_path / "subset.npy", uids)
    subset = np.load(tmp_path / "subset.npy", mmap_mode="r")
    # the type, the order and the lookup of mlfoundations/datacomp, resharder.py
    assert subset.dtype == np.dtype("u8,u8")
    assert len(subset) == len(uids)
    expected = np.array(sorted(divmod(int(uid, 16), 2**64) for uid in uids), np.dtype("u8,u8"))
    assert (subset == expected).all()
    for uid in [*uids[:50], *uids[-4:], "1" * 32]:
        key = np.array([divmod(int(uid, 16), 2**64)], np.dtype("u8,u8"))[0]
        found = np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left")
        assert found == (uid in uids)


def test_npy_without_samples(tmp_path):
    write_datacomp_npy(tmp_path / "subset.npy", [])
    assert np.load(tmp_path / "subset.npy").shape == (0,)
    assert np.load(tmp_path / "subset.npy").dtype == np.dtype("u8,u8")


@pytest.mark.parametrize("uids", [["0" * 31], ["g" * 32], ["A" * 32], ["0" * 31, "0" * 33], ["0" * 32] * 2])
def test_npy_refuses_what_is_no_set_of_uids(tmp_path, uids):
    with pytest.raises(ValueError, match="uid"):
        write_datacomp_npy(tmp_path / "subset.npy", uids)
    assert list(tmp_path.iterdir()) == []


# --- WebDataset tars --------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path):
    return scan(str(write_pool(tmp_path / "pool", n_shards=3, samples_per_shard=10)))


CHOSEN = {"00000": {"000000001", "000000007"}, "00002": {"000020000", "000020003", "000020009"}}


def test_tars_hold_the_chosen_samples_unchanged(pool, tmp_path):
    paths = write_subset_tars(pool, CHOSEN, tmp_path / "out", samples_per_shard=2)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    keys = set().union(*CHOSEN.values())
    source = members_of(shard.url for shard in pool)
    assert members_of(paths) == {name: data for name, data in source.items() if name.split(".")[0] in keys}
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {
        "00000.tar": 2,
        "00001.tar": 2,
        "00002.tar": 1,
    }


def test_webdataset_reads_them(pool, tmp_path):
    import webdataset as wds

    paths = write_subset_tars(pool, CHOSEN, tmp_path / "out", samples_per_shard=3)
    samples = list(wds.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [s["__key__"] for s in samples] == [key for name in sorted(CHOSEN) for key in sorted(CHOSEN[name])]
    assert samples[0]["txt"] == b"caption 1 of shard 0"
    assert samples[0]["png"] == image_bytes(1)
    assert json.loads(samples[0]["json"])["key"] == "000000001"


def test_open_clip_train_finds_the_sizes(pool, tmp_path):
    data = pytest.importorskip("open_clip_train.data")
    write_subset_tars(pool, CHOSEN, tmp_path / "out", samples_per_shard=2)
    assert data.get_dataset_size(str(tmp_path / "out" / "{00000..00002}.tar")) == (5, 3)


def test_tars_are_the_same_bytes_every_time(pool, tmp_path):
    lists = {name: sorted(keys, reverse=True) for name, keys in CHOSEN.items()}
    first = write_subset_tars(pool, CHOSEN, tmp_path / "one")
    second = write_subset_tars(pool, lists, tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with tarfile.open(first[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize(
    ("samples_per_shard", "min_shards", "sizes"),
    [(1000, 1, [5]), (1000, 4, [2, 1, 1, 1]), (2, 1, [2, 2, 1]), (1000, 9, [1] * 5), (3, 2, [3, 2])],
)
def test_samples_are_spread_evenly(pool, tmp_path, samples_per_shard, min_shards, sizes):
    steps: list[int] = []
    paths = write_subset_tars(
        pool,
        CHOSEN,
        tmp_path / "out",
        samples_per_shard=samples_per_shard,
        min_shards=min_shards,
        progress=steps.append,
    )
    assert list(json.loads((tmp_path / "out" / "sizes.json").read_text()).values()) == sizes
    assert len(paths) == len(sizes)
    assert sum(steps) == 5
    assert len(members_of(paths)) == 15


def test_keys_of_two_shards_that_are_the_same_get_the_shard_s_name(tmp_path):
    import webdataset as wds

    for name in ("a.b", "c"):
        write_tar(tmp_path / "pool" / f"{name}.tar", [*sample_members("0", name), *sample_members("1", name)])
    shards = scan(str(tmp_path / "pool"))
    paths = write_subset_tars(shards, {"a.b": ["0", "1"], "c": ["0"]}, tmp_path / "out")
    samples = list(wds.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [(s["__key__"], s["txt"]) for s in samples] == [
        ("a.b/0", b"a.b"),
        ("a.b/1", b"a.b"),
        ("c/0", b"c"),
    ]


def test_all_members_are_copied_with_their_names_on_request(tmp_path):
    members = [("k.JPG", image_bytes(kind="JPEG")), ("k.seg.npy", b"\0\1"), ("k.txt", b"x"), ("k.cls", b"3")]
    long = [("f" * 150 + "\u00e9.png", image_bytes()), ("f" * 150 + "\u00e9.txt", b"y")]
    write_tar(tmp_path / "pool" / "s.tar", [*members, *long])
    keys = {"s": {"k", "f" * 150 + "\u00e9"}}
    paths = write_subset_tars(
        scan(str(tmp_path / "pool")), keys, tmp_path / "all", members=Members(everything=True)
    )
    assert members_of(paths) == dict([*members, *long])
    paths = write_subset_tars(scan(str(tmp_path / "pool")), keys, tmp_path / "pairs")
    assert members_of(paths) == dict([members[0], members[2], *long])


SIDE_MEMBERS = {
    "good": ("json", b'{"status": "success"}'), "broken": ("json", b'{"caption": "a re'),
    "empty": ("json", b""), "latin1": ("json", '{"a": "é"}'.encode("latin-1")),
    "name": ("cls", b"tabby cat"), "id": ("id", b"flickr-12"),
    "index": ("index", b"a/b"), "array": ("npy", b"not an array"), "gz": ("json.gz", b"not gzip"),
    "mp": ("mp", b"\x81\xa1a\x01"), "mask": ("mask.png", b"not a png"), "second": ("webp", b"no webp"),
}  # fmt: skip


def test_open_clip_train_drops_no_pair_of_them(tmp_path):
    """Its own stages up to the decoding, over pairs with members that webdataset cannot read."""
    import webdataset
    from open_clip_train.data import (
        filter_no_caption_or_no_image,
        log_and_continue,
        tarfile_to_samples_nothrow,
    )

    members = []
    for key, side in SIDE_MEMBERS.items():
        members += [
            (f"{key}.jpg", image_bytes(kind="JPEG")),
            (f"{key}.txt", b"a"),
            (f"{key}.{side[0]}", side[1]),
        ]
    write_tar(tmp_path / "pool" / "s.tar", members)
    paths = write_subset_tars(scan(str(tmp_path / "pool")), {"s": set(SIDE_MEMBERS)}, tmp_path / "out")
    stages = (
        webdataset.SimpleShardList([str(path) for path in paths]),
        tarfile_to_samples_nothrow,
        webdataset.select(filter_no_caption_or_no_image),  # type: ignore[attr-defined]
        webdataset.decode("pilrgb", handler=log_and_continue),  # type: ignore[attr-defined]
    )
    assert {sample["__key__"] for sample in webdataset.DataPipeline(*stages)} == set(SIDE_MEMBERS)


def test_nothing_chosen(pool, tmp_path):
    assert write_subset_tars(pool, {}, tmp_path / "out", min_shards=4) == []
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {}


@pytest.mark.parametrize("name", ["00000", "00001", "00002"])
def test_sample_that_is_gone_is_an_error(pool, tmp_path, name):
    with pytest.raises(InputError, match=rf"shard {name} no longer holds 1 .* first 'zzz'"):
        write_subset_tars(pool, {**CHOSEN, name: {*CHOSEN.get(name, ()), "zzz"}}, tmp_path / "out")
    assert not (tmp_path / "out" / "sizes.json").exists()


def test_shard_that_is_gone_is_an_error(pool, tmp_path):
    with pytest.raises(InputError, match="shard 00002 is chosen from but not in the pool"):
        write_subset_tars(pool[:2], CHOSEN, tmp_path / "out")


def test_folder_with_tars_is_refused(pool, tmp_path):
    write_subset_tars(pool, CHOSEN, tmp_path / "out")
    with pytest.raises(ValueError, match="already holds tars"):
        write_subset_tars(pool, CHOSEN, tmp_path / "out")
