"""Tables and plots as Dagster shows them on an asset's page."""

from base64 import b64encode
from pathlib import Path

import dagster as dg


def image(png: Path) -> dg.MarkdownMetadataValue:
    """Return a PNG within the metadata itself, so that the page needs no file server."""
    data = b64encode(png.read_bytes()).decode()
    return dg.MetadataValue.md(f"![{png.stem}](data:image/png;base64,{data})")
