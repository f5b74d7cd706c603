"""Filters in DataComp's words against what its code does, written out in plain Python on the same metadata.

The oracles follow mlfoundations/datacomp, baselines/apply_filter.py: `load_uids_with_basic_filter_helper`,
`load_uids_with_clip_score` with `get_threshold`, `get_centroid_ids_gpu` and `image_filter_helper`.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import Pool, rank
from clipcov_pipeline.selection.filter_files import check_filter_file
from clipcov_pipeline.selection.sources import open_pool

N, D, PARTS = 600, 16, 3
WORDS = [
    "red",
    "bird",
    "golden",
    "retriever",
    "Dog,",
    "dogs",
    "hot-dog",
    "a",
    "of",
    "the",
    "old\nhouse",
    "42",
]
WORDS += ["BIRD's", "tree\u2003tree"]
MODEL = Path(__file__).with_name("language_model.bin")
needs_fasttext = pytest.mark.skipif(find_spec("fasttext") is None, reason="needs the extra `language`")


def captions(rng: np.random.Generator) -> list[str]:
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 7))) for _ in range(N)]
    # on the bounds: two and three words, five and six characters
    return ["", "a b", "a b c", "a bc d", " a  b ", "abcdef", "\u00e9 \u00e9 \u00e9\u00e9", *texts[7:]]


def sizes(rng: np.random.Generator) -> np.ndarray:
    found = rng.choice([150, 199, 200, 201, 400, 599, 600, 601, 603], (N, 2)).astype(np.int64)
    found[:4] = [200, 600], [200, 601], [199, 199], [0, 300]
    return found


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame, np.ndarray]:
    """A folder as DataComp's: parquet files, with embeddings beside them; and all of it in one table."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("metadata")
    image, text, *_ = synthetic_arrays(N, 5, D)
    side, score = sizes(rng), rng.choice(np.linspace(0.1, 0.4, 40), N)  # with ties
    table = pl.DataFrame(
        {
            "uid": [rng.bytes(16).hex() for _ in range(N)],
            "text": captions(rng),
            "original_width": side[:, 0],
            "original_height": side[:, 1],
            "clip_l14_similarity_score": np.where(rng.random(N) < 0.02, np.nan, score),
            "clip_b32_similarity_score": rng.random(N),
        }
    )
    for part, rows in enumerate(np.array_split(np.arange(N), PARTS)):
        table[rows].write_parquet(folder / f"{part:032x}.parquet")
        np.savez(
            folder / f"{part:032x}.npz",
            l14_img=image[rows].astype(np.float16), l14_txt=text[rows].astype(np.float16),
        )  # fmt: skip
    return folder, table, image.astype(np.float16)


def selected(source: Path, out: Path, *arguments: object) -> tuple[set[str], dict[str, Any]]:
    """The uids that the command chooses, and its report."""
    done = CliRunner().invoke(cli, ["select", *map(str, (source, *arguments, "--out", out))])
    assert done.exit_code == 0, done.output
    return set(pl.read_parquet(f"{out}.parquet")["uid"]), json.loads(Path(f"{out}.json").read_text())


def basic(row: dict[str, Any]) -> bool:
    """`caption_mask & image_mask` of DataComp's basic filter."""
    least, most = sorted((row["original_width"], row["original_height"]))
    words, characters = len(row["text"].split()), len(row["text"])
    return words > 2 and characters > 5 and least >= 200 and most / least <= 3.0


def by_score(table: pl.DataFrame, key: str, threshold: float) -> set[str]:
    return {row["uid"] for row in table.iter_rows(named=True) if row[key] >= threshold}


def threshold_of(table: pl.DataFrame, key: str, fraction: float) -> float:
    """`get_threshold`: of the metadata's scores in falling order, that at int(len * fraction)."""
    scores = sorted(table[key].to_list(), key=lambda score: np.inf if np.isnan(score) else -score)
    return scores[int(len(scores) * fraction)]


def test_basic_is_datacomps(metadata, tmp_path: Path) -> None:
    folder, table, _ = metadata
    expected = {row["uid"] for row in table.iter_rows(named=True) if basic(row)}
    assert 0 < len(expected) < N
    found, report = selected(folder, tmp_path / "a", "--method", "basic")
    assert found == expected
    assert report["passed_filters"] == {"basic": len(expected), "all": len(expected)}
    behind, _ = selected(
        folder, tmp_path / "b", "--method", "clip_score", "--param", 'filters={"basic":true}'
    )
    assert behind == expected


