"""Linear probe and k-NN against scikit-learn's own and brute force."""

import numpy as np
import pytest

from clipcov_pipeline.evaluation.metrics import classification_metrics
from clipcov_pipeline.evaluation.probe import C_VALUES, knn_scores, linear_probe, stratified


def clouds(seed: int, n: int, n_classes: int = 4, dim: int = 12, noise: float = 1.5):
    """Unit rows around class centres, and their labels."""
    centres = np.random.default_rng(99).normal(size=(n_classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    rows = centres[labels] + noise * rng.normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("own_valid", [True, False])
def test_the_probe_is_a_logistic_regression_chosen_on_validation_data(own_valid: bool):
    from sklearn.linear_model import LogisticRegression

    (train, labels), (valid, valid_labels), (test, targets) = clouds(0, 240), clouds(1, 80), clouds(2, 300)
    given = {"valid": valid, "valid_labels": valid_labels} if own_valid else {}
    scores, fit = linear_probe(train, labels, test, 4, **given)
    assert fit.c == max(C_VALUES, key=lambda c: (fit.valid_acc1[c], -c))
    assert set(fit.valid_acc1) == set(C_VALUES)
    assert (fit.n_train, fit.n_valid) == ((320, 80) if own_valid else (240, 48))
    # refit by hand, on standardised features and to convergence, with the weakest of the same regularisation
    x = np.concatenate([train, valid]) if own_valid else train
    y = np.concatenate([labels, valid_labels]) if own_valid else labels
    plain = LogisticRegression(C=1e3, max_iter=5000).fit(x, y).score(test, targets)
    accuracy = classification_metrics(scores, targets)["acc1"]
    assert accuracy == pytest.approx((scores.argmax(axis=1) == targets).mean())
    assert accuracy > plain - 0.03
    assert accuracy > 0.6


def test_the_probe_of_noise_is_at_chance_and_regularised():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(400, 8)), rng.normal(size=(2000, 8))
    scores, _ = linear_probe(train, rng.integers(5, size=400), test, 5)
    assert classification_metrics(scores, rng.integers(5, size=2000))["acc1"] == pytest.approx(0.2, abs=0.04)


def test_the_probe_separates_what_is_separable_and_survives_gaps():
    train, labels = clouds(0, 200, noise=0.05)
    test, targets = clouds(1, 100, noise=0.05)
    train[3] = np.nan
    test[7] = np.nan
    scores, fit = linear_probe(train, labels, test, 6)  # classes 4 and 5 have no train sample
    assert fit.n_train == 199
    assert np.isnan(scores[7]).all()
    assert np.isneginf(scores[:7, 4:]).all()
    assert classification_metrics(scores, targets)["acc1"] == pytest.approx(99 / 100)


def test_two_classes_have_two_columns():
    train, labels = clouds(0, 100, n_classes=2, noise=0.1)
    test, targets = clouds(1, 50, n_classes=2, noise=0.1)
    scores, _ = linear_probe(train, labels, test, 2)
    assert (scores.argmax(axis=1) == targets).all()


def test_one_class_is_refused():
    train, _ = clouds(0, 20)
    with pytest.raises(ValueError, match="1 classes"):
        linear_probe(train, np.zeros(20, int), train, 3)


def test_knn_is_a_weighted_vote_of_the_nearest():
    (train, labels), (test, _) = clouds(0, 120), clouds(1, 40)
    train[5] = np.nan
    test[2] = np.nan
    scores = knn_scores(train, labels, test, 4, k=7, temperature=0.1, block=11)
    for row, vector in enumerate(test):
        if row == 2:
            assert np.isnan(scores[row]).all()
            continue
        cosines = sorted(
            ((float(vector @ other), label) for other, label in zip(train, labels, strict=True)
             if not np.isnan(other[0])),
            reverse=True,
        )[:7]  # fmt: skip
        votes = np.zeros(4)
        for cosine, label in cosines:
            votes[label] += np.exp(cosine / 0.1)
        assert scores[row] == pytest.approx(votes / votes.sum(), abs=1e-4)


def test_knn_with_fewer_neighbours_than_k():
    train, labels = clouds(0, 3)
    assert knn_scores(train, labels, train, 4).sum(axis=1) == pytest.approx(1)
    assert np.isnan(knn_scores(train[:0], labels[:0], train, 4)).all()


def test_the_draw_is_by_class_and_the_same_every_time():
    labels = np.repeat([0, 1, 2, 3], [600, 300, 90, 10])
    rows = stratified(labels, 100)
    assert (np.diff(rows) > 0).all()
    assert np.bincount(labels[rows]).tolist() == pytest.approx([60, 30, 9, 1], abs=1)
    assert (rows == stratified(labels, 100)).all()
    assert np.bincount(labels[stratified(labels, 4)]).tolist() == [1, 1, 1, 1]
    assert len(stratified(labels, 5000)) == 1000
    assert len(stratified(labels[:0], 5)) == 0
