"""Training runs: steps, command line, progress, resuming, and what a finished run leaves."""

import dataclasses
import io
import json
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.training import AugCfg
from clipcov_pipeline.training import command, launch, result
from clipcov_pipeline.training import folder as training_folder
from clipcov_pipeline.training import log as training_log
from clipcov_pipeline.training import spec as training_spec
from clipcov_pipeline.training.spec import StepPlan
from index_of import Data, columns_of, index_of_noise, index_spec, write_index
from make_shards import write_tar
from make_training import MODEL, parsed, spec_for

# ---- steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 4000 samples are 40 batches in 4 virtual epochs, whatever the size of the subset
        ({"n_samples": 1000}, StepPlan(4, 1000, 10, 40)),
        ({"n_samples": 100}, StepPlan(4, 1000, 10, 40)),
        ({"n_samples": 10**7}, StepPlan(4, 1000, 10, 40)),
        # 41 batches in 4 epochs are 11 each
        ({"samples_seen": 4001}, StepPlan(4, 1100, 11, 44)),
        # fewer batches than checkpoints
        ({"samples_seen": 250}, StepPlan(3, 100, 1, 3)),
        # 3907 steps an epoch become 3912, which 2, 4 and 8 workers share
        ({"samples_seen": 1562800}, StepPlan(4, 391200, 3912, 15648)),
        ({"epochs": 3}, StepPlan(3, 1000, 10, 30)),
        ({"epochs": 3, "n_samples": 1001}, StepPlan(3, 1100, 11, 33)),
    ],
)
def test_steps_by_hand(changes, expected):
    assert training_spec.steps(spec_for(**changes)) == expected


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("samples_seen", [4000, 4100, 70_000])
@pytest.mark.parametrize("accum_freq", [1, 4])
def test_steps_are_those_that_open_clip_train_makes(tmp_path, workers, samples_seen, accum_freq):
    index = index_of_noise(tmp_path, [100])
    spec = index_spec(
        tmp_path, index, workers=workers, samples_seen=samples_seen, accum_freq=accum_freq, n_samples=100,
        batch_size=100, num_checkpoints=4,
    )  # fmt: skip
    args, loader = parsed(spec), Data(spec).info.dataloader
    plan = training_spec.steps(spec)
    assert plan == training_spec.steps(dataclasses.replace(spec, accum_freq=1))
    assert args.accum_freq == accum_freq
    assert loader.num_batches == plan.steps_per_epoch * accum_freq  # each a part of a step
    assert loader.num_samples == plan.samples_per_epoch


def test_a_pool_smaller_than_the_batch_is_refused():
    with pytest.raises(InputError, match="100 is more than the 99 samples"):
        training_spec.steps(spec_for(n_samples=99))


@pytest.mark.parametrize("changes", [{"epochs": 3, "samples_seen": 100}, {"samples_seen": None}])
def test_exactly_one_length_is_asked_for(changes):
    with pytest.raises(InputError, match="exactly one"):
        spec_for(**changes)


# ---- data


def test_a_missing_shard_is_named_before_anything_is_trained(tmp_path):
    index = index_of_noise(tmp_path, [40, 40])
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(InputError, match=r"00001\.tar"):
        launch.launch(index_spec(tmp_path, index, n_samples=80))


def test_warnings_say_what_will_not_work():
    assert command.warnings(spec_for()) == []
    found = command.warnings(spec_for(warmup=40, precision="fp16"))
    assert [line[:30] for line in found] == [
        "warm-up of 40 steps is not ove",
        "precision fp16 trains unreliab",
    ]


# ---- command line


def test_arguments_are_understood_by_open_clip_train():
    spec = spec_for(
        lr=2e-3, wd=0.1, beta1=0.8, beta2=0.95, eps=1e-7, seed=7, pretrained="openai", precision="amp"
    )
    args = parsed(dataclasses.replace(spec, extra=("--grad-clip-norm", "1.5")))
    assert (args.lr, args.wd, args.beta1, args.beta2, args.eps) == (2e-3, 0.1, 0.8, 0.95, 1e-7)
    assert (args.epochs, args.train_num_samples, args.batch_size, args.warmup) == (4, 1000, 100, 2)
    assert (args.seed, args.pretrained, args.precision, args.grad_clip_norm) == (7, "openai", "amp", 1.5)
    assert (args.resume, args.save_most_recent, args.save_frequency) == ("latest", True, 0)
    assert not args.dataset_resampled
    assert args.aug_cfg == {}
    assert (args.accum_freq, args.grad_checkpointing, args.use_bn_sync) == (1, False, False)


