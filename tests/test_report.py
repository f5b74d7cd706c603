"""The leaderboard, against a table worked out by hand."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from clipcov_pipeline.plan import Recipe
from clipcov_pipeline.report import (
    SCORE_SCHEMA,
    cells,
    collect_scores,
    leaderboard,
    metrics_of,
    ordered,
    plot,
    short_name,
    shown,
    to_markdown,
    to_rows,
    to_text,
)

PRIMARY = "coco/text_retrieval_recall@5"
# method, fraction -> the primary metric for seeds 0 and 1
VALUES = {
    ("clipcov", 0.25): (0.2, 0.4),
    ("random", 0.25): (0.1, 0.1),
    ("clipcov", 0.5): (0.3, 0.5),
    ("random", 0.5): (0.45, 0.47),
    ("full", 1.0): (0.5, 0.6),
}
SIZES = {key: round(key[1] * 12_382) for key in VALUES}
# by hand: mean and standard deviation (n - 1) of two values a, b are (a + b) / 2 and |a - b| / sqrt(2)
ROWS = [
    ["full", "100%", "12,382", "2", "55.0 ±7.1", "1.0 ±0.0", "5.0 ±0.0"],
    ["clipcov", "25%", "3,096", "2", "30.0 ±14.1", "1.0 ±0.0", "5.0 ±0.0"],
    ["random", "25%", "3,096", "2", "10.0 ±0.0", "1.0 ±0.0", "5.0 ±0.0"],
    ["random", "50%", "6,191", "2", "46.0 ±1.4", "1.0 ±0.0", "5.0 ±0.0"],
    ["clipcov", "50%", "6,191", "2", "40.0 ±14.1", "1.0 ±0.0", "5.0 ±0.0"],
    ["chance", "", "", "", "2.5", "0.1", "0.5"],
]
HEADINGS = ["method", "fraction", "samples", "seeds", "coco i2t R@5*", "coco acc1", "holdout t2i R@1"]
TEXT = """\
method   fraction  samples  seeds        coco      coco   holdout
                                     i2t R@5*      acc1   t2i R@1
