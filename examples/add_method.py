"""A method of your own, beside the built-in ones: an order of the pool, written as a list of uids.

To make it a method with a name and parameters, put the function into `selection/baselines.py` and its name
into `BASELINES` there and into `selection/methods.py`. To try an idea, a list is enough:

python examples/add_method.py mine.csv
"""

import sys
from pathlib import Path

import numpy as np

from clipcov_pipeline.bench.synthetic import synthetic_arrays
from clipcov_pipeline.selection import Pool, objective, rank


def longest_first(pool: Pool, caption_length: np.ndarray) -> np.ndarray:
    """Rows in the order in which to take them: the longer a caption, the earlier; among equals the closer."""
    return np.lexsort((-pool.pair_similarity(), -caption_length))


out = Path(sys.argv[1])
rng = np.random.default_rng(0)
uids = [rng.bytes(16).hex() for _ in range(1000)]
pool = Pool.from_arrays(*synthetic_arrays(1000, 10, 32), uid=uids)

order = longest_first(pool, rng.integers(3, 80, 1000))
out.write_text("\n".join(["uid", *pool.names(order)]) + "\n")

# in an experiment's YAML:  select: {methods: {mine: {method: external, uids: ./mine.csv}}}
for name, settings in (("clipcov", {}), ("external", {"uids": str(out)}), ("random", {})):
    rows = rank(pool, name, budget=0.1, **settings).rows
    print(f"{name:10} F = {objective(pool, rows)['F']:8.1f}")
