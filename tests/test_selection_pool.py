"""Pools: what they hold, what they refuse, and reading them from LanceDB."""

import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import Pool, rank

N, K, D = 600, 6, 24


@pytest.fixture
def arrays():
    return synthetic_arrays(N, K, D)


@pytest.fixture
def uids():
    rng = np.random.default_rng(5)
    return [rng.bytes(16).hex() for _ in range(N)]


def lists(x):
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])


@pytest.fixture
def table(arrays, uids, tmp_path):
    import lancedb

    image, text, *_ = arrays
    columns = {
        "uid": uids,
        "shard": [f"shard'{i % 3}" for i in range(N)],
        "caption": [f"caption {i % 50}" for i in range(N)],
        "image_embedding": lists(image),
        "text_embedding": lists(text),
    }
    everything = pa.table(columns)
    # three fragments, none in the order of the labels
    handle = lancedb.connect(tmp_path / "db").create_table("embeddings", everything.slice(400))
    handle.add(everything.slice(0, 100))
    handle.add(everything.slice(100, 300))
    return handle


@pytest.fixture
def labels(arrays, uids):
    return pl.DataFrame({"uid": uids, "latent_class": arrays[2], "label_similarity": arrays[3]})


def test_rows_are_sorted_by_class_and_stable(arrays, uids):
    pool = Pool.from_arrays(*arrays, uid=uids)
    np.testing.assert_array_equal(arrays[2][pool.order], np.sort(arrays[2]))
    np.testing.assert_array_equal(pool.pairs, np.concatenate(arrays[:2], axis=1)[pool.order])
    for k in range(K):
        assert (np.diff(pool.order[pool.starts[k] : pool.starts[k + 1]]) > 0).all()
    assert pool.names([3, 1]) == [uids[3], uids[1]]
    assert pool.row_of(uids[17]) == 17
    exact = (arrays[0].astype(np.float64) * arrays[1]).sum(axis=1)
    np.testing.assert_allclose(pool.pair_similarity(), exact, atol=1e-6)


def test_scratch_file_gives_the_same_ranking_and_goes_away(arrays, tmp_path):
    scratch = tmp_path / "scratch"
    with Pool.from_arrays(*arrays, scratch_dir=scratch) as pool:
        assert isinstance(pool.pairs, np.memmap)
        assert len(list(scratch.iterdir())) == 1
        np.testing.assert_array_equal(rank(pool).rows, rank(Pool.from_arrays(*arrays)).rows)
    assert list(scratch.iterdir()) == []


def test_scratch_file_goes_away_when_the_input_is_refused(arrays, tmp_path):
    image = arrays[0].copy()
    image[4] = 0
    with pytest.raises(InputError):
        Pool.from_arrays(image, *arrays[1:], scratch_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_take_and_relabelled(arrays, uids):
    pool = Pool.from_arrays(*arrays, uid=uids, caption_length=np.arange(N))
    rows = np.random.default_rng(0).permutation(N)[:200]
    part = pool.take(rows)
    again = Pool.from_arrays(*(column[rows] for column in arrays), uid=np.array(uids)[rows])
    np.testing.assert_array_equal(part.pairs, again.pairs)
    np.testing.assert_array_equal(part.uid, again.uid)
    np.testing.assert_array_equal(part.caption_length, rows)
    other = (arrays[2] + 1) % K
    moved = pool.relabelled(other, arrays[3])
    np.testing.assert_array_equal(moved.pairs, Pool.from_arrays(*arrays[:2], other, arrays[3]).pairs)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 0.5, 1.2])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_not_of_unit_norm_are_refused_by_uid(arrays, uids, bad, side):
    sides = [arrays[0].copy(), arrays[1].copy()]
    sides[side][321] *= np.float16(bad)
    with pytest.raises(InputError, match=rf"uid {uids[321]} \(row 321\).*expected 1"):
        Pool.from_arrays(*sides, *arrays[2:], uid=uids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(image_embedding=a["image_embedding"][:-1]), r"\(599, 24\) and text \(600, 24\)"),
        (lambda a: a.update(text_embedding=a["text_embedding"][:, :-1]), r"\(600, 24\) and text \(600, 23\)"),
        (
            lambda a: a.update(latent_class=a["latent_class"][:-1]),
            r"latent_class: found shape \(599,\), expected \(600,\)",
        ),
        (
            lambda a: a.update(label_similarity=np.zeros(3)),
            r"label_similarity: found shape \(3,\), expected \(600,\)",
        ),
        (lambda a: a.update(label_similarity=np.full(N, np.nan)), "label_similarity: found nan at row 0"),
        (lambda a: a.update(latent_class=a["latent_class"] - 3), "latent_class: found -3, expected 0"),
        (lambda a: a.update(n_classes=4), "latent_class: found 5, expected 0 to 3"),
        (
            lambda a: a.update(latent_class=a["latent_class"] * 1.0),
            "latent_class: found float64, expected integers",
        ),
        (lambda a: a.update(uid=["a"] * N), "uid: found 'a' more than once"),
        (lambda a: a.update(image_embedding=np.ones((N, D), int)), "found int64 and float16"),
        (lambda a: a.update({k: v[:0] for k, v in a.items()}), "found 0 pairs"),
    ],
)
def test_bad_arrays_are_refused_with_both_values(arrays, change, message):
    given = dict(
        zip(("image_embedding", "text_embedding", "latent_class", "label_similarity"), arrays, strict=True)
    )
    change(given)
    with pytest.raises(InputError, match=message):
        Pool.from_arrays(**given)


