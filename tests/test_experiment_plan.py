"""The plan: what is out of date and why, what is found again, what stands in the way."""

import copy
import time
from collections import Counter
from dataclasses import replace

import pytest

from clipcov_pipeline.commands.plan import as_json_lines, as_text
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.plan import Plan, Status, make_plan
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.stages import CODE_VERSIONS, STAGES
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.experiment.world import World
from clipcov_pipeline.pool.listing import Shard
from simulation import (
    BOARD,
    EVERYTHING,
    FRACTIONS,
    FROM_LABELS,
    FROM_SUBSETS,
    METHODS,
    SEEDS,
    arms,
    builds,
    diagnosed,
    selected,
    set_key,
    trained,
    why,
)


def test_the_first_run_builds_everything_once_in_order(fresh):
    executed = fresh.run()
    assert executed == builds(EVERYTHING)
    order = [name.partition("/")[0] for name in executed]
    assert order == sorted(order, key=STAGES.index)
    assert Counter(order) == {
        "raw_shards": 3,
        "proxy_model": 1,
        "embeddings": 3,
        "pseudo_labels": 1,
        "sample_index": 1,
        "rankings": 2,
        "subsets": 5,
        "pool_map": 1,
        "subset_diagnostics": 8,
        "subset_galleries": 4,
        "checkpoints": 10,
        "scores": 20,
        "leaderboard": 1,
        "checkpoint_galleries": 10,
        "report": 1,
    }


def test_before_the_first_run_only_shards_are_ready(fresh):
    plan = fresh.plan()
    assert {step.node.name for step in plan.steps if step.status is Status.BUILD} == {
        "raw_shards/a",
        "raw_shards/b",
        "raw_shards/c",
    }
    assert all(step.why == ("not built yet",) for step in plan.of("raw_shards"))
    assert plan.ready() == ("raw_shards", ["a", "b", "c"])
    reasons = why(plan)
    assert reasons["proxy_model"] == ("waits for raw_shards/a and 2 more",)
    assert reasons["embeddings/b"] == ("waits for raw_shards/b and 1 more",)
    assert reasons["rankings/clipcov"] == ("waits for pseudo_labels",)
    assert reasons["leaderboard"] == ("waits for scores/full-f1-s0@coco and 19 more",)


def test_parts_of_a_partition_share_its_key(built):
    plan = built.plan()
    assert plan.keys("scores") == [f"{subset}-s{seed}" for subset in arms() for seed in SEEDS]
    assert [step.node.partition for step in plan.of("scores", "random-f0.5-s1")] == [
        "random-f0.5-s1@coco",
        "random-f0.5-s1@holdout",
    ]
    assert plan.of("scores", "nobody") == plan.of("nothing") == []
    assert plan.by_name["leaderboard"].key == "_"


# --- what a change makes out of date ----------------------------------------------------------------


def test_nothing_changed(built):
    plan = built.plan()
    assert plan.todo == []
    assert plan.ready() is None
    assert {step.node.name for step in plan.steps} == EVERYTHING
    assert built.run() == {}
    assert as_text(plan) == f"Nothing to do: all {len(EVERYTHING)} entries are up to date."
    assert as_json_lines(plan) == ""


# --- a result that was there before, or comes out the same ------------------------------------------


@pytest.mark.parametrize(
    ("key", "there", "expected"),
    [
        ("train.lr", 0.002, trained(arms())),
        ("labels.templates", ["the {}"], FROM_LABELS),
        (
            "proxy.seed",
            1,
            {"proxy_model", *(f"embeddings/{name}" for name in "abc")} | FROM_LABELS,
        ),
    ],
)
def test_there_and_back_builds_nothing_twice(built, key, there, expected):
    before = copy.deepcopy(built.settings)
    built.edit(set_key(key, there))
    after = built.settings
    assert built.run() == builds(expected)
    for settings in (before, after, before):
        built.settings = settings
        assert built.run() == dict.fromkeys(expected, "restore")
        assert built.run() == {}


def test_a_restored_entry_can_be_read_at_once_but_for_embeddings(built):
    before = copy.deepcopy(built.settings)
    built.edit(set_key("labels.templates", ["the {}"]))
    built.run()
    built.settings = copy.deepcopy(before)
    assert {step.status for step in built.plan().todo} == {Status.RESTORE}
    assert why(built.plan())["pseudo_labels"] == ("labels.templates ['the {}'] -> ['a {}']",)
    built.run()
    built.edit(set_key("proxy.seed", 1))
    built.run()
    built.settings = before
    plan = built.plan()
    statuses = {stage: {step.status for step in plan.of(stage)} for stage in STAGES}
    assert statuses["proxy_model"] == statuses["embeddings"] == {Status.RESTORE}
    # rows have to come back into the table before they are read
    assert statuses["pseudo_labels"] == {Status.WAIT}


