"""MLflow's model registry: a version for each trained arm, and the alias of the best one.

A version is a pyfunc model: paths of images and names of classes in, classes and probabilities out
(`clipcov_pipeline.evaluation.classifier`).
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from assets.mlflow_runs.tracking import Tracking, local_path
from clipcov_pipeline.evaluation.classifier import CLASS_NAMES, IMAGE, TEMPLATES
from clipcov_pipeline.training.spec import RECORD

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHAMPION = "champion"

WEIGHTS_TAG = "clipcov.weights_digest"

REQUIREMENTS = ("clipcov-pipeline", "open_clip_torch", "torch", "torchvision", "numpy", "pandas", "pillow")

NOT_SERVED = {RECORD, "learning_curve.png"}  # logged with the run already


def register(
    tracking: Tracking, run_id: str, checkpoint: Path, digest: str, tags: Mapping[str, str]
) -> "ModelVersion":
    """Return the version that holds a run's checkpoint; it is made when there is none of these weights.

    Args:
        tracking: the experiment; its name is the registered model's.
        run_id: the arm's MLflow run.
        checkpoint: folder with the weights and open_clip's description of the model.
        digest: of the weights. A run that was trained again has new ones: they replace its version.
        tags: of the version.
    """
    from mlflow.entities import LoggedModelOutput

    client, name = tracking.client(), tracking.config.name
    for found in versions_of(tracking, run_id):
        if found.tags.get(WEIGHTS_TAG) == digest:
            return found
        client.delete_model_version(name, found.version)
    _delete_models(tracking, run_id)
    tags = {**tags, WEIGHTS_TAG: digest}
    logged = client.create_logged_model(tracking.experiment_id(), "model", run_id, tags, model_type="CLIP")
    try:
        # the store is a local folder: written in place, the weights are copied once
        _save(local_path(logged.artifact_location), checkpoint, run_id, logged.model_id)
        client.finalize_logged_model(logged.model_id, "READY")
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    with tracking.alone():
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description=f"The trained arms of {name}, a version each.")
    # by its place: MLflow looks an id up in the store that is set for the whole process
    arm = tags.get("clipcov.recipe")
    return client.create_model_version(name, logged.artifact_location, run_id, tags=tags, description=arm)


def _delete_models(tracking: Tracking, run_id: str) -> None:
    """Delete what a run has logged before, of a training that was not finished or of older weights."""
    client = tracking.client()
    for model in client.search_logged_models([tracking.experiment_id()], f"source_run_id = '{run_id}'"):
        client.delete_logged_model(model.model_id)
        shutil.rmtree(local_path(model.artifact_location), ignore_errors=True)


def versions_of(tracking: Tracking, run_id: str) -> "list[ModelVersion]":
    """Return the registered versions of a run, the newest first."""
    found = tracking.client().search_model_versions(f"run_id = '{run_id}'")
    mine = [some for some in found if some.name == tracking.config.name]
    return sorted(mine, key=lambda some: int(some.version), reverse=True)


def set_champion(tracking: Tracking, run_id: str) -> str | None:
    """Give a run's version the alias ``champion``, taken from any other; None if it has no version."""
    found = versions_of(tracking, run_id)
    if not found:
        return None
    tracking.client().set_registered_model_alias(tracking.config.name, CHAMPION, found[0].version)
    return found[0].version


def remove_champion(tracking: Tracking) -> None:
    """Take the alias ``champion`` from whatever version has it."""
    client, name = tracking.client(), tracking.config.name
    if client.search_registered_models(f"name = '{name}'"):
        client.delete_registered_model_alias(name, CHAMPION)


def _save(path: Path, checkpoint: Path, run_id: str, model_id: str) -> None:
    """Write the MLflow model's folder."""
    from mlflow import pyfunc
    from mlflow.models import Model

    with TemporaryDirectory() as folder:
        data = Path(folder) / "checkpoint"
        data.mkdir()
        for file in checkpoint.iterdir():
            if file.name not in NOT_SERVED:
                (data / file.name).symlink_to(file.resolve())  # MLflow copies what it points to
        pyfunc.save_model(
            str(path),
            loader_module="clipcov_pipeline.evaluation.classifier",
            data_path=str(data),
            signature=signature(),
            input_example=(
                {IMAGE: ["photo.jpg"]},
                {CLASS_NAMES: ["a cat", "a dog"], TEMPLATES: ["a photo of {}"]},
            ),
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            # MLflow would load the model to find them out
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
        )


def signature() -> "ModelSignature":
    """Return what the model takes and gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, IMAGE)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, IMAGE),
                ColSpec(DataType.string, "class"),
                ColSpec(DataType.double, "probability"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec(CLASS_NAMES, DataType.string, [], shape=(-1,)),
                ParamSpec(TEMPLATES, DataType.string, ["{}"], shape=(-1,)),
            ]
        ),
    )
