"""The section `train`, and what it shares with `proxy.train`."""

from typing import Annotated, Any, Literal, Self

from pydantic import field_validator, model_validator

from clipcov_pipeline.experiment.config.base import (
    KNOB,
    Architecture,
    Count,
    Device,
    Momentum,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    check_each_once,
)
from clipcov_pipeline.training.spec import Precision, Scheduler

# how the length of the arms' trainings is made comparable
Protocol = Literal["samples_seen", "epochs"]


MOST_HUE = 0.5


class AugCfg(Section):
    """How training images are varied, open_clip's ``--aug-cfg``; what is left out has open_clip's default."""

    scale: tuple[Share, Share] | None = None
    """Least and largest area of the random crop, as a share of the image; open_clip crops 0.9 to 1."""
    ratio: tuple[PositiveFloat, PositiveFloat] | None = None
    """Refused: open_clip reads it with timm's transforms only, which ``--aug-cfg`` here does not ask for."""
    color_jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] | None = None
    """Brightness, contrast, saturation and hue."""
    color_jitter_prob: Share | None = None
    gray_scale_prob: Share | None = None

    def semantic(self) -> dict[str, Any]:
        """Leave out what is not given."""
        return {key: value for key, value in super().semantic().items() if value is not None}

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.ratio is not None:
            raise ValueError(
                f".ratio: found {list(self.ratio)}, expected no such key: open_clip ignores it and crops with"
                " ratios of 3/4 to 4/3; leave it out"
            )
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(f"found scale {list(self.scale)}, expected the smaller number first")
        if (self.color_jitter is None) != (self.color_jitter_prob is None):
            raise ValueError("found one of color_jitter and color_jitter_prob, expected both or neither")
        if self.color_jitter is not None and self.color_jitter[3] > MOST_HUE:
            raise ValueError(
                f".color_jitter: found the hue {self.color_jitter[3]:g}, expected at most {MOST_HUE}, half"
                " the colour circle: torchvision takes no more"
            )
        return self


class Training(Section):
    """One open_clip_train run, in open_clip's own terms."""

    samples_seen: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 1e-3
    wd: NonNegativeFloat = 0.2
    beta1: Momentum = 0.9
    beta2: Momentum = 0.98
    eps: PositiveFloat = 1e-6
    warmup: Count = 50
    lr_scheduler: Scheduler = "cosine"
    precision: Precision = "fp32"
    num_checkpoints: PositiveInt = 4
    """Virtual epochs that samples_seen is cut into; a killed run goes on from the last one. With epochs alone
    there is a checkpoint after each, and no such key."""
    aug_cfg: AugCfg | None = None
    workers: Annotated[Count, KNOB] = 1
    device: Annotated[Device, KNOB] = "auto"
    gpus: Annotated[PositiveInt, KNOB] = 1
    """For each training, by torchrun; they share the batch, and BatchNorm is over all their shares."""
    accum_freq: PositiveInt = 1
    """Parts, one after another, that a GPU cuts its share of the batch into, to need less memory. The loss is
    still over the whole batch, and a model without BatchNorm learns the same; BatchNorm is over a part, so
    that this is no knob."""
    grad_checkpointing: Annotated[bool, KNOB] = False
    """Compute activations again instead of keeping them, in transformers: slower, and needs less memory."""

    def semantic(self) -> dict[str, Any]:
        """Leave out what came later than the first experiments, where it is not given."""
        not_given: dict[str, tuple[Any, ...]] = {"aug_cfg": (None, {}), "accum_freq": (1,)}
        values = super().semantic()
        return {key: value for key, value in values.items() if value not in not_given.get(key, ())}

    @property
    def parts(self) -> int:
        """Parts after each of which there is a checkpoint: epochs, or what samples_seen is cut into."""
        if self.epochs is not None:
            return self.epochs
        assert self.samples_seen is not None
        return min(self.num_checkpoints, -(-self.samples_seen // self.batch_size))

    @model_validator(mode="after")
    def _equal_parts(self) -> Self:
        parts = self.gpus * self.accum_freq
        if self.batch_size % parts:
            raise ValueError(
                f".batch_size: found {self.batch_size} with gpus={self.gpus} and"
                f" accum_freq={self.accum_freq}, expected a multiple of {parts}: the parts must be equal"
            )
        return self

    @model_validator(mode="after")
    def _cuts_something(self) -> Self:
        if self.samples_seen is None and "num_checkpoints" in self.model_fields_set:
            raise ValueError(
                f".num_checkpoints: found {self.num_checkpoints} with epochs, expected no such key: it cuts"
                " samples_seen, and there is a checkpoint after every epoch; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.samples_seen is None) == (self.epochs is None):
            raise ValueError(
                f"found samples_seen={self.samples_seen} and epochs={self.epochs}, expected exactly one"
            )
        return self


class Train(Training):
    """How every arm is trained: the same model, schedule and length; only the subset and the seed differ.

    With both ``samples_seen`` and ``epochs`` every arm is trained twice, once to each length.
    """

    model: Architecture
    pretrained: str | None = None
    seeds: tuple[Count, ...] = (0,)

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The lengths that are given: samples_seen (DataComp's protocol), epochs (the paper's), or both."""
        given: tuple[tuple[Protocol, int | None], ...] = (
            ("samples_seen", self.samples_seen),
            ("epochs", self.epochs),
        )
        return tuple(name for name, value in given if value is not None)

    def under(self, protocol: Protocol) -> Self:
        """Return the settings of the arms under one protocol: the other length is left out."""
        return self.model_copy(update={name: None for name in self.protocols if name != protocol})

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if not self.protocols:
            raise ValueError("found neither samples_seen nor epochs, expected one of them, or both")
        return self

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        check_each_once(value, "at least one seed")
        return value
