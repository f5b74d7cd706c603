"""The section `shards`."""

from typing import Annotated, Any, get_args

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema

from clipcov_pipeline.experiment.config.base import KNOB, NonNegativeFloat, PositiveInt, Section
from clipcov_pipeline.pool.captions import TXT, CaptionRule, Choice
from clipcov_pipeline.pool.pixels import MAX_PIXELS, HighBitDepth, ImageRules

_SOURCE = {"type": "string", "pattern": "^(txt|json:.+)$"}
_SOURCES = {"type": "array", "items": _SOURCE, "minItems": 1, "uniqueItems": True}
_RULE = {
    "type": "object",
    "properties": {
        "from": {"anyOf": [_SOURCE, _SOURCES]},
        "rule": {"enum": list(get_args(Choice)), "default": "first"},
    },
    "required": ["from"],
    "additionalProperties": False,
}
Caption = Annotated[
    CaptionRule,
    PlainValidator(CaptionRule.of),
    PlainSerializer(lambda rule: rule.written),
    WithJsonSchema({"anyOf": [_SOURCE, _SOURCES, _RULE]}),
]


class Shards(Section):
    """Where the pool's pairs are (WebDataset tars, parquet, a folder of images) and which are usable."""

    source: str = "sample"
    """``sample`` (shipped in the package), a local folder, a brace pattern, or an fsspec URL of these: of
    tars, of parquet files with image bytes (also ``pool/*.parquet``), of images with ``metadata.csv`` or
    ``metadata.jsonl``."""
    storage_options: Annotated[dict[str, Any], KNOB] = Field(default_factory=dict)
    image_column: str | None = None
    """Of parquet: the column with the images' bytes; of metadata: with their file names. By default found."""
    caption_column: str | None = None
    """The column with the captions, of parquet and metadata; by default ``caption``, ``text`` or ``txt``."""
    max_image_pixels: PositiveInt = MAX_PIXELS  # Pillow's own bound against decompression bombs
    """Width x height of a usable image at most. Pillow's own bound does not count beside it."""
    max_resized_pixels: PositiveInt = MAX_PIXELS
    """The same once the short side is 512, as the largest of open_clip's models resize: bounds thin ones."""
    high_bit_depth: HighBitDepth = "refuse"
    """16-bit, 32-bit and float grey: kept aside, or each image's own range mapped to 0..255 (``scale``)."""
    caption: Caption = Field(default=TXT, json_schema_extra={"default": TXT.written})
    """``txt``, ``json:KEY`` (a text or a list of texts), or ``{from: [txt, json:KEY], rule: first}``.

    Rules: ``first`` (there and not blank; that of a mere list), ``join``, ``random`` (a training draws one in
    each pass, all others take the first).
    """
    settle_seconds: Annotated[NonNegativeFloat, KNOB] = 0.0
    """A local shard that was written to within this time is left for the next scan."""
    expected_samples: Annotated[PositiveInt | None, KNOB] = None
    """Size of a pool that is not here yet: only ``clipcov check`` reads it, and counts where it can."""

    def semantic(self) -> dict[str, Any]:
        """As `Section.semantic`; of the rule for captions only one that is not the default."""
        values = super().semantic()
        caption = values.pop("caption")
        return values if caption == TXT else {**values, "caption": caption.written}

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are named."""
        named = {"image_column": self.image_column, "caption_column": self.caption_column}
        return {key: name for key, name in named.items() if name is not None}

    @property
    def image_rules(self) -> ImageRules:
        """Which images are usable."""
        return ImageRules(self.max_image_pixels, self.max_resized_pixels, self.high_bit_depth)
