"""The proxy's encoder for the assets that embed: loaded once a process."""

from functools import lru_cache

from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.world import checkpoint_path
from clipcov_pipeline.proxy.encoder import Encoder, load_encoder
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.training.spec import CHECKPOINT, EARLY_CHECKPOINT


def proxy_encoder(task: Task) -> Encoder:
    """Return the encoder of the proxy model that the plan names."""
    return _encoder(task, task.config.proxy.pretrained, "weights", CHECKPOINT)


def early_encoder(task: Task) -> Encoder:
    """Return the encoder of the early proxy: that of the YAML, or the trained proxy after its first part."""
    return _encoder(task, task.config.proxy.early, "early", EARLY_CHECKPOINT)


def _encoder(task: Task, named: str | None, output: str, file: str) -> Encoder:
    pretrained = checkpoint_path(task.config, named) or str(task.path("proxy_model", file=file))
    digest, settings = task.record("proxy_model").digests[output], task.config.embed
    model = task.config.proxy.model
    return _load(model, pretrained, digest, settings.device, settings.batch_size, settings.workers)


@lru_cache(maxsize=1)
def _load(model: str, pretrained: str, _digest: str, device: str, batch_size: int, workers: int) -> Encoder:
    return load_encoder(
        ModelSpec(model, pretrained), device=device, batch_size=batch_size, workers=workers or None
    )
