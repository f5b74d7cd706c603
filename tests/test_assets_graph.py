"""The whole graph on real data in a real Dagster instance: what a change runs again."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest

from assets.partitions import sync_partitions
from assets.running import execution
from assets.running.run import run_plan
from assets.training.pipes import train
from clipcov_pipeline.experiment import stages, store
from clipcov_pipeline.experiment.plan import Status
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.verify import verify
from clipcov_pipeline.proxy.vectors import Vectors
from clipcov_pipeline.selection import METHODS
from clipcov_pipeline.selection.methods import FILTER_METHODS
from lab import SELECTION, Lab, copy_samples

pytestmark = pytest.mark.slow

# bounds that part of the sample's small drawings pass
BASIC: dict[str, Any] = {"min_words": 4, "min_characters": 12, "min_side": 64, "max_aspect": 1.1}

ARMS = ("full-f1-s0", "clipcov-f0.5-s0", "random-f0.5-s0")


def trained(arms: int) -> dict[str, int]:
    """What new arms cost, from their training on."""
    each = dict.fromkeys(("checkpoints", "scores", "checkpoint_galleries"), arms)
    return {**each, "leaderboard": 1, "report": 1}


# ---------------------------------------------------------------- what the first run leaves


def test_nothing_changed_executes_nothing(lab: Lab) -> None:
    assert dict(lab.run()) == {}


def test_one_selection_parameter_rebuilds_that_method_only(lab: Lab) -> None:
    def scores() -> list[str]:
        records = [step.record for step in lab.plan().of("scores", "clipcov-f0.5-s0")]
        return [record.digests["scores"] for record in records if record is not None]

    before = scores()
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    changed = lab.plan().by_name["rankings/clipcov"]
    assert changed.why == ("select.methods.clipcov.weights.self 2.0 -> 0.0",)
    executed = lab.run()
    assert len(before) == len(scores()) == 2
    # another subset can train an arm that scores the same: a few steps, a few dozen pairs
    board = {"leaderboard": 1} if scores() != before else {}
    assert dict(executed) == {
        "rankings": 1,
        "subsets": 1,
        # the other method's overlap with it is another, too
        "subset_diagnostics": 2,
        "subset_galleries": 1,
        "checkpoints": 1,
        "scores": 1,
        **board,
        "checkpoint_galleries": 1,
        "report": 1,
    }


def test_a_parameter_there_and_back_builds_nothing(lab: Lab) -> None:
    before = {step.node.name: step.record for step in lab.plan().steps}
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    lab.run(only=SELECTION)
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={}))
    plan = lab.plan()
    assert {step.status for step in plan.todo} == {Status.RESTORE}
    assert set(lab.run()) == {"rankings", "subsets"}
    assert {step.node.name: step.record for step in lab.plan().steps} == before


def test_a_fraction_added_builds_only_its_subsets_and_what_follows(lab: Lab) -> None:
    lab.edit(lambda s: s["select"].update(fractions=[0.25, 0.5]))
    subsets = {"subsets": 2, "subset_diagnostics": 2, "subset_galleries": 2}
    assert dict(lab.run()) == {**subsets, **trained(2)}


def test_a_training_parameter_trains_again_and_selects_nothing(lab: Lab) -> None:
    lab.edit(lambda s: s["train"].update(lr=0.002))
    assert lab.plan().by_name["checkpoints/full-f1-s0"].why == ("train.lr 0.001 -> 0.002",)
    assert dict(lab.run()) == trained(3)


def test_another_yaml_opened_during_a_run_does_not_stop_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets its own partitions in the Dagster instance of the work folder they share."""
    other = lab.folder / "other.yaml"
    other.write_text(lab.yaml.read_text().replace("0.5", "0.4"))
    lab.edit(lambda s: (s["train"].update(lr=0.002), s["select"].update(methods={"random": {}})))
    execute, seen = execution.execute, []

    def disturbed(instance: dg.DagsterInstance, stage: str, keys: Sequence[str]) -> None:
        execute(instance, stage, keys)
        sync_partitions(instance, Project.open(str(other)).plan())
        seen.append(set(keys) & set(instance.get_dynamic_partitions(stage)))

    monkeypatch.setattr(execution, "execute", disturbed)
    assert lab.run(only=("checkpoints",))["checkpoints"] == 2
    assert seen == [{"full-f1-s0"}, set()]  # the other YAML has no such random arm