def test_an_earlier_proxy_is_restored_without_waiting_for_new_shards(built):
    built.edit(set_key("proxy.seed", 1))
    built.run()
    built.edit(set_key("proxy.seed", 0))
    built.shards["d"], built.times["d"] = "content of d", 1
    assert built.plan().by_name["proxy_model"].status is Status.RESTORE


def test_early_cutoff_at_the_ranking(built):
    ranking = built.store.current("rankings", "clipcov").digests
    built.edit(set_key("select.methods.clipcov.weights.self", 2.0000001))
    digest = built.digest
    built.digest = lambda step, output: ranking[output] if output in ranking else digest(step, output)
    # the weights of F are those that its terms are shown with
    own = diagnosed(["clipcov-f0.25", "clipcov-f0.5"], ())
    assert built.run() == builds({"rankings/clipcov", "report"} | own)


def test_early_cutoff_at_the_subset(built):
    """Another order beyond the cut: the subsets of the larger fraction differ, the smaller do not."""
    built.same_result = {"subsets/clipcov-f0.25"}
    built.edit(set_key("select.methods.clipcov.weights.self", 3.0))
    built.run()
    built.edit(set_key("select.methods.clipcov.weights.self", 4.0))
    assert built.run() == builds(
        {"rankings/clipcov"}
        | (selected(["clipcov-f0.25", "clipcov-f0.5"]) - diagnosed(METHODS, ["0.25"]))
        | diagnosed(["clipcov-f0.25", "clipcov-f0.5"], ["0.5"])
        | trained(["clipcov-f0.5"])
    )


def test_the_held_out_set_is_scored_again_only_where_it_differs(built):
    """The subsets stay in this test, so checkpoints do too; scores on the held-out share read its samples."""
    built.same_result = {"subsets"}
    built.shards["b"], built.times["b"] = "another caption, say of a held-out sample", 2
    built.run()
    built.shards["b"], built.times["b"] = "yet another caption", 3
    on_holdout = {f"scores/{subset}-s{seed}@holdout" for subset in arms() for seed in SEEDS}
    shard = {"raw_shards/b", "embeddings/b", "sample_index"}
    labels = {"pseudo_labels", "rankings/clipcov", "rankings/random", "pool_map"} | selected(arms())
    assert built.run() == builds(shard | labels | on_holdout | BOARD)
    built.edit(set_key("labels.templates", ["the {}"]))
    assert built.run() == builds(labels | {"report"})


# --- code versions and knobs ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_code_version_with_the_same_result_stops_there(built, monkeypatch, stage):
    version = CODE_VERSIONS[stage]
    monkeypatch.setitem(CODE_VERSIONS, stage, "next")
    own = {name for name in EVERYTHING if name.partition("/")[0] == stage}
    reasons = why(built.plan())
    assert all(reasons[name] == (f"code version of {stage} {version} -> next",) for name in own)
    assert built.run() == builds(own)
    monkeypatch.setitem(CODE_VERSIONS, stage, version)
    assert built.run() == dict.fromkeys(own, "restore")


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("raw_shards", EVERYTHING - {"proxy_model"}),
        ("proxy_model", EVERYTHING - {f"raw_shards/{name}" for name in "abc"} - {"sample_index"}),
        ("embeddings", FROM_LABELS | {f"embeddings/{name}" for name in "abc"}),
        ("pseudo_labels", FROM_LABELS),
        (
            "rankings",
            {"rankings/clipcov", "rankings/random"} | selected(arms(full=False)) | trained(arms(full=False)),
        ),
        ("subsets", FROM_SUBSETS),
        ("pool_map", {"pool_map", "report"} | diagnosed(arms(), ())),
        ("subset_diagnostics", {"report"} | diagnosed(arms(), FRACTIONS)),
        ("checkpoints", trained(arms())),
        ("scores", {name for name in trained(arms()) if not name.startswith("checkpoints")}),
        ("leaderboard", BOARD),
    ],
)
def test_a_code_version_with_another_result_goes_on(built, monkeypatch, stage, expected):
    monkeypatch.setitem(CODE_VERSIONS, stage, "next")
    built.code_result[stage] = "other"
    assert built.run() == builds(expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("work_dir", "elsewhere"),
        ("shards.settle_seconds", 5),
        ("shards.storage_options", {"anon": True}),
        ("embed.batch_size", 3),
        ("embed.device", "cpu"),
        ("select.threads", 2),
        ("proxy.train.workers", 0),
        ("train.workers", 3),
        ("train.device", "cpu"),
        ("train.gpus", 2),
        ("train.grad_checkpointing", True),
        ("train.accum_freq", 1),
        ("evaluate.batch_size", 2),
        ("automation.cron", "1 1 * * *"),
        ("ui.dagster_port", 3333),
        ("name", "renamed"),
    ],
)
def test_a_knob_changes_nothing(built, key, value):
    built.edit(set_key(key, value))
    assert built.run() == {}


