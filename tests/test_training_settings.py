"""Every key of `train` changes what it says in what open_clip_train builds, not only on its command line.

open_clip_train's own `main` runs up to its first step; what it has built by then is looked at.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clipcov_pipeline.experiment.config.training import AugCfg, Train, Training
from clipcov_pipeline.experiment.train_spec import TrainingData, train_spec
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.training import launch
from index_of import index_of_noise
from make_training import MODEL

N = 40
PLAIN: dict[str, Any] = {
    "samples_seen": 96, "batch_size": 8, "lr": 0.001, "warmup": 2, "num_checkpoints": 2, "workers": 0,
}  # fmt: skip
Build = Callable[..., SimpleNamespace]


class StoppedError(Exception):
    """Thrown in place of the first step."""


def looked_at(
    model: Any, data: Any, optimizer: Any, scaler: Any, scheduler: Any, args: Any
) -> SimpleNamespace:
    """What `main` hands to an epoch, in plain values."""
    from open_clip_train import train

    loader = data["train"].dataloader
    data["train"].set_epoch(0)
    images, texts = next(iter(loader))
    steps = args.epochs * (loader.num_batches // args.accum_freq)
    with train.get_autocast(args.precision, device_type="cpu")():
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return SimpleNamespace(
        lr=[scheduler(step) for step in range(steps)],
        optimizer=[(group["weight_decay"], group["betas"], group["eps"]) for group in optimizer.param_groups],
        weights={name: value.clone() for name, value in model.state_dict().items()},
        arithmetic=(autocast, train.get_input_dtype(args.precision), scaler is not None),
        first=(images, texts),
        cut=(args.epochs, steps, len(texts), args.accum_freq),
        workers=loader._loader.num_workers,
        device=next(model.parameters()).device.type,
        checkpointing=model.transformer.grad_checkpointing,
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return index_of_noise(tmp_path_factory.mktemp("shards"), [N])


@pytest.fixture(scope="module")
def build(index: str, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """What is built from settings of the YAML; what is given as None is left out."""
    from open_clip_train import main

    def built(seed: int = 0, pretrained: str | None = None, **changes: Any) -> SimpleNamespace:
        found: list[SimpleNamespace] = []

        def stop(model: Any, data: Any, _loss: Any, _epoch: int, *built: Any, **_: Any) -> None:
            optimizer, scaler, scheduler, _teacher, args = built
            found.append(looked_at(model, data, optimizer, scaler, scheduler, args))
            raise StoppedError

        def created(*args: Any, **kwargs: Any) -> Any:
            made = create(*args, **kwargs)
            transforms.append(made[1].transforms)
            return made

        transforms: list[Any] = []
        given = {key: value for key, value in {**PLAIN, **changes}.items() if value is not None}
        settings = Training.model_validate(given)
        scratch = tmp_path_factory.mktemp("run")
        data, model = TrainingData(Path(index), N), ModelSpec(MODEL, pretrained)
        spec = train_spec(settings, model, data, seed=seed, scratch=scratch)
        create = main.create_model_and_transforms
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main, "train_one_epoch", stop)
            patch.setattr(main, "create_model_and_transforms", created)
            with pytest.raises(StoppedError):
                launch.launch(spec)
        found[0].transform = {type(step).__name__: step for step in transforms[0]}
        return found[0]

    return built


@pytest.fixture(scope="module")
def plain(build: Build) -> SimpleNamespace:
    return build()


def cosine(lr: float, warmup: int, steps: int) -> list[float]:
    """Linear to `lr`, then half a cosine to 0."""
    return [
        lr * (step + 1) / warmup
        if step < warmup
        else lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for step in range(steps)
    ]


def decay(wd: float = 0.2, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-6) -> list[Any]:
    """AdamW's groups: gains and biases do not decay."""
    return [(0.0, betas, eps), (wd, betas, eps)]


# key -> a value (and what it needs), and what it makes of what is built
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "samples_seen": ({"samples_seen": 160}, {"cut": (2, 20, 8, 1), "lr": cosine(0.001, 2, 20)}),
    "epochs": (
        {"epochs": 3, "samples_seen": None, "num_checkpoints": None},
        {"cut": (3, 15, 8, 1), "lr": cosine(0.001, 2, 15)},
    ),
    "batch_size": ({"batch_size": 16}, {"cut": (2, 6, 16, 1), "lr": cosine(0.001, 2, 6)}),
    "num_checkpoints": ({"num_checkpoints": 3}, {"cut": (3, 12, 8, 1)}),
    "accum_freq": ({"accum_freq": 4}, {"cut": (2, 12, 2, 4)}),
    "lr": ({"lr": 0.002}, {"lr": cosine(0.002, 2, 12)}),
    "warmup": ({"warmup": 5}, {"lr": cosine(0.001, 5, 12)}),
    "lr_scheduler": ({"lr_scheduler": "const"}, {"lr": [0.0005, *[0.001] * 11]}),
    "wd": ({"wd": 0.1}, {"optimizer": decay(wd=0.1)}),
    "beta1": ({"beta1": 0.8}, {"optimizer": decay(betas=(0.8, 0.98))}),
    "beta2": ({"beta2": 0.95}, {"optimizer": decay(betas=(0.9, 0.95))}),
    "eps": ({"eps": 1e-8}, {"optimizer": decay(eps=1e-8)}),
    "workers": ({"workers": 2}, {"workers": 2}),
    "device": ({"device": "cpu"}, {"device": "cpu"}),
    "grad_checkpointing": ({"grad_checkpointing": True}, {"checkpointing": True}),
}
# tested beside, or in test_training_launch.py (gpus)
APART = {"precision", "aug_cfg", "gpus", "seeds", "model", "pretrained"}
SAID = ("cut", "lr", "optimizer", "workers", "device", "checkpointing")


