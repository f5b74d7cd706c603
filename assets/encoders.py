"""The proxy's encoder for the assets that embed: loaded once a process."""

from functools import lru_cache

from clipcov_pipeline.embed import Encoder, ModelSpec, load_encoder
from clipcov_pipeline.plan import checkpoint_path
from clipcov_pipeline.project import Task
from clipcov_pipeline.train import CHECKPOINT


def proxy_encoder(task: Task) -> Encoder:
    """Return the encoder of the proxy model that the plan names."""
    proxy, settings = task.config.proxy, task.config.embed
    pretrained = checkpoint_path(task.config, proxy.pretrained)
    if pretrained is None:
        pretrained = str(task.path("proxy_model", file=CHECKPOINT))
    return _load(proxy.model, pretrained, settings.device, settings.batch_size, settings.workers)


@lru_cache(maxsize=1)
def _load(model: str, pretrained: str, device: str, batch_size: int, workers: int) -> Encoder:
    return load_encoder(
        ModelSpec(model, pretrained), device=device, batch_size=batch_size, workers=workers or None
    )
