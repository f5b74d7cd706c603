"""Contact sheets: which samples they show, against numpy; pictures that are gone; hostile captions."""

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from clipcov_pipeline.evaluation.neighbours import fixed_queries, nearest
from clipcov_pipeline.evaluation.pairs import EmbeddedPairs
from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.pool.samples import read_images
from clipcov_pipeline.pool.spread import evenly
from clipcov_pipeline.report.checkpoint_gallery import checkpoint_gallery, shared_neighbours
from clipcov_pipeline.report.drawing import write_page, write_sheet
from clipcov_pipeline.report.gallery import (
    Gallery,
    Group,
    Row,
    Section,
    Tile,
    read_gallery,
    with_captions,
    with_pictures,
    write_gallery,
)
from clipcov_pipeline.report.subset_gallery import redundant_pairs, subset_gallery
from clipcov_pipeline.report.thumbnails import thumbnails
from clipcov_pipeline.selection import Pool
from lab import Lab
from make_shards import image_bytes, sample_members, write_pool, write_tar

HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>'


def unit(rows: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def uid(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()[:32]


def some_pool(classes: list[int], dim: int = 8) -> tuple[Pool, pl.DataFrame, np.ndarray, np.ndarray]:
    n = len(classes)
    image, text = unit(n, dim, 1), unit(n, dim, 2)
    labels = pl.DataFrame(
        {
            "uid": [uid(i) for i in range(n)],
            "shard": ["00000"] * n,
            "key": [f"k{i}" for i in range(n)],
            "latent_class": classes,
        }
    )
    return Pool.from_arrays(image, text, np.array(classes, np.int32)), labels, image, text


def ranking(order: list[int], gains: list[float | None] | None = None) -> pl.DataFrame:
    gains = gains if gains is not None else [float(-i) for i in range(len(order))]
    values = pl.Series(gains, dtype=pl.Float64)
    return pl.DataFrame({"uid": [uid(i) for i in order], "gain": values})


def sections(gallery: Gallery) -> dict[str, Section]:
    return {section.title: section for section in gallery.sections}


def keys(row: Row) -> list[str]:
    return [tile.key for group in row.groups for tile in group.tiles]


# ---------------------------------------------------------------- which samples


def test_redundant_pairs_are_those_of_a_dense_matrix():
    classes = np.random.default_rng(3).integers(0, 6, 120).tolist()
    pool, _, image, text = some_pool(classes)
    chosen = np.random.default_rng(4).random(120) < 0.4
    similarity = image @ text.T + text @ image.T
    expected = []
    for number in range(6):
        rows = np.flatnonzero(np.array(classes) == number)
        best = max((similarity[i, j], i, j) for i in rows[~chosen[rows]] for j in rows[chosen[rows]])
        expected.append(best)
    expected.sort(key=lambda pair: -pair[0])
    found = redundant_pairs(pool, chosen)
    assert [(i, j) for _, i, j in found] == [(i, j) for _, i, j in expected]
    assert [s for s, _, _ in found] == pytest.approx([s for s, _, _ in expected], abs=1e-6)


def test_a_subsets_gallery_shows_both_ends_of_the_gains_and_what_just_missed():
    pool, labels, _, _ = some_pool([i % 4 for i in range(80)])
    order = np.random.default_rng(5).permutation(80).tolist()
    found = sections(subset_gallery("s", ranking(order), 40, labels, pool))
    high, low, missed = found["Highest and lowest gain"].rows
    assert keys(high) == [f"k{i}" for i in order[:12]]
    assert keys(low) == [f"k{i}" for i in order[28:40]]
    assert keys(missed) == [f"k{i}" for i in order[40:52]]
    chosen = {f"k{i}" for i in order[:40]}
    for row in found["Chosen samples by class"].rows:
        assert row.heading.endswith("of 20 chosen")
        assert set(keys(row)) <= chosen
    inside, outside, *_ = found["Chosen against rejected"].rows
    assert set(keys(inside)) <= chosen
    assert not set(keys(outside)) & chosen


def test_classes_have_the_names_of_their_prompts():
    pool, labels, _, _ = some_pool([0, 0, 1, 1])
    gallery = subset_gallery("s", ranking([0, 1, 2, 3]), 2, labels, pool, ["cat", "dog"])
    headings = [row.heading for row in sections(gallery)["Chosen samples by class"].rows]
    assert headings == ["class 0 (cat): 2 of 2 chosen", "class 1 (dog): 0 of 2 chosen"]


@pytest.mark.parametrize(
    ("classes", "order", "count"),
    [([0, 1, 1], [0, 1, 2], 1), ([0], [0], 1), ([0, 1, 2], [2, 1, 0], 3), ([0, 0, 0, 7], [3], 1)],
    ids=["one sample", "a pool of one", "everything", "a class of one, the rest not ranked"],
)
def test_small_subsets_give_a_value_or_a_reason(tmp_path, classes, order, count):
    pool, labels, _, _ = some_pool(classes)
    gallery = subset_gallery("s", ranking(order), count, labels, pool)
    for section in gallery.sections:
        for row in section.rows:
            assert keys(row) or row.note
    write_sheet(gallery, tmp_path / "sheet.webp")
    write_page(gallery, tmp_path / "page.html")
    if len(set(classes)) == len(classes) or count == len(classes):
        notes = [row.note for row in sections(gallery)["Most redundant of the rejected"].rows]
        assert notes == ["not defined, because no class has both chosen and rejected samples"]


def test_a_method_without_gains_says_so():
    pool, labels, _, _ = some_pool([0, 0, 0])
    gallery = subset_gallery("s", ranking([0, 1, 2], [None, None, None]), 2, labels, pool)
    row = sections(gallery)["Highest and lowest gain"].rows[0]
    assert (keys(row), row.note) == ([], "not defined, because the method gives no gains")


# ---------------------------------------------------------------- neighbours


def pairs(n: int = 30, **changes) -> EmbeddedPairs:
    values = {
        "uids": [uid(i) for i in range(n)],
        "captions": [f"caption {i}" for i in range(n)],
        "image_sha256": [f"image {i}" for i in range(n)],
        "image_embedding": unit(n, seed=1),
        "text_embedding": unit(n, seed=2),
        "n_damaged": 0,
        "shards": ["00000"] * n,
        "keys": [f"k{i}" for i in range(n)],
    }
    return EmbeddedPairs(**{**values, **changes})


def test_neighbours_are_those_of_numpy():
    given = pairs()
    found = nearest(given, queries=4, k=5)
    order = sorted(range(30), key=lambda i: hashlib.sha256(uid(i).encode()).hexdigest())
    assert [query["uid"] for query in found] == [uid(i) for i in order[:4]]
    for query, row in zip(found, order[:4], strict=True):
        by_image = given.image_embedding @ given.image_embedding[row]
        by_image[row] = -2
        assert [n["key"] for n in query["image_to_image"]] == [f"k{i}" for i in np.argsort(-by_image)[:5]]
        by_caption = given.image_embedding @ given.text_embedding[row]
        assert [n["key"] for n in query["caption_to_image"]] == [f"k{i}" for i in np.argsort(-by_caption)[:5]]
        assert query["rank"] == 1 + (by_caption > by_caption[row]).sum()
        assert query["of"] == 30


def test_queries_are_distinct_and_the_same_for_every_model():
    given = pairs(captions=["one"] * 15 + ["two"] * 15)
    rows = fixed_queries(given)
    assert sorted(given.captions[row] for row in rows) == ["one", "two"]
    assert fixed_queries(pairs(image_embedding=unit(30, seed=9))) == fixed_queries(pairs())


def test_a_copied_image_is_one_neighbour():
    found = nearest(pairs(n=6, image_sha256=["a", "a", "b", "b", "c", "c"]), queries=1, k=5)
    shown = [n["image_sha256"] for n in found[0]["image_to_image"]]
    assert len(shown) == len(set(shown)) == 2


def test_a_diverged_model_has_no_neighbours_and_the_page_says_so(tmp_path):
    nothing = np.full((30, 8), np.nan, np.float32)
    found = nearest(pairs(image_embedding=nothing, text_embedding=nothing))
    assert all(not query["image_to_image"] and query["rank"] is None for query in found)
    gallery = checkpoint_gallery("arm", found, nearest(pairs()))
    assert gallery.sections[0].rows[0].note == "not defined, because the model gives no embedding of it"
    assert shared_neighbours(found, nearest(pairs()), "image_to_image") is None
    write_sheet(gallery, tmp_path / "sheet.webp")
    json.dumps(found, allow_nan=False)


def test_the_full_pools_neighbours_stand_beside():
    own, full = nearest(pairs()), nearest(pairs(image_embedding=unit(30, seed=9)))
    gallery = checkpoint_gallery("arm", own, full)
    row = gallery.sections[1].rows[0]
    assert [group.label for group in row.groups] == ["query", "this model", "full pool"]
    assert row.note.startswith(f"its own image is number {own[0]['rank']:,} of 30, for the full-pool model")
    assert shared_neighbours(own, own, "image_to_image") == 1
    assert 0 <= (shared_neighbours(own, full, "image_to_image") or 0) < 1


# ---------------------------------------------------------------- pictures


def test_images_are_read_at_their_place_as_the_stream_gives_them(tmp_path):
    [shard] = scan(str(write_pool(tmp_path, 1, 5)))
    wanted = {"000000001", "000000004", "absent"}
    found = dict(read_images(shard, wanted))
    assert found == {"000000001": image_bytes(1), "000000004": image_bytes(4)}
    assert dict(read_images(shard, set())) == {}


def test_headers_are_read_once_however_many_shards_there_are(tmp_path):
    shards = scan(str(write_pool(tmp_path, 150, 1)))
    wanted = {f"{index:05d}0000": image_bytes(index) for index in range(150)}
    before = {key: data for shard in shards for key, data in read_images(shard, wanted.keys())}
    for shard in shards:
        with Path(shard.url).open("r+b") as file:
            file.write(bytes(512))  # the first header: no tar any more, but every image is in its place
    after = {key: data for shard in shards for key, data in read_images(shard, wanted.keys())}
    assert before == after == wanted


def test_the_first_sample_of_a_repeated_key_counts(tmp_path):
    members = [*sample_members("a", "x", 1), *sample_members("b", "y", 2), ("a.jpg", b"another")]
    shard = Shard("s", str(write_tar(tmp_path / "s.tar", members)), "1")
    assert dict(read_images(shard, {"a"})) == {"a": image_bytes(1)}


def test_pictures_that_are_gone_have_a_reason_each(tmp_path):
    pool = write_pool(tmp_path, 3, 3)
    shards = {shard.name: shard for shard in scan(str(pool))}
    (pool / "00001.tar").unlink()
    (pool / "00002.tar").write_bytes(b"no tar at all, but long enough to be read as a header" * 20)
    wanted = {
        ("00000", "000000000"): hashlib.sha256(image_bytes(0)).hexdigest(),
        ("00000", "000000001"): "0" * 64,
        ("00000", "absent"): None,
        ("00001", "000010000"): None,
        ("00002", "000020000"): None,
        ("00009", "x"): None,
    }
    found = thumbnails(shards, wanted)
    problems = [found[place].problem for place in wanted]
    assert problems[0] is None
    assert problems[1] == "the image was replaced since it was read"
    assert problems[2] == "no longer in shard 00000"
    assert problems[3] == "shard 00001 is gone"
    assert (problems[4] or "").startswith("shard 00002 is not a tar")
    assert problems[5] == "shard 00009 is gone"
    data = found["00000", "000000000"].webp
    assert data is not None
    assert data[8:12] == b"WEBP"


def test_damaged_images_are_placeholders_and_counted(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.png", b"\x89PNG broken"), ("a.txt", b"a"), *sample_members("b", "b")])
    tiles = (Tile(uid(0), "s", "a", "a"), Tile(uid(1), "s", "b", "b"), Tile(uid(1), "s", "b", "b"))
    gallery = Gallery("g", (Section("t", "", (Row("", (Group("", tiles),)),)),))
    found = with_pictures(gallery, {s.name: s for s in scan(str(tmp_path))}, {})
    assert found.missing == 1
    assert len(found.images) == 1
    assert [bool(tile.image) for tile in found.tiles] == [False, True, True]
    write_gallery(found, tmp_path / "g.json")
    assert read_gallery(tmp_path / "g.json") == found
    write_page(found, tmp_path / "g.html")
    assert "1 picture cannot be shown" in (tmp_path / "g.html").read_text()


def test_pictures_are_what_a_model_sees():
    """Transparency is dropped, as `pixels.to_rgb` does, and what it hid is there."""
    import io

    from PIL import Image

    from clipcov_pipeline.report.thumbnails import make_thumbnail

    file = io.BytesIO()
    Image.new("RGBA", (300, 100), (0, 200, 0, 0)).save(file, "PNG")
    with Image.open(io.BytesIO(make_thumbnail(file.getvalue()))) as small:
        assert small.size == (96, 32)
        assert small.mode == "RGB"
        assert small.getpixel((40, 16)) == pytest.approx((0, 200, 0), abs=5)


def test_captions_and_keys_are_escaped(tmp_path):
    tile = Tile(uid(0), 'sh"><script>1</script>', HOSTILE, HOSTILE, note="<b>", problem="<i>gone</i>")
    row = Row(HOSTILE, (Group("<u>", (tile,)),), note="</div>")
    write_page(Gallery(HOSTILE, (Section("<s>", "&", (row,)),)), tmp_path / "g.html")
    html = (tmp_path / "g.html").read_text()
    for tag in ("<script", "<img", "<b>", "<i>", "<u>", "<s>"):
        assert tag not in html
    assert "&lt;script&gt;document.title=" in html
    assert "http" not in html  # nothing is fetched


def test_long_captions_are_cut_and_whole_in_the_title(tmp_path):
    caption = "word " * 200
    gallery = Gallery("g", (Section("t", "", (Row("", (Group("", (Tile("u", "s", "k", caption),)),)),)),))
    write_page(gallery, tmp_path / "g.html")
    html = (tmp_path / "g.html").read_text()
    assert html.count(caption) == 1
    assert "word word…</div>" in html


def test_equal_captions_everywhere(tmp_path):
    """A pool where all captions are the same: the sheets are drawn all the same."""
    pool, labels, _, _ = some_pool([0] * 20)
    gallery = subset_gallery("s", ranking(list(range(20))), 10, labels, pool)
    gallery = with_captions(gallery, {("00000", f"k{i}"): "the same" for i in range(20)})
    assert {tile.caption for tile in gallery.tiles} == {"the same"}
    write_sheet(gallery, tmp_path / "sheet.webp")


# ---------------------------------------------------------------- in the graph


@pytest.mark.slow
def test_the_galleries_of_the_lab_show_its_samples(built_lab: Lab) -> None:
    project = built_lab.project()
    by_name = project.plan().by_name
    folder = project.store.folder(by_name["subset_galleries/clipcov-f0.5"].record)
    gallery = read_gallery(folder / "gallery.json")
    manifests = {s.name: read_shard(s, max_pixels=10**8).manifest for s in project.world.shards}
    rows = {(r["shard"], r["key"]): r for m in manifests.values() for r in m.iter_rows(named=True)}
    subset = project.store.folder(by_name["subsets/clipcov-f0.5"].record) / "subset.parquet"
    chosen = set(pl.read_parquet(subset)["uid"])
    assert gallery.missing == 0
    for tile in gallery.tiles:
        row = rows[tile.shard, tile.key]
        assert (tile.uid, tile.caption) == (row["uid"], row["caption"])
    high, low, missed = gallery.sections[0].rows
    assert {tile.uid for row in (high, low) for group in row.groups for tile in group.tiles} <= chosen
    assert not {tile.uid for group in missed.groups for tile in group.tiles} & chosen
    arm = project.store.folder(by_name["checkpoint_galleries/random-f0.5-s0"].record)
    assert len(read_gallery(arm / "gallery.json").sections[0].rows) == 12
    assert (arm / "gallery.html").stat().st_size < 1 << 20


@pytest.mark.slow
def test_a_checkpoints_neighbours_agree_with_its_own_encoder(built_lab: Lab) -> None:
    from clipcov_pipeline.pool.samples import iter_samples
    from clipcov_pipeline.proxy.encoder import load_encoder
    from clipcov_pipeline.proxy.models import ModelSpec

    project = built_lab.project()
    by_name = project.plan().by_name
    scores = project.store.folder(by_name["scores/clipcov-f0.5-s0@vendor"].record)
    found = json.loads((scores / "neighbours.json").read_text())
    checkpoint = project.store.folder(by_name["checkpoints/clipcov-f0.5-s0"].record)
    encoder = load_encoder(ModelSpec("clipcov-tiny-RN", str(checkpoint / "open_clip_pytorch_model.bin")))
    samples = list(iter_samples(Shard("00000", str(built_lab.folder / "vendor" / "00000.tar"), ""), None))
    images = encoder.encode_images(sample.image for sample in samples)
    place = {sample.key: row for row, sample in enumerate(samples)}
    for query in found:
        similarity = images @ images[place[query["key"]]]
        for neighbour in query["image_to_image"]:
            assert neighbour["similarity"] == pytest.approx(similarity[place[neighbour["key"]]], abs=1e-3)


def test_the_package_holds_its_templates():
    import clipcov_pipeline

    folder = Path(clipcov_pipeline.__file__).parent / "report" / "templates"
    found = {path.name for path in folder.iterdir()}
    assert {"gallery.html.j2", "report.html.j2", "parts.j2", "style.css"} <= found


@pytest.mark.parametrize(
    ("total", "count", "places"),
    [(10, 1, [0]), (10, 2, [0, 9]), (10, 4, [0, 3, 6, 9]), (3, 5, [0, 1, 2]), (0, 1, []), (4, 0, [])],
)
def test_places_are_evenly_spread(total: int, count: int, places: list[int]) -> None:
    assert evenly(total, count) == places