def test_every_method_ranks_and_cuts_in_the_graph(lab: Lab) -> None:
    methods = [m for m in METHODS if m not in ("clipcov", "random", *FILTER_METHODS)]
    filters = {"drop_duplicate_images": True, "drop_duplicate_captions": True, "caption_length": [1, 500]}

    before = lab.project().plan().by_name
    listed = pl.read_parquet(
        lab.project().store.folder(before["pseudo_labels"].record) / "labels.parquet", columns=["uid"]
    ).sample(50, seed=1, shuffle=True)
    unknown = pl.DataFrame({"uid": ["f" * 32]})
    pl.concat([listed[:10], unknown, listed[10:]]).write_csv(lab.folder / "list.csv")

    def change(settings: dict[str, Any]) -> None:
        settings["select"]["methods"] |= {method: {} for method in methods}
        settings["select"]["methods"]["external"] = {"uids": "list.csv", "fill": "random"}
        settings["select"]["methods"]["filtered"] = {"method": "random", "filters": filters}
        settings["select"]["methods"]["basic"] = {**BASIC, "filters": {"rejected": "last"}}
        settings["select"]["methods"]["named"] = {"method": "text_based", "class_names": "names.txt"}
        settings["select"]["fractions"] = [0.25]

    (lab.folder / "names.txt").write_text("computer\nshapes\nflag\nicon\nsign\nfood\ntheme\n")
    lab.edit(change)
    executed = lab.run(only=SELECTION)
    new = len(methods) + 3
    assert dict(executed) == {"early_similarities": 3, "rankings": new, "subsets": new + 2}
    project = lab.project()
    steps = project.plan().by_name

    def read(name: str, file: str) -> pl.DataFrame:
        return pl.read_parquet(project.store.folder(steps[name].record) / file)

    labels = read("pseudo_labels", "labels.parquet")
    _check_filters(labels, read, steps["rankings/basic"].record.stats["passed_filters"])
    for method in [*methods, "basic"]:
        assert sorted(read(f"rankings/{method}", "ranking.parquet")["uid"]) == sorted(labels["uid"])
        assert read(f"subsets/{method}-f0.25", "subset.parquet").height == int(0.25 * labels.height + 0.5)
    copies = labels.filter(labels["image_sha256"].is_duplicated())
    assert copies.height  # the lab's sample has exact duplicates
    ranked = read("rankings/dedup", "ranking.parquet")
    joined = ranked.join(labels.select("uid", "image_sha256"), on="uid").filter(pl.col("gain") == 1)
    assert joined["image_sha256"].is_unique().all()
    # c_rho's gain is the final similarity less the early one
    early = pl.concat([read(f"early_similarities/0000{i}", "similarities.parquet") for i in range(3)])
    similarity = read("rankings/clip_score", "ranking.parquet").select("uid", final="gain")
    found = read("rankings/c_rho", "ranking.parquet").join(early, on="uid").join(similarity, on="uid")
    expected = found["final"] - found["early_similarity"]
    np.testing.assert_allclose(found["gain"], expected, atol=1e-6)
    assert found["early_similarity"].n_unique() > 100
    # the list's own order, then the rest; an edited list ranks again, alone
    ranked = read("rankings/external", "ranking.parquet")
    assert ranked["uid"].head(50).to_list() == listed["uid"].to_list()
    assert ranked["gain"].to_list() == [1.0] * 50 + [0.0] * (labels.height - 50)
    record = steps["rankings/external"].record
    assert (record.stats["listed"], record.stats["unknown_uids"]) == (50, 1)
    assert verify(project).lines() == []
    listed.reverse().write_csv(lab.folder / "list.csv")
    assert [step.node.name for step in lab.plan().todo if step.node.stage == "rankings"] == [
        "rankings/external"
    ]
    assert lab.plan().by_name["rankings/external"].why == ("select.methods.external.uids changed",)
    (lab.folder / "names.txt").write_text("computer\nshapes\nflag\nicon\nsign\nfood\ntheme\nof\n")
    assert lab.plan().by_name["rankings/named"].why == ("select.methods.named.class_names changed",)
    assert dict(lab.run(only=SELECTION)) == {"rankings": 2, "subsets": 2}


