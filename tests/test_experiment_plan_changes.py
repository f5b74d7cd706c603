"""Exactly what one change of the YAML, the shards or the files makes out of date, and the reason given."""

import pytest

from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.plan import Status
from clipcov_pipeline.experiment.recipes import recipes
from simulation import (
    BOARD,
    EVERYTHING,
    FROM_LABELS,
    OUTPUTS,
    SEEDS,
    arms,
    builds,
    scored,
    selected,
    set_key,
    trained,
    why,
)


def test_a_weight_of_one_method(built):
    built.edit(set_key("select.methods.clipcov.weights.self", 3.0))
    assert why(built.plan())["rankings/clipcov"] == ("select.methods.clipcov.weights.self 2.0 -> 3.0",)
    mine = arms(["clipcov"], full=False)
    assert built.run() == builds({"rankings/clipcov"} | selected(mine) | trained(mine))


def test_a_mode_of_one_method_is_named_as_in_the_yaml(built):
    built.edit(set_key("select.methods.clipcov.mode", "notebook"))
    (step,) = [step for step in built.plan().todo if step.status is Status.BUILD]
    assert step.node.name == "rankings/clipcov"
    assert step.why == (
        "select.methods.clipcov.class_balance proportional -> global",  # the notebook mode's default
        "select.methods.clipcov.clip_negative False -> True",
        "select.methods.clipcov.mode greedy -> notebook",
    )


def test_a_default_written_out_is_no_change(built):
    built.edit(set_key("select.methods.clipcov", {"method": "clipcov", "mode": "greedy", "seed": 0}))
    built.edit(set_key("train.wd", 0.2))
    built.edit(set_key("labels.latent_classes", "prompts"))
    assert built.run() == {}


def test_a_fraction_added(built):
    built.edit(set_key("select.fractions", [0.25, 0.5, 0.75]))
    new = arms(fractions=["0.75"], full=False)
    plan = built.plan()
    ready = {step.node.name for step in plan.todo if step.status is Status.BUILD}
    assert ready == {f"subsets/{subset}" for subset in new}
    assert why(plan)["subsets/random-f0.75"] == ("not built yet",)
    assert built.run() == builds(selected(new) | trained(new))


def test_a_fraction_removed_costs_only_the_leaderboard(built):
    built.edit(set_key("select.fractions", [0.25]))
    (reason,) = why(built.plan())["leaderboard"]
    assert reason == "scores/clipcov-f0.5-s0@coco#scores and 7 more removed"
    assert built.run() == builds(BOARD)


def test_a_method_added(built):
    built.edit(set_key("select.methods.clip_score", {}))
    new = arms(["clip_score"], full=False)
    assert built.run() == builds({"rankings/clip_score"} | selected(new) | trained(new))


def test_two_labels_of_one_method_are_two_methods(built):
    built.edit(set_key("select.methods.other", {"method": "random", "seed": 7}))
    new = arms(["other"], full=False)
    assert built.run() == builds({"rankings/other"} | selected(new) | trained(new))


def test_a_filter_concerns_its_method_and_so_does_its_file(built):
    key = "select.methods.random.filters.text_based.class_names"
    built.tokens[key] = "dog"
    built.edit(set_key("select.methods.random", {"filters": {"text_based": {"class_names": "names.txt"}}}))
    new = arms(["random"], full=False)
    reasons = why(built.plan())
    assert reasons["rankings/random"] == (
        f"{key} default -> names.txt", f"{key} added",
    )  # fmt: skip
    assert "rankings/clipcov" not in reasons
    assert {"rankings/random"} | selected(new) <= set(built.run())
    built.tokens[key] = "dog, cat"
    assert why(built.plan())["rankings/random"] == (f"{key} changed",)


def test_only_filters_that_read_sizes_read_manifests(built):
    built.edit(set_key("select.methods.basic", {}))
    built.edit(set_key("select.methods.words", {"method": "basic", "min_side": None, "max_aspect": None}))
    reads = {
        step.node.partition: [read.stage for read in step.node.inputs if read.stage == "raw_shards"]
        for step in built.plan().of("rankings")
    }
    assert reads == {"clipcov": [], "random": [], "words": [], "basic": ["raw_shards"] * 3}


def test_a_training_parameter(built):
    built.edit(set_key("train.lr", 0.002))
    reasons = why(built.plan())
    assert reasons["checkpoints/full-f1-s0"] == ("train.lr 0.001 -> 0.002",)
    assert reasons["scores/full-f1-s0@coco"] == ("waits for checkpoints/full-f1-s0",)
    assert built.run() == builds(trained(arms()))


def test_epochs_instead_of_samples_seen(built):
    built.edit(set_key("train.samples_seen", None))
    built.edit(set_key("train.epochs", 8))
    assert why(built.plan())["checkpoints/full-f1-s1"] == (
        "train.epochs None -> 8",
        "train.samples_seen 100 -> None",
    )


