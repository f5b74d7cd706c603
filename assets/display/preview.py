"""Tables and plots as Dagster shows them on an asset's page."""

from base64 import b64encode
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

COLUMN_SCHEMA, ROW_COUNT = "dagster/column_schema", "dagster/row_count"

DESCRIPTIONS = {
    "uid": "global id of the sample, 32 hex digits",
    "source_id": "the id that the sample's json has, where that is no UUID",
    "json_problem": "why the sample's json is of no use; the pair is still good",
    "key": "the sample's key within its shard (WebDataset `__key__`)",
    "shard": "name of the shard that holds the sample",
    "image_sha256": "sha256 of the image's bytes",
    "image_embedding": "unit norm",
    "text_embedding": "unit norm",
    "latent_class": "number of the sample's latent class",
    "label_similarity": "similarity of the sample and its class",
    "margin": "by how much the class is ahead of the next best",
    "rank": "place in the method's order, from 1",
    "gain": "what the sample adds to the method's objective when it is taken",
    "mean": "mean over the seeds, a share between 0 and 1",
    "std": "standard deviation over the seeds",
    "value": "the value; of a score a share between 0 and 1",
    "chance": "what a model that knows nothing scores",
    "protocol": "what is the same for every arm: the samples seen, or the epochs",
    "random_difference": "mean difference to the random subset of the same fraction, paired by seed",
    "random_low": "lower end of its 95 % bootstrap interval over the seeds",
    "random_high": "upper end of its 95 % bootstrap interval over the seeds",
    "random_pairs": "seeds that both have",
    "full_difference": "mean difference to the full pool, paired by seed",
    "full_low": "lower end of its 95 % bootstrap interval over the seeds",
    "full_high": "upper end of its 95 % bootstrap interval over the seeds",
    "full_pairs": "seeds that both have",
    "scope": "overall, class (one latent class) or ranking (the first so many samples)",
    "quantity": "what is measured of the subset",
    "samples": "the first so many samples of the ranking",
    "pool": "the same of the whole pool",
    "random_mean": "the same of random subsets of the same size",
    "random_std": "standard deviation over the random subsets",
    "note": "what is good, or why there is no value",
    "best_baseline": "for ClipCov: the best other method at the same fraction",
    "baseline_ratio": "mean over the mean of that method",
}


def image(path: Path) -> dg.MarkdownMetadataValue:
    """Return a PNG or WebP within the metadata itself, so that the page needs no file server."""
    data, kind = b64encode(path.read_bytes()).decode(), path.suffix.removeprefix(".")
    return dg.MetadataValue.md(f"![{path.stem}](data:image/{kind};base64,{data})")


def columns(types: Iterable[tuple[str, Any]]) -> dg.TableSchema:
    """Return a table's columns, given as (name, type), as Dagster lists them."""
    return dg.TableSchema([dg.TableColumn(name, str(kind), DESCRIPTIONS.get(name)) for name, kind in types])


def table_metadata(
    table: pl.DataFrame | pl.LazyFrame, name: str = "first_rows", rows: int = 5
) -> dict[str, Any]:
    """Return the columns, the number of rows, and under ``name`` the first rows.

    A lazy frame is not read as a whole.
    """
    lazy = table.lazy()
    return {
        COLUMN_SCHEMA: columns(lazy.collect_schema().items()),
        ROW_COUNT: lazy.select(pl.len()).collect().item(),
        name: dg.MetadataValue.md(markdown(lazy.head(rows).collect())),
    }


def cell(text: str) -> str:
    """Return a text as it may stand in a cell of a Markdown table."""
    return text.replace("|", "/")


def markdown(frame: pl.DataFrame, width: int = 32) -> str:
    """Return every row as a Markdown table; texts are cut to ``width`` characters."""
    text = pl.col(pl.String).str.replace_all(r"[\s|]+", " ")  # a table's row is one line of cells between |
    text = text.str.replace_all(r"([\\`*_\[\]<>!~])", r"\${1}")  # a caption is text, no Markdown
    with pl.Config(
        tbl_formatting="MARKDOWN",
        tbl_hide_column_data_types=True,
        tbl_hide_dataframe_shape=True,
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=-1,
        fmt_str_lengths=width,
        float_precision=4,
    ):
        return str(frame.with_columns(text))
