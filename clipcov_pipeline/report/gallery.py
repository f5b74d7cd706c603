"""What a contact sheet holds: sections of rows of groups of tiles, with captions and small pictures.

The pictures are kept apart, by content. A stage writes a gallery as ``gallery.json``; its own page and the
report are drawn from that (`drawing`).
"""

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.report.thumbnails import Place, thumbnails

ROW = 12  # tiles in a row over the whole width


@dataclass(frozen=True)
class Tile:
    """One sample: its picture (an id in ``Gallery.images``) or why there is none, and what to say of it."""

    uid: str
    shard: str
    key: str
    caption: str
    note: str = ""
    image: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Group:
    """Tiles that belong together, under a few words."""

    label: str
    tiles: tuple[Tile, ...] = ()


@dataclass(frozen=True)
class Row:
    """Groups side by side; ``note`` stands for what is not defined."""

    heading: str
    groups: tuple[Group, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Rows under a title; ``text`` says what to look for."""

    title: str
    text: str
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Gallery:
    """A page of pictures; ``images`` holds the WebP of each id."""

    title: str
    sections: tuple[Section, ...]
    images: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def tiles(self) -> Iterator[Tile]:
        """All tiles, in the order of the page."""
        return (t for s in self.sections for r in s.rows for g in r.groups for t in g.tiles)

    @property
    def missing(self) -> int:
        """Samples whose picture cannot be had."""
        return len({(tile.shard, tile.key) for tile in self.tiles if tile.problem})


def write_gallery(gallery: Gallery, path: Path) -> None:
    """Write a gallery as JSON."""
    images = {name: b64encode(data).decode() for name, data in gallery.images.items()}
    values = {"title": gallery.title, "sections": [asdict(s) for s in gallery.sections], "images": images}
    path.write_text(json.dumps(values))


def read_gallery(path: Path) -> Gallery:
    """Read what `write_gallery` wrote."""
    values = json.loads(path.read_text())
    sections = tuple(
        Section(s["title"], s["text"], tuple(_row(row) for row in s["rows"])) for s in values["sections"]
    )
    return Gallery(values["title"], sections, {k: b64decode(v) for k, v in values["images"].items()})


def _row(values: Mapping[str, Any]) -> Row:
    groups = (Group(g["label"], tuple(Tile(**tile) for tile in g["tiles"])) for g in values["groups"])
    return Row(values["heading"], tuple(groups), values["note"])


def with_pictures(
    gallery: Gallery,
    shards: Mapping[str, Shard],
    sha256: Mapping[Place, str],
    storage_options: dict | None = None,
) -> Gallery:
    """Return the gallery with the pictures of its samples, read from the original shards.

    Args:
        shards: by name, as they are now.
        sha256: of the samples' images as they were read, where it is known.
    """
    wanted = {(tile.shard, tile.key): sha256.get((tile.shard, tile.key)) for tile in gallery.tiles}
    found = thumbnails(shards, wanted, storage_options)
    images: dict[str, bytes] = {}

    def picture(tile: Tile) -> Tile:
        thumbnail = found[tile.shard, tile.key]
        if thumbnail.webp is None:
            return replace(tile, problem=thumbnail.problem)
        name = hashlib.sha256(thumbnail.webp).hexdigest()[:12]
        images[name] = thumbnail.webp
        return replace(tile, image=name)

    return replace(with_tiles(gallery, picture), images=images)


def with_captions(gallery: Gallery, captions: Mapping[Place, str]) -> Gallery:
    """Return the gallery with the captions of its samples."""
    return with_tiles(gallery, lambda tile: replace(tile, caption=captions.get((tile.shard, tile.key), "")))


def with_tiles(gallery: Gallery, change: Callable[[Tile], Tile]) -> Gallery:
    """Return the gallery with every tile changed."""

    def in_row(row: Row) -> Row:
        groups = tuple(replace(group, tiles=tuple(map(change, group.tiles))) for group in row.groups)
        return replace(row, groups=groups)

    sections = (replace(section, rows=tuple(map(in_row, section.rows))) for section in gallery.sections)
    return replace(gallery, sections=tuple(sections))
