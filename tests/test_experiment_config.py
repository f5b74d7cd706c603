"""The experiment's YAML: what is accepted, and the one line that everything else gets."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluation.metrics import retrieval_recall, zero_shot_metrics
from clipcov_pipeline.evaluation.tasks import METRICS
from clipcov_pipeline.experiment.config.base import KNOB, Section
from clipcov_pipeline.experiment.config.evaluate import EvaluationSet
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.load import find_config, load_config, preset_path
from clipcov_pipeline.experiment.config.training import Training

MINIMAL: dict[str, Any] = {
    "name": "mine",
    "shards": {"source": "pool"},
    "proxy": {"model": "RN50", "pretrained": "openai"},
    "select": {"fractions": [0.1, 0.5], "methods": {"clipcov": None, "random": None}},
    "train": {"model": "RN50", "samples_seen": 100},
    "evaluate": {"sets": {"coco": {"shards": "coco"}}, "primary_metric": "coco/text_retrieval_recall@5"},
}
DROP = object()
PRESETS = sorted(preset_path("sample").parent.glob("*.yaml"))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The minimal experiment with one key set, or dropped."""
    settings = copy.deepcopy(MINIMAL)
    *sections, key = path.split("/") if "/" in path else path.split(".")
    place = settings
    for section in sections:
        place = place.setdefault(section, {})
    if value is DROP:
        del place[key]
    else:
        place[key] = value
    return settings


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], Config]:
    """Write settings (or text, or bytes) to a file and load it."""

    def load(content: Any) -> Config:
        path = tmp_path / "experiment.yaml"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return load_config(str(path))

    return load


@pytest.fixture
def refused(load: Callable[[Any], Config], tmp_path: Path) -> Callable[[Any], str]:
    """Load what must be refused; return the message without the file's path, which it must start with."""

    def refused(content: Any) -> str:
        with pytest.raises(InputError) as caught:
            load(content)
        message = str(caught.value)
        assert message.splitlines() == [message]
        start = f"{tmp_path / 'experiment.yaml'}: "
        assert message.startswith(start)
        return message.removeprefix(start)

    return refused


# --- what is accepted -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads(path):
    config = load_config(path.stem)
    assert config.path == path
    assert config.work == Path.cwd() / config.work_dir  # not in the installed package


def test_augmentation_counts_where_it_is_given_only(load):
    assert "aug_cfg" not in load(changed("train.lr", 0.1)).train.semantic()
    settings = load(changed("train.aug_cfg", {"scale": [0.4, 1]})).train.semantic()
    assert settings["aug_cfg"] == {"scale": (0.4, 1.0)}


def test_parts_of_a_batch_count_where_there_are_several(load):
    assert load(changed("train.accum_freq", 1)).train.semantic() == load(MINIMAL).train.semantic()
    assert load(changed("train.accum_freq", 2)).train.semantic()["accum_freq"] == 2


def test_the_sample_is_the_default(monkeypatch, tmp_path):
    assert load_config() == load_config("sample")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINIMAL))
    monkeypatch.setenv("CLIPCOV_CONFIG", str(tmp_path / "mine.yaml"))
    assert load_config().name == "mine"
    assert load_config("sample").name == "sample"


def test_minimal_config_has_the_documented_defaults(load):
    config = load(MINIMAL)
    assert config.select.methods == {"clipcov": {}, "random": {}}
    assert config.evaluate.holdout_fraction == 0.1
    assert config.evaluate.sets["coco"].tasks == ("retrieval",)
    assert config.labels.class_names == "imagenet1k"
    assert config.proxy.retrain_with_pool is False
    assert config.ui.host == "127.0.0.1"


def test_methods_may_be_a_list_of_names(load):
    assert load(changed("select.methods", ["clipcov", "random"])) == load(MINIMAL)


def test_fractions_are_sorted_so_that_their_order_changes_nothing(load):
    assert load(changed("select.fractions", [0.5, 0.1])) == load(MINIMAL)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", ".1e-2", "0.001", "1E-3", "+1e-3"])
def test_numbers_in_scientific_notation_are_numbers(load, text):
    text = yaml.safe_dump(changed("train.lr", 111)).replace("111", text)
    assert load(text).train.lr == 0.001


