"""From the training settings of the YAML to one run of open_clip_train."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.training.command import shard_list
from clipcov_pipeline.training.spec import TrainSpec

RUN = "run"  # the training's own folder below its scratch folder

# a setting and the field of `TrainSpec` that takes it have one name; the GPUs are the launcher's
SETTINGS = Training.model_fields.keys() - {"gpus"}


class Tars(NamedTuple):
    """WebDataset tars, and the number of samples that they hold together."""

    paths: Sequence[Path] = ()
    samples: int = 0


NO_TARS = Tars()


def train_spec(
    settings: Training,
    model: ModelSpec,
    data: Tars,
    *,
    seed: int,
    scratch: Path,
    validation: Tars = NO_TARS,
    keep_early: bool = False,
) -> TrainSpec:
    """Return the training run that the settings ask for.

    Args:
        settings: how to train, of exactly one length (``samples_seen`` or ``epochs``).
        model: architecture, and the weights to start from, a path already absolute.
        data: what is trained on.
        seed: of the weights and of the order of shards.
        scratch: the folder for the run's own one.
        validation: held-out pairs for the retrieval curve; none, no curve.
        keep_early: also keep the weights after the first virtual epoch.

    Raises:
        InputError: no samples, or a path with ``::``.
    """
    given = {name: getattr(settings, name) for name in SETTINGS}
    given["aug_cfg"] = settings.aug_cfg.semantic() if settings.aug_cfg is not None else None
    return TrainSpec(
        **given,
        model=model.model,
        pretrained=model.pretrained,
        train_data=shard_list(data.paths),
        n_samples=data.samples,
        seed=seed,
        val_data=shard_list(validation.paths) if validation.paths else None,
        val_samples=validation.samples,
        keep_early=keep_early,
        log_dir=str(scratch),
        name=RUN,
    )
