"""What differs between two subsets or two leaderboards, against counts made by hand."""

import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.report.diff import compare, compare_boards, compare_subsets, find_record
from clipcov_pipeline.report.leaderboard import SCORE_SCHEMA
from lab import Lab


def subset(uids: str, classes: list[int]) -> pl.DataFrame:
    return pl.DataFrame({"uid": list(uids), "rank": range(len(uids)), "latent_class": classes})


def board(*rows: tuple[str, float, int, str, float]) -> pl.DataFrame:
    full = [
        (f"{method}-f{fraction:g}-s{seed}", method, fraction, "samples_seen", seed, metric, value, 0.1, 60)
        for method, fraction, seed, metric, value in rows
    ]
    return pl.DataFrame(full, schema=SCORE_SCHEMA, orient="row")


def test_two_subsets() -> None:
    found = compare_subsets(subset("abcd", [0, 0, 0, 1]), subset("bxayz", [0, 1, 0, 1, 2]))
    assert found.sizes == (4, 5)
    assert (found.both, found.jaccard) == (2, 2 / 7)
    assert (found.only_a, found.only_b) == (["c", "d"], ["x", "y", "z"])
    assert found.classes == [(0, 3, 2), (1, 1, 2), (2, 0, 1)]
    assert found.ranks == {1: 0.0, 2: 0.5, 4: 0.5}


def test_a_subset_and_itself() -> None:
    frame = subset("abcd", [0, 1, 2, 3])
    found = compare_subsets(frame, frame.reverse())
    assert (found.jaccard, found.only_a, found.only_b, found.classes) == (1.0, [], [], [])
    assert set(found.ranks.values()) == {1.0}


def test_two_leaderboards() -> None:
    a = board(("full", 1.0, 0, "s/acc", 0.5), ("x", 0.25, 0, "s/acc", 0.3), ("gone", 0.25, 0, "s/acc", 0.3))
    b = board(("full", 1.0, 0, "s/acc", 0.5), ("x", 0.25, 0, "s/acc", 0.4), ("x", 0.25, 1, "s/acc", 0.3))
    found = compare_boards(a, b)
    assert found.scores == [("x-f0.25-s0", "s/acc", 0.3, 0.4)]
    assert (found.same, found.arms_only_a, found.arms_only_b) == (1, ["gone-f0.25-s0"], ["x-f0.25-s1"])
    # tables that were written before they held the arms' names
    old = compare_boards(a.drop("arm", "protocol"), b)
    assert (old.scores, old.arms_only_b) == (found.scores, found.arms_only_b)


def test_two_parquets_need_no_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subset("abcd", [0, 0, 0, 1]).write_parquet("a.parquet")
    # as `clipcov select` wrote it before ranks and classes had one schema
    subset("abce", [0, 0, 0, 1]).rename({"latent_class": "class"}).write_parquet("b.parquet")
    result = CliRunner().invoke(cli, ["diff", "a.parquet", "b.parquet", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["jaccard"] == 3 / 5
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    Path("c.parquet").write_bytes(b"no parquet")
    result = CliRunner().invoke(cli, ["diff", "a.parquet", "c.parquet"])
    assert isinstance(result.exception, InputError)
    assert "\n" not in str(result.exception)


@pytest.mark.slow
def test_stored_subsets_and_the_settings_that_differ(lab: Lab) -> None:
    store = lab.project().store
    found, titles = compare(store, "clipcov-f0.5", "subsets/random-f0.5")
    folders = [store.folder(find_record(store, name)) for name in ("clipcov-f0.5", "random-f0.5")]
    first, second = (set(pl.read_parquet(folder / "subset.parquet")["uid"]) for folder in folders)
    assert found.jaccard == len(first & second) / len(first | second)
    assert "select.method clipcov -> random" in found.settings
    assert not [text for text in found.settings if text.startswith(("train", "labels", "proxy"))]
    assert titles[0].startswith("subsets/clipcov-f0.5@")
    before = find_record(store, "clipcov-f0.5").fingerprint
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    lab.run(only=("rankings", "subsets"))
    found, _ = compare(store, before[:8], "clipcov-f0.5")
    assert found.settings == ["select.weights.self 2.0 -> 0.0"]
    assert compare(store, f"clipcov-f0.5@{before[:8]}", before[:10])[0].jaccard == 1.0


@pytest.mark.slow
def test_stored_leaderboards(lab: Lab) -> None:
    before = find_record(lab.project().store, "leaderboard").fingerprint
    lab.edit(lambda s: s["select"].update(methods={"clipcov": {}}))
    lab.run()
    store = lab.project().store
    found, _ = compare(store, f"leaderboard@{before[:8]}", "leaderboard")
    assert (found.arms_only_a, found.arms_only_b) == (["random-f0.5-s0"], [])
    assert found.scores == []
    assert found.same > 10
    listed = CliRunner().invoke(cli, ["diff", "--list", "leaderboard", "--config", str(lab.yaml)]).output
    assert len(listed.splitlines()) == 2
    assert listed.splitlines()[0].endswith("current")
    assert before[:12] in listed.splitlines()[1]
    for name in ("full-f1", "none", "leaderboard@123456789"):
        with pytest.raises(InputError, match="expected"):
            compare(store, "leaderboard", name)
