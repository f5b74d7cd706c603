"""Who is in the pool, and latent classes of a pool that is streamed from LanceDB, against dense numpy."""

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.holdout import is_held_out, split_holdout
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.proxy.labels import label_by_clusters, label_by_prompts, label_pool, members
from clipcov_pipeline.proxy.vectors import Vectors, make_rows
from dense import unit
from make_shards import sample_members, write_tar

TABLE, DIM = "embeddings_test", 16


def uid(*parts: object) -> str:
    return hashlib.md5(repr(parts).encode()).hexdigest()


class Pool:
    """A LanceDB table and the same numbers as plain float64 arrays, by uid."""

    def __init__(self, folder: Path) -> None:
        self.vectors = Vectors(folder)
        self.version = 0
        self.image: dict[tuple[str, str], np.ndarray] = {}
        self.text: dict[tuple[str, str], np.ndarray] = {}
        self.shards: list[str] = []

    def add(self, shard: str, uids: list[str], image: np.ndarray, text: np.ndarray) -> None:
        halves = [unit(part).astype(np.float16) for part in (image, text)]
        order = np.random.default_rng(len(uids)).permutation(len(uids))  # rows need not lie in order of key
        rows = make_rows(
            uids=uids,
            shard=shard,
            keys=[f"{row:05d}" for row in range(len(uids))],
            captions=[f"caption {row}" for row in range(len(uids))],
            image_sha256=[uid("image", shard, row) for row in range(len(uids))],
            image_embedding=halves[0],
            text_embedding=halves[1],
        )
        self.version = self.vectors.replace_shard(TABLE, shard, rows.take(order))
        self.shards.append(shard)
        for row, name in enumerate(uids):
            self.image[shard, name], self.text[shard, name] = (
                half[row].astype(np.float64) for half in halves
            )

    def members(self, holdout_fraction: float = 0.0):
        return members(self.vectors, TABLE, self.version, self.shards, holdout_fraction)

    def dense(self, pool: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """float64 [n, d] image and caption embeddings as stored, in the pool's order."""
        keys = list(pool.select("shard", "uid").iter_rows())
        return np.array([self.image[key] for key in keys]), np.array([self.text[key] for key in keys])


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """Three shards of 700, 1 and 300 random samples."""
    pool = Pool(tmp_path / "lancedb")
    rng = np.random.default_rng(0)
    for shard, n in (("b", 700), ("a", 1), ("it's c", 300)):
        image, text = rng.standard_normal((2, n, DIM))
        pool.add(shard, [uid(shard, row) for row in range(n)], image, text)
    return pool


# --- the held-out share -----------------------------------------------------------------------------


def test_held_out_is_a_hash_of_the_uid_below_the_fraction():
    # sha256("abc") begins with ba7816bf, which is 0.72839... of 2 ** 32
    share = 0xBA7816BF / 2**32
    assert not is_held_out("abc", share)
    assert is_held_out("abc", share + 1e-9)
    assert not is_held_out("abc", 0.0)
    assert is_held_out("abc", 1.0)


def test_held_out_shares_nest_and_have_the_size_asked_for():
    uids = [f"{row:032x}" for row in range(20_000)]  # as a json might number its samples
    tenth = {name for name in uids if is_held_out(name, 0.1)}
    fifth = {name for name in uids if is_held_out(name, 0.2)}
    assert tenth < fifth
    # five standard deviations of a binomial
    assert abs(len(tenth) - 2000) < 5 * np.sqrt(20_000 * 0.1 * 0.9)
    assert abs(len(fifth) - 4000) < 5 * np.sqrt(20_000 * 0.2 * 0.8)


def test_splitting_keeps_the_order_and_every_row():
    frame = pl.DataFrame({"uid": [uid(row) for row in range(500)], "row": range(500)})
    pool, held_out = split_holdout(frame, 0.3)
    assert pool["row"].is_sorted()
    assert held_out["row"].is_sorted()
    assert sorted([*pool["row"], *held_out["row"]]) == list(range(500))
    assert all(is_held_out(name, 0.3) for name in held_out["uid"])
    assert not any(is_held_out(name, 0.3) for name in pool["uid"])
    everything, nothing = split_holdout(frame.head(0), 0.3)
    assert everything.is_empty()
    assert nothing.columns == frame.columns


def test_who_is_held_out_depends_on_the_uid_alone(pool, tmp_path):
    """Neither on the shard, nor on the order, nor on who else is there."""
    before = pool.members(0.25)
    other = Pool(tmp_path / "other")
    names = [*before.pool["uid"], *before.holdout["uid"]][::3]
    rng = np.random.default_rng(1)
    other.add("elsewhere", names, *rng.standard_normal((2, len(names), DIM)))
    after = other.members(0.25)
    assert set(after.holdout["uid"]) == set(before.holdout["uid"]) & set(names)
    assert set(after.pool["uid"]) == set(before.pool["uid"]) & set(names)


def test_the_proxys_training_leaves_out_the_same_samples(tmp_path):
    """It reads places, `members` the table: both must hold out the same."""
    bad = [("broken.png", b"no image"), ("broken.txt", b"caption")]
    for shard in ("00000", "00001"):
        good = [m for row in range(20) for m in sample_members(f"{shard}{row:04d}", f"caption {row}", row)]
        write_tar(tmp_path / "pool" / f"{shard}.tar", [*good, *bad])
    reports = [read_shard(shard, max_pixels=10_000) for shard in scan(str(tmp_path / "pool"))]
    rows = pl.concat([report.manifest for report in reports])
    assert rows.height == 42
    expected = {
        row["uid"]
        for row in rows.iter_rows(named=True)
        if row["status"] == "ok" and not is_held_out(row["uid"], 0.5)
    }
    assert 0 < len(expected) < 40
    places = pl.concat([report.places for report in reports])
    assert set(split_holdout(places, 0.5)[0]["uid"]) == expected


# --- members ----------------------------------------------------------------------------------------


def test_members_are_sorted_by_shard_and_key(pool):
    found = pool.members(0.25)
    for frame in (found.pool, found.holdout):
        assert frame.columns == ["uid", "shard", "key", "image_sha256", "caption"]
        assert frame.equals(frame.sort("shard", "key"))
    assert found.pool.height + found.holdout.height == 1001
    assert found.repeated == 0
    row = found.pool.row(0, named=True)
    number = int(row["key"])
    assert (row["uid"], row["image_sha256"]) == (
        uid(row["shard"], number),
        uid("image", row["shard"], number),
    )


def test_members_are_those_of_the_named_shards_at_the_version(pool):
    version = pool.version
    pool.add("b", [uid("new")], np.ones((1, DIM)), np.ones((1, DIM)))
    found = members(pool.vectors, TABLE, version, ["b"], 0)
    assert found.pool.height == 700
    assert set(found.pool["shard"]) == {"b"}
    assert members(pool.vectors, TABLE, pool.version, ["b"], 0).pool["uid"].to_list() == [uid("new")]


def test_a_repeated_uid_counts_once_in_its_first_shard(pool):
    repeated = [uid("b", 3), uid("a", 0), uid("b", 699)]
    pool.add("d", [*repeated, uid("d")], np.ones((4, DIM)), np.ones((4, DIM)))
    found = pool.members()
    assert found.repeated == 3
    assert found.pool.height == 1002
    shards = dict(found.pool.select("uid", "shard").iter_rows())
    assert [shards[name] for name in (*repeated, uid("d"))] == ["b", "a", "b", "d"]


def test_an_empty_pool_gives_one_line(tmp_path):
    pool = Pool(tmp_path)
    pool.add("a", [], np.ones((0, DIM)), np.ones((0, DIM)))
    with pytest.raises(InputError) as caught:
        pool.members(0.1)
    assert str(caught.value).startswith("the pool is empty: found 0 embedded samples, 0 of them held out;")
    assert "\n" not in str(caught.value)


def test_a_pool_that_is_all_held_out_gives_one_line(tmp_path):
    pool = Pool(tmp_path)
    name = next(uid(row) for row in range(99) if is_held_out(uid(row), 0.5))
    pool.add("a", [name], np.ones((1, DIM)), np.ones((1, DIM)))
    with pytest.raises(InputError, match=r"found 1 embedded samples, 1 of them held out; lower evaluate\."):
        pool.members(0.5)


def test_a_share_that_holds_nothing_out_gives_one_line(tmp_path):
    """Found out by the scores, it would cost all trainings."""
    pool = Pool(tmp_path)
    names = [uid(row) for row in range(99) if not is_held_out(uid(row), 0.1)][:5]
    pool.add("a", names, np.ones((5, DIM)), np.ones((5, DIM)))
    with pytest.raises(InputError, match=r"holdout_fraction: found 0.1, which holds out none of 5 samples"):
        pool.members(0.1)
    assert pool.members(0).holdout.is_empty()


# --- labels by prompts ------------------------------------------------------------------------------


def check_prompts(pool: Pool, labelled: pl.DataFrame, classes: np.ndarray) -> None:
    """Compare with argmax over a dense float64 matrix."""
    image, text = pool.dense(labelled)
    scores = image @ classes.T.astype(np.float64)
    best = scores.argmax(axis=1)
    rows = np.arange(len(scores))
    top_two = np.sort(scores, axis=1)[:, -2:]
    expected = top_two[:, 1] - top_two[:, 0] if len(classes) > 1 else np.zeros(len(scores))
    clear = expected > 1e-5  # a nearer race may go either way in float32
    assert clear.mean() > 0.99 or len(classes) == 1
    np.testing.assert_array_equal(labelled["latent_class"].to_numpy()[clear], best[clear])
    np.testing.assert_allclose(labelled["margin"].to_numpy(), expected, atol=2e-6)
    similarity = (text * classes[labelled["latent_class"].to_numpy()]).sum(axis=1)
    np.testing.assert_allclose(labelled["label_similarity"].to_numpy(), similarity, atol=2e-6)
    assert labelled.schema["latent_class"] == pl.Int32
    assert labelled.schema["margin"] == labelled.schema["label_similarity"] == pl.Float32
    assert len(rows) == labelled.height


@pytest.mark.parametrize("n_classes", [1, 2, 37])
def test_streamed_labels_by_prompts_equal_the_dense_oracle(pool, n_classes):
    classes = unit(np.random.default_rng(5).standard_normal((n_classes, DIM))).astype(np.float32)
    found = pool.members(0.2).pool
    labelled = label_pool(
        pool.vectors,
        TABLE,
        pool.version,
        pool.shards,
        found,
        lambda some, batches: label_by_prompts(some, batches, classes),
    )
    assert labelled.select(found.columns).equals(found)  # one row a pool sample, in the pool's order
    check_prompts(pool, labelled, classes)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_the_size_of_batches_changes_nothing(pool, size):
    classes = unit(np.random.default_rng(5).standard_normal((5, DIM))).astype(np.float32)
    found = pool.members().pool
    columns = ("shard", "uid", "image_embedding", "text_embedding")
    shards = ["a", "it's c"] if size == 1 else pool.shards
    found = found.filter(pl.col("shard").is_in(shards))
    batches = pool.vectors.batches(TABLE, pool.version, shards, columns, size)
    check_prompts(pool, label_by_prompts(found, batches, classes), classes)


def test_a_repeated_uid_is_labelled_by_its_own_embedding(pool):
    """The later shard's row with the same uid must neither double the sample nor lend it its embedding."""
    classes = np.eye(DIM, dtype=np.float32)
    name = uid("b", 3)
    opposite = -pool.image["b", name]
    pool.add("z", [name, uid("z")], np.array([opposite, opposite]), np.ones((2, DIM)))
    found = pool.members().pool
    by_prompts = label_pool(
        pool.vectors,
        TABLE,
        pool.version,
        pool.shards,
        found,
        lambda some, batches: label_by_prompts(some, batches, classes),
    )
    assert by_prompts.height == 1002
    check_prompts(pool, by_prompts, classes)


# --- labels by clusters -----------------------------------------------------------------------------


def clustered(pool: Pool, n: int, k: int) -> np.ndarray:
    """Add shards of samples around k far directions; return the direction of each, in the pool's order."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((2, k, DIM)) * 4
    kinds = rng.integers(0, k, n)
    for shard, part in (("a", slice(0, n // 2)), ("b", slice(n // 2, n))):
        image, text = (centre[kinds[part]] + 0.3 * rng.standard_normal((n // 2, DIM)) for centre in centres)
        pool.add(shard, [uid(shard, row) for row in range(n // 2)], image, text)
    return kinds


def by_clusters(pool: Pool, k: int, scratch: Path, seed: int = 0, size: int = 8192) -> pl.DataFrame:
    columns = ("shard", "uid", "image_embedding", "text_embedding")
    batches = pool.vectors.batches(TABLE, pool.version, pool.shards, columns, size)
    return label_by_clusters(pool.members().pool, batches, k, seed, scratch)


def dense_clusters(
    image: np.ndarray, text: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest centre, caption similarity and margin where the centres are the unit means of the clusters."""
    pairs = np.concatenate([image, text], axis=1) / np.sqrt(2)
    kinds = np.arange(labels.max() + 1)
    centres = unit(np.array([pairs[labels == kind].sum(axis=0) for kind in kinds]))
    scores = pairs @ centres.T
    top_two = np.sort(scores, axis=1)[:, -2:]
    captions = unit(centres[:, DIM:])
    best = scores.argmax(axis=1)
    return best, (text * captions[best]).sum(axis=1), top_two[:, 1] - top_two[:, 0]


def test_streamed_clusters_equal_the_dense_oracle(tmp_path):
    pool = Pool(tmp_path / "lancedb")
    kinds = clustered(pool, 600, 4)
    labelled = by_clusters(pool, 4, tmp_path / "scratch", seed=2)
    labels = labelled["latent_class"].to_numpy()
    image, text = pool.dense(labelled)
    best, similarity, margin = dense_clusters(image, text, labels)
    np.testing.assert_array_equal(labels, best)  # a fixed point of k-means
    np.testing.assert_allclose(labelled["label_similarity"].to_numpy(), similarity, atol=1e-4)
    np.testing.assert_allclose(labelled["margin"].to_numpy(), margin, atol=1e-4)
    # and the one that was planted: each cluster is one direction
    assert len({(kind, label) for kind, label in zip(kinds, labels, strict=True)}) == 4
    assert list((tmp_path / "scratch").iterdir()) == []


def test_clusters_depend_on_neither_the_batches_nor_the_order_of_rows(tmp_path):
    pool, other = Pool(tmp_path / "one"), Pool(tmp_path / "other")
    clustered(pool, 200, 7)
    expected = by_clusters(pool, 7, tmp_path)
    assert by_clusters(pool, 7, tmp_path, size=13).equals(expected)
    for shard in ("b", "a"):
        names = [name for at, name in pool.image if at == shard]
        arrays = (np.array([half[shard, name] for name in names]) for half in (pool.image, pool.text))
        other.add(shard, names, *arrays)
    again = by_clusters(other, 7, tmp_path)
    assert again["latent_class"].equals(expected["latent_class"])
    assert not by_clusters(pool, 7, tmp_path, seed=1)["latent_class"].equals(expected["latent_class"])


def test_the_number_of_clusters_is_chosen_and_told(tmp_path):
    pool = Pool(tmp_path / "lancedb")
    kinds = clustered(pool, 400, 6)
    columns, stats = ("shard", "uid", "image_embedding", "text_embedding"), {}
    batches = pool.vectors.batches(TABLE, pool.version, pool.shards, columns, 64)
    labelled = label_by_clusters(pool.members().pool, batches, "auto", 0, tmp_path, stats)
    chosen = stats["n_clusters"]
    assert chosen in (6, 8)  # what was planted, or the next candidate
    assert max(stats["silhouettes"], key=stats["silhouettes"].get) == str(chosen)
    assert labelled.equals(by_clusters(pool, chosen, tmp_path))
    # no cluster mixes what was planted
    assert len({*zip(kinds, labelled["latent_class"], strict=True)}) == labelled["latent_class"].n_unique()


def test_more_clusters_than_samples_give_one_line(tmp_path):
    pool = Pool(tmp_path / "lancedb")
    clustered(pool, 10, 2)
    with pytest.raises(InputError, match="clusters: found 11, expected 1 to 10, the number of samples"):
        by_clusters(pool, 11, tmp_path)


def test_a_pool_sample_without_embedding_gives_one_line(pool, tmp_path):
    found = pool.members().pool
    columns = ("shard", "uid", "image_embedding", "text_embedding")

    def batches():
        return pool.vectors.batches(TABLE, pool.version, ["b", "a"], columns)

    message = "found those of 701 samples, expected all 1001 of the pool: materialize embeddings again"
    with pytest.raises(InputError, match=message):
        label_by_prompts(found, batches(), np.eye(DIM, dtype=np.float32))
    with pytest.raises(InputError, match=message):
        label_by_clusters(found, batches(), 3, 0, tmp_path)
