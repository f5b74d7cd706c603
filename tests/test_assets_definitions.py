"""The graph that Dagster draws is the one that the plan goes by."""

from collections.abc import Iterable

import dagster as dg

from assets.definitions import defs
from clipcov_pipeline.experiment.stages import STAGES
from simulation import Simulation, set_key


def all_that_follows(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """(what is read, who reads it), through others too."""
    found = set(pairs)
    while more := {(a, d) for a, b in found for c, d in found if b == c} - found:
        found |= more
    return found


def test_what_follows_from_what_is_the_same_for_dagster_and_for_the_plan(fresh: Simulation) -> None:
    fresh.edit(set_key("select.methods.c_rho", {}))
    fresh.edit(set_key("select.methods.basic", {}))
    nodes = [step.node for step in fresh.plan().steps]
    planned = {(item.stage, node.stage) for node in nodes for item in (*node.inputs, *node.after)}
    assets = [asset for asset in defs.assets or () if isinstance(asset, dg.AssetsDefinition)]
    drawn = {
        (read.to_user_string(), asset.key.to_user_string())
        for asset in assets
        for read in asset.dependency_keys
    }
    assert {name for pair in planned for name in pair} == set(STAGES)
    assert all_that_follows(drawn) == all_that_follows(planned)
