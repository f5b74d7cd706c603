"""What frozen image embeddings know of classes: a linear probe and a k-NN classifier on a train split."""

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# inverse strengths of regularisation, weakest last; features are scaled so that they mean the same everywhere
C_VALUES = tuple(10.0**power for power in range(-6, 3))

MAX_ITERATIONS = 200

HELD_PART = 0.2

K_NEIGHBOURS = 20

KNN_TEMPERATURE = 0.07


@dataclass(frozen=True)
class ProbeFit:
    """How a linear probe came about: the C that was taken, the validation accuracy of each in the sweep."""

    c: float
    valid_acc1: dict[float, float]
    n_train: int
    n_valid: int
    converged: bool


def stratified(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return up to ``count`` rows, each class by its share, one of each at least; sorted, int64.

    Classes of at least one row come first: with fewer rows than classes, some classes are left out.
    """
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    sizes = np.unique(labels, return_counts=True)[1]
    rank = np.concatenate([np.arange(size) / size for size in sizes]) if len(sizes) else np.empty(0)
    return np.sort(by_class[np.argsort(rank, kind="stable")[:count]])


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    n_classes: int,
    *,
    valid: np.ndarray | None = None,
    valid_labels: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, ProbeFit]:
    """Multinomial logistic regression (L-BFGS), its regularisation chosen on a validation split.

    As the CLIP paper's linear probe (arXiv 2103.00020, A.3): sweep, choose by validation accuracy (the
    stronger regularisation of equals), fit again on train and validation samples together. Embeddings are
    centred and divided by one number, which leaves the family of classifiers as it is.

    Args:
        train: float [n, d]; rows of NaN are left out.
        train_labels: int [n].
        test: float [m, d]; a row of NaN gives a row of NaN.
        n_classes: columns of the result; a class without a train sample is never chosen.
        valid: float [v, d] and its labels; by default a fifth of the train samples of each class.
        valid_labels: int [v].
        seed: of the draw of that fifth.

    Returns:
        (scores float64 [m, n_classes], how the probe came about).

    Raises:
        ValueError: fewer than two classes to learn.
    """
    own = None if valid is None or valid_labels is None else _finite(valid, valid_labels)
    part, judge, whole = _parts(_finite(train, train_labels), own, seed)
    if (found := len(np.unique(part.labels))) < 2:
        raise ValueError(f"{len(part.rows)} train samples of {found} classes")
    scaled = _Scaled.to(part.rows)
    accuracy = _sweep(part, judge, scaled)
    # without a validation sample there is nothing to choose by
    best = max(C_VALUES, key=lambda c: (accuracy[c], -c)) if len(judge.rows) else 1.0
    final = _fit(scaled(whole.rows), whole.labels, best, None)
    good = ~np.isnan(test).any(axis=1)
    scores = np.full((len(test), n_classes), np.nan)
    if good.any():
        scores[good] = _decisions(final, scaled(test[good]), n_classes)
    converged = bool(final.n_iter_.max() < MAX_ITERATIONS)
    return scores, ProbeFit(best, accuracy, len(whole.rows), len(judge.rows), converged)


class _Labelled(NamedTuple):
    """Rows float [n, d] with their classes int [n]."""

    rows: np.ndarray
    labels: np.ndarray


def _parts(train: _Labelled, valid: _Labelled | None, seed: int) -> tuple[_Labelled, _Labelled, _Labelled]:
    """What the sweep fits on, what it is judged by, and the two together."""
    if valid is None:
        held = _held_back(train.labels, seed)
        part, judge = (_Labelled(train.rows[some], train.labels[some]) for some in (~held, held))
        return part, judge, train
    return train, valid, _Labelled(*(np.concatenate(pair) for pair in zip(train, valid, strict=True)))


def _held_back(labels: np.ndarray, seed: int) -> np.ndarray:
    """Bool [n]: a fifth of each class for validation, but no class as a whole."""
    held = np.zeros(len(labels), bool)
    held[stratified(labels, round(HELD_PART * len(labels)), seed)] = True
    if len(np.unique(labels[~held])) < len(np.unique(labels)):
        held &= ~_last_of_class(labels, held)
    return held


@dataclass(frozen=True)
class _Scaled:
    """Centres rows and divides them by one number."""

    centre: np.ndarray
    scale: np.float32

    @classmethod
    def to(cls, rows: np.ndarray) -> "_Scaled":
        """By the mean and the spread of these rows."""
        centre = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        return cls(centre, np.float32(max(float(np.sqrt(np.mean((rows - centre) ** 2))), 1e-12)))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return (rows.astype(np.float32) - self.centre) / self.scale


def _sweep(part: _Labelled, judge: _Labelled, scaled: _Scaled) -> dict[float, float]:
    """Validation accuracy by C."""
    accuracy, model = {}, None
    rows, others = scaled(part.rows), scaled(judge.rows)
    for c in C_VALUES:
        model = _fit(rows, part.labels, c, model)
        accuracy[c] = float((model.predict(others) == judge.labels).mean()) if len(others) else 0.0
    return accuracy


def _decisions(model: Any, rows: np.ndarray, n_classes: int) -> np.ndarray:
    """Scores float64 [n, n_classes]; -inf for a class that the model does not know."""
    found = model.decision_function(rows)
    found = np.stack([-found, found], axis=1) / 2 if found.ndim == 1 else found
    scores = np.full((len(rows), n_classes), -np.inf)
    scores[:, model.classes_] = found
    return scores


def _fit(x: np.ndarray, labels: np.ndarray, c: float, start: Any) -> Any:
    """A fitted LogisticRegression, begun at the coefficients of ``start`` where there is one."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, tol=1e-4, warm_start=True)
    if start is not None:  # the last fit of the sweep is near
        model.coef_, model.intercept_, model.classes_ = start.coef_, start.intercept_, start.classes_
    # products this small are no faster on several threads, and wait for each other on a busy machine
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # recorded
        return model.fit(x, labels)