def test_epochs_beside_samples_seen_adds_arms_and_trains_nothing_again(built):
    before = built.plan().by_name
    built.edit(set_key("train.epochs", 8))
    found = recipes(built.config)
    assert [arm.key for arm in found] == [
        f"{subset}-s{seed}{suffix}" for suffix in ("", "-epochs") for subset in arms() for seed in SEEDS
    ]
    assert [arm.protocol for arm in found] == ["samples_seen"] * 10 + ["epochs"] * 10
    assert {arm.subset for arm in found} == set(arms())
    new = {f"checkpoints/{subset}-s{seed}-epochs" for subset in arms() for seed in SEEDS}
    scores = scored([name.partition("/")[2] for name in new], ["coco", "holdout"])
    assert built.run() == builds(new | scores | BOARD)
    after = built.plan().by_name
    for name, step in before.items():
        if name not in BOARD:
            assert after[name].fingerprint == step.fingerprint
    params = after["checkpoints/full-f1-s0-epochs"].node.params["train"]
    assert (params["samples_seen"], params["epochs"], params["seed"]) == (None, 8, 0)
    # and back: the arms that are no longer asked for cost nothing
    built.edit(set_key("train.epochs", None))
    assert built.run() == dict.fromkeys(BOARD, "restore")


def test_a_seed_added(built):
    built.edit(set_key("train.seeds", [0, 1, 2]))
    new = {f"checkpoints/{subset}-s2" for subset in arms()}
    scores = scored([f"{subset}-s2" for subset in arms()], ["coco", "holdout"])
    assert built.run() == builds(new | scores | BOARD)


def test_an_evaluation_set_added(built):
    built.sets["flickr"] = 1
    built.edit(set_key("evaluate.sets.flickr", {"shards": "flickr"}))
    assert built.run() == builds(
        {f"scores/{subset}-s{seed}@flickr" for subset in arms() for seed in SEEDS} | BOARD
    )


def test_an_evaluation_setting_concerns_its_own_set_only(built):
    built.edit(set_key("evaluate.sets.coco.templates", ["a {}"]))
    assert why(built.plan())["scores/random-f0.5-s0@coco"] == (
        "evaluate.sets.coco.templates ['{}'] -> ['a {}']",
    )
    scores = scored([f"{subset}-s{seed}" for subset in arms() for seed in SEEDS], ["coco"])
    assert built.run() == builds(scores | BOARD)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("max_image_pixels", 1000, "89478485 -> 1000"),
        ("max_resized_pixels", 1000, "89478485 -> 1000"),
        ("high_bit_depth", "scale", "refuse -> scale"),
    ],
)
def test_the_rules_for_images_concern_the_scores_of_evaluation_sets(built, key, value, reason):
    """Their samples are checked by them, too, whether or not a sample of the pool is concerned."""
    before = {step.node.name: step.fingerprint for step in built.plan().of("scores")}
    current = built.store.current
    built.digest = lambda step, output: current(step.node.stage, step.node.partition).digests[output]
    built.edit(set_key(f"shards.{key}", value))
    reasons = why(built.plan())
    shard = next(name for name in reasons if name.startswith("raw_shards/"))
    assert {reasons[name][0] for name in (shard, "scores/random-f0.5-s0@coco")} == {f"shards.{key} {reason}"}
    built.run()
    after = {step.node.name: step.fingerprint for step in built.plan().of("scores")}
    changed = {name.rpartition("@")[2] for name in after if after[name] != before[name]}
    assert changed == set(built.settings["evaluate"]["sets"])


@pytest.mark.parametrize("caption", ["txt", ["txt"], {"from": "txt"}, {"from": ["txt"], "rule": "first"}])
def test_the_rule_for_captions_written_out_is_no_change(built, caption):
    built.edit(set_key("shards.caption", caption))
    assert built.run() == {}


def test_another_rule_for_captions(built):
    built.edit(set_key("shards.caption", ["json:re_caption"]))
    assert why(built.plan())["raw_shards/a"] == ("shards.caption default -> json:re_caption",)
    assert built.run() == builds(EVERYTHING)
    built.edit(set_key("shards.caption", {"from": ["txt", "json:re_caption"], "rule": "join"}))
    assert "shards.caption.rule default -> join" in why(built.plan())["raw_shards/a"]


def test_another_rule_that_gives_the_same_captions_trains_no_arm_again(built):
    current = built.store.current
    built.edit(set_key("shards.caption", ["txt", "json:re_caption"]))
    built.digest = lambda step, output: current(step.node.stage, step.node.partition).digests[output]
    assert built.run() == builds({"raw_shards/a", "raw_shards/b", "raw_shards/c", "proxy_model"})


