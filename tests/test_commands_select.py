"""``clipcov select``, ``clipcov explain`` and ``clipcov bench selection``, as a user calls them."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import Pool, explain, rank

N, K, D = 900, 5, 24


@pytest.fixture(scope="module")
def arrays():
    return synthetic_arrays(N, K, D)


@pytest.fixture(scope="module")
def uids():
    rng = np.random.default_rng(5)
    return [rng.bytes(16).hex() for _ in range(N)]


@pytest.fixture(scope="module")
def sources(arrays, uids, tmp_path_factory):
    """The same pool in every form the command reads."""
    import lancedb

    folder = tmp_path_factory.mktemp("sources")
    image, text, labels, similarity = arrays

    def lists(x):
        return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])

    captions = [f"caption {i % 100}" for i in range(N)]
    columns = {"uid": uids, "latent_class": labels, "label_similarity": similarity, "caption": captions}
    table = pa.table({**columns, "image_embedding": lists(image), "text_embedding": lists(text)})
    lancedb.connect(folder).create_table("pool", table)
    pq.write_table(table, folder / "pool.parquet", row_group_size=250)
    np.savez(folder / "pool.npz", image_embedding=image, text_embedding=text, **columns)
    in_bytes = {**columns, "uid": np.array(uids, "S"), "caption": np.array(captions, "S")}
    np.savez(folder / "bytes.npz", image_embedding=image, text_embedding=text, **in_bytes)
    np.save(folder / "image.npy", image)
    np.save(folder / "text.npy", text)
    pl.DataFrame(columns).sample(fraction=1.0, shuffle=True, seed=0).write_parquet(folder / "labels.parquet")
    pl.DataFrame({"latent_class": labels, "label_similarity": similarity}).write_parquet(
        folder / "rows.parquet"
    )
    retrieval = folder / "retrieval"
    for name in ("img_emb", "text_emb", "metadata"):
        (retrieval / name).mkdir(parents=True)
    for part, at in enumerate(range(0, N, 80)):
        rows = slice(at, at + 80)
        np.save(retrieval / "img_emb" / f"img_emb_{part}.npy", image[rows])
        np.save(retrieval / "text_emb" / f"text_emb_{part}.npy", text[rows])
        frame = pl.DataFrame({"uid": uids[rows], "caption": captions[rows]})
        frame.write_parquet(retrieval / "metadata" / f"metadata_{part}.parquet")
    return folder


def run(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    "source",
    [
        ["pool.lance"],
        ["pool.lance", "--labels", "labels.parquet"],
        ["pool.parquet"],
        ["pool.npz"],
        ["image.npy", "--text", "text.npy", "--labels", "rows.parquet"],
        ["retrieval", "--labels", "labels.parquet"],
    ],
    ids=" ".join,
)
def test_every_source_gives_the_same_subset(sources, arrays, uids, tmp_path, source):
    source = [item if item.startswith("--") else sources / item for item in source]
    result = run("select", *source, "--fraction", 0.1, "--out", tmp_path / "deep" / "subset")
    assert result.exit_code == 0
    assert "F " in result.output
    expected = rank(Pool.from_arrays(*arrays, uid=uids), budget=0.1)
    frame = pl.read_parquet(tmp_path / "deep" / "subset.parquet")
    assert frame.columns == ["uid", "rank", "gain", "latent_class"]
    named = source[0].name != "image.npy"
    assert frame["uid"].to_list() == [uids[row] if named else str(row) for row in expected.rows]
    assert frame["rank"].to_list() == list(range(1, 91))
    np.testing.assert_allclose(frame["gain"].to_numpy(), expected.gains, atol=1e-9)
    np.testing.assert_array_equal(frame["latent_class"].to_numpy(), arrays[2][expected.rows])
    if named:
        datacomp = np.load(tmp_path / "deep" / "subset.npy")
        assert datacomp.dtype == np.dtype("u8,u8")
        assert [f"{high:016x}{low:016x}" for high, low in datacomp.tolist()] == sorted(frame["uid"].to_list())
    assert len(list((tmp_path / "deep").iterdir())) == (3 if named else 2)


def test_the_report(sources, arrays, tmp_path):
    run("select", sources / "pool.npz", "--count", 120, "--mode", "notebook", "--out", tmp_path / "a.parquet")
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["params"]["mode"] == "notebook"
    assert report["subset"]["pairs"] == 120
    assert report["pool"]["pairs"] == N
    assert sum(taken for taken, _ in report["class_counts"].values()) == 120
    assert [size for _, size in report["class_counts"].values()] == np.bincount(arrays[2]).tolist()
    terms = report["objective"]
    assert terms["F"] == pytest.approx(sum(terms[name] for name in terms if name != "F"))
    assert set(report["seconds"]) == {"read", "rank", "objective", "write"}
    assert min(report["anonymous_bytes"].values()) > 1e6


def test_methods_and_parameters(sources, arrays, tmp_path):
    pool = Pool.from_arrays(*arrays)
    options = [
        "--param",
        'weights={"inter": 0}',
        "--param",
        "class_balance=proportional",
        "--param",
        "class_floor=3",
    ]
    run("select", sources / "image.npy", "--text", sources / "text.npy", "--labels", sources / "rows.parquet",
        "--count", 50, *options, "--out", tmp_path / "a")  # fmt: skip
    expected = rank(pool, budget=50, weights={"inter": 0}, class_balance="proportional", class_floor=3)
    assert pl.read_parquet(tmp_path / "a.parquet")["uid"].to_list() == [str(row) for row in expected.rows]
    # a method that reads no classes needs none
    run("select", sources / "image.npy", "--text", sources / "text.npy", "--method", "random", "--seed", 3,
        "--out", tmp_path / "b")  # fmt: skip
    expected = rank(pool, "random", seed=3)
    assert pl.read_parquet(tmp_path / "b.parquet")["uid"].to_list() == [str(row) for row in expected.rows]
    filters = '{"drop_duplicate_captions": true, "caption_length": [10, 99]}'
    for source in ("pool.lance", "pool.parquet", "pool.npz", "bytes.npz"):
        run(
            "select",
            sources / source,
            "--method",
            "clip_score",
            "--param",
            f"filters={filters}",
            "--out",
            tmp_path / "c",
        )
        assert len(pl.read_parquet(tmp_path / "c.parquet")) == 90


@pytest.mark.parametrize("source", ["pool.lance", "pool.parquet", "pool.npz"])
def test_classes_from_prompts_or_clusters(sources, arrays, tmp_path, source):
    from clipcov_pipeline.selection.latent_classes import zero_shot_labels

    prompts = np.random.default_rng(0).standard_normal((4, D)).astype(np.float32)
    prompts /= np.linalg.norm(prompts, axis=1, keepdims=True)
    np.save(tmp_path / "prompts.npy", prompts)
    run(
        "select",
        sources / source,
        "--class-embedding",
        tmp_path / "prompts.npy",
        "--count",
        60,
        "--out",
        tmp_path / "a",
    )
    labels, similarity, _ = zero_shot_labels(arrays[0], prompts, arrays[1])
    uid = pl.read_parquet(sources / "labels.parquet")
    by_uid = dict(
        zip(pl.read_parquet(sources / "pool.parquet", columns=["uid"])["uid"], range(N), strict=True)
    )
    expected = rank(Pool.from_arrays(*arrays[:2], labels, similarity), budget=60).rows
    frame = pl.read_parquet(tmp_path / "a.parquet")
    assert {by_uid[name] for name in frame["uid"]} == set(expected.tolist())
    assert len(uid) == N
    run("select", sources / source, "--clusters", 3, "--count", 60, "--out", tmp_path / "b")
    assert pl.read_parquet(tmp_path / "b.parquet")["latent_class"].max() <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.npz", "--count", 5], "nothing.npz does not exist"),
        (["pool.npz", "--count", 0], "count: found 0, expected 1 to 900"),
        (["pool.npz", "--count", 10**30], f"count: found {10**30}, expected 1 to 900"),
        (["pool.npz", "--fraction", 1.5], "fraction: found 1.5, expected a number above 0 and at most 1"),
        (["pool.npz", "--fraction", 0.1, "--count", 3], "found --fraction 0.1 and --count 3"),
        (["pool.npz", "--method", "best"], "method: found 'best', expected one of clipcov"),
        (["pool.npz", "--mode", "fast"], "found 'fast', expected one of greedy, strict, notebook"),
        (["pool.npz", "--param", "weights"], "--param: found 'weights', expected NAME=VALUE"),
        (["pool.npz", "--method", "c_rho"], "c_rho: needs the column early_similarity"),
        (["image.npy"], "give those of the captions with --text"),
        (["image.npy", "--text", "text.npy"], "give --labels, --class-embedding or --clusters"),
        (["image.npy", "--text", "pool.npz", "--clusters", 3], "pool.npz"),
        (["image.npy", "--text", "text.npy", "--labels", "none.parquet"], "none.parquet does not exist"),
        (["labels.parquet"], "missing column image_embedding, text_embedding"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_bad_input_is_told_and_leaves_no_file(sources, tmp_path, arguments, message):
    files = {path.name for path in sources.iterdir()} | {"nothing.npz", "none.parquet"}
    given = [sources / item if item in files else item for item in arguments]
    with pytest.raises(InputError, match=re.escape(message)):
        run("select", *given, "--out", tmp_path / "subset")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        ("img_emb/img_emb_3.npy", "11 image, 12 text and 12 metadata"),
        ("metadata/metadata_3.parquet", "12 image, 12 text and 11 metadata"),
    ],
)
def test_a_clip_retrieval_folder_short_of_a_part_is_refused(sources, tmp_path, lost, found):
    """Else every later row would have another sample's uid."""
    shutil.copytree(sources / "retrieval", tmp_path / "pool")
    (tmp_path / "pool" / lost).unlink()
    with pytest.raises(
        InputError, match=re.escape(f"found {found} files, expected those of the same numbers")
    ):
        run("select", tmp_path / "pool", "--clusters", 3, "--out", tmp_path / "subset")


