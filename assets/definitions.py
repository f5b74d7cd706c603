"""The code location, read in one screen: every asset, the resources, the terminal's logger."""

import dagster as dg

from assets.automation import JOBS, rebuild, rescan
from assets.checkpoint_galleries import checkpoint_galleries
from assets.checkpoints import checkpoints
from assets.display.terminal import terminal_logger
from assets.early_similarities import early_similarities
from assets.embeddings import embeddings
from assets.leaderboard import leaderboard
from assets.pool_map import pool_map
from assets.proxy_model import proxy_model
from assets.pseudo_labels import pseudo_labels
from assets.rankings import rankings
from assets.raw_shards import raw_shards
from assets.report import report
from assets.resources import Experiment
from assets.sample_index import sample_index
from assets.scores import scores
from assets.subset_diagnostics import subset_diagnostics
from assets.subset_galleries import subset_galleries
from assets.subsets import subsets

defs = dg.Definitions(
    assets=[
        raw_shards,
        proxy_model,
        embeddings,
        early_similarities,
        pseudo_labels,
        sample_index,
        rankings,
        subsets,
        pool_map,
        subset_diagnostics,
        subset_galleries,
        checkpoints,
        scores,
        leaderboard,
        checkpoint_galleries,
        report,
    ],
    jobs=list(JOBS.values()),
    sensors=[rebuild],
    schedules=[rescan],
    resources={"experiment": Experiment(), "pipes": dg.PipesSubprocessClient()},
    executor=dg.in_process_executor,  # a run has one step: no process of its own for it
    loggers={"console": dg.colored_console_logger, "terminal": terminal_logger},
)