def _check_filters(
    labels: pl.DataFrame, read: Callable[[str, str], pl.DataFrame], passed: dict[str, int]
) -> None:
    """What passed `BASIC` stands first in its ranking; by the manifests, in plain Python."""
    manifests = pl.concat([read(f"raw_shards/0000{i}", "manifest.parquet") for i in range(3)])
    good = manifests.filter(pl.col("status") == "ok").join(labels, on=["shard", "uid"], how="semi")
    passing = {
        row["uid"]
        for row in good.iter_rows(named=True)
        if len(row["caption"].split()) >= BASIC["min_words"]
        and len(row["caption"]) >= BASIC["min_characters"]
        and min(row["width"], row["height"]) >= BASIC["min_side"]
        and max(row["width"], row["height"]) / min(row["width"], row["height"]) <= BASIC["max_aspect"]
    }
    assert 0 < len(passing) < labels.height
    assert passed == {"basic": len(passing), "all": len(passing)}
    assert set(read("rankings/basic", "ranking.parquet")["uid"].head(len(passing))) == passing


def test_an_evaluation_set_added_is_scored_alone(lab: Lab) -> None:
    before = {step.node.name: step.record for step in lab.plan().of("scores")}
    copy_samples(lab.folder / "vendor" / "00000.tar", lab.folder / "half" / "00000.tar", 0, 30)
    lab.edit(lambda s: s["evaluate"]["sets"].update(half={"shards": "half"}))
    assert dict(lab.run()) == {"scores": 3, "leaderboard": 1, "report": 1}
    after = {step.node.name: step.record for step in lab.plan().of("scores")}
    assert {name: after[name] for name in before} == before


def test_a_class_prompt_edited_starts_at_the_labels(lab: Lab) -> None:
    names = lab.folder / "names.txt"
    names.write_text("star\ntree\nface\nanimal\n")
    prompts = {"latent_classes": "prompts", "class_names": "./names.txt", "templates": ["a drawing of {}"]}
    lab.edit(lambda s: s.update(labels=prompts))
    lab.run(only=SELECTION)
    names.write_text("star\ntree\nface\nvehicle\n")
    assert lab.plan().by_name["pseudo_labels"].why == ("labels.class_names changed",)
    executed = lab.run(only=SELECTION)
    assert set(executed) <= {"pseudo_labels", "rankings", "subsets"}
    assert executed["pseudo_labels"] == 1


@pytest.mark.long
def test_one_new_shard_of_150_embeds_once(lab: Lab, sample_shards: Path) -> None:
    for index in range(150):
        copy_samples(sample_shards / "00003.tar", lab.folder / "many" / f"{index:05d}.tar", 4 * index, 4)
    lab.edit(lambda s: s["shards"].update(source="many"))
    first = lab.run(only=SELECTION)
    assert first["raw_shards"] == first["embeddings"] == 150
    copy_samples(sample_shards / "00003.tar", lab.folder / "many" / "00150.tar", 600, 4)
    executed = lab.run(only=SELECTION)
    assert executed["raw_shards"] == executed["embeddings"] == executed["pseudo_labels"] == 1
    with lab.instance() as instance:
        runs = instance.get_run_records(dg.RunsFilter(), limit=5)
        events = sum(len(instance.all_logs(run.dagster_run.run_id)) for run in runs)
    assert events < 200  # nothing is written for the 150 shards that did not change


