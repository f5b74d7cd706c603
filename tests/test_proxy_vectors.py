"""Embeddings in a real LanceDB: one version a replacement, pins, digests that ignore how rows are stored."""

import hashlib
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import numpy as np
import pyarrow as pa
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.proxy.vectors import (
    VECTORS,
    Vectors,
    digest_of_rows,
    make_rows,
    table_name,
    table_schema,
    vectors_of,
)

TABLE, DIM = "embeddings_0123456789ab", 8
ODD_NAMES = ("it's", "'", '"quoted"', "a'; DROP TABLE x; --", "per%cent_under", "back\\slash", "日本")


@pytest.fixture
def vectors(tmp_path: Path) -> Vectors:
    return Vectors(tmp_path / "lancedb")


def shard_of(shard: str, n: int, seed: int = 0, dim: int = DIM) -> pa.Table:
    """Rows whose values depend on the shard, the row and the seed; uids on the shard and the row only."""
    rng = np.random.default_rng([seed, *shard.encode()])
    image, text = rng.standard_normal((2, n, dim))
    return make_rows(
        uids=[hashlib.md5(f"{shard} {row}".encode()).hexdigest() for row in range(n)],
        shard=shard,
        keys=[f"{row:04d}" for row in range(n)],
        captions=[f"caption {row}, seed {seed}" for row in range(n)],
        image_sha256=[hashlib.sha256(f"{shard} {row} {seed}".encode()).hexdigest() for row in range(n)],
        image_embedding=(image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float16),
        text_embedding=(text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float16),
    )


def content(table: pa.Table) -> list[dict]:
    return sorted(table.to_pylist(), key=lambda row: (row["shard"], row["uid"]))


def stored(vectors: Vectors, version: int | None = None) -> list[dict]:
    return content(vectors.open(TABLE, version).to_arrow())


def combined(*tables: pa.Table) -> list[dict]:
    return content(pa.concat_tables(tables))


# --- rows -------------------------------------------------------------------------------------------


def test_rows_have_the_tables_columns_and_give_back_their_vectors():
    rows = shard_of("a", 5)
    assert rows.schema == table_schema(DIM)
    assert rows.column_names == ["uid", "shard", "key", "caption", "image_sha256", *VECTORS]
    for name in VECTORS:
        found = vectors_of(rows, name)
        assert (found.shape, found.dtype) == ((5, DIM), np.float16)
        np.testing.assert_array_equal(found, np.array(rows.column(name).to_pylist(), np.float16))
    assert set(rows.column("shard").to_pylist()) == {"a"}


def test_rows_of_an_empty_shard():
    rows = shard_of("a", 0)
    assert rows.num_rows == 0
    assert rows.schema == table_schema(DIM)
    assert vectors_of(rows, "image_embedding").shape == (0, DIM)
    assert len(digest_of_rows(rows)) == 64


def test_a_table_is_named_by_its_proxy():
    assert table_name("0123456789abcdef") == TABLE


def test_vectors_of_a_slice_are_those_of_the_slice():
    rows = shard_of("a", 9)
    np.testing.assert_array_equal(
        vectors_of(rows.slice(3, 4), "text_embedding"), vectors_of(rows, "text_embedding")[3:7]
    )
    batch = rows.to_batches()[0].slice(2, 3)
    np.testing.assert_array_equal(
        vectors_of(batch, "text_embedding"), vectors_of(rows, "text_embedding")[2:5]
    )


# --- digest -----------------------------------------------------------------------------------------


def test_digest_ignores_the_order_and_the_chunks_of_rows():
    rows = shard_of("a", 20)
    digest = digest_of_rows(rows)
    shuffled = rows.take(np.random.default_rng(1).permutation(20))
    assert digest_of_rows(shuffled) == digest
    assert digest_of_rows(pa.concat_tables([rows.slice(13), rows.slice(5, 8), rows.slice(0, 5)])) == digest


def changed_column(rows: pa.Table, name: str, row: int) -> pa.Table:
    values = rows.column(name).to_pylist()
    if name in VECTORS:
        values[row][3] = float(np.nextafter(np.float16(values[row][3]), np.float16(9)))
    else:
        values[row] += "x"
    index = rows.column_names.index(name)
    return rows.set_column(index, rows.schema.field(name), pa.array(values, rows.schema.field(name).type))


@pytest.mark.parametrize("name", ["uid", "key", "caption", "image_sha256", *VECTORS])
def test_digest_sees_the_smallest_change_of_every_column(name):
    rows = shard_of("a", 20)
    assert digest_of_rows(changed_column(rows, name, 7)) != digest_of_rows(rows)


