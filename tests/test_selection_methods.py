"""Checking methods, parameters and budgets."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import (
    DEFAULT_WEIGHTS,
    METHODS,
    budget_count,
    columns_read,
    files_of,
    reads_captions,
    validate_method,
    with_files_at,
)

# parameters without a default
NEEDED = {
    "external": {"uids": "list.csv"},
    "language": {"model": "lid.176.bin"},
    "text_based": {"class_names": "names.txt"},
    "image_based": {"target": "target.npy"},
}


def test_defaults_are_filled_in_and_json_able():
    for method in METHODS:
        filled = validate_method(method, NEEDED.get(method))
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
        (
            "random",
            {"filters": {"basic": None}},
            r"filters\.basic: found None, expected a mapping",
        ),
        ("random", {"filters": {"basic": {"min_word": 1}}}, r"filters\.basic: unknown parameter 'min_word'"),
        ("random", {"filters": {"basic": {"max_aspect": 0.5}}}, r"basic\.max_aspect: .* at least 1"),
        ("random", {"filters": {"clip_score": {}}}, "found threshold None and share None, expected exactly"),
        ("random", {"filters": {"clip_score": {"threshold": 0.3, "share": 0.3}}}, "exactly one of them"),
        ("random", {"filters": {"clip_score": {"share": 30}}}, "found 30, expected a share of the pool"),
        ("random", {"filters": {"clip_score": {"share": 0.3, "arch": "L14"}}}, "expected one of l14, b32"),
        ("random", {"filters": {"text_based": True}}, r"class_names: found None, expected a text file"),
        (
            "language",
            {"model": "m.bin", "keep": [False]},
            r"keep: found \[False\], .* 'no' in quotes",
        ),
        (
            "image_based",
            {"target": "a.npy", "centroids": "b.npy", "n_clusters": 9},
            r"n_clusters: has no effect",
        ),
        ("basic", {"filters": {"basic": True}}, "found beside the method basic, expected it once"),
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
    assert columns_read("basic") == {"caption_words", "caption_length", "width", "height"}
    assert columns_read("basic", {"min_side": None, "max_aspect": None}) == {
        "caption_words",
        "caption_length",
    }
    assert columns_read("text_based", NEEDED["text_based"]) == {"caption"}
    filters = {"clip_score": {"share": 0.3, "arch": "b32"}, "basic": False}
    assert columns_read("random", {"filters": filters}) == {"clip_b32_similarity_score"}


def test_what_is_read_of_captions():
    assert reads_captions("random") is False
    assert reads_captions("basic") is True
    assert reads_captions("random", {"filters": {"text_based": NEEDED["text_based"]}}) == "text"


def test_a_filter_that_is_not_given_is_in_no_fingerprint():
    """Settings as they were before there were more filters."""
    old = {
        "min_similarity": None,
        "drop_duplicate_images": False,
        "drop_duplicate_captions": False,
        "caption_length": None,
        "rejected": "drop",
    }
    assert validate_method("random") == {"seed": 0, "filters": old}
    assert validate_method("random", {"filters": {"basic": False}}) == {"seed": 0, "filters": old}


def test_the_files_that_a_method_reads_and_where_they_lie():
    params = {"centroids": "c.npy", "target": "t.npy", "filters": {"text_based": {"class_names": "n.txt"}}}
    assert files_of("image_based", params) == {
        "target": "t.npy", "centroids": "c.npy", "filters.text_based.class_names": "n.txt",
    }  # fmt: skip
    placed = with_files_at("image_based", params, lambda file: f"/x/{file}")
    assert placed == {
        "centroids": "/x/c.npy", "target": "/x/t.npy", "filters": {"text_based": {"class_names": "/x/n.txt"}},
    }  # fmt: skip
    assert params["filters"] == {"text_based": {"class_names": "n.txt"}}
    assert files_of("external", NEEDED["external"]) == {"uids": "list.csv"}


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