def test_each_bound_of_basic_is_its_own(metadata) -> None:
    folder, table, _ = metadata
    off = dict.fromkeys(("min_words", "min_characters", "min_side", "max_aspect"))
    side = table["original_width"].to_numpy(), table["original_height"].to_numpy()
    least, most = np.minimum(*side), np.maximum(*side)
    expected = {
        ("min_words", 2): [len(text.split()) >= 2 for text in table["text"]],
        ("min_characters", 9): [len(text) >= 9 for text in table["text"]],
        ("min_side", 201): least >= 201,
        ("max_aspect", 1.5): [x > 0 and y / x <= 1.5 for x, y in zip(least, most, strict=True)],
    }
    with open_pool(folder, need_classes=False, captions=True) as pool:
        for (name, bound), mask in expected.items():
            rows = rank(pool, "basic", **{**off, name: bound}).rows
            np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(mask))


def test_words_are_what_python_splits() -> None:
    texts = [f"a{chr(code)}b{chr(code)}" for code in range(0x3100) if not 0xD800 <= code < 0xE000]
    image, text, *_ = (column[:1].repeat(len(texts), axis=0) for column in synthetic_arrays(4, 1, D))
    from clipcov_pipeline.selection.columns import caption_columns

    columns = caption_columns(pl.Series(texts))
    assert columns["caption_words"].tolist() == [len(one.split()) for one in texts]
    pool = Pool.from_arrays(image, text, np.zeros(len(texts), int), **columns)
    bounds = {"min_words": 2, "min_characters": None, "min_side": None, "max_aspect": None}
    assert len(rank(pool, "basic", **bounds)) == sum(len(one.split()) > 1 for one in texts)