def test_digest_sees_where_one_text_ends_and_the_next_begins():
    rows = shard_of("a", 2)
    values = {name: rows.column(name).to_pylist() for name in ("key", "caption")}
    one = {**values, "caption": ["ab", "c"]}
    other = {**values, "caption": ["a", "bc"]}
    digests = set()
    for columns in (one, other):
        table = rows
        for name, column in columns.items():
            table = table.set_column(rows.column_names.index(name), name, pa.array(column))
        digests.add(digest_of_rows(table))
    assert len(digests) == 2


def test_digest_is_the_same_after_the_way_through_lancedb(vectors):
    """Whatever fragments they lie in: several small writes, a deletion, a compaction."""
    a, b = shard_of("a", 30), shard_of("b", 30)
    vectors.replace_shard(TABLE, "a", shard_of("a", 40, seed=9))
    vectors.replace_shard(TABLE, "b", b)
    version = vectors.replace_shard(TABLE, "a", a)
    assert digest_of_rows(vectors.shard_rows(TABLE, "a", version)) == digest_of_rows(a)
    vectors.open(TABLE).optimize()
    compacted = vectors.open(TABLE).version
    assert compacted > version
    for shard, rows in (("a", a), ("b", b)):
        assert digest_of_rows(vectors.shard_rows(TABLE, shard, compacted)) == digest_of_rows(rows)


@pytest.mark.parametrize("held", [1, 50, 65_536])
def test_digests_of_many_shards_are_those_of_each(vectors, held, monkeypatch):
    monkeypatch.setattr("clipcov_pipeline.proxy.vectors.HELD_ROWS", held)
    shards = {name: shard_of(name, n) for name, n in zip(("a", "b", *ODD_NAMES), range(20, 38), strict=False)}
    for name, rows in shards.items():
        version = vectors.replace_shard(TABLE, name, rows)
    vectors.replace_shard(TABLE, "b", shard_of("b", 7, seed=1))  # is not of that version
    asked = {**{name: rows.num_rows for name, rows in shards.items()}, "not there": 3}
    found = vectors.digests(TABLE, version, asked)
    shards["not there"] = shard_of("not there", 0)
    assert found == {name: (rows.num_rows, digest_of_rows(rows)) for name, rows in shards.items()}
    later = vectors.digests(TABLE, version + 1, {"b": 1})  # a size is a guess
    assert later == {"b": (7, digest_of_rows(shard_of("b", 7, seed=1)))}


# --- replacing --------------------------------------------------------------------------------------


def test_the_first_shard_makes_the_table(vectors):
    assert not vectors.exists(TABLE)
    version = vectors.replace_shard(TABLE, "a", shard_of("a", 3))
    assert vectors.exists(TABLE)
    assert vectors.open(TABLE).version == version
    assert stored(vectors) == content(shard_of("a", 3))


@pytest.mark.parametrize(
    "after", [shard_of("a", 7), shard_of("a", 7, seed=1), shard_of("a", 3, seed=2), shard_of("a", 0)]
)
def test_a_replacement_is_one_version_and_touches_no_other_shard(vectors, after):
    """Rows are added, changed and dropped at once; nobody sees a state in between."""
    a, b, c = shard_of("a", 5), shard_of("b", 4), shard_of("c", 2)
    for shard, rows in (("a", a), ("b", b), ("c", c)):
        before = vectors.replace_shard(TABLE, shard, rows)
    version = vectors.replace_shard(TABLE, "a", after)
    assert version == before + 1
    assert [found["version"] for found in vectors.open(TABLE).list_versions()][-2:] == [before, version]
    assert stored(vectors) == combined(after, b, c)
    assert stored(vectors, before) == combined(a, b, c)


def test_an_empty_shard_is_no_new_version(vectors):
    version = vectors.replace_shard(TABLE, "a", shard_of("a", 2))
    assert vectors.replace_shard(TABLE, "b", shard_of("b", 0)) == version
    assert vectors.shards(TABLE) == {"a"}


def test_a_pool_may_begin_with_an_empty_shard(vectors):
    vectors.replace_shard(TABLE, "a", shard_of("a", 0))
    assert vectors.shards(TABLE) == set()
    vectors.replace_shard(TABLE, "b", shard_of("b", 2))
    assert stored(vectors) == content(shard_of("b", 2))