def test_one_new_shard(lab: Lab, sample_shards: Path) -> None:
    copy_samples(sample_shards / "00005.tar", lab.shard(3), 0, 40)
    executed = lab.run(only=SELECTION)
    assert dict(executed) == {
        "raw_shards": 1,
        "embeddings": 1,
        "pseudo_labels": 1,
        "rankings": 2,
        "subsets": 3,
        "sample_index": 1,
    }
    plan = lab.plan()
    statuses = {step.node.partition: step.status for step in plan.of("checkpoints")}
    assert statuses.pop("full-f1-s0") is Status.BUILD
    assert set(statuses.values()) == {Status.WAIT}  # to be seen first
    assert plan.by_name["checkpoints/full-f1-s0"].why == ("subsets/full-f1#samples changed",)


def test_one_changed_shard(lab: Lab, sample_shards: Path) -> None:
    shutil.copy(lab.shard(1), lab.folder / "kept.tar")
    copy_samples(sample_shards / "00005.tar", lab.shard(1), 0, 30)
    executed = lab.run(only=SELECTION)
    expected = {"raw_shards": 1, "embeddings": 1, "pseudo_labels": 1, "rankings": 2, "subsets": 3}
    expected |= {"sample_index": 1}
    assert dict(executed) == expected
    # and back: everything that was built for it is found again
    shutil.copy(lab.folder / "kept.tar", lab.shard(1))
    plan_before = lab.run(only=("raw_shards",))
    assert dict(plan_before) == {"raw_shards": 1}
    assert {step.status for step in lab.plan().of("embeddings")} == {Status.CURRENT, Status.RESTORE}
    expected = {"embeddings": 1, "pseudo_labels": 1, "sample_index": 1, "rankings": 2, "subsets": 3}
    assert dict(lab.run()) == expected
    assert not lab.plan().todo


def test_only_the_shards_whose_rows_have_changed_are_written_again(lab: Lab) -> None:
    project = lab.project()
    records = {step.node.partition: step.record for step in project.plan().of("embeddings")}
    table = project.vectors.open(records["00000"].stats["table"])
    table.update(where="shard = '00001'", values={"caption": "another"})
    for name in records:
        project.store.clear_current("embeddings", name)
    assert {step.status for step in lab.plan().of("embeddings")} == {Status.RESTORE}
    assert dict(lab.run(only=("embeddings",))) == {"embeddings": 3}
    assert {step.node.partition: step.record for step in lab.plan().of("embeddings")} == records
    assert project.vectors.open(table.name).version == table.version + 1
    assert verify(lab.project()).lines() == []


def test_one_removed_shard(lab: Lab) -> None:
    lab.shard(2).unlink()
    executed = lab.run(only=SELECTION)
    assert dict(executed) == {"pseudo_labels": 1, "sample_index": 1, "rankings": 2, "subsets": 3}
    project = lab.project()
    labels = project.plan().by_name["pseudo_labels"].record
    assert labels is not None
    assert project.vectors.shards(labels.stats["table"]) == {"00000", "00001"}
    with lab.instance() as instance:
        assert list(instance.get_dynamic_partitions("raw_shards")) == ["00000", "00001"]


