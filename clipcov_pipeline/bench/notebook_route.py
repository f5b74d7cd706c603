"""ClipCov the plain way, with every class's similarity matrix in memory: what the engine is measured against.

``notebook_route`` follows the authors' notebook (``clip_core.ipynb``) cell by cell: per class a file with
the matrix of <v_i, t_j>; each file is loaded once for the diagonal and once more to set the negatives to 0
and keep it; then one global sorted list that is sorted again after every batch of a class. What made its
input files was never published: they are made here in the plainest way. Its progress bar is left out.
"""

from pathlib import Path

import numpy as np

from clipcov_pipeline.selection.measure import Phases

BATCH = 200


def notebook_route(
    image: np.ndarray, text: np.ndarray, latent_class: np.ndarray, label_similarity: np.ndarray, count: int,
    folder: Path, phases: Phases, clip_negative: bool = True,
) -> np.ndarray:  # fmt: skip
    """Select ``count`` pairs by the authors' rule, with the matrices it needs.

    Args:
        image, text: [N, d] unit norm; latent_class: int [N]; label_similarity: float [N].
        folder: where the matrices go (4 bytes x the sum of squared class sizes).
        phases: "matrices" and "loop" are recorded in it.
        clip_negative: set similarities below 0 to 0, as they do.

    Returns:
        int64 [count], rows in the order taken.
    """
    members = {int(k): np.flatnonzero(latent_class == k) for k in np.unique(latent_class)}
    with phases("matrices"):
        base, class_term = _precompute(image, text, label_similarity, members, folder, clip_negative)
    with phases("loop"):
        easiness = np.zeros(len(image))
        for k, rows in members.items():
            easiness[rows] += np.diag(np.load(folder / f"{k}.npy"))
        matrices = {}
        for k in members:
            matrices[k] = np.load(folder / f"{k}.npy")
            if clip_negative:
                matrices[k] *= matrices[k] > 0
            matrices[k] = matrices[k].astype("float32")
        base = base + 2 * easiness
        return _loop(base, class_term, label_similarity, latent_class, members, matrices, count)


def _precompute(
    image: np.ndarray, text: np.ndarray, label_similarity: np.ndarray, members: dict[int, np.ndarray],
    folder: Path, clip_negative: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Base scores without the self term, and the class term; the matrices go to files."""
    image, text = image.astype(np.float32), text.astype(np.float32)
    centres = {k: [_unit(side[rows].mean(axis=0)) for side in (image, text)] for k, rows in members.items()}
    total = [np.sum([centres[k][side] for k in members], axis=0) for side in (0, 1)]
    class_term, base = np.zeros(len(image)), np.zeros(len(image))
    others = max(len(members) - 1, 1)
    for k, rows in members.items():
        similarity = image[rows] @ text[rows].T
        np.save(folder / f"{k}.npy", similarity)
        if clip_negative:
            similarity *= similarity > 0
        both = similarity.sum(axis=0, dtype=np.float64) + similarity.sum(axis=1, dtype=np.float64)
        class_term[rows] = both / len(rows)
        inter = image[rows] @ (total[1] - centres[k][1]) + text[rows] @ (total[0] - centres[k][0])
        base[rows] = class_term[rows] + label_similarity[rows] / 2 - inter / others
    return base, class_term


def _loop(
    base: np.ndarray, class_term: np.ndarray, label_similarity: np.ndarray, latent_class: np.ndarray,
    members: dict[int, np.ndarray], matrices: dict[int, np.ndarray], count: int,
) -> np.ndarray:  # fmt: skip
    scores = base.copy()
    taken: list[int] = []
    of_class: dict[int, list[int]] = {k: [] for k in members}
    new: dict[int, list[int]] = {k: [] for k in members}
    waiting = np.argsort(scores)
    end = len(waiting)
    while len(taken) < count:
        end -= 1
        row = int(waiting[end])
        k = int(latent_class[row])
        taken.append(row)
        of_class[k].append(row)
        new[k].append(row)
        if (len(of_class[k]) + 1) % BATCH == 0:
            rows, n = members[k], len(members[k])
            # they look the batch up in a list, row by row, once for each of the two deductions
            columns = [i for i, member in enumerate(rows) if member in new[k]]
            similar = (matrices[k][:, columns].sum(axis=1) + matrices[k][columns, :].sum(axis=0)) / n
            columns = [i for i, member in enumerate(rows) if member in new[k]]
            label = label_similarity[rows[columns]].sum() / 2 / n
            scores[rows] -= similar + class_term[of_class[k]].sum() / n + label
            scores[taken] = -np.inf
            waiting = np.argsort(scores)[len(taken) :]
            end = len(waiting)
            new[k] = []
    return np.array(taken, np.int64)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)