def test_a_uid_may_occur_in_two_shards(vectors):
    """Which of them counts is decided where the pool is put together, not here."""
    a = shard_of("a", 3)
    b = a.set_column(1, "shard", pa.array(["b"] * 3))
    vectors.replace_shard(TABLE, "a", a)
    vectors.replace_shard(TABLE, "b", b)
    vectors.replace_shard(TABLE, "b", b.slice(0, 2))
    assert stored(vectors) == combined(a, b.slice(0, 2))


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_shard_names(vectors, name):
    plain = shard_of("plain", 2)
    vectors.replace_shard(TABLE, "plain", plain)
    vectors.replace_shard(TABLE, name, shard_of(name, 3))
    version = vectors.replace_shard(TABLE, name, shard_of(name, 2, seed=1))
    assert vectors.shards(TABLE) == {"plain", name}
    assert content(vectors.shard_rows(TABLE, name, version)) == content(shard_of(name, 2, seed=1))
    batches = list(vectors.batches(TABLE, version, [name], ["shard"]))
    assert {value for batch in batches for value in batch.column("shard").to_pylist()} == {name}
    vectors.remove_shards(TABLE, [name])
    assert stored(vectors) == content(plain)


def test_shards_may_be_replaced_at_the_same_time_and_none_is_lost(tmp_path):
    """The first writers of a table too: LanceDB alone lets one of them overwrite the others' rows."""
    start = Barrier(3)

    def replace(vectors: Vectors, name: str) -> list[int]:
        start.wait()
        return [vectors.replace_shard(TABLE, name, shard_of(name, n)) for n in (3, 4)]

    with ThreadPoolExecutor(3) as threads:
        for turn in range(15):
            vectors = Vectors(tmp_path / str(turn))
            versions = list(threads.map(replace, [vectors] * 3, "abc"))
            assert stored(vectors) == combined(*(shard_of(name, 4) for name in "abc"))
            assert len({version for found in versions for version in found}) == 6


@pytest.mark.parametrize("steps", [("own", "own", "other", "own"), ("other", "own", "removed", "own", "own")])
def test_what_others_write_in_between_is_seen(vectors, steps):
    """Rows of a shard that another process wrote are replaced, never added to."""
    other, expected = Vectors(vectors.folder), {}
    for turn, step in enumerate(steps):
        if step == "removed":
            other.remove_shards(TABLE, ["a", "b"])
            expected = {}
            continue
        for name in "ab":
            expected[name] = shard_of(name, 3 + turn, seed=turn)
            (vectors if step == "own" else other).replace_shard(TABLE, name, expected[name])
        assert stored(vectors) == combined(*expected.values())
    assert vectors.shards(TABLE) == {"a", "b"}


def test_a_shard_that_became_empty_may_have_rows_again(vectors):
    for n in (3, 0, 0, 2, 4):
        vectors.replace_shard(TABLE, "a", shard_of("a", n))
        assert stored(vectors) == content(shard_of("a", n))


def test_writing_shard_after_shard_looks_through_the_table_once(vectors, monkeypatch):
    from clipcov_pipeline.proxy import vectors as proxy_vectors

    looks = []
    look = proxy_vectors._shards_in
    monkeypatch.setattr(proxy_vectors, "_shards_in", lambda table: looks.append(table.version) or look(table))
    for name in "abcab":
        vectors.replace_shard(TABLE, name, shard_of(name, 2))
    assert len(looks) == 1
    version = Vectors(vectors.folder).replace_shard(TABLE, "d", shard_of("d", 2))
    vectors.replace_shard(TABLE, "d", shard_of("d", 5))
    assert looks[1:] == [version - 1, version]  # of the other writer, and because of it


# --- removing ---------------------------------------------------------------------------------------


def test_rows_of_removed_shards_go_in_one_version(vectors):
    for name in ("a", "b", "it's", "d"):
        before = vectors.replace_shard(TABLE, name, shard_of(name, 3))
    vectors.remove_shards(TABLE, ["a", "it's", "not there"])
    assert vectors.open(TABLE).version == before + 1
    assert stored(vectors) == combined(shard_of("b", 3), shard_of("d", 3))
    assert len(stored(vectors, before)) == 12


def test_nothing_to_remove_is_no_new_version(vectors):
    version = vectors.replace_shard(TABLE, "a", shard_of("a", 3))
    vectors.remove_shards(TABLE, [])
    assert vectors.open(TABLE).version == version


# --- reading ----------------------------------------------------------------------------------------


def read(vectors: Vectors, version: int, shards: Iterable[str], size: int = 8192) -> list[str]:
    batches = list(vectors.batches(TABLE, version, list(shards), ["uid", "image_embedding"], size))
    assert all(batch.schema.names == ["uid", "image_embedding"] for batch in batches)
    assert all(batch.num_rows <= size for batch in batches)
    return sorted(uid for batch in batches for uid in batch.column("uid").to_pylist())


