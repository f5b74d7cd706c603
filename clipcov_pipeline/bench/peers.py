"""The selection beside other packages' submodular optimisers."""

import numpy as np

from clipcov_pipeline.bench.measuring import Bench, fresh_pool
from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.ranking import rank

PEER_PAIRS = 4_000


def compare_peers(bench: Bench, dim: int, seed: int) -> dict[str, str]:
    """apricot and submodlib on what they can express: the graph cut of one class (m_i and the redundancy)."""
    from clipcov_pipeline.selection import kernels  # noqa: F401  loaded before it is timed

    image, text, labels, similarity = synthetic_arrays(PEER_PAIRS, 1, dim, seed)
    count = PEER_PAIRS // 10
    pool = Pool.from_arrays(image, text, labels, similarity)
    weights = {"self": 0.0, "label": 0.0, "inter": 0.0}
    ours = bench.measure(
        "one class: ours", PEER_PAIRS, lambda: rank(fresh_pool(pool), budget=count, weights=weights)
    ).rows
    wide = image.astype(np.float64) @ text.astype(np.float64).T
    # apricot takes no negative similarity
    matrix = np.maximum(wide + wide.T, 0.0)
    found = {}
    for name, work in (("apricot", _apricot), ("submodlib", _submodlib)):
        try:
            theirs = bench.measure(
                f"one class: {name}", PEER_PAIRS, lambda work=work: work(matrix, count), repeat=1
            )
            same = len(np.intersect1d(ours, theirs)) / count
            bench.rows[-1]["note"] = f"given the matrix; {same:.1%} of its choice is ours"
            found[name] = "measured"
        except ImportError:
            found[name] = (
                f"not installed (pip install {'apricot-select' if name == 'apricot' else 'submodlib-py'})"
            )
            bench.say(f"{name}: {found[name]}")
    return found


def _apricot(matrix: np.ndarray, count: int) -> np.ndarray:
    from apricot import GraphCutSelection  # type: ignore[import-not-found]

    model = GraphCutSelection(count, metric="precomputed", alpha=2.0, optimizer="lazy")
    return np.asarray(model.fit(matrix).ranking)


def _submodlib(matrix: np.ndarray, count: int) -> np.ndarray:
    from submodlib import GraphCutFunction  # type: ignore[import-not-found]

    function = GraphCutFunction(n=len(matrix), mode="dense", lambdaVal=0.5, ggsijs=matrix.astype(np.float32))
    chosen = function.maximize(budget=count, optimizer="LazyGreedy", show_progress=False)
    return np.array([row for row, _ in chosen])