def test_scientific_notation_works_inside_a_method_too(load):
    settings = changed("select.methods", {"clipcov": {"weights": {"label": 111}}})
    config = load(yaml.safe_dump(settings).replace("111", "5e-1"))
    assert config.select.methods["clipcov"] == {"weights": {"label": 0.5}}


def test_both_protocols_may_be_given_for_the_arms(load):
    both = load(changed("train.epochs", 3)).train
    assert both.protocols == ("samples_seen", "epochs")
    assert load(MINIMAL).train.protocols == ("samples_seen",)
    assert (both.under("epochs").samples_seen, both.under("epochs").epochs) == (None, 3)
    assert both.under("samples_seen") == load(MINIMAL).train


def test_relative_paths_start_at_the_yaml_and_urls_are_left_alone(load, tmp_path, monkeypatch):
    config = load(MINIMAL)
    assert config.location("pool") == str(tmp_path / "pool")
    assert config.location("../pool/{00..11}.tar") == str(tmp_path / "../pool/{00..11}.tar")
    assert config.location("s3://bucket/pool") == "s3://bucket/pool"
    assert config.resolve("names.txt") == (tmp_path / "names.txt").resolve()
    assert config.resolve("/names.txt") == Path("/names.txt")
    assert config.work == (tmp_path / "work").resolve()
    monkeypatch.setenv("CLIPCOV_WORK_DIR", "/elsewhere")
    assert config.work == Path("/elsewhere")