def test_no_embeddings_stand_without_their_rows(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed between the two would else call them up to date when the shard comes back."""

    def killed(*_: Any) -> None:
        raise OSError("killed")

    lab.shard(2).unlink()
    monkeypatch.setattr(Vectors, "remove_shards", killed)
    with lab.instance() as instance:
        _, failed = run_plan(instance, str(lab.yaml), SELECTION)
    assert failed[0] == "pseudo_labels"
    assert lab.project().store.current("embeddings", "00002") is None


def test_a_proxy_whose_entry_could_not_be_written_is_not_trained_again(
    lab: Lab, sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it matter that the pool has changed since: it goes on with the one that it began with."""

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    before = lab.plan().by_name["proxy_model"].record
    lab.edit(lambda s: s["proxy"]["train"].update(lr=0.002))
    with monkeypatch.context() as broken, lab.instance() as instance:
        broken.setattr(store, "_put", full)
        _, failed = run_plan(instance, str(lab.yaml), ("proxy_model",))
    assert failed[0] == "proxy_model"
    [scratch] = lab.project().scratch.glob("proxy_model-*")
    log = next(scratch.rglob("out.log"))
    text = log.read_text()
    copy_samples(sample_shards / "00005.tar", lab.shard(3), 0, 40)

    def seen_again(*arguments: Any, **options: Any) -> Any:
        record = train(*arguments, **options)
        assert log.read_text() == text  # nothing more was trained
        return record

    monkeypatch.setattr("assets.proxy_model.train", seen_again)
    assert dict(lab.run(("raw_shards", "proxy_model"))) == {"raw_shards": 1, "proxy_model": 1}
    after = lab.plan().by_name["proxy_model"].record
    assert before is not None
    assert after is not None
    assert after.stats["trained_on"] == before.stats["trained_on"]
    assert not scratch.exists()


def test_a_proxy_that_was_stopped_before_its_first_checkpoint_begins_with_the_pool_of_today(
    lab: Lab, sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise OSError("stopped")

    lab.edit(lambda s: s["proxy"]["train"].update(lr=0.002))
    with monkeypatch.context() as broken, lab.instance() as instance:
        broken.setattr("assets.proxy_model.train", stopped)
        _, failed = run_plan(instance, str(lab.yaml), ("proxy_model",))
    assert failed[0] == "proxy_model"
    [scratch] = lab.project().scratch.glob("proxy_model-*")
    before = pl.read_parquet(scratch / "index.parquet").height
    copy_samples(sample_shards / "00005.tar", lab.shard(3), 0, 40)
    lab.run(("raw_shards", "proxy_model"))
    record = lab.plan().by_name["proxy_model"].record
    assert record is not None
    n_samples = int(str(record.stats["trained_on"]).split()[0])
    assert before < n_samples <= before + 40


def test_entries_keep_the_yaml_that_the_plan_was_made_of(lab: Lab) -> None:
    text = lab.yaml.read_text()
    project = lab.project()
    lab.edit(lambda s: s.update(name="next"))  # before anything is written
    with project.store.write("stage", "p", "0" * 64, code_version="1", params={}, sources={}, inputs={}):
        pass
    record = project.store.current("stage", "p")
    assert record is not None
    kept = project.store.config(record)
    assert kept is not None
    assert kept.read_text() == text


def test_a_touched_shard_stops_at_its_manifest(lab: Lab) -> None:
    data = lab.shard(0).read_bytes()
    lab.shard(0).write_bytes(data)  # same content, new modification time
    assert dict(lab.run()) == {"raw_shards": 1}


def test_a_code_version_of_one_stage(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages.CODE_VERSIONS, "rankings", "next")
    assert lab.plan().by_name["rankings/random"].why == ("code version of rankings 3 -> next",)
    # the new code ranks as the old one did, so nothing after it runs
    assert dict(lab.run()) == {"rankings": 2}


def test_of_a_large_hold_out_some_are_scored_the_same_for_every_arm(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(file: str) -> list[Any]:
        project = lab.project()
        records = [project.store.current("scores", f"{arm}@holdout") for arm in ARMS]
        return [json.loads((project.store.folder(record) / file).read_text()) for record in records if record]

    before = found("scores.json")
    monkeypatch.setitem(stages.CODE_VERSIONS, "scores", "next")
    assert lab.run(only=("scores",))["scores"] == 3
    assert found("scores.json") == before
    monkeypatch.setitem(stages.CODE_VERSIONS, "scores", "another")
    monkeypatch.setattr("assets.scores.HOLDOUT_PAIRS", 10)
    assert lab.run(only=("scores",))["scores"] == 3
    assert [record["n_samples"] + record["n_left_out"] for (record,) in found("scores.json")] == [10] * 3
    assert all(record["n_samples"] < before[0][0]["n_samples"] for (record,) in found("scores.json"))
    queries = [[(query["uid"], query["of"]) for query in one] for one in found("neighbours.json")]
    assert queries[0] == queries[1] == queries[2]
    shards = {query["shard"] for query in found("neighbours.json")[0]}
    assert shards == {"00000", "00001", "00002"}  # ten of 48: from all over


def test_knobs_do_not_matter(lab: Lab) -> None:
    def change(settings: dict) -> None:
        settings["embed"]["batch_size"] = 17
        settings["train"]["workers"] = 1
        settings["evaluate"]["batch_size"] = 9
        settings["select"]["threads"] = 1

    lab.edit(change)
    assert dict(lab.run()) == {}


def test_a_failed_partition_leaves_the_others_and_is_named(lab: Lab, sample_shards: Path) -> None:
    from assets.running.run import run_plan

    lab.shard(1).write_bytes(b"not a tar at all")
    copy_samples(sample_shards / "00005.tar", lab.shard(3), 0, 40)
    (lab.folder / "broken.pt").write_bytes(b"no checkpoint")
    lab.edit(lambda s: s["train"].update(pretrained="./broken.pt"))
    with lab.instance() as instance:
        executed, failed = run_plan(instance, str(lab.yaml))
    # the quarantined shard stops nothing; the broken checkpoint stops the three trainings
    assert executed["raw_shards"] == 2
    assert executed["subsets"] == 3
    assert failed == [f"checkpoints/{arm}" for arm in ARMS]


def test_a_pool_smaller_than_the_batch_is_refused_before_training(lab: Lab) -> None:
    from assets.running.run import run_plan
    from clipcov_pipeline.errors import InputError

    before = {step.node.name: step.record for step in lab.plan().steps}
    lab.edit(lambda s: s["train"].update(batch_size=97, samples_seen=20_000))
    with lab.instance() as instance, pytest.raises(InputError, match=r"train.batch_size: found 97, .* 95"):
        run_plan(instance, str(lab.yaml))
    lab.edit(lambda s: s["train"].update(batch_size=32, samples_seen=192))
    assert {step.node.name: step.record for step in lab.plan().steps} == before


def test_what_is_out_of_date_is_on_the_assets_page_with_its_reason(lab: Lab) -> None:
    from assets.display.staleness import report_staleness

    def observed(instance: dg.DagsterInstance, stage: str) -> list[dict]:
        records = instance.fetch_observations(dg.AssetKey(stage), limit=10).records
        found = [record.asset_observation for record in records]
        return [{name: value.value for name, value in one.metadata.items()} for one in found if one]

    lab.edit(lambda s: s["train"].update(lr=0.002))
    with lab.instance() as instance:
        for _ in range(2):
            report_staleness(instance, lab.plan())
        [told] = observed(instance, "checkpoints")  # once, though it was looked at twice
        assert told["out_of_date"] == 3
        assert "| full-f1-s0 | build | train.lr 0.001 -> 0.002 |" in told["why_out_of_date"]
        assert observed(instance, "scores")[0]["out_of_date"] == 6
        assert not observed(instance, "rankings")
        lab.edit(lambda s: s["train"].pop("lr"))
        report_staleness(instance, lab.plan())
        assert observed(instance, "checkpoints")[0]["out_of_date"] == 0


def test_both_protocols_in_one_experiment(lab: Lab) -> None:
    """Epochs beside samples_seen: the arms that are there stay, a new one has its own number of steps."""
    from assets.running.run import standing

    lab.edit(lambda s: (s["train"].update(epochs=2), s["select"].update(methods={"random": {}})))
    # what is there is shown already, what lacks is named
    text = standing(lab.project())
    assert "full" in text
    assert "\nmissing, in no mean above: full-f1-s0-epochs@vendor" in text
    # the subset that is left is compared with no other now
    assert dict(lab.run()) == trained(2) | {"subset_diagnostics": 1}
    project = lab.project()
    steps = project.plan().by_name
    for subset in ("full-f1", "random-f0.5"):
        samples = steps[f"subsets/{subset}"].record.stats["samples"]
        assert steps[f"checkpoints/{subset}-s0-epochs"].record.stats["steps"] == 2 * -(-samples // 32)
        assert steps[f"checkpoints/{subset}-s0"].record.stats["steps"] == 192 // 32
    board = pl.read_csv(project.store.folder(steps["leaderboard"].record) / "leaderboard.csv")
    assert board.select("method", "fraction", "protocol").unique().height == 4
    assert standing(project).count("epochs") == 2  # a row each
