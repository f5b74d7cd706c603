"""The Dagster code location: what exists, one file a stage."""

import warnings

import dagster as dg

# `backfill_policy` is beta and a part of Pipes is preview in Dagster 1.13: a notice at every start tells
# nobody anything
for _category in (dg.BetaWarning, dg.PreviewWarning):
    warnings.filterwarnings("ignore", category=_category)
