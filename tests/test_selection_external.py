"""Lists of uids that somebody else chose, in every format, as rankings and on the command line."""

import uuid
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import Pool, explain, rank
from clipcov_pipeline.selection.explain import describe
from clipcov_pipeline.selection.external import listed
from clipcov_pipeline.subsets.files import write_datacomp_npy

N = 300
UIDS = [np.random.default_rng(row).bytes(16).hex() for row in range(N)]
CHOSEN = [int(row) for row in np.random.default_rng(1).permutation(N)[:40]]


@pytest.fixture(scope="module")
def pool():
    return Pool.from_arrays(*synthetic_arrays(N, 4, 16), uid=UIDS)


def write(path: Path, uids: list[str | None]) -> str:
    match path.suffix:
        case ".parquet":
            pl.DataFrame({"other": range(len(uids)), "uid": uids}).write_parquet(path)
        case ".csv":
            pl.DataFrame({"other": range(len(uids)), "uid": uids}).write_csv(path)
        case ".npy":
            write_datacomp_npy(path, [uid for uid in uids if uid])
    return str(path)


@pytest.mark.parametrize("name", ["list.parquet", "list.csv"])
def test_listed_first_in_the_files_order(pool, tmp_path, name):
    uids = [UIDS[row] for row in CHOSEN]
    path = write(tmp_path / name, [*uids[:5], "0" * 32, uids[2], *uids[5:], None])
    whole = rank(pool, "external", uids=path, fill="random")
    assert whole.rows[:40].tolist() == CHOSEN
    assert sorted(whole.rows) == list(range(N))
    assert whole.gains.tolist() == [1.0] * 40 + [0.0] * (N - 40)
    for budget in (7, 40, 90):
        part = rank(pool, "external", budget, uids=path, fill="random")
        np.testing.assert_array_equal(part.rows, whole.rows[:budget])
        np.testing.assert_array_equal(part.gains, whole.gains[:budget])
    other = rank(pool, "external", uids=path, seed=1, fill="random")
    assert other.rows[:40].tolist() == CHOSEN
    assert not np.array_equal(other.rows[40:], whole.rows[40:])
    assert (listed(pool, path).unknown, listed(pool, path).missing) == (1, 1)


