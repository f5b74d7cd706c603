"""The table of the stages, and that the graph and the code location keep to it."""

import pytest

from assets.definitions import defs
from clipcov_pipeline.experiment.config.load import load_config
from clipcov_pipeline.experiment.graph import nodes
from clipcov_pipeline.experiment.stages import PARTITIONED, STAGES, TABLE
from clipcov_pipeline.experiment.world import World
from clipcov_pipeline.pool.listing import Shard

PRESETS = ("sample", "cc3m", "datacomp_small")


def world_of(names: list[str]) -> World:
    shards = tuple(Shard(f"{index:05d}", f"/pool/{index:05d}.tar", "1") for index in range(3))
    return World(shards, dict.fromkeys(names, shards[:1]), {})


@pytest.mark.parametrize("preset", PRESETS)
def test_entries_read_outputs_that_the_table_has_and_come_after_them(preset: str) -> None:
    config = load_config(preset)
    outputs = {name: {*stage.files, *stage.computed} for name, stage in TABLE.items()}
    outputs["embeddings"] = {"rows"}  # in LanceDB, no file
    outputs["raw_shards"].add("source_ids")  # a column of a file
    seen: set[str] = set()
    for node in nodes(config, world_of(list(config.evaluate.sets))):
        for read in (*node.inputs, *node.after):
            assert read.output in outputs[read.stage]
            assert read.name.partition("#")[0] in seen
        assert set(node.needs) <= outputs[node.stage]
        seen.add(node.name)
    left_out = set(STAGES) - {name.partition("/")[0] for name in seen}
    assert left_out <= {"early_similarities", "checkpoint_galleries"}  # for c_rho; of held-out pairs


def test_every_stage_is_an_asset_and_is_partitioned_as_the_table_says() -> None:
    graph = defs.resolve_asset_graph()
    found = {key.path[-1]: graph.get(key).is_partitioned for key in graph.materializable_asset_keys}
    assert found == {name: name in PARTITIONED for name in STAGES}