def test_config_cannot_be_changed(load):
    config = load(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0


def test_the_metrics_of_a_task_are_those_that_evaluation_gives():
    eye = np.eye(3)
    rows = np.arange(3)
    assert set(METRICS["retrieval"]) == set(retrieval_recall(eye, eye, rows))
    assert set(METRICS["zeroshot_names"]) == set(zero_shot_metrics(eye, eye, rows))


# --- what is refused, in one line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # misspelt keys
        ("trian", {}, "trian: unknown key, did you mean 'train'?"),
        ("train.epoch", 3, "train.epoch: unknown key, did you mean 'epochs'?"),
        ("shards.xyz", "x", "shards.xyz: unknown key, expected one of ['source', 'storage_options',"),
        (
            "proxy.train",
            {"samples_seen": 9, "batchsize": 3},
            "proxy.train.batchsize: unknown key, did you mean 'batch_size'?",
        ),
        ("evaluate.sets.coco.task", [], "evaluate.sets.coco.task: unknown key, did you mean 'tasks'"),
        ("select.methods.clipcov", {"mod": 1}, "select.methods.clipcov: unknown parameter 'mod', expected"),
        (
            "select.methods.clipcov",
            {"weights": {"clas": 1}},
            "select.methods.clipcov.weights: unknown parameter 'clas', expected any of class, self,",
        ),
        (
            "select.methods.mine",
            {"method": "semdedup", "keeep": "hard"},
            "select.methods.mine: unknown parameter 'keeep', expected any of n_clusters, keep,",
        ),
        (
            "select.methods.clipcov",
            {"redundancy": "budget_share"},
            "select.methods.clipcov.redundancy: found 'budget_share', expected 'class_size'",
        ),
        # missing
        ("name", DROP, "name: missing, expected a value"),
        ("train", DROP, "train: missing, expected a value"),
        ("train.model", DROP, "train.model: missing, expected a value"),
        ("evaluate.primary_metric", DROP, "evaluate.primary_metric: missing, expected a value"),
        ("evaluate.sets.coco.shards", DROP, "evaluate.sets.coco: found shards=None and benchmark=None"),
        # wrong types
        ("name", 3, "name: found 3, expected text: YAML reads it as a number"),
        ("train", None, "train: found None, expected a mapping"),
        ("proxy", ["RN50"], "proxy: found ['RN50'], expected a mapping"),
        ("train.lr", "fast", "train.lr: found 'fast', expected: a valid number"),
        ("train.batch_size", "128", "train.batch_size: found '128', expected: a valid integer"),
        ("train.batch_size", 1.5, "train.batch_size: found 1.5, expected: a valid integer"),
        ("train.batch_size", True, "train.batch_size: found True, expected: a valid integer"),
        ("train.lr", True, "train.lr: found True, expected: a valid number"),
        ("train.seeds", 0, "train.seeds: found 0, expected a list"),
        ("train.precision", "fp64", "train.precision: found 'fp64', expected: 'fp32', 'amp',"),
        ("select.fractions", 0.5, "select.fractions: found 0.5, expected a list"),
        ("select.fractions", ["half"], "select.fractions.0: found 'half', expected: a valid number"),
        ("select.methods", "clipcov", "select.methods: found 'clipcov', expected a mapping"),
        ("select.methods.clipcov", 3, "select.methods.clipcov: found 3, expected a mapping"),
        ("select.methods", {3: None}, "select.methods.3: found 3, expected text: YAML reads it as a number"),
        ("select.methods", [{"clipcov": {}}], "select.methods: found {'clipcov': {}} in a list"),
        ("evaluate.sets", ["coco"], "evaluate.sets: found ['coco'], expected a mapping"),
        ("shards.storage_options", "x", "shards.storage_options: found 'x', expected a mapping"),
        # impossible values
        ("name", "../up", "name: found '../up', expected letters, digits, dots, dashes or underscores"),
        ("select.fractions", [0], "select.fractions.0: found 0, expected: greater than 0"),
        ("select.fractions", [0.1, 1], "select.fractions.1: found 1, expected: less than 1"),
        ("select.fractions", [1.5], "select.fractions.0: found 1.5, expected: less than 1"),
        ("select.fractions", [25, 50], "select.fractions.0: found 25, expected: less than 1 (25 % is 0.25)"),
        (
            "evaluate.holdout_fraction",
            10.0,
            "evaluate.holdout_fraction: found 10.0, expected: less than 0.9 (10 % is 0.1)",
        ),
        (
            "name",
            False,
            "name: found False, expected text: YAML reads it as yes or no where it is not quoted; write",
        ),
        ("name", 1e3, "name: found 1000.0, expected text: YAML reads it as a number where it is not quoted"),
        ("select.methods", [True], "select.methods: found True in a list, expected a method's name: YAML"),
        ("select.fractions", [-0.5], "select.fractions.0: found -0.5, expected: greater than 0"),
        ("select.fractions", [float("nan")], "select.fractions.0: found nan, expected: a finite number"),
        ("select.fractions", [], "select.fractions: found an empty list, expected at least one fraction"),
        ("select.fractions", [0.5, 0.5], "select.fractions: found 0.5 more than once, expected each"),
        # would get the same name
        ("select.fractions", [0.25, 0.2500001], "select.fractions: found 0.25 more than once, expected each"),
        ("train.seeds", [0, 1, 0], "train.seeds: found [0, 1, 0], expected at least one seed, each once"),
        ("train.seeds", [], "train.seeds: found [], expected at least one seed, each once"),
        ("train.seeds", [-1], "train.seeds.0: found -1, expected: greater than or equal to 0"),
        ("train.lr", 0, "train.lr: found 0, expected: greater than 0"),
        ("train.lr", float("inf"), "train.lr: found inf, expected: a finite number"),
        ("train.wd", -0.1, "train.wd: found -0.1, expected: greater than or equal to 0"),
        ("train.aug_cfg", {"crop": [0.4, 1]}, "train.aug_cfg.crop: unknown key"),
        (
            "train.accum_freq",
            3,
            "train.batch_size: found 128 with gpus=1 and accum_freq=3, expected a multiple of 3",
        ),
        ("train.accum_freq", 0, "train.accum_freq: found 0, expected:"),
        ("train.gpus", 3, "train.batch_size: found 128 with gpus=3 and accum_freq=1, expected a multiple"),
        ("train.aug_cfg", {"scale": [1, 0.4]}, "train.aug_cfg: found scale [1.0, 0.4], expected the smaller"),
        ("train.aug_cfg", {"scale": [0.4, 2]}, "train.aug_cfg.scale.1: found 2, expected: less"),
        ("train.aug_cfg", {"gray_scale_prob": "1"}, "train.aug_cfg.gray_scale_prob: found '1', expected"),
        ("train.aug_cfg", {"color_jitter_prob": 1}, "train.aug_cfg: found one of color_jitter and"),
        ("train.samples_seen", DROP, "train: found neither samples_seen nor epochs, expected one of them"),
        (
            "proxy",
            {"model": "RN50", "train": {"samples_seen": 9, "epochs": 3}},
            "proxy.train: found samples_seen=9 and epochs=3, expected exactly one",
        ),
        ("automation.cron", "61 3 * * *", "automation.cron: found 61 as minute of '61 3 * * *', expected"),
        ("automation.cron", "*/0 * * * *", "automation.cron: found a step of 0 as minute of '*/0 * * * *'"),
        ("automation.cron", "0 3 * * MONDAY", "automation.cron: found '0 3 * * MONDAY', expected as weekday"),
        ("automation.cron", "1,,2 * * * *", "automation.cron: found '1,,2 * * * *', expected as minute *"),
        ("automation.cron", "0 0 31 2 *", "automation.cron: found '0 0 31 2 *', expected a day that one of"),
        ("automation.cron", "0 3 * *", "automation.cron: found '0 3 * *', expected five fields such as"),
        ("proxy.model", "hf-hub:laion/x", "proxy.model: found 'hf-hub:laion/x', expected the name of an"),
        ("train.model", "local-dir:x", "train.model: found 'local-dir:x', expected the name of an"),
        ("proxy.pretrained", DROP, "proxy: found neither pretrained nor train, expected one"),
        ("proxy.train", {"epochs": 1}, "proxy: found both pretrained and train, expected one"),
        ("labels.latent_classes", "prompt", "labels.latent_classes: found 'prompt', expected: 'prompts' or"),
        ("labels.n_clusters", 1, "labels.n_clusters: found 1, expected auto or a whole number of at least 2"),
        ("labels.n_clusters", True, "labels.n_clusters: found True, expected auto or a whole number"),
        ("labels.n_clusters", "many", "labels.n_clusters: found 'many', expected auto or a whole"),
        (
            "select.methods.mine",
            {"method": "external"},
            "select.methods.mine.uids: found None, expected a file of uids (.parquet, .csv or .npy)",
        ),
        (
            "select.methods.mine",
            {"method": "random", "filters": {"clip_score": {"share": 0.3, "arch": "l14"}}},
            "select.methods.mine.filters.clip_score.arch: found 'l14', expected none: the proxy scores",
        ),
        (
            "select.methods.basic",
            {"min_sides": 200},
            "select.methods.basic: unknown parameter 'min_sides', expected any of min_words, min_characters",
        ),
        (
            "train",
            {"model": "RN50", "epochs": 2, "num_checkpoints": 2},
            "train.num_checkpoints: found 2 with epochs, expected no such key: it cuts samples_seen",
        ),
        ("labels.templates", "clip", "labels.templates: found 'clip', expected imagenet or a list of prompt"),
        ("labels.templates", ["a photo"], "labels.templates: found 'a photo', expected exactly one {}"),
        ("labels.templates", ["{}", 3], "labels.templates: found 3, expected exactly one {}"),
        ("labels.templates", [], "labels.templates: found [], expected imagenet or a list of prompt"),
        ("evaluate.sets.coco.templates", ["x"], "evaluate.sets.coco.templates: found 'x', expected exactly"),
        ("evaluate.sets.coco.tasks", [], "evaluate.sets.coco.tasks: found [], expected one or more of"),
        ("evaluate.sets.coco.benchmark", "eval/x", "evaluate.sets.coco: found shards='"),
        ("evaluate.sets.coco.split", "val", "evaluate.sets.coco.split: has no effect for shards with the"),
        ("evaluate.sets.coco.tasks", ["knn"], "evaluate.sets.coco.tasks: found 'knn', expected of a set"),
        (
            "evaluate.sets.coco",
            {"benchmark": "x", "tasks": ["zeroshot_names"]},
            "evaluate.sets.coco.tasks: found 'zeroshot_names', expected of a set of benchmark: ['retrieval'",
        ),
        (
            "evaluate.sets.coco",
            {"benchmark": "s3://bucket/x"},
            "evaluate.sets.coco.benchmark: found 's3://bucket/x', expected a local folder",
        ),
        (
            "evaluate.sets.coco",
            {"benchmark": "x", "probe_samples": 10},
            "evaluate.sets.coco.probe_samples: has no effect for benchmark with the tasks ['retrieval']",
        ),
        ("evaluate.suites", {"coco": {"sets": ["coco"]}}, "evaluate.suites: found the label 'coco'"),
        ("evaluate.suites", {"s": {"sets": ["gone"]}}, "evaluate.suites.s.sets: found 'gone', expected some"),
        ("evaluate.suites", {"s": {"sets": ["coco"]}}, "evaluate.suites.s.metric: found 'acc1'"),
        ("evaluate.suites", {"s": {"sets": []}}, "evaluate.suites.s.sets: found [], expected at least one"),
        ("evaluate.sets.coco.tasks", ["vqa"], "evaluate.sets.coco.tasks.0: found 'vqa', expected: 'retr"),
        ("evaluate.sets.holdout", {"shards": "x"}, "evaluate.sets: found the label 'holdout', expected"),
        ("evaluate.holdout_fraction", 1, "evaluate.holdout_fraction: found 1, expected: less than 0.9"),
        ("automation.pools", {"gpus": 2}, "automation.pools.gpus: found 'gpus', expected: 'gpu' or 'embed'"),
        ("automation.pools", {"gpu": 0}, "automation.pools.gpu: found 0, expected: greater than 0"),
        ("ui.dagster_port", 99_999, "ui.dagster_port: found 99999, expected: less than 65536"),
        # methods
        ("select.methods", {}, "select.methods: found no method, expected at least one"),
        ("select.methods", ["random", "random"], "select.methods: found 'random' in a list"),
        ("select.methods.clipcv", None, "select.methods.clipcv.method: found 'clipcv', expected one of"),
        ("select.methods.a", {"method": "b"}, "select.methods.a.method: found 'b', expected one of clipcov,"),
        ("select.methods.a", {"method": ["b"]}, "select.methods.a.method: found ['b'], expected a method"),
        ("select.methods.full", {"method": "random"}, "select.methods: found the label 'full', expected"),
        ("select.methods.Clip Cov", {"method": "random"}, "select.methods: found the label 'Clip Cov'"),
        (
            "select.methods.clipcov",
            {"mode": "gready"},
            "select.methods.clipcov.mode: found 'gready', expected one of greedy, strict, notebook",
        ),
        (
            "select.methods.a",
            {"method": "clipcov", "weights": {"self": -1}},
            "select.methods.a.weights.self: found -1, expected a finite number of at least 0",
        ),
        # the primary metric
        (
            "evaluate.primary_metric",
            "flick/text_retrieval_recall@5",
            "evaluate.primary_metric: found 'flick/text_retrieval_recall@5', expected SET/METRIC with SET one"
            " of ['coco', 'holdout']",
        ),
        (
            "evaluate.primary_metric",
            "coco/acc1",  # the set has retrieval only
            "evaluate.primary_metric: found 'coco/acc1', expected SET/METRIC with METRIC of coco one of",
        ),
        ("evaluate.primary_metric", "coco", "evaluate.primary_metric: found 'coco', expected SET/METRIC"),
        # captions
        ("shards.caption", "json", "shards.caption: found 'json', expected txt, json:KEY, a list of these,"),
        ("shards.caption", ["txt", 7], "shards.caption: found ['txt', 7], expected txt, json:KEY"),
        (
            "shards.caption",
            {"from": ["txt"], "rule": "last"},
            "shards.caption: found the rule 'last', expected first, random, join",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_gives_one_line_with_the_keys_path(refused, path, value, message):
    assert refused(changed(path, value)).startswith(message)


def test_holdout_is_no_primary_set_when_nothing_is_held_out(refused, load):
    settings = changed("evaluate.primary_metric", "holdout/text_retrieval_recall@1")
    assert load(settings).evaluate.primary_metric == "holdout/text_retrieval_recall@1"
    settings["evaluate"]["holdout_fraction"] = 0
    assert refused(settings).endswith("expected SET/METRIC with SET one of ['coco']")


def test_c_rho_needs_an_early_proxy(refused, load):
    settings = changed("select.methods.mine", {"method": "c_rho"})
    assert refused(settings) == (
        "select.methods.mine: c_rho compares with an early proxy, found none: give proxy.early, a tag or"
        " checkpoint from earlier in its training"
    )
    settings["proxy"]["early"] = "yfcc15m"
    assert load(settings).proxy.semantic()["early"] == "yfcc15m"
    settings["proxy"] = {"model": "RN50", "train": {"samples_seen": 1000, "num_checkpoints": 1}}
    assert refused(settings).endswith(
        "found none: give proxy.train.num_checkpoints 2 or more: it is the proxy after the first"
    )
    settings["proxy"]["train"] = {"epochs": 1}
    assert "give proxy.train.epochs 2 or more" in refused(settings)
    settings["proxy"]["train"] = {"epochs": 2}
    assert "early" not in load(settings).proxy.semantic()  # as before there was such a key
    settings["proxy"]["early"] = "yfcc15m"
    assert refused(settings).startswith("proxy.early: has no effect with train")


def test_several_mistakes_are_all_named_in_the_one_line(refused):
    settings = changed("train.lr", -1)
    settings["select"]["fractions"] = [2]
    settings["trian"] = {}
    message = refused(settings)
    for part in ("train.lr: found -1", "select.fractions.0: found 2", "trian: unknown key"):
        assert part in message


def test_values_and_keys_with_line_breaks_still_give_one_line(refused):
    assert "found 'a\\nb'" in refused(changed("name", "a\nb"))
    assert refused(changed("two\nlines", 1)).startswith("two lines: unknown key")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found an empty file, expected a mapping of sections"),
        ("# only a comment\n", "found an empty file, expected a mapping of sections"),
        ("- a\n- b\n", "found list, expected a mapping of sections"),
        ("experiment\n", "found str, expected a mapping of sections"),
        ("name: x\nproxy:\n  model: [a, b\n", "not readable as YAML: while parsing a flow sequence"),
        ("name: x\nsel", "not readable as YAML: while scanning a simple key"),
        ('name: "x', "not readable as YAML: while scanning a quoted scalar"),
        ("a: 1\n---\nb: 2\n", "not readable as YAML: expected a single document"),
        ("? [a]\n: 1\n", "not readable as YAML: while constructing a mapping"),
        ("name: a\x00b", "not readable as YAML: unacceptable character"),
        ("name: !!python/object/apply:os.getcwd []\n", "not readable as YAML: could not determine"),
        (b"name: \xff\xfe", "not readable as YAML: 'utf-8' codec can't decode byte 0xff in position 6"),
    ],
)  # fmt: skip
def test_what_is_no_mapping_gives_one_line(refused, content, message):
    assert refused(content).startswith(message)