def test_a_column_of_another_length_is_refused(arrays, uids, tmp_path):
    image, text, labels, similarity = arrays
    np.savez(tmp_path / "p.npz", image_embedding=image, text_embedding=text, uid=uids[:-1],
             latent_class=labels, label_similarity=similarity)  # fmt: skip
    with pytest.raises(InputError, match=f"found {N - 1} values of uid, expected {N}, one a pair"):
        run("select", tmp_path / "p.npz", "--out", tmp_path / "subset")


def test_labels_with_a_uid_twice_are_refused(sources, tmp_path):
    labels = pl.read_parquet(sources / "labels.parquet")
    pl.concat([labels, labels.head(2).with_columns(latent_class=0)]).write_parquet(tmp_path / "twice.parquet")
    with pytest.raises(InputError, match="found 2 repeated uids, expected distinct ones"):
        run("select", sources / "retrieval", "--labels", tmp_path / "twice.parquet", "--out", tmp_path / "a")


def test_class_embeddings_that_are_not_of_unit_norm_are_refused(sources, tmp_path):
    prompts = np.eye(4, D, dtype=np.float32)
    prompts[2] *= 0.7
    np.save(tmp_path / "prompts.npy", prompts)
    with pytest.raises(InputError, match=r"prompts.npy: found norm 0.7 in row 2, expected 1"):
        run(
            "select",
            sources / "pool.npz",
            "--class-embedding",
            tmp_path / "prompts.npy",
            "--out",
            tmp_path / "a",
        )


