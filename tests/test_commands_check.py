"""`clipcov check`: what is missing and what it takes, on a machine with and without the data."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from click.testing import CliRunner, Result

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment import disk
from clipcov_pipeline.experiment import preflight as experiment_preflight
from clipcov_pipeline.experiment.batches import repeats_in_batches, step_findings
from clipcov_pipeline.experiment.config.load import load_config
from clipcov_pipeline.experiment.disk import model_size
from clipcov_pipeline.experiment.duration import TRAINING_SECONDS, Part, time_needed
from clipcov_pipeline.experiment.graph import Node
from clipcov_pipeline.experiment.plan import make_plan
from clipcov_pipeline.experiment.preflight import count_samples, preflight
from clipcov_pipeline.experiment.rates import MOST_WAITING, measure_rates, start_seconds, steps_in_time
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.records import RECORD, record_text
from clipcov_pipeline.experiment.stages import SUBSETS
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.experiment.uid_finding import uid_finding
from clipcov_pipeline.experiment.weights import cached_weights
from clipcov_pipeline.experiment.world import observe
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.proxy.models import register_model_configs
from make_benchmark import write_classification
from make_shards import sample_members, write_pool, write_tar

PRESETS = ("cc3m", "cc12m", "datacomp_small")
TINY = {"samples_seen": 64, "batch_size": 8, "warmup": 2, "num_checkpoints": 2}
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "shards": {"source": "pool"},
    "proxy": {"model": "clipcov-tiny-RN", "train": TINY},
    "labels": {"latent_classes": "clusters", "n_clusters": 2},
    "select": {"fractions": [0.5], "methods": ["clipcov", "random"]},
    "train": {"model": "clipcov-tiny-RN", **TINY, "seeds": [0, 1]},
    "evaluate": {
        "holdout_fraction": 0.0,
        "sets": {
            "icons": {"benchmark": "icons", "tasks": ["zeroshot_classification"]},
            "gone": {"benchmark": "gone", "tasks": ["zeroshot_classification"]},
        },
        "suites": {"both": {"sets": ["icons", "gone"]}},
        "primary_metric": "icons/acc1",
    },
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without data: an empty folder, an empty cache of weights, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def experiment(folder: Path, **changes: Any) -> Path:
    """20 samples in 2 shards, one evaluation folder of two."""
    write_pool(folder / "pool", 2, 10)
    write_classification(folder / "icons", ["star", "sun"], {"test": 2})
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return path


def check(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["check", *map(str, arguments)])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_say_what_is_missing(name: str, tmp_path: Path):
    done = check(name, "--no-measure", "--json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    missing = {item["subject"]: item["text"] for item in found["findings"] if item["level"] == "missing"}
    assert f"{tmp_path}/{name}" in missing["pool"]
    assert "openai is not in this machine's cache" in missing["weights"]
    assert missing["evaluation"].startswith(f"imagenet1k: no folder {tmp_path}/eval/wds_imagenet1k")
    absent = [i for i in found["findings"] if i["subject"] == "evaluation" and "no folder" in i["text"]]
    assert len(absent) == 6 + 11
    assert all("\n" not in item["text"] for item in found["findings"])
    suites = load_config(name).evaluate.suites
    assert {key: len(suite.sets) for key, suite in suites.items()} == {
        "imagenet_and_shifts": 6,
        "downstream_11": 11,
    }


def test_a_small_subset_of_cc3m_does_not_finish_the_warm_up():
    found = preflight(load_config("cc3m"), measure=False)
    arms = {arm.subset: arm for arm in found.arms}
    # 30 epochs of ceil(0.05 * 2,836,000 / 512) = 277 batches
    assert (arms["5 %"].samples, arms["5 %"].batches, arms["5 %"].warmup) == (141_800, 8_310, 10_000)
    assert arms["5 %"].steps == 30 * 280  # by open_clip_train's rule of whole epochs for 8 workers
    assert arms["full pool"].batches == 30 * 5540
    (warning,) = [i.text for i in found.findings if i.level == "warning" and i.subject == "warm-up"]
    assert warning.startswith("5 %: 8,400 steps (8,310 batches")
    assert "fewer than the warm-up of 10,000: the learning rate only reaches 84 %" in warning


def test_datacomp_sees_as_many_samples_with_every_subset():
    found = preflight(load_config("datacomp_small"), measure=False)
    assert {arm.steps for arm in found.arms} == {3136}  # ceil(12.8 M / 4096) = 3125, in 8 parts of 392
    assert found.arms[0].samples == 12_800_000


def test_an_experiment_that_can_run(tmp_path: Path):
    path = experiment(tmp_path)
    done = check(path, "--no-measure")
    assert done.exit_code == 0, done.output
    assert "ok       pool        2 shards in pool\nok       pool size   20 samples\n" in done.output
    assert "present: icons" in done.output
    assert f"warning  evaluation  gone: no folder {tmp_path}/gone: left out, in no average" in done.output
    assert "warning  suite       both/acc1 would be the mean of 1 of its 2 sets" in done.output
    assert "50 %: 10 samples, 8 steps of 8, 6.4 passes, 4 trainings" in done.output
    assert done.output.endswith("tiny: can run\n")
    assert not (tmp_path / "work").exists()


RATES = {"embed": 10.0, "train": 4.0, "proxy": 2.0, "read": 5.0}


def parts(path: Path, rates: dict[str, float] = RATES, **changes: Any) -> dict[str, Part]:
    """What `time_needed` tells of an experiment, by stage; changes: of its section train."""
    config = load_config(str(path))
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    store = Store(config.work / "store")
    arms, plan = step_findings(config, 20)[0], make_plan(config, observe(config), store)
    return {part.stage: part for part in time_needed(config, plan, store, 20, arms, rates, 3.0)}


def test_time_is_told_from_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = experiment(tmp_path, embed={"device": "cpu"})
    config = load_config(str(path))
    rates, notes = measure_rates(config, scan(str(tmp_path / "pool")), seconds=0.2)
    assert not notes
    assert set(rates) == {"embed", "train", "proxy", "read"}
    assert min(rates.values()) > 1
    monkeypatch.setattr(experiment_preflight, "measure_rates", lambda *_: (RATES, []))
    monkeypatch.setattr(experiment_preflight, "start_seconds", lambda: 3.0)
    found = preflight(config)
    told = {part.stage: part for part in found.parts}
    # 20 samples in 2 shards
    assert (told["raw_shards"].entries, told["raw_shards"].seconds) == (2, pytest.approx(20 / 5))
    assert told["embeddings"].seconds == pytest.approx(20 / 10 + 20 / 5)
    # 64 seen, each of the 20 decoded once; 6 trainings of 8 steps of 8, on 20, 20, 10, 10, 10, 10
    assert told["proxy_model"].seconds == pytest.approx(64 / 2 + 20 / 5 + TRAINING_SECONDS)
    assert told["checkpoints"].seconds == pytest.approx(
        6 * (64 / 4 + TRAINING_SECONDS) + (2 * 20 + 4 * 10) / 5
    )
    assert (told["checkpoints"].entries, told["checkpoints"].basis) == (6, "measured")
    assert (told["starts"].entries, told["starts"].basis) == (
        4,
        "measured",
    )  # run, torch, two kinds of training
    assert "  checkpoints x 6: 2.4 min, measured" in found.to_text()
    assert "  scores x 6: 14 s, assumed" in found.to_text()


def test_a_second_forward_pass_takes_a_third_longer(tmp_path: Path):
    path = experiment(tmp_path)

    def seconds(**changes: Any) -> float:
        return parts(path, {"train": 4.0}, **changes)["checkpoints"].seconds - 6 * TRAINING_SECONDS

    assert seconds() == pytest.approx(6 * 64 / 4)  # 6 trainings of 8 steps of 8
    assert seconds(accum_freq=4) == seconds(grad_checkpointing=True) == pytest.approx(seconds() * 4 / 3)


def test_arms_side_by_side_take_as_long_as_the_longest_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    alone = parts(experiment(tmp_path), {"train": 4.0})
    path = experiment(tmp_path / "four", automation={"pools": {"gpu": 4}})
    beside = parts(path, {"train": 4.0})
    assert beside["checkpoints"].seconds == pytest.approx(alone["checkpoints"].seconds * 2 / 6)
    assert beside["scores"].seconds == pytest.approx(alone["scores"].seconds * 2 / 6)
    assert beside["starts"].entries == alone["starts"].entries + 2
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # four share two cores
    work = alone["checkpoints"].seconds - 6 * TRAINING_SECONDS
    assert parts(path, {"train": 4.0})["checkpoints"].seconds == pytest.approx(
        2 * (work / 6 * 2 + TRAINING_SECONDS)
    )


def test_what_the_store_has_recorded_is_preferred_and_what_is_built_takes_no_time(tmp_path: Path):
    path = experiment(tmp_path)
    config = load_config(str(path))
    store = Store(config.work / "store")
    plan = make_plan(config, observe(config), store)
    (built, _) = plan.of("raw_shards")
    write_record(store, built.node, built.fingerprint or "", 7.0)
    arm = plan.of("checkpoints")[0].node
    write_record(store, arm, "0" * 64, 25.0, training_seconds=16.0, samples_seen=32)  # of an earlier length
    told = parts(path)
    assert (told["raw_shards"].entries, told["raw_shards"].seconds) == (1, 7.0)  # the other shard
    assert told["raw_shards"].basis == "recorded"
    # 64 samples at the rate of 32 in 16 s, and 9 s beside the steps
    assert told["checkpoints"].seconds == pytest.approx(6 * (64 * 16 / 32 + 9))
    assert told["checkpoints"].basis == "recorded"
    # a record of another batch does not tell
    assert parts(path, batch_size=4)["checkpoints"].basis == "measured"


def write_record(store: Store, node: Node, fingerprint: str, seconds: float, **stats: Any) -> None:
    about = {"code_version": "2", "params": node.params, "sources": {}, "inputs": {}}
    with store.write(node.stage, node.partition, fingerprint, **about) as entry:
        entry.stats, entry.digests = stats, dict.fromkeys(node.needs, "0" * 64)
    record = store.current(node.stage, node.partition)
    assert record is not None
    (store.folder(record) / RECORD).write_text(record_text(dataclasses.replace(record, seconds=seconds)))


def test_a_start_takes_the_time_of_its_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "import time\nwhile time.process_time() < 0.5: pass\ntime.sleep(1)\n"
    (tmp_path / "busy.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert 0.4 < (start_seconds("busy") or 0) < 1  # not what it waits
    assert start_seconds("no_such_module") is None


class Machine:
    """A clock of a machine where a step takes a second for the first of a size, then 0.05 + batch / 1000;
    so many times as long by the wall, as something else runs."""

    def __init__(self, slowed: float) -> None:
        self.slowed, self.worked, self.sizes = slowed, 0.0, []

    def step(self, batch: int) -> None:
        self.worked += 0.05 + batch / 1000 + (batch not in self.sizes)
        self.sizes.append(batch)

    def clock(self) -> tuple[float, float]:
        return self.worked * self.slowed, self.worked


@pytest.mark.parametrize(("slowed", "seconds"), [(1, 20), (3, 20), (40, 200)])
def test_the_configured_batch_is_timed_without_its_first_step(slowed: float, seconds: float):
    machine = Machine(slowed)
    batch, took = steps_in_time(machine.step, 256, seconds, machine.clock)
    assert batch == 256
    assert len(took) >= 3
    assert [worked for _, worked in took] == pytest.approx([0.306] * len(took))
    assert max(machine.worked, machine.worked * slowed / MOST_WAITING) < 1.1 * seconds


def test_a_step_that_takes_too_long_is_timed_in_a_smaller_batch():
    machine = Machine(1)
    batch, took = steps_in_time(machine.step, 256, 3, machine.clock)
    assert batch == 32
    assert took[0] == pytest.approx((0.082, 0.082))
    assert steps_in_time(machine.step, 512, 0, machine.clock)[0] == 2  # one step at least


def test_disk_is_estimated_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(str(experiment(tmp_path)))
    found = preflight(config, measure=False)
    pool = sum(path.stat().st_size for path in (tmp_path / "pool").iterdir())
    size = model_size("clipcov-tiny-RN")
    indexes = 2 * 20 * disk.INDEX_BYTES  # all of the pool, and half of it twice
    assert found.disk["subsets"] == indexes
    select = config.select.model_copy(update={"write_tars": True})
    with_tars = preflight(config.model_copy(update={"select": select}), measure=False)
    assert with_tars.disk["subsets"] == indexes + 2 * pool
    assert found.disk["embeddings"] == 20 * (4 * size.embed_dim + 200)
    assert found.disk["checkpoints"] == 4 * size.parameters * (2 * 6 + 3 + 1)

    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    full = preflight(config, measure=False)
    assert [item.subject for item in full.findings if item.level == "missing"] == ["disk"]
    config.work.mkdir()
    with (config.work / "built").open("wb") as file:  # what is there needs no room
        file.truncate(sum(found.disk.values()))
    built = preflight(config, measure=False)
    assert built.can_run
    assert "disk" in [item.subject for item in built.findings if item.level == "warning"]


def test_parameters_are_counted_as_built():
    import open_clip

    register_model_configs()
    model = open_clip.create_model("clipcov-tiny-RN")
    assert model_size("clipcov-tiny-RN").parameters == sum(p.numel() for p in model.parameters())


def test_samples_are_counted_or_told_from_sizes(tmp_path: Path):
    shards = scan(str(write_pool(tmp_path / "pool", 3, 10)))
    assert count_samples(shards) == (30, True)
    found, exact = count_samples(shards, seconds=-1) or (0, True)
    assert found == pytest.approx(30, abs=1)
    assert not exact
    assert count_samples([]) is None
    (tmp_path / "pool" / "00001.tar").write_bytes(b"no tar")
    assert count_samples(scan(str(tmp_path / "pool"))) == (20, True)


def test_samples_of_a_tar_made_of_a_folder_are_counted(tmp_path: Path):
    """``tar cf 0.tar -C DIR .`` puts ``./`` before every name, and names may have folders with dots."""
    members = [(f"./v1.0/{i:03d}.{suffix}", b"x") for i in range(7) for suffix in ("jpg", "txt")]
    write_tar(tmp_path / "pool" / "0.tar", members)
    assert count_samples(scan(str(tmp_path / "pool"))) == (7, True)


def test_a_pool_of_another_size_than_expected_is_told(tmp_path: Path):
    path = experiment(tmp_path, shards={"source": "pool", "expected_samples": 1000})
    assert "20 samples, but shards.expected_samples is 1,000" in check(path, "--no-measure").output
    unknown = experiment(tmp_path / "other", shards={"source": "nowhere"})
    done = check(unknown, "--no-measure")
    assert done.exit_code == 1
    assert "pool size   not known: give shards.expected_samples" in done.output


def test_a_batch_larger_than_a_subset_is_missing_samples(tmp_path: Path):
    path = experiment(tmp_path, train={**SETTINGS["train"], "batch_size": 16})
    done = check(path, "--no-measure")
    assert done.exit_code == 1
    assert "missing  steps       50 %: train.batch_size: 16 is more than the 10 samples" in done.output


def test_broken_evaluation_folders_and_weights_are_named(tmp_path: Path):
    path = experiment(tmp_path, proxy={"model": "RN50-quickgelu", "pretrained": "weights/mine.pt"})
    (tmp_path / "icons" / "test" / "0.tar").unlink()
    done = check(path, "--no-measure")
    assert done.exit_code == 1
    assert f"weights     proxy.pretrained: no checkpoint file at {tmp_path}/weights/mine.pt" in done.output
    assert "missing  evaluation  icons: evaluate.sets.icons: " in done.output


def test_weights_in_the_cache_are_found(tmp_path: Path):
    model, tag = "ViT-B-32-quickgelu", "openai"
    assert cached_weights(model, tag) is None
    cache = tmp_path / "hub" / "models--timm--vit_base_patch32_clip_224.openai"
    snapshot = cache / "snapshots" / "abc" / "open_clip_model.safetensors"
    for path, text in ((cache / "refs" / "main", "abc"), (snapshot, "weights")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert cached_weights(model, tag) == str(snapshot)
    found = preflight(load_config("datacomp_small"), measure=False)
    assert [item.level for item in found.findings if item.subject == "weights"] == ["ok"]


def test_mistakes_in_the_yaml_are_errors(tmp_path: Path):
    for model in ({"model": "RN51", "pretrained": "openai"}, {"model": "RN50-quickgelu", "pretrained": "x"}):
        path = experiment(tmp_path / model["model"], proxy=model)
        with pytest.raises(InputError, match=r"RN51|'x' is neither a file nor an open_clip tag"):
            preflight(load_config(str(path)), measure=False)
    assert isinstance(check("no_such_preset").exception, InputError)


@pytest.mark.parametrize(("alike", "batch_size", "warned"), [(3, 8, True), (2, 8, False), (3, 4, False)])
def test_batches_that_cannot_be_free_of_repeats_are_told(alike: int, batch_size: int, warned: bool):
    text = repeats_in_batches(alike, 20, batch_size)  # 2.5 batches, or 5
    assert text.startswith(f"one image or caption comes {alike} times in a pass of 2.5 batches") == warned


def test_the_check_tells_it_of_subsets_that_are_built(tmp_path: Path):
    config = load_config(str(experiment(tmp_path)))
    store = Store(config.work / "store")
    subset = next(arm.subset for arm in recipes(config))
    with store.write(SUBSETS, subset, "0" * 64, code_version="2", params={}, sources={}, inputs={}) as entry:
        entry.stats = {"most_alike": 9, "draws": 20}
    (found,) = [each for each in preflight(config, measure=False).findings if each.subject == "batches"]
    assert (found.level, found.text.partition(":")[0]) == ("warning", subset)


@pytest.mark.parametrize(
    ("uids", "level", "text"),
    [
        ([f"{i:032x}" for i in range(3)], "ok", "in the json"),
        (["00000000-0000-0000-0000-000000000007"] * 3, "note", "3 of the first 3"),  # int(uid, 16) fails
        (
            [None, 7, f"{5:032x}"],
            "note",
            "2 of the first 3 samples have no uid of 32 hex digits in",
        ),
    ],
)
def test_whether_an_npy_will_be_readable_elsewhere(uids: list[Any], level: str, text: str, tmp_path: Path):
    members = [m for i, uid in enumerate(uids) for m in sample_members(f"{i}", "x", i, uid=uid)]
    write_tar(tmp_path / "pool" / "0.tar", members)
    (found,) = uid_finding(scan(str(tmp_path / "pool")))
    assert (found.level, found.subject) == (level, "uids")
    assert found.text.startswith(text)
    assert ("1 have an id of another kind" in found.text) == (7 in uids)
    assert uid_finding([]) == []


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, 2.0], "ok"),
        ([1.0, -2.0], "found the weight -2.0 of b"),
        ([float("nan"), 1.0], "found the weight nan of a"),
        ([0.0, 0.0], "found 2 weights of 0"),
    ],
)
def test_a_list_by_whose_weights_nothing_can_be_drawn_is_missing(
    tmp_path: Path, weights: list[float], said: str
):
    methods = {"mine": {"method": "external", "uids": "list.parquet"}}
    path = experiment(tmp_path, select={"fractions": [0.5], "methods": methods})
    pl.DataFrame({"uid": ["a", "b"], "weight": weights}).write_parquet(tmp_path / "list.parquet")
    done = check(path, "--no-measure")
    assert done.exit_code == (said != "ok")
    (line,) = [line for line in done.output.splitlines() if "select.methods.mine.uids: " in line]
    assert line.startswith("ok" if said == "ok" else "missing")
    assert said in line