def test_a_file_cut_off_anywhere_gives_one_line_or_loads(load, refused):
    """An editor that saves in pieces: a sensor may read any prefix."""
    text = preset_path("sample").read_text()
    outcomes = set()
    for end in range(0, len(text), 7):
        try:
            load(text[:end])
            outcomes.add("loads")
        except InputError:
            refused(text[:end])
            outcomes.add("refused")
    assert outcomes >= {"refused"}
    assert load(text).name == "sample"


def test_a_key_given_twice_is_refused_with_its_line(refused):
    text = yaml.safe_dump(MINIMAL) + "train:\n  model: RN101\n"
    line = text.count("\n") - 1
    message = refused(text)
    assert "found the key 'train' twice, expected it once" in message
    assert f"line {line}," in message
    assert "'lr' twice" in refused("train:\n  lr: 1\n  lr: 2\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/such.yaml", "config 'no/such.yaml' not found, expected a YAML file: check the path"),
        ("smaple", "preset 'smaple' not found, expected one of ['cc12m', 'cc3m', 'datacomp_small', 'sample'"),
        (".", "preset '.' not found, expected one of ['cc12m', 'cc3m', 'datacomp_small', 'sample'"),
    ],
)
def test_a_missing_file_or_preset_gives_one_line(given, message):
    with pytest.raises(InputError) as caught:
        find_config(given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# --- knobs ------------------------------------------------------------------------------------------


def sections_of(section: type[Section]) -> dict[str, type[Section]]:
    """Every kind of section below this one, by its dotted path."""
    found: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                found[name] = kind
                found |= {f"{name}.{below}": deeper for below, deeper in sections_of(kind).items()}
    return found


def test_exactly_these_keys_are_knobs():
    """The list by hand: moving a key across this line makes caches wrong, or rebuilds of nothing."""
    knobs = {
        f"{path}.{name}".lstrip(".")
        for path, section in {"": Config, **sections_of(Config)}.items()
        for name, field in section.model_fields.items()
        if KNOB in field.metadata
    }
    assert knobs == {
        "work_dir",
        *(f"shards.{name}" for name in ("storage_options", "settle_seconds", "expected_samples")),
        *(f"train.{name}" for name in ("workers", "device", "gpus", "grad_checkpointing")),
        *(f"proxy.train.{name}" for name in ("workers", "device", "gpus", "grad_checkpointing")),
        *(f"embed.{name}" for name in ("batch_size", "device", "workers")),
        "select.threads",
        *(f"evaluate.{name}" for name in ("batch_size", "device")),
        "evaluate.sets.storage_options",
        "diagnostics.checks",
        *(f"automation.{name}" for name in ("cron", "sensor_seconds", "settle_seconds")),
        *(f"automation.{name}" for name in ("max_retries", "retry_seconds", "pools")),
        *(f"ui.{name}" for name in ("host", "dagster_port", "mlflow_port")),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("work_dir", "elsewhere"),
        ("shards.storage_options", {"anon": True}),
        ("shards.settle_seconds", 30),
        ("embed.batch_size", 3),
        ("embed.device", "cpu"),
        ("embed.workers", 0),
        ("select.threads", 7),
        ("train.workers", 9),
        ("train.device", "cpu"),
        ("train.gpus", 2),
        ("train.grad_checkpointing", True),
        ("evaluate.batch_size", 3),
        ("evaluate.device", "cpu"),
        ("evaluate.sets.coco.storage_options", {"anon": True}),
        ("automation.cron", "1 1 * * *"),
        ("automation.pools", {"gpu": 2}),
        ("ui.mlflow_port", 5001),
    ],
)
def test_a_knob_stays_out_of_what_is_fingerprinted(load, path, value):
    before, after = load(MINIMAL), load(changed(path, value))
    assert after != before
    assert after.semantic() == before.semantic()


