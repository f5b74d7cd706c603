"""Checking methods, parameters and budgets."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import DEFAULT_WEIGHTS, METHODS, budget_count, columns_read, validate_method


def test_defaults_are_filled_in_and_json_able():
    for method in METHODS:
        filled = validate_method(method, {"uids": "list.csv"} if method == "external" else {})
        assert validate_method(method, json.loads(json.dumps(filled))) == filled
    assert validate_method("clipcov")["weights"] == DEFAULT_WEIGHTS
    assert validate_method("clipcov", {"weights": {"label": 0}})["weights"] == {
        **DEFAULT_WEIGHTS,
        "label": 0.0,
    }


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("clipcove", {}, "method: found 'clipcove', expected one of clipcov, random"),
        ("random", {"mode": "greedy"}, "random: unknown parameter 'mode'"),
        (
            "clipcov",
            {"mode": "lazy"},
            r"clipcov\.mode: found 'lazy', expected one of greedy, strict, notebook",
        ),
        ("clipcov", {"mode": ["greedy"]}, r"clipcov\.mode: found \['greedy'\]"),
        ("clipcov", {"clip_negative": 1}, r"clipcov\.clip_negative: found 1, expected true or false"),
        ("clipcov", {"weights": {"lable": 0}}, "unknown parameter 'lable'"),
        ("clipcov", {"weights": {"label": "0"}}, r"weights\.label: found '0', expected a finite number"),
        ("clipcov", {"weights": {"label": math.nan}}, "expected a finite number"),
        ("clipcov", {"weights": 3}, "expected a mapping"),
        ("clipcov", {"class_floor": -1}, "found -1, expected an integer of at least 0"),
        ("clipcov", {"class_floor": True}, "found True, expected an integer"),
        ("clipcov", {"seed": 1.5}, "seed: found 1.5"),
        ("s_cliploss", {"temperature": 0}, "found 0, expected a finite number above 0"),
        ("semdedup", {"n_clusters": 0}, "found 0, expected an integer of at least 1"),
        ("external", {}, r"external\.uids: found None, expected a file of uids"),
        ("external", {"uids": "a.csv", "shuffle": 1}, r"external\.shuffle: found 1, expected true or false"),
        ("dedup", {"by": "url"}, "expected one of image_or_caption, image, caption, pair"),
        ("random", {"filters": {"caption_length": [9, 3]}}, r"\[9, 3\], expected \[shortest, longest\]"),
        ("random", {"filters": {"min_score": 1}}, "unknown parameter 'min_score'"),
    ],
)
def test_mistakes_are_named(method, params, message):
    with pytest.raises(InputError, match=message):
        validate_method(method, params)


def test_the_columns_that_a_method_reads():
    assert columns_read("clipcov") == set()
    assert columns_read("clipcov", {"repeat_penalty": 0.1}) == {"image_hash", "caption_hash"}
    assert columns_read("c_rho") == {"early_similarity"}
    assert columns_read("dedup") == {"image_hash", "caption_hash"}
    assert columns_read("dedup", {"by": "caption"}) == {"caption_hash"}
    filters = {"drop_duplicate_images": True, "caption_length": [1, 9]}
    assert columns_read("random", {"filters": filters}) == {"image_hash", "caption_length"}


@settings(deadline=None)
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**7))
def test_fractions_round_half_up_and_give_at_least_one(fraction, n):
    count = budget_count(fraction, n)
    assert 1 <= count <= n
    assert count == max(1, math.floor(fraction * n + 0.5))


def test_counts_and_none():
    assert budget_count(None, 7) == 7
    assert budget_count(3, 7) == budget_count(np.int64(3), 7) == 3
    assert budget_count(0.5, 5) == 3
    assert budget_count(np.float32(0.25), 100) == 25


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0, "count: found 0, expected 1 to 10"),
        (11, "count: found 11, expected 1 to 10"),
        (2**80, f"count: found {2**80}, expected 1 to 10"),
        (-(2**63), "expected 1 to 10"),
        (0.0, "fraction: found 0.0, expected a number above 0 and at most 1"),
        (1.01, "fraction: found 1.01"),
        (math.nan, "fraction: found nan"),
        ("10%", "budget: found '10%'"),
        (True, "budget: found True"),
    ],
)
def test_budgets_out_of_range(budget, message):
    with pytest.raises(InputError, match=message):
        budget_count(budget, 10)
