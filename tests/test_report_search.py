"""Search over the embeddings against numpy, by index and without; FiftyOne's format."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.samples import iter_samples
from clipcov_pipeline.proxy.vectors import label_tag, make_rows, vectors_of
from clipcov_pipeline.report.fiftyone import export_fiftyone
from clipcov_pipeline.report.search import (
    Found,
    Hit,
    Searcher,
    as_text,
    has_index,
    hits_gallery,
    image_query,
    search,
    text_query,
)
from lab import Lab

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def searcher(built_lab: Lab) -> Searcher:
    return Searcher.open(built_lab.project())


def embeddings(searcher: Searcher, column: str) -> tuple[list[str], np.ndarray]:
    rows = searcher.table().to_arrow()
    return rows.column("uid").to_pylist(), vectors_of(rows, column).astype(np.float32)


def uids_of(searcher: Searcher, subset: str) -> set[str]:
    return set(pl.read_parquet(searcher.subsets()[subset])["uid"])


def a_query(searcher: Searcher, seed: int = 0) -> np.ndarray:
    dim = embeddings(searcher, "image_embedding")[1].shape[1]
    values = np.random.default_rng(seed).normal(size=dim).astype(np.float32)
    return values / np.linalg.norm(values)


@pytest.mark.parametrize("by", ["image", "caption"])
def test_hits_are_those_of_numpy(searcher: Searcher, by) -> None:
    uids, values = embeddings(searcher, {"image": "image_embedding", "caption": "text_embedding"}[by])
    query = a_query(searcher)
    similarity = values @ query / np.linalg.norm(values, axis=1)
    found = search(searcher, query, by=by, count=9)
    assert not found.indexed
    assert found.rows == len(uids) == 238
    order = np.argsort(-similarity)[:9]
    assert [hit.score for hit in found.hits] == pytest.approx(similarity[order].tolist(), abs=2e-3)
    best = dict(zip(uids, similarity.tolist(), strict=True))
    for hit in found.hits:
        assert hit.score == pytest.approx(best[hit.uid], abs=2e-3)


def test_hits_know_their_class_and_the_subsets_that_they_are_chosen_in(
    searcher: Searcher, built_lab: Lab
) -> None:
    project = built_lab.project()
    plan = project.plan()
    folder = project.store.folder(plan.by_name["pseudo_labels"].record)
    classes = dict(pl.read_parquet(folder / "labels.parquet", columns=["uid", "latent_class"]).iter_rows())
    held_out = set(pl.read_parquet(folder / "holdout.parquet")["uid"])
    subsets = {
        step.node.partition: set(pl.read_parquet(project.store.folder(step.record) / "subset.parquet")["uid"])
        for step in plan.of("subsets")
        if step.record is not None
    }
    hits = search(searcher, a_query(searcher), count=238).hits
    assert len({hit.uid for hit in hits}) == 238
    for hit in hits:
        assert hit.latent_class == classes.get(hit.uid)
        assert set(hit.subsets) == {name for name, uids in subsets.items() if hit.uid in uids}
        assert hit.note == ("held out" if hit.uid in held_out else "")


def assert_best(hits: Sequence[Hit], ranked: Sequence[Hit], count: int) -> None:
    """Hits are the first of a ranking; nobody promises an order of those that are equally near."""
    assert [hit.score for hit in hits] == [hit.score for hit in ranked[:count]]
    assert len(set(hits)) == len(hits) == count
    assert set(hits) <= {hit for hit in ranked if hit.score >= hits[-1].score}


def test_in_and_not_in_a_subset(searcher: Searcher) -> None:
    subsets = {name: set(pl.read_parquet(path)["uid"]) for name, path in searcher.subsets().items()}
    query = a_query(searcher)
    everything = search(searcher, query, count=238).hits
    found = search(searcher, query, count=7, inside=["clipcov-f0.5"], outside=["random-f0.5"])
    wanted = subsets["clipcov-f0.5"] - subsets["random-f0.5"]
    assert_best(found.hits, [hit for hit in everything if hit.uid in wanted], 7)
    # more asked for than there are
    found = search(searcher, query, count=500, inside=["clipcov-f0.5"], outside=["random-f0.5"])
    assert {hit.uid for hit in found.hits} == wanted
    assert search(searcher, query, inside=["full-f1"], outside=["full-f1"]).hits == ()
    with pytest.raises(
        InputError, match=r"found the subset 'clipcov', expected one of: clipcov-f0.5, full-f1"
    ):
        search(searcher, query, inside=["clipcov"])


def test_an_image_finds_itself_and_a_text_is_embedded_by_the_proxy(
    searcher: Searcher, built_lab: Lab, tmp_path: Path
) -> None:
    encoder = searcher.encoder()
    shard = built_lab.project().world.shards[1]
    sample = next(iter_samples(shard, None))
    path = tmp_path / "picture"
    path.write_bytes(sample.image)
    hits = search(searcher, image_query(encoder, path), count=238).hits
    own = next(hit for hit in hits if hit.image_sha256 == hashlib.sha256(sample.image).hexdigest())
    assert own.score == hits[0].score > 0.999  # others may be as near: the proxy is hardly trained
    hit = search(searcher, text_query(encoder, sample.caption), by="caption", count=1).hits[0]
    assert hit.score > 0.999
    with pytest.raises(InputError, match="empty text"):
        text_query(encoder, "  ")
    with pytest.raises(InputError, match=r"--image: .*absent cannot be read \(No such file"):
        image_query(encoder, tmp_path / "absent")
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"is not usable \(undecodable_image"):
        image_query(encoder, path)


def test_newer_rows_are_not_searched(lab: Lab) -> None:
    """The table goes on, the labels do not: a search sees what selection has seen."""
    searcher = Searcher.open(lab.project())
    query, stats = a_query(searcher), searcher.labels.stats
    before = search(searcher, query, count=238)
    _add_rows(lab, query)
    assert lab.project().vectors.open(stats["table"]).version > stats["version"]
    after = search(Searcher.open(lab.project()), query, count=5)
    assert (after.indexed, after.rows) == (before.indexed, before.rows)
    assert_best(after.hits, before.hits, 5)


def _add_rows(lab: Lab, vector: np.ndarray) -> None:
    vectors = lab.project().vectors
    stats = Searcher.open(lab.project()).labels.stats
    both = np.stack([vector, vector])
    rows = make_rows(
        uids=["0" * 32, "1" * 32],
        shard="new",
        keys=["a", "b"],
        captions=["x", "y"],
        image_sha256=["", ""],
        image_embedding=both,
        text_embedding=both,
    )
    vectors.replace_shard(stats["table"], "new", rows)


def _with_many_rows(lab: Lab) -> Searcher:
    """An index needs 256 rows for its partitions; the labels are told of a version with 400."""
    project = lab.project()
    searcher = Searcher.open(project)
    stats = searcher.labels.stats
    dim = a_query(searcher).shape[0]
    values = np.random.default_rng(7).normal(size=(400, dim))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    names = [f"{i:032x}" for i in range(400)]
    rows = make_rows(
        uids=names,
        shard="many",
        keys=names,
        captions=names,
        image_sha256=names,
        image_embedding=values,
        text_embedding=values,
    )
    version = project.vectors.replace_shard(stats["table"], "many", rows)
    project.store.move_pin(searcher.labels, version)
    project.vectors.pin(stats["table"], version, label_tag(searcher.labels.fingerprint))
    return Searcher.open(project)


def test_an_index_is_made_where_the_table_is_large_and_the_labels_follow_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = _with_many_rows(lab)
    query, version = a_query(searcher), searcher.labels.stats["version"]
    exact = search(searcher, query, count=10, index=False)
    assert not has_index(searcher.table(), "image")
    monkeypatch.setattr("clipcov_pipeline.report.search.INDEX_ROWS", 300)
    told: list[str] = []
    found = search(searcher, query, count=10, report=told.append)
    assert found.indexed
    assert len(told) == 1
    assert told[0].startswith(f"making an index of {found.rows:,} image embeddings")
    recalled = {hit.uid for hit in found.hits} & {hit.uid for hit in exact.hits}
    assert len(recalled) >= 9
    again = Searcher.open(lab.project())
    assert again.labels.stats["version"] == version + 1
    assert has_index(again.table(), "image")
    assert not has_index(again.table(), "caption")
    assert search(again, query, count=10, report=told.append) == found
    assert len(told) == 1
    assert again.labels.stats["version"] == version + 1  # it is made once
    # a filter that leaves little is answered exactly: all of the pool's samples that are in the subset
    inside = search(again, query, count=400, inside=["clipcov-f0.5"])
    assert {hit.uid for hit in inside.hits} == uids_of(again, "clipcov-f0.5")
    code = CliRunner().invoke(cli, ["verify", "--config", str(lab.yaml)])
    assert code.output.startswith("0 problems")


def test_no_index_is_made_once_newer_rows_are_there(lab: Lab) -> None:
    searcher = _with_many_rows(lab)
    query = a_query(searcher)
    exact = search(searcher, query, index=False)
    _add_rows(lab, query)
    found = search(Searcher.open(lab.project()), query, index=True)
    assert not found.indexed
    assert found == exact


def test_before_anything_is_built(lab: Lab) -> None:
    import shutil

    shutil.rmtree(lab.project().store.root / "pseudo_labels")
    with pytest.raises(InputError, match="pseudo_labels is not built yet"):
        Searcher.open(lab.project())


# ---------------------------------------------------------------- the command


def run(lab: Lab, *arguments: str):
    return CliRunner().invoke(cli, [*arguments, "--config", str(lab.yaml)], catch_exceptions=True)


def test_the_command_prints_json_and_text_and_writes_pictures(built_lab: Lab, tmp_path: Path) -> None:
    page = tmp_path / "hits.html"
    done = run(built_lab, "search", "a red bird", "--count", "5", "--json", "--html", str(page))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["hits"]) == 5
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    html = page.read_text()
    assert html.count('class="picture i') == 5
    assert "a red bird" in html
    text = run(built_lab, "search", "a red bird", "--count", "5").output
    for hit in found["hits"]:
        assert hit["uid"] in text
        assert f"{hit['shard']}/{hit['key']}" in text
    for arguments in ((), ("bird", "--image", "x.png")):
        error = run(built_lab, "search", *arguments).exception
        assert isinstance(error, InputError)
        assert "expected a text or --image" in str(error)


def test_hostile_captions_do_no_harm_in_a_terminal_or_a_page(built_lab: Lab, tmp_path: Path) -> None:
    from clipcov_pipeline.report.drawing import write_page

    hit = Hit(0.5, "0" * 32, "s\x1b[31m", "k", "<script>x</script>\x1b]0;owned\x07", "", None, None, (), "n")
    found = Found((hit,), False, 1)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", as_text(found))
    write_page(hits_gallery(built_lab.project(), "<script>", found), tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text()
    assert "<script" not in html
    assert "is gone" in html  # its shard is not there: a placeholder with the reason
    assert as_text(Found((), False, 0)) == "Nothing found."


# ---------------------------------------------------------------- FiftyOne


def test_a_subset_in_fiftyones_format(searcher: Searcher, tmp_path: Path) -> None:
    exported = export_fiftyone(searcher, "random-f0.5", tmp_path / "out", rejected=10)
    chosen, other = uids_of(searcher, "random-f0.5"), uids_of(searcher, "clipcov-f0.5")
    assert exported.samples == len(chosen) + 10
    assert exported.missing == {}
    samples = json.loads((tmp_path / "out" / "samples.json").read_text())["samples"]
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["media_type"] == "image"
    fields = {field["db_field"] for field in metadata["sample_fields"]}
    assert len({sample["_id"]["$oid"] for sample in samples}) == len(samples)
    for sample in samples:
        assert set(sample) <= fields
        assert re.fullmatch("[0-9a-f]{24}", sample["_id"]["$oid"])
        data = (tmp_path / "out" / sample["filepath"]).read_bytes()
        assert data
        assert sample["chosen"] == (sample["uid"] in chosen)
        assert ("random-f0.5" in sample["tags"]) == sample["chosen"]
        assert ("clipcov-f0.5" in sample["tags"]) == (sample["uid"] in other)
        assert "full-f1" in sample["tags"]
        assert (sample["rank"] is not None) == sample["chosen"]
        assert sample["latent_class"]["_cls"] == "Classification"
    rows = {
        r["uid"]: r
        for r in searcher.table().to_arrow().select(["uid", "caption", "image_sha256"]).to_pylist()
    }
    for sample in samples:
        row = rows[sample["uid"]]
        assert sample["caption"] == row["caption"]
        data = (tmp_path / "out" / sample["filepath"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["image_sha256"]


def test_images_that_are_gone_are_left_out_of_the_export_and_counted(lab: Lab, tmp_path: Path) -> None:
    searcher = Searcher.open(lab.project())
    lab.shard(0).unlink()
    done = run(lab, "export-fiftyone", "full-f1", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    labels = pl.read_parquet(searcher.project.store.folder(searcher.labels) / "labels.parquet")
    gone = labels.filter(pl.col("shard") == "00000").height
    assert f"left out {gone}: shard 00000 is gone" in done.stderr
    assert f"{labels.height - gone} samples written" in done.stdout


def test_an_export_never_overwrites(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        export_fiftyone(searcher, "random-f0.5", tmp_path)
    with pytest.raises(InputError, match="found 'random', expected one of"):
        export_fiftyone(searcher, "random", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
