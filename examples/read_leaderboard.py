"""Read what an experiment came to: a polars frame, a row an arm and metric, means over seeds.

python examples/read_leaderboard.py my-pool.yaml
"""

import sys

import polars as pl

from clipcov_pipeline.experiment.project import Project

project = Project.open(sys.argv[1])
record = project.plan().by_name["leaderboard"].record
assert record is not None, "not built yet, or out of date: clipcov run"
folder = project.store.folder(record)  # leaderboard.csv, .md, .png and the single scores lie there, too
board = pl.read_parquet(folder / "leaderboard.parquet")

primary = project.config.evaluate.primary_metric
print(primary)
for row in board.filter(metric=primary).sort("mean", descending=True).iter_rows(named=True):
    print(f"{row['method']:22} {row['fraction']:5.0%}  {row['mean']:6.1%}")