# --- damage -----------------------------------------------------------------------------------------


def test_a_damaged_file_is_the_reason_given_and_is_built_again(built):
    record = built.store.current("subsets", "random-f0.5")
    (built.store.folder(record) / "samples").write_text("damaged")
    assert why(built.plan())["subsets/random-f0.5"] == ("damaged: samples has 7 bytes, expected 64",)
    assert built.plan().by_name["subsets/random-f0.5"].status is Status.BUILD
    assert built.run() == builds({"subsets/random-f0.5"})


def test_a_damaged_earlier_entry_is_not_restored(built):
    record = built.store.current("rankings", "clipcov")
    built.edit(set_key("select.methods.clipcov.weights.self", 3.0))
    there = built.run()
    (built.store.folder(record) / "ranking").unlink()
    built.edit(set_key("select.methods.clipcov.weights.self", 2.0))
    back = built.run()
    assert back.pop("rankings/clipcov") == "build"
    assert back == dict.fromkeys(there.keys() - {"rankings/clipcov"}, "restore")


def test_a_damaged_record_is_built_again_and_its_reader_is_left_alone(built):
    record = built.store.current("rankings", "clipcov")
    (built.store.folder(record) / "record.json").write_text("{")
    assert why(built.plan())["rankings/clipcov"] == ("not built yet",)
    assert built.run() == builds({"rankings/clipcov"})


# --- asking the plan --------------------------------------------------------------------------------


# --- asking the plan --------------------------------------------------------------------------------


def test_ready_leaves_out_what_failed_and_what_is_not_asked_for(built):
    built.shards |= {"d": "d", "e": "e"}
    built.times |= {"d": 1, "e": 1}
    built.edit(set_key("select.methods.clipcov.weights.self", 3.0))
    plan = built.plan()
    assert plan.ready() == ("raw_shards", ["d", "e"])
    assert plan.ready(skip={("raw_shards", "d")}) == ("raw_shards", ["e"])
    assert plan.ready(skip={("raw_shards", "d"), ("raw_shards", "e")}) is None  # the rest waits for them
    assert plan.ready(only=["embeddings"]) is None
    assert plan.ready(only=["embeddings", "raw_shards"]) == ("raw_shards", ["d", "e"])


def test_a_method_that_failed_does_not_hold_up_the_others(built):
    for method in METHODS:
        built.edit(set_key(f"select.methods.{method}.seed", 5))
    failed = {("rankings", "clipcov")}
    assert built.plan().ready(skip=failed) == ("rankings", ["random"])
    built.execute(built.plan().by_name["rankings/random"])
    assert built.plan().ready(skip=failed) == ("subsets", ["random-f0.25", "random-f0.5"])


def test_planning_writes_nothing_and_gives_the_same_plan_again(built):
    before = {path: path.stat().st_mtime_ns for path in built.folder.rglob("*") if path.suffix != ".yaml"}
    assert built.plan() == built.plan()
    after = {path: path.stat().st_mtime_ns for path in built.folder.rglob("*") if path.suffix != ".yaml"}
    assert after == before


# --- checks -----------------------------------------------------------------------------------------


# --- checks -----------------------------------------------------------------------------------------


