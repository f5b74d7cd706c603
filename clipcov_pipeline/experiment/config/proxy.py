"""The sections `proxy` and `embed`."""

from typing import Annotated, Any, Self

from pydantic import model_validator

from clipcov_pipeline.experiment.config.base import KNOB, Architecture, Count, Device, PositiveInt, Section
from clipcov_pipeline.experiment.config.training import Training


class Proxy(Section):
    """The model whose embeddings selection works on."""

    model: Architecture
    pretrained: str | None = None
    """An open_clip tag or a local checkpoint; ``null`` trains ``model`` on the pool by ``train``."""
    early: str | None = None
    """Of ``pretrained``, an earlier tag or checkpoint, for ``c_rho``; a proxy trained here keeps its own."""
    train: Training | None = None
    seed: Count = 0
    retrain_with_pool: bool = False
    """False: a proxy trained once stays when shards come and go, so that embeddings stay comparable."""

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.pretrained is None and self.train is None:
            raise ValueError(
                "found neither pretrained nor train, expected one: a checkpoint or how to train one"
            )
        if self.pretrained is not None and self.train is not None:
            raise ValueError("found both pretrained and train, expected one: remove the other")
        if self.early is not None and self.train is not None:
            raise ValueError(
                ".early: has no effect with train, whose first checkpoint is the early proxy: remove it"
            )
        return self

    def semantic(self) -> dict[str, Any]:
        """Leave ``early`` out where none is named: it came later than the first experiments."""
        return {key: value for key, value in super().semantic().items() if key != "early" or value}


class Embed(Section):
    """How samples are embedded; the precision of storage is always fp16."""

    batch_size: Annotated[PositiveInt, KNOB] = 256
    device: Annotated[Device, KNOB] = "auto"
    workers: Annotated[Count, KNOB] = 2