def _finite(rows: np.ndarray, labels: np.ndarray) -> _Labelled:
    good = np.isfinite(rows).all(axis=1)
    return _Labelled(rows[good], np.asarray(labels)[good])


def _last_of_class(labels: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Rows of the classes that have only held rows: they stay for training."""
    return np.isin(labels, np.setdiff1d(labels, labels[~held]))


def knn_scores(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    n_classes: int,
    *,
    k: int = K_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
    block: int = 1024,
) -> np.ndarray:
    """Weighted k-NN as DINO has it (arXiv 2104.14294): the k nearest vote with exp(cosine / temperature).

    Args:
        train: float [n, d], unit rows; rows of NaN are left out.
        train_labels: int [n].
        test: float [m, d], unit rows; a row of NaN gives a row of NaN.
        n_classes: columns of the result.
        k: neighbours; all of them where there are fewer.
        temperature: of the votes.
        block: test rows at a time.

    Returns:
        float64 [m, n_classes], the share of the votes.
    """
    train, train_labels = _finite(train, train_labels)
    k = min(k, len(train))
    scores = np.full((len(test), n_classes), np.nan)
    if k == 0:
        return scores
    for start in range(0, len(test), block):
        rows = test[start : start + block]
        good = np.isfinite(rows).all(axis=1)
        similar = rows[good].astype(np.float32) @ train.astype(np.float32).T
        nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        weights = np.exp((np.take_along_axis(similar, nearest, axis=1).astype(np.float64) - 1) / temperature)
        votes = np.zeros((len(similar), n_classes))
        np.add.at(votes, (np.arange(len(similar))[:, None], train_labels[nearest]), weights)
        scores[start : start + block][good] = votes / weights.sum(axis=1, keepdims=True)
    return scores
