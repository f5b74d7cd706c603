"""What the gallery of a checkpoint shows: the neighbours of fixed queries, beside the full-pool model's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clipcov_pipeline.report.gallery import Gallery, Group, Row, Section, Tile


def checkpoint_gallery(
    title: str, own: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]] | None
) -> Gallery:
    """Return what a model finds nearest to fixed queries, beside what the full-pool model finds.

    Args:
        title: the arm's name.
        own, full: as `neighbours.nearest` gives them; ``full`` is None for the full-pool arm itself.
    """
    beside = {query["uid"]: query for query in full or ()}
    sections = []
    for kind, name, text in (
        ("image_to_image", "Image to image", "The held-out images nearest to an image (its own left out)."),
        ("caption_to_image", "Caption to image", "The held-out images nearest to a caption."),
    ):
        rows = tuple(_neighbours(query, beside.get(query["uid"]), kind) for query in own)
        if full is not None:
            text += " Left this model's, right the full-pool model's: does the meaning survive?"
        sections.append(Section(name, text, rows))
    return Gallery(title, tuple(sections))


def _neighbours(query: Mapping[str, Any], full: Mapping[str, Any] | None, kind: str) -> Row:
    groups = [Group("query", (_found_tile(query, ""),)), Group("this model", _found(query, kind))]
    if full is not None:
        groups.append(Group("full pool", _found(full, kind)))
    note = "" if query[kind] else "not defined, because the model gives no embedding of it"
    if kind == "caption_to_image" and query["rank"] is not None:
        note = f"its own image is number {query['rank']:,} of {query['of']:,}"
        if full is not None and full["rank"] is not None:
            note += f", for the full-pool model {full['rank']:,}"
    return Row(query["caption"] if kind == "caption_to_image" else "", tuple(groups), note)


def _found(query: Mapping[str, Any], kind: str) -> tuple[Tile, ...]:
    tiles = []
    for neighbour in query[kind]:
        own = ", its own" if neighbour["uid"] == query["uid"] else ""
        tiles.append(_found_tile(neighbour, f"{neighbour['similarity']:.2f}{own}"))
    return tuple(tiles)


def _found_tile(values: Mapping[str, Any], note: str) -> Tile:
    return Tile(values["uid"], values["shard"], values["key"], values["caption"], note)


def shared_neighbours(
    own: Iterable[Mapping[str, Any]], full: Iterable[Mapping[str, Any]], kind: str
) -> float | None:
    """Return the mean share of a query's neighbours that the full-pool model finds too; None without any."""
    beside = {query["uid"]: {found["uid"] for found in query[kind]} for query in full}
    shares = [
        len(beside[query["uid"]] & {found["uid"] for found in query[kind]}) / len(query[kind])
        for query in own
        if query[kind] and query["uid"] in beside
    ]
    return sum(shares) / len(shares) if shares else None