def test_a_failed_check_keeps_what_follows_from_being_built(fresh):
    fresh.stats = {"subset_diagnostics/random-f0.5": {"alignment": 0.1}}
    with pytest.raises(AssertionError):  # the rest is done, and something is left
        fresh.run()
    plan = fresh.plan()
    blocked = {step.node.name: step.why for step in plan.todo if step.status is Status.BLOCKED}
    assert set(blocked) == {f"checkpoints/random-f0.5-s{seed}" for seed in SEEDS}
    (text,) = blocked["checkpoints/random-f0.5-s0"]
    assert text == (
        "blocked by check alignment of subset_diagnostics/random-f0.5: alignment of the cross-covariance with"
        " the pool's: 0.1, expected at least 0.2; mend the cause, or change diagnostics.checks.alignment"
    )
    assert "blocked" in as_text(plan)
    assert plan.by_name["checkpoints/random-f0.25-s0"].status is Status.CURRENT
    # another bound, or a warning, is looked at with what is there: nothing but the blocked is built
    for change in ({"bound": 0.05}, {"severity": "warn"}):
        fresh.edit(set_key("diagnostics.checks.alignment", change))
        assert {step.node.name for step in fresh.plan().todo if step.status is Status.BUILD} == set(blocked)
    assert fresh.run() == builds(trained(["random-f0.5"]))
    # what is trained already stays when the bound is tightened, and the report says that it failed
    fresh.edit(set_key("diagnostics.checks.alignment", {"bound": 0.9, "severity": "error"}))
    assert fresh.run() == builds({"report"})


def test_a_broken_proxy_stops_all_that_reads_its_embeddings(fresh):
    figures = {"matched_lead": 0.1, "matched_cosine": 0.2, "shuffled_cosine": 0.2}
    fresh.stats = {f"embeddings/{name}": figures for name in "ab"}
    with pytest.raises(AssertionError):
        fresh.run()
    step = fresh.plan().by_name["pseudo_labels"]
    assert step.status is Status.BLOCKED
    assert step.why[0].startswith("blocked by check matched_pairs of embeddings/a: lead of matched pairs")
    assert step.why[1:] == ("and 1 more",)
    assert fresh.plan().by_name["rankings/random"].status is Status.WAIT


# --- scale ------------------------------------------------------------------------------------------


# --- scale ------------------------------------------------------------------------------------------


def test_one_new_shard_of_150(fresh):
    """Dagster's own resolver misses this: a downstream of 100 or more partitions."""
    fresh.shards = {f"{index:05d}": str(index) for index in range(149)}
    fresh.times = dict.fromkeys(fresh.shards, 1)
    fresh.run()
    fresh.shards["00149"], fresh.times["00149"] = "new", 1
    assert fresh.run() == builds({"raw_shards/00149", "embeddings/00149", "sample_index"} | FROM_LABELS)


@pytest.mark.long
def test_2000_shards_and_200_recipes_are_planned_in_under_5_seconds(fresh):
    fresh.shards = {f"{index:05d}": str(index) for index in range(2000)}
    fresh.times = dict.fromkeys(fresh.shards, 1)
    methods = {f"m{index}": {"method": "random", "seed": index} for index in range(10)}
    fresh.edit(set_key("select.methods", methods))
    fresh.edit(set_key("select.fractions", [0.1, 0.2, 0.3, 0.4]))
    fresh.edit(set_key("train.seeds", list(range(5))))
    config, world = fresh.config, fresh.world
    assert len(recipes(config)) == 205
    while (ready := (plan := make_plan(config, world, fresh.store)).ready()) is not None:
        for step in plan.of(ready[0]):
            fresh.execute(step)
    assert len(plan.steps) == 2 * 2000 + 2 + 10 + 41 + 40 + 2 + 40 * 2 + 205 * 4 + 2

    def timed(config: Config, world: World) -> tuple[Plan, float]:
        seconds = []
        for _ in range(3):  # of the processor, and the least: other things may be at work beside this
            started = time.process_time()
            plan = make_plan(config, world, Store(fresh.store.root))
            seconds.append(time.process_time() - started)
        return plan, min(seconds)

    plan, nothing = timed(config, world)
    assert plan.todo == []
    plan, added = timed(config, replace(world, shards=(*world.shards, Shard("x", "/x.tar", "1"))))
    assert plan.ready() == ("raw_shards", ["x"])
    fresh.edit(set_key("proxy.seed", 1))
    plan, proxy = timed(fresh.config, world)
    assert plan.ready() == ("proxy_model", ["_"])
    seconds = {"nothing": nothing, "shard": added, "proxy": proxy}
    print(f"\n{len(plan.steps)} steps planned:", {change: f"{s:.2f} s" for change, s in seconds.items()})
    assert max(seconds.values()) < 5