def test_knobs_of_nested_sections_stay_out_too(load):
    settings = changed("proxy", {"model": "RN50", "train": {"epochs": 1}})
    found = load(settings).proxy.semantic()["train"]
    knobs, not_given = {"workers", "device", "gpus", "grad_checkpointing"}, {"aug_cfg", "accum_freq"}
    assert set(found) == set(Training.model_fields) - knobs - not_given


def test_what_changes_a_result_is_fingerprinted(load):
    before = load(MINIMAL).semantic()
    for path, value in {
        "train.lr": 0.5,
        "train.num_checkpoints": 2,
        "train.precision": "amp",
        "labels.class_names": "sample",
        "proxy.seed": 1,
        "select.samples_per_shard": 10,
        "evaluate.holdout_fraction": 0.2,
        "shards.max_image_pixels": 1000,
        "shards.caption": ["txt", "json:re_caption"],
    }.items():
        assert load(changed(path, value)).semantic() != before, path


def test_labels_leave_out_what_their_kind_does_not_read(load):
    def semantic(**labels: Any) -> dict[str, Any]:
        return load(changed("labels", labels)).labels.semantic()

    assert semantic(n_clusters=7, seed=3) == semantic()
    assert semantic(class_names="sample") != semantic()
    clusters = {"latent_classes": "clusters"}
    assert semantic(**clusters, class_names="sample", templates=["{}"]) == semantic(**clusters)
    assert semantic(**clusters, n_clusters=7) != semantic(**clusters)
    assert semantic(**clusters, n_clusters="auto")["n_clusters"] == "auto"


def test_what_is_fingerprinted_can_be_written_as_json(load):
    from clipcov_pipeline.experiment.digests import digest_of

    assert (
        len(digest_of(load(changed("select.methods.clipcov", {"weights": {"self": 1.5}})).semantic())) == 64
    )
    assert EvaluationSet(shards="x").semantic()["templates"] == ("{}",)