@pytest.mark.parametrize("arch", ["l14", "b32"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_clip_score_by_share_is_datacomps(metadata, tmp_path: Path, arch: str, share: float) -> None:
    folder, table, _ = metadata
    key = f"clip_{arch}_similarity_score"
    expected = by_score(table, key, threshold_of(table, key, share))
    assert len(expected) > int(share * N)
    filters = json.dumps({"clip_score": {"share": share, "arch": arch}})
    found, _ = selected(folder, tmp_path / "a", "--method", "random", "--param", f"filters={filters}")
    assert found == expected


def test_clip_score_by_threshold_is_datacomps_and_of_the_pairs_without_an_arch(metadata) -> None:
    folder, table, _ = metadata
    bound = table["clip_l14_similarity_score"].drop_nans()[5]  # a score that some have
    with open_pool(folder, need_classes=False) as pool:

        def found(**settings: Any) -> list[int]:
            return sorted(rank(pool, "clip_score", filters={"clip_score": settings}).rows)

        expected = by_score(table, "clip_l14_similarity_score", bound)
        assert {pool.names([row])[0] for row in found(threshold=bound, arch="l14")} == expected
        own = pool.pair_similarity()
        assert found(threshold=float(own[7])) == np.flatnonzero(own >= own[7]).tolist()
        assert found(share=0.25) == np.flatnonzero(own >= np.sort(own)[::-1][N // 4]).tolist()
        assert found(share=1.0) == list(range(N))
        # what has no score never passes, even where more is asked for than has one
        scored = np.flatnonzero(~np.isnan(table["clip_l14_similarity_score"].to_numpy()))
        assert found(share=0.999, arch="l14") == scored.tolist()


def nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """`get_centroid_ids_gpu`: the largest inner product."""
    return np.argmax(np.einsum("ik,jk->ij", rows.astype(np.float32), centroids.astype(np.float32)), axis=1)


def test_image_based_is_datacomps_by_its_centroids(metadata, tmp_path: Path) -> None:
    folder, table, image = metadata
    rng = np.random.default_rng(5)
    # as faiss leaves them: means, and so not of unit norm
    centroids = np.stack([image[rng.choice(N, 9)].astype(np.float32).mean(axis=0) for _ in range(30)])
    target = image[rng.choice(N, 12)] + rng.normal(0, 0.02, (12, D))
    np.save(tmp_path / "centroids.npy", centroids)
    np.save(tmp_path / "target.npy", target.astype(np.float32))
    wanted = set(nearest(target, centroids).tolist())
    near = [centre in wanted for centre in nearest(image, centroids).tolist()]
    expected = set(table["uid"].filter(pl.Series(near)))
    assert 0 < len(expected) < N
    files = [f"--param={name}={tmp_path / name}.npy" for name in ("target", "centroids")]
    found, _ = selected(folder, tmp_path / "a", "--method", "image_based", *files)
    assert found == expected
    # image_based_intersect_clip_score: the threshold is of the whole metadata
    filters = {
        "clip_score": {"share": 0.3, "arch": "l14"},
        "basic": {"min_words": 2, "min_side": None, "max_aspect": None},
    }
    both, report = selected(
        folder, tmp_path / "b", "--method", "image_based", *files, "--param", f"filters={json.dumps(filters)}"
    )
    key = "clip_l14_similarity_score"
    scored = by_score(table, key, threshold_of(table, key, 0.3))
    said = {
        row["uid"]
        for row in table.iter_rows(named=True)
        if len(row["text"].split()) > 1 and len(row["text"]) > 5
    }
    assert both == expected & scored & said
    assert report["passed_filters"] == {
        "clip_score": len(scored), "basic": len(said), "image_based": len(expected), "all": len(both),
    }  # fmt: skip


def test_image_based_makes_clusters_of_its_own(tmp_path: Path) -> None:
    """The pool's images lie in five bunches; the target is of two of them."""
    rng = np.random.default_rng(0)
    bunch = rng.permutation(np.arange(500) % 5)
    image = np.eye(5, 8)[bunch] + rng.normal(0, 0.02, (500, 8))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    np.save(tmp_path / "target.npy", image[np.isin(bunch, [1, 3])][:20].astype(np.float32))
    pool = Pool.from_arrays(image, image, bunch)
    for clusters in (5, 20, None):
        rows = rank(
            pool, "image_based", target=str(tmp_path / "target.npy"), n_clusters=clusters, seed=1
        ).rows
        assert set(bunch[rows].tolist()) <= {1, 3}
    rows = rank(pool, "image_based", target=str(tmp_path / "target.npy"), n_clusters=5, seed=1).rows
    assert len(rows) > 0


def names_a_class(text: str, names: list[list[str]]) -> bool:
    words = re.findall(r"[^\W_]+", text.lower())
    return any(
        words[at : at + len(name)] == name for name in names for at in range(len(words) - len(name) + 1)
    )


def test_text_based_names_a_class(metadata, tmp_path: Path) -> None:
    folder, table, _ = metadata
    (tmp_path / "names.txt").write_text("Golden_Retriever\n\n dog\nhot dog\nOLD HOUSE\n\u00c9\n")
    names = [["golden", "retriever"], ["dog"], ["hot", "dog"], ["old", "house"], ["\u00e9"]]
    expected = {row["uid"] for row in table.iter_rows(named=True) if names_a_class(row["text"], names)}
    assert 0 < len(expected) < N
    found, _ = selected(
        folder, tmp_path / "a", "--method", "text_based", "--param", f"class_names={tmp_path / 'names.txt'}"
    )
    assert found == expected


def test_captions_alone_are_enough(metadata) -> None:
    _, table, image = metadata
    sizes = {name: table[f"original_{name}"].to_numpy() for name in ("width", "height")}
    texts = table["text"].to_list()
    for captions in (texts, np.array(texts, object), np.array([text.encode() for text in texts])):
        pool = Pool.from_arrays(image, image, np.zeros(N, int), caption=np.asarray(captions), **sizes)
        rows = rank(pool, "basic").rows
        assert sorted(rows) == [row for row, one in enumerate(table.iter_rows(named=True)) if basic(one)]


@needs_fasttext
def test_language_is_what_the_model_says(metadata, tmp_path: Path) -> None:
    _, table, image = metadata
    texts = ["a photo of the house", "ein Foto vom\nHaus am Baum", "et bilde av huset og fjellene", ""] * (
        N // 4
    )
    uids, text = table["uid"].to_list(), np.array(texts, object)
    pool = Pool.from_arrays(image, image, np.zeros(N, int), uid=uids, caption=text)
    for keep in (["en"], ["de", "no"]):
        rows = rank(pool, "language", model=str(MODEL), keep=keep).rows
        spoken = {"en": {0, 3}, "de": {1}, "no": {2}}  # this model takes nothing for English
        expected = [row for row in range(N) if row % 4 in set().union(*(spoken[one] for one in keep))]
        assert sorted(rows) == expected
    rows = rank(pool, "random", filters={"language": {"model": str(MODEL)}}).rows
    assert {row % 4 for row in rows.tolist()} == {0, 3}
    (tmp_path / "no.bin").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"no\.bin: not readable as a fastText model"):
        rank(pool, "language", model=str(tmp_path / "no.bin"))


def test_without_fasttext_one_line_says_what_to_install(metadata, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("clipcov_pipeline.selection.filter_files.find_spec", lambda _: None)
    arguments = [str(metadata[0]), "--method=language", f"--param=model={MODEL}", f"--out={tmp_path / 'a'}"]
    done = CliRunner().invoke(cli, ["select", *arguments])
    assert isinstance(done.exception, InputError)
    assert str(done.exception).endswith("expected it: pip install 'clipcov-pipeline[language]'")


def test_files_of_no_use_are_named(metadata, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("dog\n--\n")
    (tmp_path / "empty.txt").write_text("\n")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "wide.npy", np.zeros((3, D + 1), np.float32))
    np.save(tmp_path / "holes.npy", np.array([[1.0] * D, [np.nan] * D], np.float32))
    np.save(tmp_path / "good.npy", np.eye(D, dtype=np.float32))
    for key, name, said in (
        ("filters.text_based.class_names", "nams.txt", "found no file .*nams.txt, did you mean 'names.txt'?"),
        ("class_names", "names.txt", r"class_names: class names: found '--' in .*names.txt"),
        ("class_names", "empty.txt", "found none in .*empty.txt, expected one a line"),
        (
            "filters.image_based.target",
            "flat.npy",
            r"found float64 of shape \(3,\), expected floats \[n, d\]",
        ),
    ):
        with pytest.raises(InputError, match=said):
            check_filter_file(key, tmp_path / name)
    with open_pool(metadata[0], need_classes=False) as pool:
        with pytest.raises(InputError, match=f"found embeddings of width {D + 1}, expected the pool's {D}"):
            rank(pool, "image_based", target=str(tmp_path / "wide.npy"))
        with pytest.raises(InputError, match=r"holes.npy: found 1 of 2 rows with values that are not finite"):
            rank(pool, "image_based", target=str(tmp_path / "holes.npy"))
        with pytest.raises(InputError, match=rf"image_based.n_clusters: found {N + 1}, expected at most {N}"):
            rank(pool, "image_based", target=str(tmp_path / "good.npy"), n_clusters=N + 1)
        with pytest.raises(InputError, match="filter basic: needs the column caption_words"):
            rank(pool, "basic")


def test_a_filter_as_a_method_is_random_behind_it(metadata) -> None:
    with open_pool(metadata[0], need_classes=False, captions=True) as pool:
        whole = rank(pool, "basic", seed=4)
        behind = rank(pool, "random", seed=4, filters={"basic": True})
        np.testing.assert_array_equal(whole.rows, behind.rows)
        assert whole.rows.tolist() != sorted(whole.rows.tolist())
        assert rank(pool, "basic", 9, seed=4).rows.tolist() == whole.rows[:9].tolist()
        passing = len(whole)
        with pytest.raises(InputError, match=rf"at most {passing}, which pass .*\(basic {passing}\)"):
            rank(pool, "basic", passing + 1, seed=4)
        filled = rank(pool, "basic", 1.0, seed=4, filters={"rejected": "last"})
        assert filled.rows[:passing].tolist() == whole.rows.tolist()
        assert sorted(filled.rows.tolist()) == list(range(N))


@pytest.mark.parametrize("kind", ["parquet", "lance", "npz", "clip_retrieval"])
def test_every_source_gives_the_same(metadata, tmp_path: Path, kind: str) -> None:
    folder, table, image = metadata
    (tmp_path / "names.txt").write_text("bird\ngolden retriever\n")
    filters = {
        "basic": True,
        "text_based": {"class_names": str(tmp_path / "names.txt")},
        "clip_score": {"share": 0.6, "arch": "l14"},
    }
    expected, _ = selected(
        folder, tmp_path / "a", "--method", "random", "--param", f"filters={json.dumps(filters)}"
    )
    source = written(kind, tmp_path, table, image)
    found, _ = selected(
        source, tmp_path / "b", "--method", "random", "--param", f"filters={json.dumps(filters)}"
    )
    assert len(expected) > 5
    assert found == expected


def written(kind: str, folder: Path, table: pl.DataFrame, image: np.ndarray) -> Path:
    columns = {name: table[name].to_numpy() for name in table.columns}
    rows = {name: list(image) for name in ("image_embedding", "text_embedding")}
    if kind == "npz":
        columns |= {name: columns[name].astype(str) for name in ("uid", "text")}
        np.savez(folder / "pool.npz", image_embedding=image, text_embedding=image, **columns)
        return folder / "pool.npz"
    if kind == "clip_retrieval":
        for name in ("img_emb", "text_emb"):
            (folder / name).mkdir()
            np.save(folder / name / f"{name}_0.npy", image)
        (folder / "metadata").mkdir()
        table.rename({"text": "caption"}).write_parquet(folder / "metadata" / "metadata_0.parquet")
        return folder
    arrow = table.with_columns(
        **{k: pl.Series(np.stack(v), dtype=pl.Array(pl.Float32, D)) for k, v in rows.items()}
    )
    if kind == "parquet":
        arrow.with_columns(pl.col("image_embedding", "text_embedding").arr.to_list()).write_parquet(
            folder / "pool.parquet"
        )
        return folder / "pool.parquet"
    import lancedb

    # where labels are beside the table, its columns are found all the same; the size as stored does not count
    wide = arrow.with_columns(width=pl.lit(10), height=pl.lit(10)).sample(fraction=1, shuffle=True, seed=1)
    lancedb.connect(folder).create_table("pool", wide.to_arrow())
    return folder / "pool.lance"