-----------------------------------------------------------------
full         100%   12,382      2   55.0 ±7.1  1.0 ±0.0  5.0 ±0.0
clipcov       25%    3,096      2  30.0 ±14.1  1.0 ±0.0  5.0 ±0.0
random        25%    3,096      2   10.0 ±0.0  1.0 ±0.0  5.0 ±0.0
random        50%    6,191      2   46.0 ±1.4  1.0 ±0.0  5.0 ±0.0
clipcov       50%    6,191      2  40.0 ±14.1  1.0 ±0.0  5.0 ±0.0
chance                                    2.5       0.1       0.5"""
MARKDOWN = """\
| method | fraction | samples | seeds | coco i2t R@5* | coco acc1 | holdout t2i R@1 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| full | 100% | 12,382 | 2 | 55.0 ±7.1 | 1.0 ±0.0 | 5.0 ±0.0 |"""


def write_scores(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> list[tuple[Recipe, str, Path]]:
    """Score files as evaluation writes them: on coco two records, on the held-out share one."""
    files = []
    for (method, fraction), values in VALUES.items():
        for seed in seeds:
            recipe = Recipe(method, fraction, seed)
            retrieval = {"text_retrieval_recall@5": values[seed], "text_retrieval_recall@10": 0.9}
            names = {"acc1": 0.01, "mean_per_class_recall": 0.02}
            held_out = {"image_retrieval_recall@1": 0.05}
            records = {
                "coco": [
                    {
                        "metrics": retrieval,
                        "chance": {"text_retrieval_recall@5": 0.025, "text_retrieval_recall@10": 0.05},
                        "n_samples": 200,
                    },
                    {
                        "metrics": names,
                        "chance": {"acc1": 0.001, "mean_per_class_recall": 0.002},
                        "n_samples": 199,
                    },
                ],
                "holdout": [
                    {"metrics": held_out, "chance": {"image_retrieval_recall@1": 0.005}, "n_samples": 50}
                ],
            }
            for name, some in records.items():
                path = folder / f"{recipe.key}@{name}.json"
                path.write_text(json.dumps(some))
                files.append((recipe, name, path))
    return files


@pytest.fixture
def board(tmp_path: Path) -> pl.DataFrame:
    return leaderboard(collect_scores(write_scores(tmp_path)))


def test_scores_are_one_row_an_arm_and_metric(tmp_path):
    scores = collect_scores(write_scores(tmp_path))
    assert dict(scores.schema) == SCORE_SCHEMA
    assert scores.height == 5 * 2 * 5
    assert scores.filter(method="clipcov", fraction=0.5, seed=1, metric=PRIMARY).rows() == [
        ("clipcov", 0.5, 1, PRIMARY, 0.5, 0.025, 200)
    ]
    assert scores.filter(method="full", seed=0, metric="coco/acc1")["n_samples"].to_list() == [199]
    assert collect_scores([]).height == 0


def test_the_mean_and_spread_over_seeds(board):
    assert board.height == 5 * 5
    for (method, fraction), (one, other) in VALUES.items():
        (row,) = board.filter(method=method, fraction=fraction, metric=PRIMARY).iter_rows(named=True)
        assert row["mean"] == pytest.approx((one + other) / 2)
        assert row["std"] == pytest.approx(abs(one - other) / 2**0.5)
        assert (row["seeds"], row["chance"], row["n_samples"]) == (2, 0.025, 200)


def test_the_table_as_worked_out_by_hand(board):
    headings, rows = to_rows(board, PRIMARY, SIZES)
    assert headings == HEADINGS
    assert rows == ROWS
    assert to_text(headings, rows) == TEXT
    assert to_markdown(headings, rows).startswith(MARKDOWN + "\n")
    assert to_markdown(headings, rows).count("\n") == 7


def test_every_line_of_the_text_is_as_wide_as_its_rule(board):
    lines = to_text(*to_rows(board, PRIMARY, SIZES)).splitlines()
    width = len(lines[2])
    assert set(lines[2]) == {"-"}
    assert all(len(line) == width for line in lines)


def test_one_seed_has_no_spread(tmp_path):
    board = leaderboard(collect_scores(write_scores(tmp_path, seeds=(1,))))
    assert board["std"].is_null().all()
    assert cells(board)["clipcov", 0.25, PRIMARY] == "40.0"
    _, rows = to_rows(board, PRIMARY, SIZES)
    assert rows[0] == ["full", "100%", "12,382", "1", "60.0", "1.0", "5.0"]
    assert not any("±" in cell for row in rows for cell in row)


def test_full_pool_first_then_by_fraction_best_first(board):
    assert ordered(board, PRIMARY) == [
        ("full", 1.0),
        ("clipcov", 0.25),
        ("random", 0.25),
        ("random", 0.5),
        ("clipcov", 0.5),
    ]
    # equal scores: by name, so that the order never changes between runs
    assert ordered(board, "coco/acc1")[1:] == [
        ("clipcov", 0.25),
        ("random", 0.25),
        ("clipcov", 0.5),
        ("random", 0.5),
    ]


def test_the_primary_metric_comes_first_and_is_shown_whatever_it_is(board):
    metrics = metrics_of(board, "holdout/image_retrieval_recall@1")
    assert metrics[0] == "holdout/image_retrieval_recall@1"
    assert sorted(metrics) == sorted(set(board["metric"]))
    at_ten = "coco/text_retrieval_recall@10"
    assert at_ten not in shown(metrics, PRIMARY)
    assert "coco/mean_per_class_recall" not in shown(metrics, PRIMARY)
    assert shown(metrics_of(board, at_ten), at_ten)[0] == at_ten


def test_small_fractions_stay_apart(board):
    small = board.with_columns(fraction=pl.col("fraction") / 1000)
    _, rows = to_rows(small, PRIMARY, {})
    assert [row[1] for row in rows] == ["0.1%", "0.025%", "0.025%", "0.05%", "0.05%", ""]


@pytest.mark.parametrize(
    ("metric", "short"),
    [
        ("a/text_retrieval_recall@5", "i2t R@5"),
        ("a/image_retrieval_recall@10", "t2i R@10"),
        ("a/mean_per_class_recall", "mpcr"),
        ("a/acc5", "acc5"),
    ],
)
def test_short_names(metric, short):
    assert short_name(metric) == short


@pytest.mark.parametrize("arms", [None, "full", "clipcov"])
def test_the_plot_is_a_png_of_sane_size_with_something_on_it(board, tmp_path, arms):
    """Also where there is only the full pool, or no full pool."""
    path = tmp_path / "plot.png"
    plot(board if arms is None else board.filter(method=arms), PRIMARY, path)
    assert 5_000 < path.stat().st_size < 200_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (704, 440)
        pixels = np.asarray(image.convert("L"))
    ink = (pixels < 200).mean()
    assert 0.005 < ink < 0.5


def test_the_plot_is_the_same_for_the_same_scores_and_shows_other_scores(board, tmp_path):
    for name, table in {
        "one": board,
        "again": board,
        "other": board.with_columns(mean=1 - pl.col("mean")),
    }.items():
        plot(table, PRIMARY, tmp_path / f"{name}.png")
    images = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("one", "again", "other")}
    assert images["one"] == images["again"] != images["other"]
