"""The whole graph on real data in a real Dagster instance: what its first run leaves."""

import json
import tarfile

import dagster as dg
import numpy as np
import polars as pl
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from assets.definitions import defs
from lab import Lab

pytestmark = pytest.mark.slow

ARMS = ("full-f1-s0", "clipcov-f0.5-s0", "random-f0.5-s0")
FIRST_RUN = {
    "raw_shards": 3,
    "proxy_model": 1,
    "embeddings": 3,
    "pseudo_labels": 1,
    "sample_index": 1,
    "rankings": 2,
    "subsets": 3,
    "pool_map": 1,
    "subset_diagnostics": 2,
    "subset_galleries": 2,
    "checkpoints": 3,
    "scores": 3,
    "leaderboard": 1,
    "checkpoint_galleries": 3,
    "report": 1,
}


def test_first_run_executes_every_stage_once(built_lab: Lab) -> None:
    assert dict(built_lab.first_run) == FIRST_RUN
    assert not built_lab.plan().todo


def test_subset_files_agree_with_each_other_and_the_pool(built_lab: Lab) -> None:
    project = built_lab.project()
    steps = project.plan().by_name
    labels = pl.read_parquet(project.store.folder(steps["pseudo_labels"].record) / "labels.parquet")
    for key in ("clipcov-f0.5", "random-f0.5", "full-f1"):
        folder = project.store.folder(steps[f"subsets/{key}"].record)
        subset = pl.read_parquet(folder / "subset.parquet")
        expected = labels.height if key == "full-f1" else int(0.5 * labels.height + 0.5)
        assert subset.height == subset["uid"].n_unique() == expected
        assert set(subset["uid"]) <= set(labels["uid"])
        halves = np.load(folder / "subset.npy")
        assert sorted(subset["uid"]) == [f"{high:016x}{low:016x}" for high, low in halves.tolist()]
        assert not list(folder.rglob("*.tar"))
        row = subset.row(subset.height // 2, named=True)
        with tarfile.open(project.shards[row["shard"]].url) as tar:
            image = tar.getmember(f"{row['key']}.{row['image_ext']}")
        assert (row["image_offset"], row["image_size"]) == (image.offset_data, image.size)


def test_every_arm_was_given_its_subset_and_nothing_else(built_lab: Lab) -> None:
    project = built_lab.project()
    steps = project.plan().by_name
    for key in ("clipcov-f0.5", "random-f0.5", "full-f1"):
        subset = pl.read_parquet(project.store.folder(steps[f"subsets/{key}"].record) / "subset.parquet")
        record = steps[f"checkpoints/{key}-s0"].record
        assert record is not None
        seen = pl.read_parquet(project.store.folder(record) / "seen.parquet")
        assert set(seen["uid"]) <= set(subset["uid"])
        assert seen.height == min(subset.height, record.stats["samples_seen"])
        assert seen["times"].sum() == record.stats["samples_seen"] == record.stats["seen_samples"]
        assert set(seen["times"]) <= {
            seen["times"].min(),
            seen["times"].min() + 1,
        }  # whole passes, part of one


def test_no_arm_or_proxy_sees_the_held_out_share(built_lab: Lab) -> None:
    project = built_lab.project()
    folder = project.store.folder(project.plan().by_name["pseudo_labels"].record)
    labels, holdout = pl.read_parquet(folder / "labels.parquet"), pl.read_parquet(folder / "holdout.parquet")
    assert labels.height + holdout.height == 238  # of 240, two are of one colour
    assert not set(labels["uid"]) & set(holdout["uid"])
    assert 20 < holdout.height < 80  # a fifth, by hash


def test_checkpoint_loads_with_open_clip_alone(built_lab: Lab) -> None:
    import open_clip

    from clipcov_pipeline.proxy.models import register_model_configs

    project = built_lab.project()
    folder = project.store.folder(project.plan().by_name["checkpoints/clipcov-f0.5-s0"].record)
    register_model_configs()
    open_clip.create_model_and_transforms(
        "clipcov-tiny-RN", pretrained=str(folder / "open_clip_pytorch_model.bin")
    )
    record = json.loads((folder / "training.json").read_text())
    assert record["samples_seen"] == 192


def test_every_arm_has_seen_the_same_number_of_samples(built_lab: Lab) -> None:
    steps = built_lab.plan().of("checkpoints")
    assert {step.record.stats["samples_seen"] for step in steps if step.record} == {192}


def test_dagster_has_a_materialization_with_its_own_data_version_for_each_partition(built_lab: Lab) -> None:
    plan = built_lab.plan()
    with built_lab.instance() as instance:
        for stage in ("raw_shards", "embeddings", "subsets", "checkpoints"):
            versions = set()
            for step in plan.of(stage):
                records = instance.fetch_materializations(
                    dg.AssetRecordsFilter(asset_key=dg.AssetKey(stage), asset_partitions=[step.key]), limit=5
                ).records
                assert len(records) == 1
                materialization = records[0].asset_materialization
                assert materialization is not None
                assert materialization.tags is not None
                versions.add(materialization.tags["dagster/data_version"])
                assert step.fingerprint is not None
                assert materialization.tags["dagster/data_version"] == step.fingerprint[:16]
            assert len(versions) == len(plan.of(stage))


def unsynced(lab: Lab) -> set[str]:
    """What Dagster itself calls out of date, as its pages show it."""
    graph = defs.resolve_asset_graph()
    with lab.instance() as instance:
        status = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
        keys = {
            (asset, key)
            for asset in graph.materializable_asset_keys
            for key in (
                instance.get_dynamic_partitions(asset.path[-1]) if graph.get(asset).is_partitioned else [None]
            )
        }
        states = {(asset.path[-1], key): status.get_status(asset, key) for asset, key in keys}
    return {f"{stage}/{key}" for (stage, key), state in states.items() if state is StaleStatus.STALE}


def test_dagster_calls_nothing_unsynced_but_what_follows_a_change(lab: Lab) -> None:
    assert unsynced(lab) == set()
    lab.edit(lambda s: s["train"].update(lr=0.002))
    lab.run(only=("checkpoints",))
    # what reads the checkpoints itself; the leaderboard and the galleries follow the scores
    assert unsynced(lab) == {"report/None", *(f"scores/{arm}" for arm in ARMS)}


def test_mlflow_has_one_finished_run_a_recipe_linked_with_dagster(built_lab: Lab) -> None:
    from assets.mlflow_runs.tracking import Tracking

    project = built_lab.project()
    tracking = Tracking(project.config)
    with built_lab.instance() as instance:
        for arm in ARMS:
            record = project.plan().by_name[f"checkpoints/{arm}"].record
            assert record is not None
            run = tracking.find(record.fingerprint)
            assert run is not None
            assert run.info.status == "FINISHED"
            assert run.data.tags["clipcov.recipe"] == arm
            assert instance.get_run_by_id(run.data.tags["dagster.run_id"]) is not None
            assert run.data.params["train.batch_size"] == "32"
            assert 0 <= run.data.metrics["vendor/text_retrieval_recall_at_5"] <= 1
            assert "holdout/text_retrieval_recall_at_5" in run.data.metrics
            history = tracking.client().get_metric_history(run.info.run_id, "train/loss")
            assert [point.step for point in history] == sorted({point.step for point in history})
            names = {item.path for item in tracking.client().list_artifacts(run.info.run_id)}
            assert {"subset", "config", "scores", "training.json"} <= names


def test_leaderboard_agrees_with_the_score_records(built_lab: Lab) -> None:
    project = built_lab.project()
    steps = project.plan().by_name
    board = pl.read_csv(project.store.folder(steps["leaderboard"].record) / "leaderboard.csv")
    for arm, method in zip(ARMS, ("full", "clipcov", "random"), strict=True):
        folder = project.store.folder(steps[f"scores/{arm}@vendor"].record)
        [retrieval, names] = json.loads((folder / "scores.json").read_text())
        for record in (retrieval, names):
            assert record["n_samples"] == 60
            for metric, value in record["metrics"].items():
                row = board.filter((pl.col("method") == method) & (pl.col("metric") == f"vendor/{metric}"))
                assert row["mean"].item() == pytest.approx(value)


# ---------------------------------------------------------------- what runs again