def test_augmentation_is_what_open_clip_builds():
    """After JSON, as the training process gets it."""
    from open_clip.transform import AugmentationCfg, image_transform

    settings = AugCfg(scale=(0.4, 1.0), color_jitter=(0.4, 0.3, 0.2, 0.1), color_jitter_prob=0.5)
    spec = training_spec.from_json(training_spec.to_json(spec_for(aug_cfg=settings.semantic())))
    aug_cfg = AugmentationCfg(**parsed(spec).aug_cfg)
    assert tuple(aug_cfg.scale) == (0.4, 1.0)
    steps = image_transform(32, is_train=True, aug_cfg=aug_cfg).transforms
    assert tuple(next(step for step in steps if hasattr(step, "scale")).scale) == (0.4, 1.0)
    jitter = next(step.transf for step in steps if hasattr(step, "transf"))
    assert (jitter.brightness, jitter.hue) == ((0.6, 1.4), (-0.1, 0.1))


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": (0.2, 1.0)},
        {"color_jitter": (0.4, 0.3, 0.2, 0.1), "color_jitter_prob": 0.5},
        {"gray_scale_prob": 0.3},
    ],
)
def test_every_key_of_aug_cfg_changes_what_open_clip_builds(settings):
    from open_clip.transform import AugmentationCfg, image_transform

    def built(given: AugCfg | None) -> list[dict[str, object]]:
        spec = spec_for(aug_cfg=given.semantic() if given else None)
        steps = image_transform(32, is_train=True, aug_cfg=AugmentationCfg(**parsed(spec).aug_cfg)).transforms
        return [{"step": str(step), **{k: str(v) for k, v in vars(step).items()}} for step in steps]

    assert built(AugCfg(**settings)) != built(None)


