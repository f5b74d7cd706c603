"""From the YAML's training settings to one run: every setting arrives under its own name."""

import dataclasses
from pathlib import Path

import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.experiment.train_spec import SETTINGS, TrainingData, train_spec
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.training.spec import TrainSpec, steps, steps_of

DATA = TrainingData(Path("/scratch/index.parquet"), 100, "/scratch/fetched", {"anon": True})
SET = Training.model_validate(
    {
        "samples_seen": 300,
        "batch_size": 30,
        "lr": 0.01,
        "wd": 0.1,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-8,
        "warmup": 7,
        "lr_scheduler": "const",
        "precision": "amp",
        "num_checkpoints": 2,
        "aug_cfg": {"scale": [0.5, 1.0]},
        "workers": 3,
        "device": "cpu",
        "gpus": 2,
        "accum_freq": 5,
        "grad_checkpointing": True,
    }
)


def test_every_setting_is_one_of_the_run_and_arrives_there(tmp_path: Path) -> None:
    assert set(SET.model_fields_set) == set(Training.model_fields) - {"epochs"}
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSpec)}
    assert defaults.keys() >= SETTINGS
    spec = train_spec(SET, ModelSpec("RN50", "weights.pt"), DATA, seed=4, scratch=tmp_path)
    changed = {name for name in SETTINGS if getattr(spec, name) != defaults[name]}
    assert changed == SETTINGS - {"epochs"}
    plain = SETTINGS - {"aug_cfg"}
    assert {name: getattr(spec, name) for name in plain} == {name: getattr(SET, name) for name in plain}
    assert spec.aug_cfg == {"scale": (0.5, 1.0)}
    assert (spec.model, spec.pretrained, spec.seed) == ("RN50", "weights.pt", 4)
    assert (spec.n_samples, spec.index, spec.cache, spec.storage_options) == (
        100, "/scratch/index.parquet", "/scratch/fetched", {"anon": True},
    )  # fmt: skip
    assert (spec.val_data, spec.keep_early) == (None, False)
    assert spec.folder == tmp_path / "run"


def test_steps_are_told_from_the_settings_as_from_the_run(tmp_path: Path) -> None:
    spec = train_spec(SET, ModelSpec("RN50"), DATA, seed=0, scratch=tmp_path)
    assert steps_of(SET, 100) == steps(spec)
    for samples in (0, 29):
        with pytest.raises(InputError, match=r"train\.(n_samples: 0|batch_size: 30)"):
            steps_of(SET, samples)
