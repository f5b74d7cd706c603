"""The leaderboard, against a table worked out by hand."""

import itertools
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from clipcov_pipeline.experiment.config.evaluate import Suite
from clipcov_pipeline.experiment.recipes import Recipe
from clipcov_pipeline.report.leaderboard import (
    SCORE_SCHEMA,
    bootstrap_interval,
    certain,
    collect_scores,
    leaderboard,
    suite_notes,
    with_suites,
)
from clipcov_pipeline.report.plots import plot
from clipcov_pipeline.report.tables import (
    as_text,
    cells,
    metrics_of,
    notes,
    ordered,
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
SIZES = {f"{method}-f{fraction:g}": round(fraction * 12_382) for method, fraction in VALUES}
ARMS = [(*key, "samples_seen") for key in VALUES]
FULL_ROW, CLIPCOV_25, RANDOM_25, CLIPCOV_50, RANDOM_50 = (ARMS[i] for i in (4, 0, 1, 2, 3))
# by hand: mean and standard deviation (n - 1) of two values a, b are (a + b) / 2 and |a - b| / sqrt(2);
# seed by seed, clipcov - random is (0.1, 0.3) at 25 % and (-0.15, 0.03) at 50 %; with two seeds a quarter of
# the bootstrap's draws are the lower one twice, so that the interval reaches from one to the other
HEADINGS = [
    "method", "fraction", "samples", "seeds", "coco i2t R@5*",
    "difference to random", "difference to full", "ratio to next", "coco acc1", "holdout t2i R@1",
]  # fmt: skip
SAME = ["1.0 ±0.0", "5.0 ±0.0"]
ROWS = [
    ["full", "100%", "12,382", "2", "55.0 ±7.1", "", "", "", *SAME],
    [
        "clipcov",
        "25%",
        "3,096",
        "2",
        "30.0 ±14.1",
        "+20.0 [+10.0, +30.0]",
        "-25.0 [-30.0, -20.0]",
        "3.00",
        *SAME,
    ],
    ["random", "25%", "3,096", "2", "10.0 ±0.0", "", "-45.0 [-50.0, -40.0]", "", *SAME],
    ["random", "50%", "6,191", "2", "46.0 ±1.4", "", "-9.0 [-13.0, -5.0]", "", *SAME],
    [
        "clipcov",
        "50%",
        "6,191",
        "2",
        "40.0 ±14.1",
        "-6.0 [-15.0, +3.0]",
        "-15.0 [-20.0, -10.0]",
        "0.87",
        *SAME,
    ],
    ["chance", "", "", "", "2.5", "", "", "", "0.1", "0.5"],
]
TEXT = """\
method   fraction  samples  seeds        coco                                  difference    ratio      coco   holdout
                                     i2t R@5*             to random               to full  to next      acc1   t2i R@1
----------------------------------------------------------------------------------------------------------------------
full         100%   12,382      2   55.0 ±7.1                                                       1.0 ±0.0  5.0 ±0.0
clipcov       25%    3,096      2  30.0 ±14.1  +20.0 [+10.0, +30.0]  -25.0 [-30.0, -20.0]     3.00  1.0 ±0.0  5.0 ±0.0
random        25%    3,096      2   10.0 ±0.0                        -45.0 [-50.0, -40.0]           1.0 ±0.0  5.0 ±0.0
random        50%    6,191      2   46.0 ±1.4                          -9.0 [-13.0, -5.0]           1.0 ±0.0  5.0 ±0.0
clipcov       50%    6,191      2  40.0 ±14.1    -6.0 [-15.0, +3.0]  -15.0 [-20.0, -10.0]     0.87  1.0 ±0.0  5.0 ±0.0
chance                                    2.5                                                            0.1       0.5"""  # noqa: E501
MARKDOWN = """\
| method | fraction | samples | seeds | coco i2t R@5* | difference to random | difference to full | ratio to next | coco acc1 | holdout t2i R@1 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| full | 100% | 12,382 | 2 | 55.0 ±7.1 |  |  |  | 1.0 ±0.0 | 5.0 ±0.0 |"""  # noqa: E501


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
        ("clipcov-f0.5-s1", "clipcov", 0.5, "samples_seen", 1, PRIMARY, 0.5, 0.025, 200)
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


def test_every_line_of_the_text_fits_the_rule_and_the_terminal(board):
    headings, rows = to_rows(board, PRIMARY, SIZES)
    for width, columns in ((None, 10), (118, 10), (117, 9), (80, 6), (10, 1)):
        lines = to_text(headings, rows, width).splitlines()
        table = lines[: 3 + len(rows)]
        assert set(lines[2]) == {"-"}
        assert all(len(line) <= len(lines[2]) for line in table)
        assert len(lines[2]) <= (width or 118)
        left = 10 - columns
        assert lines[len(table) :] == ([f"and {left} more columns in leaderboard.csv"] if left else [])


def test_one_seed_has_no_spread_and_no_interval(tmp_path):
    board = leaderboard(collect_scores(write_scores(tmp_path, seeds=(1,))))
    assert board["std"].is_null().all()
    assert board["random_low"].is_null().all()
    assert cells(board)[CLIPCOV_25, PRIMARY] == "40.0"
    headings, rows = to_rows(board, PRIMARY, SIZES)
    assert headings == HEADINGS
    assert rows[0] == ["full", "100%", "12,382", "1", "60.0", "", "", "", "1.0", "5.0"]
    assert rows[1] == ["clipcov", "25%", "3,096", "1", "40.0", "+30.0", "-20.0", "4.00", "1.0", "5.0"]
    assert not any("±" in cell or "[" in cell for row in rows for cell in row)
    assert "one seed has no interval" in "".join(notes(board, PRIMARY))


def test_the_note_speaks_of_random_only_where_it_is(board):
    assert "paired by seed, to random at the same fraction; [95 %" in "".join(notes(board, PRIMARY))
    without = board.with_columns(random_pairs=pl.lit(0), random_low=pl.lit(None, pl.Float64))
    assert "paired by seed; [95 %" in "".join(notes(without, PRIMARY))


def test_full_pool_first_then_by_fraction_best_first(board):
    assert ordered(board, PRIMARY) == [FULL_ROW, CLIPCOV_25, RANDOM_25, RANDOM_50, CLIPCOV_50]
    # equal scores: by name, so that the order never changes between runs
    assert ordered(board, "coco/acc1")[1:] == [CLIPCOV_25, RANDOM_25, CLIPCOV_50, RANDOM_50]


# --- comparisons ------------------------------------------------------------------------------------


def table(*rows: tuple[str, float, str, int, float], metric: str = PRIMARY) -> pl.DataFrame:
    """Scores of (method, fraction, protocol, seed, value)."""
    full = [
        (f"{method}-f{fraction:g}-s{seed}", method, fraction, protocol, seed, metric, value, 0.01, 100)
        for method, fraction, protocol, seed, value in rows
    ]
    return pl.DataFrame(full, schema=SCORE_SCHEMA, orient="row")


def one(board: pl.DataFrame, **place: object) -> dict:
    (row,) = board.filter(**place).iter_rows(named=True)
    return row


def test_differences_pair_the_seeds_and_keep_fractions_and_protocols_apart():
    samples, epochs = "samples_seen", "epochs"
    scores = table(
        ("full", 1.0, samples, 0, 0.50), ("full", 1.0, samples, 1, 0.60),
        ("full", 1.0, epochs, 0, 0.90), ("full", 1.0, epochs, 1, 0.80),
        ("random", 0.1, samples, 0, 0.10), ("random", 0.1, samples, 1, 0.30),
        ("random", 0.1, epochs, 0, 0.20), ("random", 0.1, epochs, 1, 0.20),
        ("clipcov", 0.1, samples, 0, 0.20), ("clipcov", 0.1, samples, 1, 0.50),
        ("clipcov", 0.1, samples, 2, 0.99), ("clipcov", 0.1, epochs, 0, 0.10),
        ("clipcov", 0.2, samples, 0, 0.70),
    )  # fmt: skip
    board = leaderboard(scores)
    row = one(board, method="clipcov", fraction=0.1, protocol=samples)
    # seeds 0 and 1 are in both: 0.2 - 0.1 and 0.5 - 0.3; seed 2 has no partner
    assert row["seeds"] == 3
    assert (row["random_pairs"], row["full_pairs"]) == (2, 2)
    assert row["random_difference"] == pytest.approx(0.15)
    assert (row["random_low"], row["random_high"]) == pytest.approx((0.1, 0.2))
    assert row["full_difference"] == pytest.approx((-0.3 - 0.1) / 2)
    assert (row["full_low"], row["full_high"]) == pytest.approx((-0.3, -0.1))
    assert row["baseline_ratio"] == pytest.approx((0.2 + 0.5 + 0.99) / 3 / 0.2)
    row = one(board, method="clipcov", protocol=epochs)
    assert row["random_difference"] == pytest.approx(0.1 - 0.2)
    assert row["full_difference"] == pytest.approx(0.1 - 0.9)
    assert (row["random_pairs"], row["random_low"], row["full_high"]) == (1, None, None)
    assert row["baseline_ratio"] == pytest.approx(0.1 / 0.2)
    # no random subset of this size, and nothing is compared with itself
    row = one(board, method="clipcov", fraction=0.2)
    assert (row["random_difference"], row["random_pairs"], row["baseline_ratio"]) == (None, None, None)
    assert row["full_difference"] == pytest.approx(0.2)
    for method in ("random", "full"):
        assert board.filter(method=method)[f"{method}_difference"].is_null().all()
    assert board.filter(method="full")["random_difference"].is_null().all()


def test_the_best_baseline_is_no_clipcov_and_nothing_that_knows_the_truth():
    place = (0.1, "samples_seen", 0)
    scores = table(
        ("full", 1.0, "samples_seen", 0, 0.95), ("random", *place, 0.1), ("clip_score", *place, 0.2),
        ("clipcov", *place, 0.5), ("mine", *place, 0.6), ("truth", *place, 0.9),
        ("zero", 0.2, "samples_seen", 0, 0.0), ("clipcov", 0.2, "samples_seen", 0, 0.5),
    )  # fmt: skip
    board = leaderboard(scores, {"mine": "clipcov", "truth": "oracle", "zero": "random"})
    found = {row["method"]: row for row in board.filter(fraction=0.1).iter_rows(named=True)}
    assert {name for name, row in found.items() if row["baseline_ratio"]} == {"clipcov", "mine"}
    assert {row["best_baseline"] for row in found.values()} == {None, "clip_score"}
    assert found["clipcov"]["baseline_ratio"] == pytest.approx(2.5)
    assert found["mine"]["baseline_ratio"] == pytest.approx(3.0)
    row = one(board, method="clipcov", fraction=0.2)
    assert (row["best_baseline"], row["baseline_ratio"]) == ("zero", None)  # not defined: a baseline of 0
    assert "clip_score at 10%" in "".join(notes(board, PRIMARY))


def test_the_interval_agrees_with_scipy_and_with_all_resamples():
    from scipy import stats

    rng = np.random.default_rng(5)
    for n in (3, 5, 20):
        values = rng.normal(size=n)
        found = bootstrap_interval(values)
        theirs = stats.bootstrap(
            (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(7)
        ).confidence_interval
        assert found == pytest.approx((theirs.low, theirs.high), abs=0.06)
        if n <= 5:  # every one of the n^n resamples is equally likely
            means = [np.mean(draw) for draw in itertools.product(values, repeat=n)]
            exact = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
            assert found == pytest.approx(tuple(exact), abs=0.06)
    assert bootstrap_interval(np.array([0.3])) is None
    assert bootstrap_interval(np.full(4, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(("n", "least", "most"), [(3, 0.68, 0.84), (5, 0.78, 0.90), (30, 0.90, 0.97)])
def test_the_interval_covers_as_often_as_its_docstring_says(n, least, most):
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(0.1, 0.02, n))
        hits += low <= 0.1 <= high
    assert least < hits / 200 < most


def test_both_protocols_are_two_blocks_and_a_column(board):
    both = pl.concat([board, board.with_columns(protocol=pl.lit("epochs"), mean=pl.col("mean") / 2)])
    headings, rows = to_rows(both, PRIMARY, SIZES)
    assert headings[:3] == ["method", "protocol", "fraction"]
    assert [row[1] for row in rows] == ["samples_seen"] * 5 + ["epochs"] * 5 + [""]
    assert [row[0] for row in rows[:5]] == [row[0] for row in rows[5:10]] == [row[0] for row in ROWS[:5]]


def test_an_arm_without_scores_is_named_and_never_a_zero(tmp_path):
    files = write_scores(tmp_path)
    lost = [file for file in files if file[0].key == "clipcov-f0.5-s1" or file[:2] == (files[0][0], "coco")]
    board = leaderboard(collect_scores(file for file in files if file not in lost))
    assert one(board, method="clipcov", fraction=0.5, metric=PRIMARY)["mean"] == 0.3  # seed 0 alone
    text = as_text(board, PRIMARY, SIZES, [f"{arm.key}@{name}" for arm, name, _ in lost])
    assert text.splitlines()[-1] == (
        "missing, in no mean above: clipcov-f0.25-s0@coco, clipcov-f0.5-s1@coco, clipcov-f0.5-s1@holdout"
    )
    # no score of the primary metric at all: last of its fraction
    board = board.filter(~((pl.col("method") == "random") & (pl.col("metric") == PRIMARY)))
    _, rows = to_rows(board, PRIMARY, SIZES)
    assert [row[:5] for row in rows if row[0] == "random"] == [
        ["random", "25%", "3,096", "0", "missing"],
        ["random", "50%", "6,191", "0", "missing"],
    ]
    assert [row[0] for row in rows] == ["full", "clipcov", "random", "clipcov", "random", "chance"]


# --- metrics and plots ------------------------------------------------------------------------------


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


def test_a_suite_is_the_mean_of_the_sets_that_are_there():
    def row(arm: str, seed: int, name: str, value: float) -> dict:
        return {
            "arm": arm,
            "method": arm,
            "fraction": 0.5,
            "protocol": "samples_seen",
            "seed": seed,
            "metric": f"{name}/acc1",
            "value": value,
            "chance": {"a": 0.1, "b": 0.3}[name],
            "n_samples": 10,
        }

    scores = pl.DataFrame(
        [
            row("x", 0, "a", 0.2),
            row("x", 0, "b", 0.6),
            row("x", 1, "a", 0.4),
            row("x", 1, "b", 0.8),
            row("y", 0, "a", 0.9),  # not scored on b yet: no average over other sets than the rest
        ],
        schema=SCORE_SCHEMA,
    )
    suites = {"s": Suite(sets=("a", "b", "gone")), "none": Suite(sets=("gone",))}
    found = with_suites(scores, suites, absent={"gone"})
    averages = found.filter(pl.col("metric").is_in(["s/acc1", "none/acc1"]))
    assert averages.select("arm", "seed").rows() == [("x", 0), ("x", 1)]
    assert averages["value"].to_list() == pytest.approx([0.4, 0.6])
    assert averages["chance"].to_list() == pytest.approx([0.2, 0.2])
    assert averages["n_samples"].to_list() == [20, 20]
    assert found.height == scores.height + 2
    assert suite_notes(suites, {"gone"}) == [
        "s/acc1: mean of 2 of its 3 sets (a, b); left out, folder absent: gone",
        "none/acc1: not defined, none of its 1 sets has a folder; left out, folder absent: gone",
    ]
    assert with_suites(scores, {}).equals(scores)


def test_a_metric_that_cannot_be_missed_is_in_no_average():
    """acc5 of 3 classes is 1 by any model; CLIP_benchmark writes NaN there."""
    base = {
        "arm": "x",
        "method": "x",
        "fraction": 0.5,
        "protocol": "samples_seen",
        "seed": 0,
        "n_samples": 10,
    }
    values = {"few": (1.0, 1.0), "a": (0.4, 0.1), "b": (0.2, 0.3)}
    scores = pl.DataFrame(
        [{**base, "metric": f"{k}/acc5", "value": v, "chance": c} for k, (v, c) in values.items()],
        schema=SCORE_SCHEMA,
    )
    suites = {"s": Suite(sets=("few", "a", "b"), metric="acc5"), "t": Suite(sets=("few",), metric="acc5")}
    found = with_suites(scores, suites)
    assert found["metric"].to_list() == ["s/acc5", "few/acc5", "a/acc5", "b/acc5"]
    assert found["value"][0] == pytest.approx(0.3)
    assert found["chance"][0] == pytest.approx(0.2)
    assert suite_notes(suites, (), certain(scores)) == [
        "s/acc5: mean of 2 of its 3 sets (a, b); left out, chance level is 100 %: few",
        "t/acc5: not defined, none of its 1 sets can be missed; left out, chance level is 100 %: few",
    ]