def test_the_keys_of_aug_cfg_are_those():
    assert set(AugCfg.model_fields) == {
        "scale", "color_jitter", "color_jitter_prob", "gray_scale_prob", "ratio"
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected no such key: open_clip ignores it"):
        AugCfg(ratio=(0.5, 2.0))


def test_several_gpus_share_the_batch(monkeypatch):
    spec = spec_for()
    args = parsed(spec, n_gpus=2)
    assert (args.batch_size, args.train_num_samples) == (50, 1000)
    assert args.local_loss
    assert args.gather_with_grad
    with pytest.raises(InputError, match="3 GPUs"):
        command.arguments(spec, n_gpus=3)
    assert not args.use_bn_sync  # torch has none for the CPU
    for device in ("cuda", "auto"):
        on_gpus = dataclasses.replace(spec, device=device)
        assert parsed(on_gpus, n_gpus=2).use_bn_sync
        assert not parsed(on_gpus).use_bn_sync
    assert command.command(spec, 1, "a.b") == [sys.executable, "-m", "a.b"]
    monkeypatch.setattr(command, "resolve_device", lambda _: "cuda")
    assert command.command(spec, 2, "a.b")[-4:] == ["--nproc-per-node", "2", "-m", "a.b"]


def test_each_gpu_cuts_its_share_into_parts():
    spec = spec_for(accum_freq=5, grad_checkpointing=True)
    args = parsed(spec, n_gpus=2)
    assert (args.batch_size, args.accum_freq, args.train_num_samples) == (10, 5, 1000)
    assert args.grad_checkpointing
    with pytest.raises(InputError, match=r"100 .* 3 GPUs with train.accum_freq 5; give a multiple of 15"):
        command.arguments(spec, n_gpus=3)
    with pytest.raises(InputError, match="accum_freq: 0"):
        spec_for(accum_freq=0)


def test_a_spec_survives_json():
    spec = spec_for(extra=("--debug",))
    assert training_spec.from_json(training_spec.to_json(spec)) == spec


# ---- progress


def test_progress_of_a_log_line():
    line = (
        "2026-01-01,00:00:00 | INFO | Train Epoch: 2 [ 500/1000 (50%)] Data (t): 0.003 "
        "Batch (t): 0.250, 1334.13/s, 1334.13/s/gpu LR: 0.000024 Logit Scale: 14.199 "
        "Contrastive_loss: 4.2862 (4.3495) Loss: 4.2862 (4.3495)"
    )
    assert training_log.parse_line(line, spec_for()) == {
        "step": 25,
        "total_steps": 40,
        "epoch": 2,
        "loss": 4.2862,
        "lr": 0.000024,
        "logit_scale": 14.199,
        "samples_per_second": 400.0,
        "eta_seconds": 3.75,
    }
    assert np.isnan(training_log.parse_line(line.replace("4.2862 (4.3495)", "nan (nan)"), spec_for())["loss"])
    assert training_log.parse_line("Start epoch 2", spec_for()) is None


def test_what_a_log_line_of_an_evaluation_tells():
    line = (
        "Eval Epoch: 3 image_to_text_mean_rank: 9.5000\timage_to_text_R@1: 0.2500"
        "\ttext_to_image_R@10: 0.7500\tclip_val_loss: 2.1000\tepoch: 3.0000\tnum_samples: 20.0000"
    )
    assert training_log.parse_evaluation(line, spec_for()) == {
        "step": 30,
        "text_retrieval_recall@1": 0.25,
        "image_retrieval_recall@10": 0.75,
        "loss": 2.1,
    }
    # a batch of it, and a training line
    assert training_log.parse_evaluation("Eval Epoch: 3 [20 / 20]\tClip Loss: 2.1\t", spec_for()) is None
    assert training_log.parse_evaluation("Train Epoch: 0 [  512/2048 (25%)] Loss: 1", spec_for()) is None


@pytest.mark.parametrize(("length", "frequency"), [({"epochs": 30}, 3), ({"samples_seen": 4000}, 1)])
def test_at_most_about_ten_evaluations(tmp_path, length, frequency):
    arguments = command.arguments(spec_for(tmp_path, val_data="/h.parquet", **length))
    at = arguments.index("--val-frequency")
    assert arguments[at : at + 2] == ["--val-frequency", str(frequency)]
    assert "--val-frequency" not in command.arguments(spec_for(tmp_path, **length))


# ---- whole runs


def test_a_run_from_start_to_loaded_checkpoint(tmp_path):
    import open_clip
    import torch

    index = index_of_noise(tmp_path, [24, 24])
    (tmp_path / "held_out").mkdir()
    spec = spec_for(
        tmp_path, index=index, n_samples=48, batch_size=16, samples_seen=96, num_checkpoints=2,
        val_data=index_of_noise(tmp_path / "held_out", [20]),
        keep_early=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="launch it again"):
        result.finish(spec, tmp_path / "out")
    seen, evaluated = [], []
    launch.launch(spec, seen.append, evaluated.append)
    assert [point["step"] for point in seen] == [1, 2, 3, 4, 5, 6]
    assert [point["step"] for point in evaluated] == [3, 6]
    assert seen[-1]["eta_seconds"] == 0
    # a second launch finds the run complete and trains nothing; other settings are refused
    before = (spec.folder / "out.log").read_text()
    launch.launch(spec, seen.append)
    assert (spec.folder / "out.log").read_text() == before
    with pytest.raises(InputError, match=r"lr = 0\.001, now it is 0\.01"):
        launch.launch(dataclasses.replace(spec, lr=0.01))
    launch.launch(dataclasses.replace(spec, val_data=None))  # the curve decides nothing
    (tmp_path / "moved").mkdir()
    moved = index_of_noise(tmp_path / "moved", [24, 24])
    launch.launch(dataclasses.replace(spec, index=moved))  # the same samples in another folder
    (tmp_path / "other").mkdir()
    other = index_of_noise(tmp_path / "other", [20, 28])
    with pytest.raises(InputError, match="samples = 'index of digest"):
        launch.launch(dataclasses.replace(spec, index=other))
    assert (spec.folder / "out.log").read_text() == before

    record = result.finish(spec, tmp_path / "out")
    assert record == json.loads((tmp_path / "out" / "training.json").read_text())
    assert (record["steps"], record["samples_seen"], record["passes"]) == (6, 96, 2)
    assert record["learning_curve"] == seen
    assert record["held_out_retrieval"] == evaluated
    assert_held_out_recalls(tmp_path / "out", tmp_path / "held_out" / "00000.tar", evaluated[-1])
    assert (record["first_loss"], record["last_loss"]) == (seen[0]["loss"], seen[-1]["loss"])
    path = tmp_path / "out" / "open_clip_pytorch_model.bin"
    by_path, _, preprocess = open_clip.create_model_and_transforms(MODEL, pretrained=str(path))
    by_folder, _, same = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    trained = torch.load(spec.folder / "checkpoints" / "epoch_2.pt", weights_only=True)["state_dict"]
    for model in (by_path, by_folder):
        loaded = model.state_dict()
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    image = Image.fromarray(np.arange(3000, dtype=np.uint8).reshape(25, 40, 3))
    assert torch.equal(preprocess(image), same(image))
    assert not set(torch.load(path, weights_only=True)) & {"optimizer", "state_dict"}
    first = torch.load(spec.folder / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert first["epoch"] == 1
    early = str(tmp_path / "out" / training_spec.EARLY_CHECKPOINT)
    loaded = open_clip.create_model_and_transforms(MODEL, pretrained=early)[0].state_dict()
    assert all(torch.equal(loaded[name], first["state_dict"][name]) for name in trained)
    assert any(not torch.equal(loaded[name], trained[name]) for name in trained)


def test_a_batch_in_parts_takes_the_same_steps_and_can_go_on(tmp_path):
    import torch

    index = index_of_noise(tmp_path, [24, 24])
    spec = spec_for(
        tmp_path, index=index, n_samples=48, batch_size=16, samples_seen=96, num_checkpoints=2,
        workers=0, accum_freq=2,
    )  # fmt: skip

    def stop_in_the_second_epoch(point):
        if point["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.launch(spec, stop_in_the_second_epoch)
    with pytest.raises(InputError, match="accum_freq = 2, now it is 1"):
        launch.launch(dataclasses.replace(spec, accum_freq=1))
    launch.launch(dataclasses.replace(spec, grad_checkpointing=True))
    assert "resuming checkpoint" in (spec.folder / "out.log").read_text()
    curve = result.learning_curve(spec)
    assert [point["step"] for point in curve] == [1, 2, 3, 4, 5, 6]
    assert np.isfinite([point["loss"] for point in curve]).all()
    last = torch.load(spec.folder / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert {int(state["step"]) for state in last["optimizer"]["state"].values()} == {6}


def assert_held_out_recalls(checkpoint, tar, evaluation):
    """What open_clip_train logged after its last step is what the finished checkpoint scores, by numpy."""
    from clipcov_pipeline.pool.listing import Shard
    from clipcov_pipeline.pool.samples import iter_samples
    from clipcov_pipeline.proxy.encoder import load_encoder
    from clipcov_pipeline.proxy.models import ModelSpec

    samples = list(iter_samples(Shard("held_out", str(tar), ""), None, None))
    encoder = load_encoder(ModelSpec(f"local-dir:{checkpoint}"), device="cpu")
    images = encoder.encode_images(sample.image for sample in samples)
    similarity = images @ encoder.encode_texts([sample.caption for sample in samples]).T
    for k in (1, 5, 10):
        for name, table in (("text", similarity), ("image", similarity.T)):
            recall = np.mean([i in np.argsort(-row)[:k] for i, row in enumerate(table)])
            assert evaluation[f"{name}_retrieval_recall@{k}"] == pytest.approx(recall, abs=0.051)  # near ties
    assert evaluation["loss"] > 0


KILLED_AT_STEP_36 = """
import os, pathlib, signal, sys
from clipcov_pipeline.training import launch as train

def kill(point):
    if point["step"] == 36:
        os.kill(os.getpid(), signal.SIGKILL)

train.launch(train.from_json(pathlib.Path(sys.argv[1]).read_text()), kill)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_virtual_epoch(tmp_path):
    index = index_of_noise(tmp_path, [40, 40])
    spec = spec_for(tmp_path, index=index, n_samples=80, batch_size=16, samples_seen=64 * 16, workers=0)
    (tmp_path / "spec.json").write_text(training_spec.to_json(spec))
    argv = [
        sys.executable,
        "-m",
        "clipcov_pipeline.training.launch",
        str(tmp_path / "spec.json"),
        str(tmp_path / "out"),
    ]
    log = spec.folder / "out.log"

    run = subprocess.run([sys.executable, "-c", KILLED_AT_STEP_36, argv[3]], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    assert "Train Epoch: 2 [" in log.read_text()  # the third, of 16 steps each
    assert not training_folder.is_complete(spec)
    first = len(log.read_text())

    subprocess.run(argv, check=True, capture_output=True)
    again = log.read_text()[first:]
    assert "resuming checkpoint" in again
    assert "(epoch 2)" in again
    assert re.findall(r"Start epoch (\d+)", again) == ["2", "3"]
    assert training_folder.is_complete(spec)
    curve = json.loads((tmp_path / "out" / "training.json").read_text())["learning_curve"]
    assert [point["step"] for point in curve] == list(range(1, 65))
    # the schedule goes on where it was: cosine over all 64 steps after 2 of warm-up
    for point in random.Random(0).sample(curve, 20):
        step = point["step"] - 1
        expected = step + 1 if step < 2 else 1 + np.cos(np.pi * (step - 2) / 62)
        assert point["lr"] == pytest.approx(expected * 1e-3 / 2, abs=1e-6)


def test_a_run_that_ends_early_is_not_taken_for_a_finished_one(tmp_path):
    index = index_of_noise(tmp_path, [32])
    spec = spec_for(tmp_path, index=index, n_samples=32, batch_size=16, samples_seen=32, num_checkpoints=2)
    with pytest.raises(RuntimeError, match="without the checkpoint of epoch 2"):
        launch.launch(dataclasses.replace(spec, extra=("--epochs", "1")))


def test_cpu_kernels_take_the_same_steps_and_end_with_their_block():
    import torch

    from clipcov_pipeline.training.launch import cpu_kernels

    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    last = torch.channels_last

    def trained() -> tuple[torch.Tensor, tuple[bool, bool]]:
        torch.manual_seed(0)
        convolutions = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 3)
        features = torch.nn.Sequential(*convolutions)
        model = torch.nn.Sequential(features, torch.nn.Flatten(), torch.nn.Linear(80, 4))
        # of a gradient near 0, a small eps would make a step of what is rounding
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
        laid_out = features(images).is_contiguous(memory_format=last)
        return model(images).detach(), (bool(optimizer.param_groups[0]["fused"]), laid_out)

    plain, before = trained()
    with cpu_kernels():
        fast, inside = trained()
    _, after = trained()
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert (before, inside, after) == ((False, False), (True, True), (False, False))


def test_only_image_and_caption_of_a_sample_are_read_whatever_the_images_suffix(tmp_path):
    """open_clip_train alone drops every one of these pairs, and waits for ever for a batch."""
    members = [
        (f"{number:03d}.{suffix}", data)
        for number in range(16)
        for suffix, data in (
            (("avif", "gif", "bmp", "tif")[number % 4], picture(("avif", "gif", "bmp", "tiff")[number % 4])),
            ("txt", f"drawing {number}".encode()),
            ("json", b"{"),
            ("cls", b"cat"),
        )
    ]
    index = write_index(tmp_path / "index.parquet", columns_of([write_tar(tmp_path / "0.tar", members)]))
    spec = index_spec(tmp_path, index, n_samples=16, batch_size=8, samples_seen=16, val_data=index)
    launch.launch(spec, on_evaluation=(evaluated := []).append)
    assert [point["step"] for point in evaluated] == [1, 2]
    assert result.finish(spec, tmp_path / "out")["seen"]["distinct"] == 16


def picture(kind):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(file, kind)
    return file.getvalue()