def test_a_missing_caption_has_no_length(sources, tmp_path):
    table = pq.read_table(sources / "pool.parquet")
    captions = [None, *table["caption"].to_pylist()[1:]]
    at = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(at, "caption", [captions]), tmp_path / "pool.parquet")
    run("select", tmp_path / "pool.parquet", "--method", "clip_score", "--param",
        'filters={"caption_length": [1, 99]}', "--out", tmp_path / "a")  # fmt: skip
    frame = pl.read_parquet(tmp_path / "a.parquet")
    assert len(frame) == N - 1
    assert table["uid"][0].as_py() not in set(frame["uid"])


def test_exit_code_and_one_line(sources, tmp_path):
    command = [
        sys.executable,
        "-m",
        "clipcov_pipeline.cli",
        "select",
        str(sources / "pool.npz"),
        "--fraction",
        "2",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "a")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "clipcov: fraction: found 2.0, expected a number above 0 and at most 1 (2 % is 0.02)"
    )


def test_a_failed_write_leaves_what_was_there(sources, tmp_path, monkeypatch):
    run("select", sources / "pool.npz", "--count", 30, "--out", tmp_path / "a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_args, **_options):
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        run("select", sources / "pool.npz", "--count", 40, "--out", tmp_path / "a")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("balance", ["global", "proportional"])
def test_explain_is_what_the_matrices_say(arrays, uids, balance):
    image, text, labels, similarity = (column.astype(np.float64) for column in arrays)
    pool = Pool.from_arrays(*arrays, uid=uids)
    ranking = rank(pool, class_balance=balance)
    for row in (int(ranking.rows[12]), int(ranking.rows[89]), int(ranking.rows[90]), int(ranking.rows[-1])):
        found = explain(pool, uids[row], 0.1, {"class_balance": balance})
        at = int(np.flatnonzero(ranking.rows == row)[0])
        members = np.flatnonzero(labels == labels[row])
        s = image[row] @ text[members].T + text[row] @ image[members].T
        taken = ranking.rows[: min(at, 90)]
        before = np.isin(members, taken)
        assert found.rank == at + 1
        assert found.chosen == (at < 90)
        assert found.rank_in_class == (labels[ranking.rows[: at + 1]] == labels[row]).sum()
        assert found.terms["class"] == pytest.approx(s.mean(), abs=1e-5)
        assert found.terms["self"] == pytest.approx(2 * image[row] @ text[row], abs=1e-5)
        assert found.terms["label"] == pytest.approx(similarity[row] / 2, abs=1e-5)
        assert found.base == pytest.approx(sum(found.terms.values()))
        assert found.redundancy == pytest.approx(s[before].sum() / len(members), abs=1e-5)
        assert found.score == ranking.gains[at]
        if found.chosen:
            assert found.gain == pytest.approx(found.score, abs=1e-5)
        else:
            assert found.gain <= found.cut + 1e-6
        chosen = ranking.rows[:90][(labels[ranking.rows[:90]] == labels[row]) & (ranking.rows[:90] != row)]
        nearest = chosen[np.argsort(-s[np.searchsorted(members, chosen)])][:5]
        assert [entry["uid"] for entry in found.neighbours] == [uids[i] for i in nearest]


def test_explain_command(sources, arrays, uids):
    ranking = rank(Pool.from_arrays(*arrays), budget=0.1)
    inside, outside = uids[ranking.rows[3]], next(uids[i] for i in range(N) if i not in set(ranking.rows))
    result = run("explain", inside, sources / "pool.lance", "--fraction", 0.1)
    assert f"{inside} is in: rank 4 of the whole" in result.output
    assert "nearest chosen" in result.output
    result = run("explain", outside, sources / "pool.npz", "--count", 90)
    assert f"{outside} is out" in result.output
    result = run("explain", outside, sources / "pool.npz", "--count", 90, "--json", "--neighbours", 2)
    found = json.loads(result.output[result.output.index("{") :])
    assert found["budget"] == 90
    assert len(found["neighbours"]) == 2
    for options in (["--mode", "notebook"], ["--param", "class_balance=global"],
                    ["--param", "clip_negative=true"],
                    ["--param", "redundancy=budget_share"]):  # fmt: skip
        assert outside in run("explain", outside, sources / "pool.npz", "--count", 90, *options).output
    with pytest.raises(InputError, match="uid: found 'nobody', which is none of the 900 in the pool"):
        run("explain", "nobody", sources / "pool.npz", "--count", 90)
    with pytest.raises(InputError, match="expected --fraction or --count"):
        run("explain", inside, sources / "pool.npz")


FILTERS = {"drop_duplicate_captions": True, "caption_length": [10, 99]}


@pytest.mark.parametrize("balance", ["global", "proportional"])
def test_explain_compares_a_sample_with_those_that_filters_leave_beside_it(arrays, uids, balance):
    """Terms, redundancy and gain are those of the ranking: of the part that passes, or of the rest."""
    captions = np.arange(N) % 100
    extra = {"caption_hash": captions, "caption_length": np.full(N, 12)}
    pool = Pool.from_arrays(*arrays, uid=uids, **extra)
    params = {"class_balance": balance, "filters": {**FILTERS, "rejected": "last"}}
    ranking = rank(pool, **params)
    passing = np.sort(ranking.rows[:100])
    assert len(set(captions[passing])) == 100
    rest = np.setdiff1d(np.arange(N), passing)
    for at in (0, 30, 99, 100, 150, 400, 899):
        found = explain(pool, uids[ranking.rows[at]], 200, params)
        rows = passing if at < 100 else rest
        part = Pool.from_arrays(*(column[rows] for column in arrays), uid=[uids[i] for i in rows])
        alone = explain(part, found.uid, 100, {"class_balance": balance})
        assert (found.rank, found.chosen, found.rejected) == (at + 1, at < 200, at >= 100)
        assert found.score == ranking.gains[at]
        assert found.terms == pytest.approx(alone.terms, abs=1e-6)
        assert (found.class_size, found.class_chosen) == (alone.class_size, alone.class_chosen)
        assert found.gain == pytest.approx(alone.gain, abs=1e-6)
        if found.chosen:
            assert found.gain == pytest.approx(found.score, abs=1e-5)
        assert [n["uid"] for n in found.neighbours] == [n["uid"] for n in alone.neighbours]
        assert all(uids[ranking.rows[n["rank"] - 1]] == n["uid"] for n in found.neighbours)


def test_explain_what_filters_reject(sources, arrays, uids):
    params = {"filters": FILTERS}
    extra = {"caption_hash": np.arange(N) % 100, "caption_length": np.full(N, 12)}
    pool = Pool.from_arrays(*arrays, uid=uids, **extra)
    rejected = next(uid for uid in uids if uid not in set(pool.names(rank(pool, **params).rows)))
    found = explain(pool, rejected, 0.1, params)
    assert (found.rejected, found.chosen, found.rank, found.score, found.cut) == (
        True,
        False,
        None,
        None,
        None,
    )
    for source in ("pool.lance", "pool.parquet", "pool.npz"):
        output = run("explain", rejected, sources / source, "--fraction", 0.1, "--param",
                     f"filters={json.dumps(FILTERS)}").output  # fmt: skip
        assert f"{rejected} is out: the filters reject it; not ranked" in output
        assert "none of those that it is ranked with is in" in output


def test_explain_a_class_without_a_place(uids):
    image, text, _, similarity = synthetic_arrays(N, K, D)
    labels = np.zeros(N, np.int64)
    labels[:3] = 1
    found = explain(Pool.from_arrays(image, text, labels, similarity, uid=uids), uids[0], 0.1)
    assert (found.chosen, found.class_chosen, found.cut) == (False, 0, None)


@pytest.mark.slow
def test_bench_selection(tmp_path, monkeypatch):
    from clipcov_pipeline.bench import peers, selection_speed

    monkeypatch.setattr(selection_speed, "NOTEBOOK_PAIRS", 3000)
    monkeypatch.setattr(selection_speed, "NOTEBOOK_CLASSES", (3, 2))
    monkeypatch.setattr(peers, "PEER_PAIRS", 300)
    scratch, report = tmp_path / "scratch", tmp_path / "bench.json"
    result = run("bench", "selection", "--pairs", 5000, "--classes", 8, "--dim", 32, "--repeat", 1, "--lance",
                 "--peers", "--scratch-dir", scratch, "--json", report)  # fmt: skip
    assert list(scratch.iterdir()) == []
    found = json.loads(report.read_text())
    measured = {row["what"] for row in found["rows"]}
    assert {
        "rank all, cold",
        "rank all, warm",
        "zero-shot labels",
        "LanceDB table to parquet, 10 %",
    } <= measured
    assert {"floor: read the embeddings once", "floor: sgemm of the labels"} <= measured
    assert {f"notebook: {name} of {k} classes" for name in ("matrices", "loop") for k in (3, 2)} <= measured
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert [one["classes"] for one in found["notebook"]] == [3, 2]
    assert min(share for one in found["notebook"] for share in one["jaccard"].values()) >= 0.999
    assert all(what in result.output for what in measured)
    for name, state in found["peers"].items():
        assert state == "measured" or f"{name}: not installed" in result.output


def test_bench_checks_the_disk(tmp_path):
    with pytest.raises(InputError, match="GB free, expected"):
        run("bench", "selection", "--pairs", 10**12, "--scratch-dir", tmp_path)
    assert list(tmp_path.iterdir()) == []
