"""Looks samples up by a text or an image: nearest neighbours in the LanceDB table that selection has read.

The table and its version are those of the pseudo-labels that stand now, and the query is embedded by the
proxy that made the table: never "the latest" of either.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.index import Index
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import WHOLE, Record
from clipcov_pipeline.experiment.store import require
from clipcov_pipeline.experiment.world import latent_class_names
from clipcov_pipeline.pool.pixels import RULES, ImageRules, UnusableImageError, usable_rgb
from clipcov_pipeline.proxy.encoder import Encoder, load_encoder
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.proxy.prompts import name_of
from clipcov_pipeline.proxy.vectors import label_tag
from clipcov_pipeline.report.gallery import Gallery, Group, Row, Section, Tile, with_pictures
from clipcov_pipeline.training.spec import CHECKPOINT

if TYPE_CHECKING:
    from lancedb.table import Table

By = Literal["image", "caption"]

COLUMNS: Mapping[By, str] = {"image": "image_embedding", "caption": "text_embedding"}

FIELDS = ("uid", "shard", "key", "caption", "image_sha256")

INDEX_ROWS = 100_000  # above this many rows an index is made, and used

PROBES, REFINE = 30, 10  # partitions that are looked into; candidates, per result, that are compared exactly


@dataclass(frozen=True)
class Hit:
    """One sample found.

    score: cosine between query and embedding. latent_class: None for a sample that is not in the pool;
    ``subsets`` then is empty, and ``note`` says why.
    """

    score: float
    uid: str
    shard: str
    key: str
    caption: str
    image_sha256: str
    latent_class: int | None
    class_name: str | None
    subsets: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Found:
    """What a search gave.

    hits: best first. indexed: whether an index was used, so that a hit may be missing. rows: of the table.
    """

    hits: tuple[Hit, ...]
    indexed: bool
    rows: int


@dataclass(frozen=True)
class Searcher:
    """The pool as selection has read it."""

    project: Project
    labels: Record

    @classmethod
    def open(cls, project: Project) -> "Searcher":
        """Find the labels that stand now.

        Raises:
            InputError: there are none yet.
        """
        return cls(project, require(project.store.current("pseudo_labels", WHOLE), "pseudo_labels"))

    def table(self) -> "Table":
        """Open the embeddings at the version that the labels were made from."""
        return self.project.vectors.open(self.labels.stats["table"], self.labels.stats["version"])

    def encoder(self) -> Encoder:
        """Load the proxy that made the table.

        Raises:
            InputError: it is no longer in the store.
        """
        name, settings = "proxy_model#weights", self.project.config.embed
        proxy = Index(list(self.project.store.records())).source(name, self.labels.inputs[name])
        if proxy is None:
            raise InputError("search: the proxy that made the embeddings is gone from the store: run again")
        pretrained = proxy.stats["pretrained"]
        if pretrained == CHECKPOINT:
            pretrained = str(self.project.store.checked(proxy, CHECKPOINT))
        return load_encoder(
            ModelSpec(proxy.stats["model"], pretrained),
            device=settings.device,
            batch_size=settings.batch_size,
        )

    def subsets(self) -> dict[str, Path]:
        """Return the ``subset.parquet`` of every subset that was cut from these labels, by its name."""
        store, found = self.project.store, {}
        for step in self.project.plan().of("subsets"):
            record = store.current("subsets", step.node.partition)
            if record is not None and record.inputs["pseudo_labels#pool"] == self.labels.digests["pool"]:
                found[step.node.partition] = store.checked(record, "subset.parquet")
        return found


def chosen(path: Path) -> pl.Series:
    """Return the uids of a subset by its file."""
    return pl.read_parquet(path, columns=["uid"])["uid"]


def subsets_of(uids: Sequence[str] | pl.Series, subsets: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return the names of the subsets that each uid is chosen in; a uid that none has is not a key.

    Of every file only what is asked for is kept: together they have many times the pool's uids.
    """
    asked = pl.LazyFrame({"uid": uids}, schema={"uid": pl.String})
    found: dict[str, list[str]] = {}
    for name, path in subsets.items():
        rows = pl.scan_parquet(path).select("uid").join(asked, on="uid", how="semi")
        for uid in rows.collect(engine="streaming")["uid"]:
            found.setdefault(uid, []).append(name)
    return found


