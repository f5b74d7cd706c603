"""Choose a tenth of an experiment's LanceDB table, and write it as DataComp's tools read a subset.

python examples/lance_to_datacomp.py my-pool.yaml subset.npy
"""

import sys
from pathlib import Path

from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.selection import Pool, rank
from clipcov_pipeline.subsets.files import write_datacomp_npy

config, out = sys.argv[1], Path(sys.argv[2])

project = Project.open(config)
record = project.plan().by_name["pseudo_labels"].record  # which table and version the classes were made of
assert record is not None, "make the classes first: clipcov run --only pseudo_labels"
table = project.vectors.open(record.stats["table"], record.stats["version"])
labels = project.store.checked(record, "labels.parquet")  # the pool: without what is held out

# a memory-mapped file where the pool is large, which goes away with it
with Pool.from_lance(table, labels) as pool:
    ranking = rank(pool, "clipcov", budget=0.1)
    uids = pool.names(ranking.rows)
    print(f"{len(uids)} of {len(pool)} samples, the first is {uids[0]}")
write_datacomp_npy(out, uids)