def test_from_lance_has_the_order_of_the_labels(table, labels, arrays, uids):
    pool = Pool.from_lance(table, labels, captions=True)
    expected = Pool.from_arrays(*arrays, uid=uids)
    np.testing.assert_array_equal(pool.pairs, expected.pairs)
    np.testing.assert_array_equal(pool.uid, expected.uid)
    assert pool.caption_length.tolist() == [len(f"caption {i % 50}") for i in range(N)]
    assert len(set(pool.caption_hash.tolist())) == 50
    shuffled = labels.sample(fraction=0.5, shuffle=True, seed=1)
    part = Pool.from_lance(table, shuffled)
    assert part.names(range(len(part))) == shuffled["uid"].to_list()
    row = labels["uid"].to_list().index(shuffled["uid"][7])
    np.testing.assert_array_equal(part.sides(np.array([7]))[0][0], arrays[0][row])


def test_from_lance_reads_labels_from_a_file_or_from_the_table(table, labels, arrays, uids, tmp_path):
    import lancedb

    labels.write_parquet(tmp_path / "labels.parquet")
    by_file = Pool.from_lance(table, tmp_path / "labels.parquet")
    with_labels = table.to_arrow()
    for name in ("latent_class", "label_similarity"):
        values = dict(zip(uids, labels[name].to_list(), strict=True))
        column = pa.array(
            [values[uid] for uid in with_labels["uid"].to_pylist()], labels[name].to_arrow().type
        )
        with_labels = with_labels.append_column(name, column)
    by_table = Pool.from_lance(lancedb.connect(tmp_path / "db").create_table("labelled", with_labels))
    assert by_table.names(range(N)) == sorted(uids)
    np.testing.assert_array_equal(by_table.latent_class, arrays[2][np.argsort(uids)])
    assert set(by_file.names(rank(by_file, budget=0.1).rows)) == set(
        by_table.names(rank(by_table, budget=0.1).rows)
    )


def test_from_lance_at_a_version_and_by_shard(table, labels):
    first = labels.slice(400)
    assert len(Pool.from_lance(table, first, version=1)) == 200
    assert table.count_rows() == N
    with pytest.raises(InputError, match="found no row for 400 of 600 labelled uids"):
        Pool.from_lance(table, labels, version=1)
    assert table.count_rows() == N
    of_shard = labels.filter(pl.Series([i % 3 == 2 for i in range(N)]))
    assert len(Pool.from_lance(table, of_shard, shards=["shard'2"])) == 200
    with pytest.raises(InputError, match=labels["uid"][0]):
        Pool.from_lance(table, labels, shards=["shard'2", "shard'1"])


def test_from_lance_refuses_what_it_cannot_match(table, labels):
    with pytest.raises(InputError, match="missing column label_similarity, latent_class"):
        Pool.from_lance(table)
    with pytest.raises(InputError, match="labels: missing column label_similarity"):
        Pool.from_lance(table, labels.drop("label_similarity"))
    with pytest.raises(InputError, match=f"uid {labels['uid'][3]} more than once"):
        Pool.from_lance(table, pl.concat([labels, labels.slice(3, 1)]))
    with pytest.raises(InputError, match="missing values in latent_class"):
        Pool.from_lance(table, labels.with_columns(latent_class=pl.lit(None, pl.Int32)))
    with pytest.raises(InputError, match="found 0 labelled pairs"):
        Pool.from_lance(table, labels.clear())
    with pytest.raises(InputError, match="latent_class: found 5, expected 0 to 2"):
        Pool.from_lance(table, labels, n_classes=3)
    table.add(table.search().limit(1).to_arrow())
    with pytest.raises(InputError, match="found a uid more than once"):
        Pool.from_lance(table, labels)


def test_from_lance_takes_a_uid_of_two_shards_from_the_one_that_is_labelled(table, labels):
    """DataComp's uids are the json's: a shard copied under another name brings them again."""
    shard = [f"shard'{i % 3}" for i in range(N)]
    alone = Pool.from_lance(table, labels)
    again = table.search().limit(N).to_arrow()
    swapped = {"image_embedding": "text_embedding", "text_embedding": "image_embedding", "shard": "shard"}
    for name in ("image_embedding", "text_embedding"):
        again = again.set_column(again.schema.get_field_index(name), name, table.to_arrow()[swapped[name]])
    again = again.set_column(again.schema.get_field_index("shard"), "shard", pa.array(["copy"] * N))
    table.add(again)
    with pytest.raises(InputError, match="found a uid more than once"):
        Pool.from_lance(table, labels)
    pool = Pool.from_lance(table, labels.with_columns(shard=pl.Series(shard)))
    np.testing.assert_array_equal(pool.pairs, alone.pairs)
    with pytest.raises(InputError, match=f"no row for {N} of {N} labelled uids in the shard that the labels"):
        Pool.from_lance(table, labels.with_columns(shard=pl.lit("another")))


def test_from_lance_does_not_take_numbers_for_names_of_shards(table, labels):
    pool = Pool.from_lance(table, labels.with_columns(shard=pl.lit(7)))
    np.testing.assert_array_equal(pool.pairs, Pool.from_lance(table, labels).pairs)


def test_no_room_for_the_scratch_file(arrays, tmp_path, monkeypatch):
    import os

    class Full:
        f_bavail, f_frsize = 3, 512

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(InputError, match="GB free, expected"):
        Pool.from_arrays(*arrays, scratch_dir=tmp_path)


def test_importing_the_engine_is_light():
    code = (
        "import sys, clipcov_pipeline.selection as s; s.validate_method('semdedup', {});"
        "print([m for m in ('numba', 'sklearn', 'lancedb', 'polars', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
