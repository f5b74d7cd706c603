"""The section `shards`."""

from typing import Annotated, Any

from pydantic import Field

from clipcov_pipeline.experiment.config.base import KNOB, NonNegativeFloat, PositiveInt, Section


class Shards(Section):
    """Where the pool's WebDataset shards are (img2dataset layout) and which images are too large."""

    source: str = "sample"
    """``sample`` (shipped in the package), a local folder, a brace pattern, or an fsspec URL of these."""
    storage_options: Annotated[dict[str, Any], KNOB] = Field(default_factory=dict)
    max_image_pixels: PositiveInt = 89_478_485  # Pillow's own bound against decompression bombs
    settle_seconds: Annotated[NonNegativeFloat, KNOB] = 0.0
    """A local shard that was written to within this time is left for the next scan."""
    expected_samples: Annotated[PositiveInt | None, KNOB] = None
    """Size of a pool that is not here yet: only ``clipcov check`` reads it, and counts where it can."""
