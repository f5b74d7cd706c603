"""Draws galleries: as one self-contained HTML page, and as a contact sheet for Dagster.

Captions and keys come from the web: every value goes through Jinja2 with autoescaping on, and no template
marks anything safe but the package's own style sheet.
"""

import io
from base64 import b64encode
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcov_pipeline.report.gallery import Gallery, Tile

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.ImageFont import FreeTypeFont

PAGE, SHEET = "gallery.html", "gallery.webp"

LONGEST = 90  # characters of a caption that are shown; the whole of it is in the tile's title

_CELL, _LABEL, _MARGIN = 76, 150, 6  # pixels of the contact sheet


def write_page(gallery: Gallery, path: Path) -> None:
    """Write a gallery as one HTML file that needs no other and no network."""
    path.write_text(render("gallery.html.j2", title=gallery.title, galleries=[gallery]), encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Fill a template of this package."""
    return environment().get_template(template).render(**values)


@cache
def environment() -> "Environment":
    """Return the Jinja2 environment of this package's templates; everything that is filled in is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("clipcov_pipeline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["clip"] = clip
    made.filters["base64"] = lambda data: b64encode(data).decode()
    return made


def clip(text: str, longest: int = LONGEST) -> str:
    """Return a text on one line, cut where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def write_sheet(gallery: Gallery, path: Path) -> None:
    """Draw a gallery's pictures with short captions on one image, readable on a light and a dark page."""
    from PIL import Image, ImageDraw

    rows = [(section, row) for section in gallery.sections for row in section.rows]
    widest = max((sum(max(len(g.tiles), 1) for g in row.groups) for _, row in rows), default=1)
    width = _LABEL + widest * _CELL + _MARGIN
    height = len(gallery.sections) * 26 + len(rows) * (_CELL + 16) + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for section in gallery.sections:
        draw.text((_MARGIN, top), section.title, "black", _font(14))
        top += 26
        for row in section.rows:
            words = [row.heading, *(group.label for group in row.groups if group.label), row.note]
            _paragraph(draw, (_MARGIN, top), " · ".join(word for word in words if word))
            left = _LABEL
            for group in row.groups:
                for tile in group.tiles:
                    _draw_tile(sheet, draw, (left, top), tile, gallery)
                    left += _CELL
                draw.line([(left - 2, top), (left - 2, top + _CELL + 8)], "#bbb")
            top += _CELL + 16
    sheet.save(path, "WEBP", quality=55)


def _draw_tile(sheet: Any, draw: Any, at: tuple[int, int], tile: Tile, gallery: Gallery) -> None:
    from PIL import Image

    left, top = at
    side = _CELL - _MARGIN
    if tile.image is None:
        draw.rectangle([left, top, left + side, top + side], "#ccc")
        _paragraph(draw, (left + 3, top + 3), tile.problem or "no picture", 12, 5)
    else:
        with Image.open(io.BytesIO(gallery.images[tile.image])) as picture:
            picture.thumbnail((side, side))
            sheet.paste(picture, (left, top))
    draw.text((left, top + side), clip(tile.caption, 13), "black", _font(9))


def _paragraph(draw: Any, at: tuple[int, int], text: str, width: int = 25, lines: int = 6) -> None:
    from textwrap import wrap

    draw.multiline_text(at, "\n".join(wrap(text, width)[:lines]), "black", _font(9), spacing=2)


@cache
def _font(size: int) -> "FreeTypeFont":
    import matplotlib
    from PIL import ImageFont

    # matplotlib's DejaVu Sans knows more of the world's letters than Pillow's own font
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
