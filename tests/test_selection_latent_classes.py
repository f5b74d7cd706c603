"""Zero-shot labels and clusters against dense numpy."""

import numpy as np
import pytest

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.latent_classes import (
    assign_clusters,
    cluster_labels,
    silhouettes,
    spherical_kmeans,
    zero_shot_labels,
)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def data():
    image, text, labels, _ = synthetic_arrays(9000, 12, 40)
    prompts = unit(np.random.default_rng(0).standard_normal((13, 40)))
    return image, text, prompts, labels


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_zero_shot_labels(data, dtype):
    image, text, prompts, _ = data
    labels, similarity, margin = zero_shot_labels(image.astype(dtype), prompts, text.astype(dtype))
    scores = image.astype(np.float64) @ prompts.T.astype(np.float64)
    ordered = np.sort(scores, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 1e-6
    np.testing.assert_array_equal(labels[clear], scores.argmax(axis=1)[clear])
    np.testing.assert_allclose(margin, ordered[:, -1] - ordered[:, -2], atol=1e-6)
    np.testing.assert_allclose(similarity, (text.astype(np.float64) * prompts[labels]).sum(axis=1), atol=1e-6)
    assert (labels.dtype, similarity.dtype, margin.dtype) == (np.int32, np.float32, np.float32)


def test_a_stream_gives_the_same_in_any_blocks(data):
    image, text, prompts, _ = data
    whole = zero_shot_labels(image, prompts, text)
    for step in (1000, 4097):
        stream = ((image[a : a + step], text[a : a + step]) for a in range(0, len(image), step))
        for one, other in zip(zero_shot_labels(stream, prompts, threads=2), whole, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_ties_go_to_the_lower_class_and_one_class_has_no_margin(data):
    image, text, prompts, _ = data
    # sums that are exact in any order
    corners = np.eye(40, dtype=np.float32)[[3, 0, 3, 0]]
    labels, _, margin = zero_shot_labels(image, corners, text)
    assert set(labels) == {0, 1}
    assert not margin.any()
    labels, _, margin = zero_shot_labels(image, prompts[:1], text)
    assert not labels.any()
    assert not margin.any()


def test_bad_input(data):
    image, text, prompts, _ = data
    with pytest.raises(InputError, match="found width 39, expected 40"):
        zero_shot_labels(image, prompts[:, :39], text)
    with pytest.raises(InputError, match="at least one class"):
        zero_shot_labels(image, prompts[:0], text)
    with pytest.raises(InputError, match=r"image \(9000, 40\) and text \(8999, 40\)"):
        zero_shot_labels(image, prompts, text[1:])
    with pytest.raises(InputError, match=r"image .* and text None"):
        zero_shot_labels(image, prompts)
    broken = image.copy()
    broken[5] = np.nan
    with pytest.raises(InputError, match="not finite"):
        zero_shot_labels(broken, prompts, text)
    with pytest.raises(InputError, match="clusters: found 0, expected 1 to 9000"):
        spherical_kmeans(image, 0)
    with pytest.raises(InputError, match="clusters: found 9001, expected 1 to 9000"):
        cluster_labels(image, text, 9001)


def test_kmeans_ends_at_a_fixed_point_and_repeats(data):
    image, *_ = data
    centres = spherical_kmeans(image, 7, seed=3, n_iter=2000)
    np.testing.assert_array_equal(centres, spherical_kmeans(image, 7, seed=3, n_iter=2000))
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-6)
    nearest, similarity, _ = assign_clusters(image, centres)
    scores = image.astype(np.float64) @ centres.T
    np.testing.assert_allclose(similarity, scores.max(axis=1), atol=1e-6)
    for k in range(7):
        mean = image[nearest == k].astype(np.float64).sum(axis=0)
        np.testing.assert_allclose(centres[k], mean / np.linalg.norm(mean), atol=1e-5)


def test_kmeans_keeps_k_clusters_of_identical_rows():
    x = unit(np.repeat(np.eye(3, 8), [40, 40, 1], axis=0))
    centres = spherical_kmeans(x, 3, seed=0)
    assert sorted(np.bincount(assign_clusters(x, centres)[0], minlength=3)) == [1, 40, 40]


def test_silhouettes_are_the_definition_and_are_largest_near_the_planted_number():
    rng = np.random.default_rng(4)
    kinds = rng.integers(0, 8, 400)
    image, text = (
        unit(rng.standard_normal((8, 24))[kinds] * 2 + 0.3 * rng.standard_normal((400, 24))) for _ in "vt"
    )
    scores = silhouettes(image.astype(np.float16), text.astype(np.float16), seed=1)
    assert list(scores) == [2, 3, 4, 6, 8, 11, 16, 23, 32, 45]
    # k-means from one random start splits a planted group before it has told all eight apart
    assert max(scores, key=lambda k: scores[k]) in (8, 11)
    # by hand: cosine distances of the pairs, own cluster against the nearest other
    labels = cluster_labels(image.astype(np.float16), text.astype(np.float16), 4, 1)[0]
    distance = 1 - (image @ image.T + text @ text.T) / 2
    member = labels[:, None] == np.arange(4)
    to = (distance @ member) / member.sum(axis=0)
    own = (distance @ member)[member] / (member.sum(axis=0)[labels] - 1)
    other = np.where(member, np.inf, to).min(axis=1)
    assert scores[4] == pytest.approx(((other - own) / np.maximum(own, other)).mean(), abs=1e-3)
    assert silhouettes(image, text, seed=1, sample=100).keys() == {2, 3, 4, 6, 8, 11}


def test_silhouettes_of_too_little():
    one = unit(np.ones((9, 4)))
    with pytest.raises(InputError, match="found auto and 2 samples, expected 3 or more; give a number"):
        silhouettes(one[:2], one[:2])
    with pytest.raises(InputError, match="found auto and embeddings that are all equal"):
        silhouettes(one, one)


def test_clusters_find_planted_classes(data):
    image, text, _, planted = data
    labels, similarity, margin = cluster_labels(image, text, 24, seed=0, sample=4000)
    # nearly all pairs of a cluster are of one planted class
    agree = sum(np.bincount(planted[labels == k]).max() for k in np.unique(labels))
    assert agree / len(planted) > 0.8
    assert (margin >= 0).all()
    both = np.concatenate([image, text], axis=1).astype(np.float32) * np.float32(np.sqrt(0.5))
    centres = spherical_kmeans(both, 24, seed=0, sample=4000)
    captions = unit(centres[:, 40:])
    np.testing.assert_array_equal(assign_clusters(both, centres)[0], labels)
    np.testing.assert_allclose(
        similarity, (text.astype(np.float64) * captions[labels]).sum(axis=1), atol=1e-5
    )