def test_an_evaluation_set_that_lies_elsewhere_is_the_same_set(built):
    built.edit(set_key("evaluate.sets.coco.shards", "moved/coco"))
    assert built.run() == {}


def test_an_evaluation_set_whose_shards_changed(built):
    built.sets["coco"] = 2
    assert why(built.plan())["scores/random-f0.5-s0@coco"] == ("coco/00000 changed",)
    assert len(built.run()) == 22


def test_the_primary_metric_concerns_the_leaderboard_only(built):
    built.edit(set_key("evaluate.primary_metric", "coco/image_retrieval_recall@1"))
    change = "evaluate.primary_metric coco/text_retrieval_recall@5 -> coco/image_retrieval_recall@1"
    assert why(built.plan()) == {
        "leaderboard": (change,),
        "report": (change, "waits for leaderboard"),
    }
    assert built.run() == builds(BOARD)


def test_a_bound_of_a_check_and_the_primary_metric_concern_what_shows_them(built):
    """The scores are the same, so that the leaderboard's output is: the report reads the settings itself."""
    built.edit(set_key("diagnostics.checks.loss", {"bound": 2.0}))
    assert why(built.plan()) == {"report": ("diagnostics.checks.loss.bound 1.0 -> 2.0",)}
    assert built.run() == builds({"report"})
    built.same_result = {"leaderboard"}
    built.edit(set_key("evaluate.primary_metric", "coco/image_retrieval_recall@1"))
    assert built.run() == builds(BOARD)


def test_a_shard_added(built):
    built.shards["d"], built.times["d"] = "content of d", 1
    plan = built.plan()
    assert {step.node.name: step.status for step in plan.todo if step.status is not Status.WAIT} == {
        "raw_shards/d": Status.BUILD
    }
    # a proxy that is there does not wait for the new shard, nor do the other shards' embeddings
    assert plan.by_name["proxy_model"].status is Status.CURRENT
    assert {step.node.name for step in plan.of("embeddings") if step.status is Status.WAIT} == {
        "embeddings/d"
    }
    assert built.run() == builds({"raw_shards/d", "embeddings/d", "sample_index"} | FROM_LABELS)


def test_a_shard_added_is_the_reason_given(built):
    built.shards["d"], built.times["d"] = "content of d", 1
    for stage in ("raw_shards", "embeddings"):
        assert built.plan().ready() == (stage, ["d"])
        for step in built.plan().of(stage, "d"):
            built.execute(step)
    assert why(built.plan())["pseudo_labels"] == (
        "embeddings/d#rows added",
        "raw_shards/d#source_ids added",
    )


def test_a_shard_changed(built):
    built.shards["b"], built.times["b"] = "other content", 2
    plan = built.plan()
    assert why(plan)["raw_shards/b"] == ("shard changed",)
    assert {step.node.name for step in plan.of("embeddings") if step.status is not Status.CURRENT} == {
        "embeddings/b"
    }
    assert built.run() == builds({"raw_shards/b", "embeddings/b", "sample_index"} | FROM_LABELS)


def test_a_shard_written_again_with_the_same_bytes(built):
    built.times["b"] = 2
    assert built.run() == builds({"raw_shards/b"})
    assert built.run() == {}


def test_a_shard_changed_without_consequence_for_its_embeddings(built):
    """Say a sample that was kept aside anyway."""
    built.same_result = {"embeddings/b"}
    built.shards["b"], built.times["b"] = "other content", 2
    built.run()  # from here on the embeddings of b are what they are
    built.shards["b"], built.times["b"] = "yet other content", 3
    cut = {f"subsets/{subset}" for subset in arms()}  # where its samples lie has changed, and no more
    assert built.run() == builds({"raw_shards/b", "embeddings/b", "sample_index"} | cut)


def test_a_shard_removed(built):
    del built.shards["b"]
    assert why(built.plan())["pseudo_labels"] == (
        "embeddings/b#rows removed",
        "raw_shards/b#source_ids removed",
    )
    assert built.run() == builds({"sample_index"} | FROM_LABELS)
    built.shards["b"] = "content of b"
    assert built.run() == dict.fromkeys({"sample_index"} | FROM_LABELS, "restore")


def test_class_names_edited(built):
    built.tokens["labels.class_names"] = digest_of(["cat", "dog", "owl"])
    assert why(built.plan())["pseudo_labels"] == ("labels.class_names changed",)
    assert built.run() == builds(FROM_LABELS)


def test_class_names_edited_without_consequence(built):
    """A class that no sample belongs to: the labels come out as they were."""
    built.tokens["labels.class_names"] = digest_of(["cat", "dog", "unicorn"])
    current = built.store.current
    built.digest = lambda step, output: current(step.node.stage, step.node.partition).digests[output]
    pictures = {f"subset_galleries/{subset}" for subset in arms(full=False)}
    assert built.run() == builds({"pseudo_labels"} | pictures)


