"""Which entries should exist, what each is made from, and how arms are named."""

from clipcov_pipeline.experiment.graph import nodes
from clipcov_pipeline.experiment.recipes import evaluation_sets, recipes
from simulation import EVERYTHING, OUTPUTS, SEEDS, arms, set_key


def test_every_node_comes_after_what_it_reads_and_names_are_unique(fresh):
    seen: dict[str, str] = {}
    for node in nodes(fresh.config, fresh.world):
        for item in (*node.inputs, *node.after):
            assert item.output in OUTPUTS[item.stage]
            assert item.name.partition("#")[0] in seen
        assert node.name not in seen
        seen[node.name] = node.stage
    assert set(seen) == EVERYTHING


def test_no_two_entries_of_a_stage_share_a_fingerprint(built):
    prints = [step.fingerprint for step in built.plan().steps]
    assert len(set(prints)) == len(prints)


def test_arms_and_sets_of_an_experiment(fresh):
    assert [recipe.key for recipe in recipes(fresh.config)] == [
        f"{subset}-s{seed}" for subset in arms() for seed in SEEDS
    ]
    assert evaluation_sets(fresh.config) == ["coco", "holdout"]
    fresh.edit(set_key("evaluate.holdout_fraction", 0))
    assert evaluation_sets(fresh.config) == ["coco"]


def test_epochs_alone_name_their_arms_without_a_suffix(fresh):
    fresh.edit(set_key("train.samples_seen", None))
    fresh.edit(set_key("train.epochs", 8))
    assert [arm.key for arm in recipes(fresh.config)] == [
        f"{name}-s{seed}" for name in arms() for seed in SEEDS
    ]


def test_another_method_behind_a_label_concerns_the_leaderboard_though_the_scores_are_the_same(fresh):
    board = next(node for node in nodes(fresh.config, fresh.world) if node.stage == "leaderboard")
    assert board.params["select"] == {"methods": {m: {"method": m} for m in fresh.config.select.methods}}