def test_batches_stream_the_shards_that_are_asked_for_at_a_version(vectors):
    a, b, c = shard_of("a", 50), shard_of("b", 30), shard_of("c", 20)
    for name, rows in (("a", a), ("b", b), ("c", c)):
        version = vectors.replace_shard(TABLE, name, rows)
    vectors.replace_shard(TABLE, "b", shard_of("b", 1))
    expected = sorted(a.column("uid").to_pylist() + b.column("uid").to_pylist())
    for size in (8192, 7, 1):
        assert read(vectors, version, ["a", "b"], size) == expected
    assert read(vectors, version, ["not there"]) == []
    assert len(read(vectors, version + 1, ["a", "b"])) == 51


def test_many_shards_fit_in_one_question(vectors):
    version = vectors.replace_shard(TABLE, "00007", shard_of("00007", 3))
    assert len(read(vectors, version, [f"{index:05d}" for index in range(2000)])) == 3


def test_an_earlier_version_of_a_shard_can_be_brought_back(vectors):
    first = shard_of("a", 5)
    version = vectors.replace_shard(TABLE, "a", first)
    vectors.replace_shard(TABLE, "a", shard_of("a", 9, seed=1))
    vectors.replace_shard(TABLE, "b", shard_of("b", 2))
    vectors.replace_shard(TABLE, "a", vectors.shard_rows(TABLE, "a", version))
    assert stored(vectors) == combined(first, shard_of("b", 2))


@pytest.mark.parametrize(("version", "wanted"), [(None, "table"), (1, "version 1 of table")])
def test_a_missing_table_is_the_users_to_mend(vectors, version, wanted):
    with pytest.raises(InputError) as caught:
        vectors.open(TABLE, version)
    assert f"no {wanted} {TABLE} (" in str(caught.value)
    assert str(caught.value).endswith("), expected one: materialize embeddings again")
    assert "\n" not in str(caught.value)


def test_a_missing_version_is_the_users_to_mend(vectors):
    vectors.replace_shard(TABLE, "a", shard_of("a", 1))
    with pytest.raises(InputError, match=f"no version 99 of table {TABLE} .*materialize") as caught:
        vectors.shard_rows(TABLE, "a", 99)
    assert "\n" not in str(caught.value)


# --- pins -------------------------------------------------------------------------------------------


def clean_up(vectors: Vectors) -> None:
    """Drop every old version that may be dropped; LanceDB 0.40 refuses as a whole where one is tagged."""
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")
        vectors.open(TABLE).optimize(cleanup_older_than=timedelta(0), delete_unverified=True)


def test_a_pinned_version_survives_cleanup_and_an_unpinned_one_does_not(vectors):
    first = shard_of("a", 5)
    version = vectors.replace_shard(TABLE, "a", first)
    vectors.pin(TABLE, version, "pseudo_labels-0123")
    vectors.replace_shard(TABLE, "a", shard_of("a", 7, seed=1))
    clean_up(vectors)
    assert content(vectors.shard_rows(TABLE, "a", version)) == content(first)
    vectors.open(TABLE).tags.delete("pseudo_labels-0123")
    clean_up(vectors)
    with pytest.raises(InputError, match=f"version {version}"):
        vectors.shard_rows(TABLE, "a", version)
    assert stored(vectors) == content(shard_of("a", 7, seed=1))


def test_a_pin_may_be_set_again_and_moved(vectors):
    first = vectors.replace_shard(TABLE, "a", shard_of("a", 1))
    second = vectors.replace_shard(TABLE, "b", shard_of("b", 1))
    for version in (first, first, second):
        vectors.pin(TABLE, version, "tag")
    vectors.pin(TABLE, first, "other")
    tags = vectors.open(TABLE).tags.list()
    assert {name: tag["version"] for name, tag in tags.items()} == {"tag": second, "other": first}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", VECTORS)
def test_no_write_takes_an_embedding_that_is_not_finite(vectors: Vectors, name: str, bad: float) -> None:
    """``add`` (a new shard) and ``merge_insert`` (one that is there): LanceDB refuses NaN in the first."""
    rows = shard_of("a", 5)
    values = vectors_of(rows, name).copy()
    values[3, 2] = bad
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), DIM)
    broken = rows.set_column(rows.schema.get_field_index(name), name, column)
    with pytest.raises(ValueError, match=f"{name} of shard a: found 1 rows that are not finite"):
        vectors.replace_shard(TABLE, "a", broken)
    vectors.replace_shard(TABLE, "a", rows)
    with pytest.raises(ValueError, match="that are not finite, first uid"):
        vectors.replace_shard(TABLE, "a", broken)
    assert stored(vectors) == combined(rows)