def test_a_prompt_template_edited(built):
    built.edit(set_key("labels.templates", ["a photo of {}"]))
    assert why(built.plan())["pseudo_labels"] == ("labels.templates ['a {}'] -> ['a photo of {}']",)
    assert built.run() == builds(FROM_LABELS)


def test_the_proxys_training(built):
    built.edit(set_key("proxy.train.lr", 0.5))
    assert why(built.plan())["proxy_model"] == ("proxy.train.lr 0.001 -> 0.5",)
    expected = {"proxy_model", "embeddings/a", "embeddings/b", "embeddings/c"} | FROM_LABELS
    assert built.run() == builds(expected)


def test_the_description_of_a_model_edited(fresh):
    fresh.tokens |= {"train.model": "1", "proxy.model": "1"}
    fresh.run()
    fresh.tokens["train.model"] = "2"
    assert why(fresh.plan())["checkpoints/full-f1-s0"] == ("train.model changed",)
    assert fresh.run() == builds(trained(arms()))


def test_a_proxy_that_follows_the_pool_is_trained_again(fresh):
    fresh.edit(set_key("proxy.retrain_with_pool", True))
    fresh.run()
    fresh.shards["d"], fresh.times["d"] = "content of d", 1
    assert fresh.plan().by_name["proxy_model"].status is Status.WAIT
    embeddings = {f"embeddings/{name}" for name in "abcd"}
    assert fresh.run() == builds({"raw_shards/d", "proxy_model", "sample_index"} | embeddings | FROM_LABELS)


def test_a_pretrained_proxy_waits_for_no_shard_and_reads_no_pool(fresh):
    fresh.settings["proxy"] = {"model": "RN50", "pretrained": "openai"}
    assert fresh.plan().by_name["proxy_model"].status is Status.BUILD
    fresh.run()
    # the held-out share matters to a proxy that is trained, not to this one
    fresh.edit(set_key("evaluate.holdout_fraction", 0.2))
    assert fresh.run() == builds(FROM_LABELS)


C_RHO = {f"early_similarities/{name}" for name in "abc"} | {"rankings/c_rho"}


def test_c_rho_alone_asks_for_the_early_similarities(built):
    built.edit(set_key("select.methods.c_rho", {}))
    added = arms(["c_rho"], full=False)
    assert built.run() == builds(C_RHO | selected(added) | trained(added))
    built.shards["d"], built.times["d"] = "content of d", 1
    executed = built.run()
    assert {name for name in executed if name.startswith("early")} == {"early_similarities/d"}
    assert "proxy_model" not in executed


def test_a_proxy_of_before_early_weights_were_kept_is_trained_again_when_they_are_read(fresh, monkeypatch):
    with monkeypatch.context() as before:
        before.setitem(OUTPUTS, "proxy_model", ("weights",))
        fresh.run()
    assert fresh.plan().todo == []  # nobody reads them
    fresh.edit(set_key("select.methods.c_rho", {}))
    reasons = why(fresh.plan())
    assert reasons["proxy_model"] == ("was built without early, which is read now",)
    assert "embeddings/a" in reasons
    added = arms(["c_rho"], full=False)
    # the training gives the same weights here: its other readers are left alone
    assert fresh.run() == builds({"proxy_model"} | C_RHO | selected(added) | trained(added))


def test_another_early_checkpoint_of_a_pretrained_proxy_concerns_c_rho_only(fresh):
    fresh.settings["proxy"] = {"model": "RN50", "pretrained": "openai"}
    fresh.run()
    fresh.settings["proxy"]["early"] = "yfcc15m"
    fresh.settings["select"]["methods"]["c_rho"] = {}
    added = arms(["c_rho"], full=False)
    rest = {"proxy_model"} | C_RHO | selected(added) | trained(added)
    assert fresh.run() == builds(rest)
    fresh.settings["proxy"]["early"] = "cc12m"
    assert why(fresh.plan())["proxy_model"] == ("proxy.early yfcc15m -> cc12m",)
    assert fresh.run() == builds(rest)


def test_the_held_out_share(built):
    built.edit(set_key("evaluate.holdout_fraction", 0.2))
    reasons = why(built.plan())
    assert reasons["proxy_model"] == ("evaluate.holdout_fraction 0.1 -> 0.2",)
    embeddings = {f"embeddings/{name}" for name in "abc"}
    assert built.run() == builds({"proxy_model"} | embeddings | FROM_LABELS)


def test_two_changes_at_once_are_both_named(built):
    built.edit(set_key("train.lr", 0.002))
    built.edit(set_key("train.batch_size", 64))
    assert why(built.plan())["checkpoints/full-f1-s0"] == (
        "train.batch_size 128 -> 64",
        "train.lr 0.001 -> 0.002",
    )