def test_every_key_is_tested() -> None:
    assert CASES.keys() | APART == set(Train.model_fields)


@pytest.mark.parametrize("key", CASES)
def test_a_key_changes_what_it_says_and_nothing_else(build: Build, plain: SimpleNamespace, key: str) -> None:
    changes, expected = CASES[key]
    found = build(**changes)
    same = {name: getattr(plain, name) for name in SAID}
    if key != "device":  # there is no other one to be had here
        assert all(same[name] != value for name, value in expected.items())
    for name, value in {**same, **expected}.items():
        assert getattr(found, name) == (pytest.approx(value) if name == "lr" else value), name
    assert all(value.equal(plain.weights[name]) for name, value in found.weights.items())


def test_what_is_built_of_plain_settings(plain: SimpleNamespace) -> None:
    assert plain.cut == (2, 12, 8, 1)
    assert plain.lr == pytest.approx(cosine(0.001, 2, 12))
    assert plain.optimizer == decay()
    assert (plain.workers, plain.device, plain.checkpointing) == (0, "cpu", False)


FULL = torch.float32


@pytest.mark.parametrize(
    ("precision", "autocast", "images", "scaled", "convolutions", "norms"),
    [
        ("fp32", None, None, False, FULL, FULL),
        ("amp", torch.float16, None, True, FULL, FULL),
        ("amp_bf16", torch.bfloat16, None, False, FULL, FULL),
        ("bf16", None, torch.bfloat16, False, torch.bfloat16, FULL),
        ("fp16", None, torch.float16, False, torch.float16, FULL),
        ("pure_bf16", None, torch.bfloat16, False, torch.bfloat16, torch.bfloat16),
        ("pure_fp16", None, torch.float16, False, torch.float16, torch.float16),
    ],
)
def test_precision(
    build: Build, precision: str, autocast: Any, images: Any, scaled: bool, convolutions: Any, norms: Any
) -> None:
    found = build(precision=precision)
    assert found.arithmetic == (autocast, images, scaled)
    assert found.weights["visual.conv1.weight"].dtype == convolutions
    assert found.weights["ln_final.weight"].dtype == norms


def test_aug_cfg(build: Build, plain: SimpleNamespace) -> None:
    crop = plain.transform["RandomResizedCrop"]
    assert (tuple(crop.scale), set(plain.transform) & {"color_jitter", "gray_scale"}) == ((0.9, 1.0), set())
    settings = {"scale": [0.4, 0.8], "gray_scale_prob": 0.3}
    colours = {"color_jitter": [0.4, 0.3, 0.2, 0.1], "color_jitter_prob": 0.6}
    found = build(aug_cfg={**settings, **colours}).transform
    assert tuple(found["RandomResizedCrop"].scale) == (0.4, 0.8)
    jitter = found["color_jitter"]
    assert (jitter.p, jitter.transf.brightness, jitter.transf.contrast) == (0.6, (0.6, 1.4), (0.7, 1.3))
    assert (jitter.transf.saturation, jitter.transf.hue) == ((0.8, 1.2), (-0.1, 0.1))
    assert found["gray_scale"].p == 0.3
    assert set(AugCfg.model_fields) - {"ratio"} == {*settings, *colours}


def test_the_seed_is_of_weights_and_of_order(build: Build, plain: SimpleNamespace) -> None:
    again, other = build(), build(seed=1)
    name = "token_embedding.weight"
    assert again.weights[name].equal(plain.weights[name])
    assert not other.weights[name].equal(plain.weights[name])
    assert again.first[1].equal(plain.first[1])
    assert not other.first[1].equal(plain.first[1])


def test_pretrained_weights_are_those_that_training_starts_from(
    build: Build, plain: SimpleNamespace, tmp_path: Path
) -> None:
    weights = {
        name: value + 1 if value.is_floating_point() else value for name, value in plain.weights.items()
    }
    torch.save(weights, tmp_path / "weights.pt")
    found = build(pretrained=str(tmp_path / "weights.pt")).weights
    assert all(value.equal(weights[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("section", "settings", "said"),
    [
        (
            Training,
            {"epochs": 2, "num_checkpoints": 4},
            "it cuts samples_seen, and there is",
        ),
        (Train, {"model": MODEL, "epochs": 2, "num_checkpoints": 2}, "num_checkpoints: found 2 with epochs"),
        (AugCfg, {"color_jitter": [0.1, 0.1, 0.1, 0.6], "color_jitter_prob": 0.5}, "found the hue 0.6"),
        (AugCfg, {"ratio": [0.5, 2.0]}, "open_clip ignores it"),
    ],
)
def test_what_would_change_nothing_is_refused(section: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        section.model_validate(settings)


def test_both_lengths_take_checkpoints_of_samples_seen() -> None:
    both = {"model": MODEL, "epochs": 2, "samples_seen": 100, "num_checkpoints": 4}
    assert Train.model_validate(both).under("samples_seen").parts == 1