@pytest.mark.parametrize("name", ["list.csv", "list.npy"])
def test_listed_first_in_random_order(pool, tmp_path, name):
    path = write(tmp_path / name, [UIDS[row] for row in CHOSEN])
    params = {"uids": path, "shuffle": name != "list.npy"}  # the order of an .npy means nothing
    one, again, other = (rank(pool, "external", seed=seed, **params).rows for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    for rows in (one, other):
        assert set(rows[:40].tolist()) == set(CHOSEN)
    assert not np.array_equal(one[:40], other[:40])
    in_file = sorted(CHOSEN, key=lambda row: UIDS[row]) if name == "list.npy" else CHOSEN
    assert one[:40].tolist() != in_file


def test_numbers_as_uids_keep_their_zeros(tmp_path):
    pool = Pool.from_arrays(*synthetic_arrays(N, 4, 16), uid=[f"{row:06d}" for row in range(N)])
    path = write(tmp_path / "list.csv", ["000007", "000299"])
    assert rank(pool, "external", 2, uids=path).rows.tolist() == [7, 299]


def test_filters_come_first(pool, tmp_path):
    path = write(tmp_path / "list.csv", [UIDS[row] for row in CHOSEN])
    bound = float(np.median(pool.pair_similarity()))
    ranked = rank(pool, "external", uids=path, filters={"min_similarity": bound})
    passing = [row for row in CHOSEN if pool.pair_similarity()[row] >= bound]
    assert ranked.rows[: len(passing)].tolist() == passing
    assert ranked.gains.sum() == len(passing)
    # none of the listed among what is rejected, or none among what passes
    own = pool.pair_similarity()
    best, worst = (write(tmp_path / f"{row}.csv", [UIDS[row]]) for row in (own.argmax(), own.argmin()))
    filters = {"min_similarity": bound, "rejected": "last"}
    first = rank(pool, "external", uids=best, filters=filters, fill="random")
    assert (first.rows[0], len(first), first.gains.sum()) == (own.argmax(), N, 1)
    last = rank(pool, "external", uids=worst, filters=filters, fill="random")
    assert np.flatnonzero(last.rows == own.argmin()) == np.flatnonzero(last.gains) == (own >= bound).sum()


def test_mistakes_are_named(pool, tmp_path):
    def refused(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            rank(pool, "external", uids=str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused(tmp_path / "none.csv").startswith(f"uids: found no file {tmp_path / 'none.csv'}, expected")
    (tmp_path / "list.txt").write_text("a")
    assert "list.txt, expected a .parquet or .csv with a column uid" in refused(tmp_path / "list.txt")
    pl.DataFrame({"id": ["a"], "name": ["b"]}).write_csv(tmp_path / "columns.csv")
    assert refused(tmp_path / "columns.csv").startswith("uids: found the columns id, name in ")
    (tmp_path / "broken.parquet").write_text("no parquet")
    assert "broken.parquet is not readable as .parquet: " in refused(tmp_path / "broken.parquet")
    np.save(tmp_path / "numbers.npy", np.arange(4))
    assert refused(tmp_path / "numbers.npy").startswith("uids: found int64 of shape (4,) in ")
    others = write(tmp_path / "others.csv", ["a", "b"])
    assert "found none of the 2 uids of" in refused(Path(others))
    assert f"The pool's first uid is {UIDS[0]}" in refused(Path(others))
    assert "found none of the 0 uids of" in refused(Path(write(tmp_path / "empty.csv", [])))
    with pytest.raises(InputError, match="external: needs the column uid, which this pool has not"):
        rank(Pool.from_arrays(*synthetic_arrays(N, 4, 16)), "external", uids=others)


def test_on_the_command_line(tmp_path):
    image, text, *_ = synthetic_arrays(N, 4, 16)
    np.savez(tmp_path / "pool.npz", image_embedding=image, text_embedding=text, uid=UIDS)
    path = write(tmp_path / "list.csv", [*(UIDS[row] for row in CHOSEN), "nobody"])
    arguments = ["--method", "external", "--param", f"uids={path}", "--count", "40"]
    done = CliRunner().invoke(
        cli, ["select", str(tmp_path / "pool.npz"), *arguments, "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert pl.read_parquet(tmp_path / "out.parquet")["uid"].to_list() == [UIDS[row] for row in CHOSEN]
    assert "1 uids of" in done.stderr


def test_nothing_is_filled_up_that_was_not_asked_for(pool, tmp_path):
    path = write(tmp_path / "list.csv", [UIDS[row] for row in CHOSEN])
    assert rank(pool, "external", uids=path).rows.tolist() == CHOSEN
    assert rank(pool, "external", 40, uids=path).rows.tolist() == CHOSEN
    for budget in (41, 0.5):
        with pytest.raises(InputError, match=r"expected at most 40, which .*list.csv lists of this pool"):
            rank(pool, "external", budget, uids=path)
    bound = float(np.median(pool.pair_similarity()[CHOSEN]))
    filters = {"min_similarity": bound}
    passing = [row for row in CHOSEN if pool.pair_similarity()[row] >= bound]
    assert rank(pool, "external", len(passing), uids=path, filters=filters).rows.tolist() == passing
    with pytest.raises(InputError, match=f"expected at most {len(passing)}, which are listed and pass"):
        rank(pool, "external", len(passing) + 1, uids=path, filters=filters)
    last = rank(pool, "external", 40, uids=path, filters={**filters, "rejected": "last"})
    assert set(last.rows.tolist()) == set(CHOSEN)
    assert last.rows[: len(passing)].tolist() == passing


def test_a_list_names_samples_as_people_do(tmp_path):
    """By uid, by a UUID written another way, and by the id that the samples had before."""
    ids = [None if row % 3 else f"row-{row // 2}" for row in range(N)]
    pool = Pool.from_arrays(*synthetic_arrays(N, 4, 16), uid=UIDS, source_id=np.array(ids, object))
    dashed = str(uuid.UUID(UIDS[7])).upper()
    path = write(tmp_path / "list.csv", ["row-6", dashed, "nobody", UIDS[3], UIDS[7], "row-3"])
    found = listed(pool, path)
    assert found.rows.tolist() == [12, 7, 3, 6]
    assert found.unknown == 1
    assert pool.row_of("row-6") == 12
    assert pool.row_of(dashed) == 7
    twice = Pool.from_arrays(
        *synthetic_arrays(N, 4, 16), uid=UIDS, source_id=np.array(["5"] * 2 + [None] * (N - 2), object)
    )
    with pytest.raises(InputError, match=f"the source id of 2 samples.* {UIDS[0]} or {UIDS[1]}"):
        twice.row_of("5")
    assert listed(twice, write(tmp_path / "numbers.parquet", ["5"])).rows.tolist() == [0, 1]
    taken = pool.take(np.array([12, 0]))
    assert taken.row_of("row-6") == 0
    assert explain(pool, "row-6", 0.5).uid == UIDS[12]
    assert "(source id row-6)" in describe(explain(pool, "row-6", 0.5))


def test_a_uid_that_is_listed_again_weighs_more(tmp_path):
    pool = Pool.from_arrays(*synthetic_arrays(N, 4, 16), uid=UIDS)
    found = listed(pool, write(tmp_path / "list.csv", [UIDS[5], UIDS[2], UIDS[5], "nobody"]))
    assert (found.rows.tolist(), found.weight.tolist()) == ([5, 2], [2.0, 1.0])
    halves = np.array(
        [(int(uid[:16], 16), int(uid[16:], 16)) for uid in (UIDS[5], UIDS[2], UIDS[5])], "u8,u8"
    )
    np.save(tmp_path / "list.npy", halves)
    found = listed(pool, tmp_path / "list.npy")
    assert dict(zip(found.rows.tolist(), found.weight.tolist(), strict=True)) == {5: 2.0, 2: 1.0}


def test_a_list_may_say_how_often_each_sample_is_drawn(tmp_path):
    pool = Pool.from_arrays(*synthetic_arrays(N, 4, 16), uid=UIDS)
    table = pl.DataFrame({"uid": [UIDS[5], None, UIDS[2], UIDS[5]], "weight": [0.5, 9.0, 0.0, 1.0]})
    table.write_parquet(tmp_path / "list.parquet")
    found = listed(pool, tmp_path / "list.parquet")
    assert (found.rows.tolist(), found.weight.tolist()) == ([5], [1.5])
    assert found.never_drawn.tolist() == [2]
    for bad in (-1.0, float("nan"), None):
        table.with_columns(weight=pl.Series([1.0, 1.0, bad, 1.0])).write_parquet(tmp_path / "bad.parquet")
        with pytest.raises(InputError, match=f"found the weight .* of {UIDS[2]} in .*bad.parquet, expected"):
            listed(pool, tmp_path / "bad.parquet")


def test_a_sample_of_weight_0_takes_no_place_of_a_subset(tmp_path):
    pool = Pool.from_arrays(*synthetic_arrays(N, 4, 16), uid=UIDS)
    table = pl.DataFrame({"uid": [UIDS[5], UIDS[2], UIDS[7]], "weight": [1.0, 0.0, 3.0]})
    path = tmp_path / "list.parquet"
    table.write_parquet(path)
    asked = {"method": "external", "uids": str(path), "shuffle": False}
    assert rank(pool, budget=2, **asked).rows.tolist() == [5, 7]
    with pytest.raises(InputError, match="expected at most 2"):
        rank(pool, budget=3, **asked)
    filled = rank(pool, fill="random", **asked).rows.tolist()
    assert filled[:2] == [5, 7]
    assert sorted(filled) == [row for row in range(N) if row != 2]
    table.with_columns(weight=pl.lit(0.0)).write_parquet(path)
    with pytest.raises(InputError, match="3 weights of 0"):
        rank(pool, budget=1, **asked)
