"""uids in the forms in which people keep them, in every source that a selection reads."""

import uuid

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import Pool
from clipcov_pipeline.selection.uids import uid_bytes
from clipcov_pipeline.uuids import hex_of

N, D = 40, 8
# the last bytes are zeros in some: numpy's bytes lose these
RAW = [bytes([k + 1]) + (b"\0" * 15 if k % 3 == 0 else np.random.default_rng(k).bytes(15)) for k in range(N)]
HEX = [f"{int.from_bytes(raw, 'big'):032x}" for raw in RAW]
UUIDS = [uuid.UUID(bytes=raw) for raw in RAW]


def select(source, out, *options):
    result = CliRunner().invoke(cli, ["select", str(source), "--out", str(out), *map(str, options)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return pl.read_parquet(f"{out}.parquet")["uid"].to_list()


def table(uid, n=N, labels=True):
    image, text, classes, similarity = synthetic_arrays(N, 3, D)
    columns = {} if uid is None else {"uid": uid}
    columns |= {
        "image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(image[:n].reshape(-1)), D),
        "text_embedding": pa.FixedSizeListArray.from_arrays(pa.array(text[:n].reshape(-1)), D),
    }
    own = {"latent_class": classes[:n], "label_similarity": similarity[:n]}
    return pa.table({**columns, **(own if labels else {})})


FORMS = {
    "binary16": pa.array(RAW, pa.binary(16)),
    "binary": pa.array(RAW, pa.binary()),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array(RAW, pa.binary(16))),
    "text in bytes": pa.array([text.encode() for text in HEX], pa.binary()),
    "categorical": pa.array(HEX).dictionary_encode(),
    "text": pa.array(HEX),
}


@pytest.mark.parametrize("form", FORMS)
def test_128_bits_are_hex_in_parquet_and_lancedb(form, tmp_path):
    import lancedb

    pq.write_table(table(FORMS[form]), tmp_path / "pool.parquet")
    assert sorted(select(tmp_path / "pool.parquet", tmp_path / "a")) == sorted(HEX)
    halves = np.load(tmp_path / "a.npy")
    assert sorted((int(high) << 64) | int(low) for high, low in halves) == sorted(u.int for u in UUIDS)
    if form == "categorical":
        return  # LanceDB has its own way with these
    lancedb.connect(tmp_path).create_table("pool", table(FORMS[form]))
    assert sorted(select(tmp_path / "pool.lance", tmp_path / "b")) == sorted(HEX)


def test_labels_with_uids_in_another_form_go_to_their_pairs(tmp_path):
    pq.write_table(table(FORMS["uuid"], labels=False), tmp_path / "pool.parquet")
    whole = table(FORMS["text"])
    labels = pl.DataFrame(
        {"uid": HEX, "latent_class": whole["latent_class"].to_numpy(), "label_similarity": 0.1}
    )
    by_uid = dict(labels.select("uid", "latent_class").iter_rows())
    for name, changed in (
        ("categorical", labels.with_columns(pl.col("uid").cast(pl.Categorical))),
        ("binary", labels.with_columns(uid=pl.Series(RAW, dtype=pl.Binary))),
    ):
        changed.sample(fraction=1.0, shuffle=True, seed=2).write_parquet(tmp_path / f"{name}.parquet")
        select(tmp_path / "pool.parquet", tmp_path / "a", "--labels", tmp_path / f"{name}.parquet")
        found = pl.read_parquet(tmp_path / "a.parquet").to_dicts()
        assert {row["uid"]: row["latent_class"] for row in found} == by_uid


@pytest.mark.parametrize("column", ["latent_class", "label_similarity"])
def test_a_missing_label_is_one_line(column, tmp_path):
    pq.write_table(table(FORMS["text"], labels=False), tmp_path / "pool.parquet")
    labels = pl.DataFrame({"uid": HEX, "latent_class": 0, "label_similarity": 0.1})
    lost = labels.with_columns(pl.when(pl.col("uid") != HEX[7]).then(pl.col(column)).alias(column))
    lost.write_parquet(tmp_path / "labels.parquet")
    with pytest.raises(InputError, match=f"found 1 of {N} values of {column} missing, first in row 7"):
        select(tmp_path / "pool.parquet", tmp_path / "a", "--labels", tmp_path / "labels.parquet")


@pytest.mark.parametrize("form", ["text", "binary16", "uuid", "categorical"])
def test_a_missing_uid_is_one_line(form, tmp_path):
    if form == "uuid":
        storage = pa.array([*RAW[:2], None, *RAW[3:]], pa.binary(16))
        taken = pa.ExtensionArray.from_storage(pa.uuid(), storage)
    else:
        taken = FORMS[form].take(pa.array([0, 1, None, *range(3, N)]))
    pq.write_table(table(taken), tmp_path / "pool.parquet")
    with pytest.raises(InputError, match=f"pool.parquet: uid: found 1 of {N} uids missing, first in row 2,"):
        select(tmp_path / "pool.parquet", tmp_path / "a")
    with pytest.raises(InputError, match="1 of 3 uids missing, first in row 1"):
        Pool.from_arrays(*(part[:3] for part in synthetic_arrays(N, 3, D)), uid=["a", None, "b"])  # type: ignore[list-item]


def test_a_folder_of_parquet_files_is_one_pool(tmp_path):
    whole, folder = table(FORMS["uuid"]), tmp_path / "spark.parquet"
    folder.mkdir()
    pq.write_table(whole, tmp_path / "one.parquet")
    for part, at in enumerate(range(0, N, 15)):
        # each part in an order of its own: columns go by name
        names = whole.column_names if part % 2 else whole.column_names[::-1]
        pq.write_table(whole.slice(at, 15).select(names), folder / f"part-{part:05d}.parquet")
    (folder / "_SUCCESS").touch()
    (folder / "_metadata.parquet").write_bytes(b"none")
    assert select(folder, tmp_path / "a") == select(tmp_path / "one.parquet", tmp_path / "b")

    pq.write_table(whole.drop(["uid"]), folder / "part-00009.parquet")
    with pytest.raises(InputError, match=r"part-00009.parquet: missing column uid, which other parts have"):
        select(folder, tmp_path / "a")
    (folder / "latent_class=3").mkdir()
    pq.write_table(whole, folder / "latent_class=3" / "part-0.parquet")
    with pytest.raises(InputError, match="found the folder latent_class=3, whose name is a column"):
        select(folder, tmp_path / "a")


def retrieval(folder, metadata):
    """A folder of clip-retrieval with parts of 25 and 15 pairs."""
    image, text, _, _ = synthetic_arrays(N, 3, D)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for part, rows in enumerate((slice(0, 25), slice(25, N))):
        np.save(folder / "img_emb" / f"img_emb_{part}.npy", image[rows])
        np.save(folder / "text_emb" / f"text_emb_{part}.npy", text[rows])
    for part, frame in enumerate(metadata):
        frame.write_parquet(folder / "metadata" / f"metadata_{part}.parquet")
    return folder


def test_parts_of_clip_retrieval_with_other_json_keys_are_read(tmp_path):
    captions = [f"a caption of {'x' * k}" for k in range(N)]
    first = pl.DataFrame({"image_path": HEX[:25], "caption": captions[:25], "uid": HEX[:25], "width": 3})
    second = pl.DataFrame({"uid": HEX[25:], "exif": "{}", "caption": captions[25:], "height": 2.5})
    folder = retrieval(tmp_path / "pool", [first, second])
    options = ("--clusters", 2, "--method", "clip_score")
    image, text, _, _ = synthetic_arrays(N, 3, D)
    score = np.einsum("nd,nd->n", image.astype(float), text.astype(float))
    assert select(folder, tmp_path / "a", *options) == [HEX[row] for row in np.argsort(-score, kind="stable")]


@pytest.mark.parametrize(
    ("sizes", "lost", "text"),
    [
        ((20, 20), None, "metadata_0.parquet: found 20 rows, expected 25 as in img_emb_0.npy"),
        ((25, 15), 1, "metadata_1.parquet: missing column uid, which other parts have"),
    ],
)
def test_metadata_that_does_not_fit_is_one_line(sizes, lost, text, tmp_path):
    frames = [pl.DataFrame({"uid": HEX[: sizes[0]]}), pl.DataFrame({"uid": HEX[sizes[0] :]})]
    if lost is not None:
        frames[lost] = frames[lost].select(image_path="uid")
    folder = retrieval(tmp_path / "pool", frames)
    with pytest.raises(InputError, match=text):
        select(folder, tmp_path / "a", "--clusters", 2)


def test_every_form_comes_to_the_same_text():
    expected = [text.encode() for text in HEX]
    for values in (
        RAW,
        UUIDS,
        np.array(RAW, "V16"),
        np.array(UUIDS, object),
        HEX,
        np.array(HEX),
        *FORMS.values(),
    ):
        assert uid_bytes(values).tolist() == expected
    assert uid_bytes([7, 12]).tolist() == uid_bytes(np.array([7, 12])).tolist() == [b"7", b"12"]
    assert hex_of(str(UUIDS[1]).upper()) == HEX[1]
    assert hex_of(HEX[1]) == HEX[1]
    assert hex_of(HEX[1] + "0") is None
    assert hex_of("a-b") is None
    for wrong, text in (
        ([1.5, 2.0], "found the type double"),
        ([b"\xff\xfe", b"a"], "neither text nor 16"),
        (np.array([b"\xff\xfe"]), "bytes that are no text"),
        (["a", b"b", 3], "several types"),
    ):
        with pytest.raises(InputError, match=text):
            uid_bytes(wrong)


def test_uuids_with_dashes_have_a_datacomp_file_too(tmp_path):
    pq.write_table(table(pa.array([str(u) for u in UUIDS])), tmp_path / "pool.parquet")
    assert sorted(select(tmp_path / "pool.parquet", tmp_path / "a")) == sorted(map(str, UUIDS))
    halves = np.load(tmp_path / "a.npy")
    assert sorted((int(high) << 64) | int(low) for high, low in halves) == sorted(u.int for u in UUIDS)


def test_source_ids_go_from_the_source_to_the_subset(tmp_path):
    ids = [None if k % 2 else 700 + k for k in range(N)]
    pq.write_table(table(FORMS["uuid"]).append_column("source_id", pa.array(ids)), tmp_path / "pool.parquet")
    select(tmp_path / "pool.parquet", tmp_path / "a")
    found = dict(pl.read_parquet(tmp_path / "a.parquet").select("uid", "source_id").iter_rows())
    assert found == {HEX[k]: None if ids[k] is None else str(ids[k]) for k in range(N)}
    (tmp_path / "list.csv").write_text("uid\n706\n700\n")
    options = ("--method", "external", "--param", f"uids={tmp_path / 'list.csv'}")
    assert select(tmp_path / "pool.parquet", tmp_path / "b", *options) == [HEX[6], HEX[0]]