def text_query(encoder: Encoder, text: str) -> np.ndarray:
    """Embed a text: float32 [d], unit norm.

    Raises:
        InputError: nothing but white space, or the model gives no embedding.
    """
    if not text.strip():
        raise InputError('search: found an empty text, expected some words: clipcov search "a red bird"')
    return _checked(encoder.encode_texts([text])[0], f"the text {text!r}")


def image_query(encoder: Encoder, path: Path, rules: ImageRules = RULES) -> np.ndarray:
    """Embed an image file: float32 [d], unit norm.

    Raises:
        InputError: no such file, no image that the rules take, or the model gives no embedding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--image: {path} cannot be read ({error.strerror}), expected an image file"
        ) from error
    try:
        image = usable_rgb(data, rules)
    except UnusableImageError as error:
        raise InputError(f"--image: {path} is not usable ({error.status}: {error})") from error
    return _checked(encoder.encode_images([image])[0], f"the image {path}")


def _checked(embedding: np.ndarray, what: str) -> np.ndarray:
    if np.isnan(embedding).any():
        raise InputError(f"search: the proxy gives no embedding of {what}, expected a readable one")
    return embedding


def search(
    searcher: Searcher,
    query: np.ndarray,
    *,
    by: By = "image",
    count: int = 10,
    inside: Sequence[str] = (),
    outside: Sequence[str] = (),
    index: bool | None = None,
    report: Callable[[str], object] | None = None,
) -> Found:
    """Return the samples nearest to a query.

    Args:
        query: float32 [d], unit norm.
        by: which embedding of the samples is compared with it.
        inside, outside: names of subsets that every hit is, or is not, chosen in.
        index: make and use a vector index; None means where the table is large (``INDEX_ROWS``).
        report: is told before an index is made, which takes minutes where there are millions of rows.

    Raises:
        InputError: an unknown subset.
    """
    subsets = searcher.subsets()
    for name in (*inside, *outside):
        if name not in subsets:
            known = ", ".join(sorted(subsets)) or "none is built"
            raise InputError(f"search: found the subset {name!r}, expected one of: {known}")
    table = searcher.table()
    rows = table.count_rows()
    wanted = rows > INDEX_ROWS if index is None else index
    if wanted and rows >= 256:  # fewer cannot be partitioned
        searcher = make_index(searcher, by, report)
        table = searcher.table()
    indexed = wanted and has_index(table, by)

    within, without = ([set(chosen(subsets[name])) for name in names] for names in (inside, outside))

    def suits(row: Mapping[str, Any]) -> bool:
        uid = row["uid"]
        return all(uid in some for some in within) and not any(uid in some for some in without)

    found = _nearest(table, query, by, count, indexed, rows, suits if inside or outside else None)
    return Found(tuple(_hits(searcher, found, subsets)), indexed, rows)


def _nearest(
    table: "Table", query: np.ndarray, by: By, count: int, indexed: bool, rows: int, suits: Any
) -> list[dict[str, Any]]:
    """Ask for more until enough of what comes suits; a uid list as a filter would not scale."""
    limit = min(rows, count if suits is None else 8 * count)
    while True:
        asked: Any = table.search(query, vector_column_name=COLUMNS[by])
        asked = asked.distance_type("cosine").limit(limit)
        asked = asked.nprobes(PROBES).refine_factor(REFINE) if indexed else asked.bypass_vector_index()
        found = asked.select([*FIELDS, "_distance"]).to_arrow().to_pylist()
        kept = [row for row in found if suits is None or suits(row)]
        if len(kept) >= count or (limit >= rows and not indexed):
            return kept[:count]
        if indexed and len(found) < limit:  # the partitions looked into hold no more
            indexed = False
        limit = min(rows, 4 * limit)
        indexed = indexed and limit < rows


def _hits(searcher: Searcher, found: Sequence[Mapping[str, Any]], subsets: Mapping[str, Path]) -> list[Hit]:
    labels = searcher.project.store.checked(searcher.labels)
    places = pl.DataFrame(
        {"shard": [row["shard"] for row in found], "uid": [row["uid"] for row in found]},
        schema={"shard": pl.String, "uid": pl.String},
    )
    on = ["shard", "uid"]
    columns = [*on, "latent_class"]
    in_pool = pl.read_parquet(labels / "labels.parquet", columns=columns).join(places, on=on, how="semi")
    classes = {(shard, uid): number for shard, uid, number in in_pool.select(columns).iter_rows()}
    held_out = set(
        pl.read_parquet(labels / "holdout.parquet", columns=on).join(places, on=on, how="semi").iter_rows()
    )
    names = latent_class_names(searcher.project.config) if classes else None
    tags = subsets_of([uid for _, uid in classes], subsets)
    hits = []
    for row in found:
        place = row["shard"], row["uid"]
        number = classes.get(place)
        why = "held out" if place in held_out else "an earlier sample has the same uid"
        hits.append(
            Hit(
                score=round(1 - row["_distance"], 4),
                **{name: row[name] for name in FIELDS},
                latent_class=number,
                class_name=None if number is None else name_of(names, number),
                subsets=tuple(tags.get(row["uid"], ())) if number is not None else (),
                note="" if number is not None else why,
            )
        )
    return hits


def has_index(table: "Table", by: By) -> bool:
    """Return whether the table, at its version, has a vector index of these embeddings."""
    return any(index.columns == [COLUMNS[by]] for index in table.list_indices())


def make_index(searcher: Searcher, by: By, report: Callable[[str], object] | None = None) -> Searcher:
    """Make a vector index, if there is none, and let the labels name the version that has it.

    An index is a new version of the same rows. Where newer rows have been written, there is no version that
    has both, and nothing is done: `has_index` then says no.
    """
    from lancedb.index import IvfSq

    vectors, labels = searcher.project.vectors, searcher.labels
    name, version = labels.stats["table"], labels.stats["version"]
    table = vectors.open(name)
    if has_index(searcher.table(), by) or table.version != version:
        return searcher
    if report is not None:
        report(f"making an index of {table.count_rows():,} {by} embeddings, once: later searches use it")
    table.create_index(
        COLUMNS[by], config=IvfSq(distance_type="cosine"), wait_timeout=timedelta(hours=1), replace=True
    )
    if table.version != version + 1:  # something else was written meanwhile
        return searcher
    searcher.project.store.move_pin(labels, table.version)
    vectors.pin(name, table.version, label_tag(labels.fingerprint))
    moved = replace(labels, stats={**labels.stats, "version": table.version})
    return replace(searcher, labels=moved)


def as_json(found: Found) -> dict[str, Any]:
    """Return everything as JSON-able values."""
    return {"rows": found.rows, "indexed": found.indexed, "hits": [asdict(hit) for hit in found.hits]}


def as_text(found: Found) -> str:
    """Return a few lines a hit; control characters of captions are not sent to the terminal."""
    if not found.hits:
        return "Nothing found."
    lines = []
    for hit in found.hits:
        lines.append(f"{hit.score:.3f}  {_printable(hit.caption)[:100]}")
        lines.append(f"       {hit.uid}  {_printable(f'{hit.shard}/{hit.key}')}  {describe(hit)}")
    how = "by index, a hit may be missing" if found.indexed else "every row compared"
    return "\n".join([*lines, f"{len(found.hits)} of {found.rows:,} rows, {how}"])


def describe(hit: Hit) -> str:
    """Say which class a hit has and where it is chosen."""
    if hit.note:
        return f"not in the pool: {hit.note}"
    name = f" ({_printable(hit.class_name)})" if hit.class_name else ""
    return f"class {hit.latent_class}{name}; in {', '.join(hit.subsets) or 'no subset'}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def hits_gallery(project: Project, title: str, found: Found) -> Gallery:
    """Return the hits as a gallery with pictures."""
    tiles = tuple(
        Tile(hit.uid, hit.shard, hit.key, hit.caption, f"{hit.score:.3f}; {describe(hit)}")
        for hit in found.hits
    )
    row = Row("", (Group("", tiles),), "" if tiles else "nothing found")
    text = "Best first: cosine, latent class and the subsets that it is chosen in."
    sha256 = {(hit.shard, hit.key): hit.image_sha256 for hit in found.hits}
    options = dict(project.config.shards.storage_options)
    return with_pictures(Gallery(title, (Section("Found", text, (row,)),)), project.tars, sha256, options)
