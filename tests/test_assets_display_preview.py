"""What Dagster shows of an asset's data."""

from pathlib import Path

import dagster as dg
import polars as pl
from PIL import Image

from assets.display.preview import COLUMN_SCHEMA, ROW_COUNT, columns, image, markdown, table_metadata


def test_table_metadata_of_a_file_counts_all_rows_and_shows_the_first(tmp_path: Path) -> None:
    frame = pl.DataFrame({"uid": [f"{i:032x}" for i in range(100)], "gain": [i / 3 for i in range(100)]})
    frame.write_parquet(tmp_path / "table.parquet")
    found = table_metadata(pl.scan_parquet(tmp_path / "table.parquet"), rows=2)
    assert found == table_metadata(frame, rows=2)
    assert found[ROW_COUNT] == 100
    assert [(c.name, c.type) for c in found[COLUMN_SCHEMA].columns] == [
        ("uid", "String"),
        ("gain", "Float64"),
    ]
    lines = found["first_rows"].md_str.splitlines()
    assert len(lines) == 4  # heading, rule, two rows
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [f"{1:032x}", "0.3333"]


def test_a_caption_cannot_break_the_table() -> None:
    text = markdown(pl.DataFrame({"caption": ["a | b\n\n| c |", None], "n": [1, 2]}))
    rows = text.splitlines()[2:]
    assert len(rows) == 2
    assert {row.count("|") for row in rows} == {3}


def test_a_caption_is_no_markdown() -> None:
    """Dagster's pages would fetch an image that a caption names."""
    frame = pl.DataFrame({"caption": ["![](https://a.co/p.png)", "<b> *a* _b_ `c`", "back\\slash"]})
    rows = [line.strip("| ") for line in markdown(frame).splitlines()[2:]]
    assert rows == [r"\!\[\](https://a.co/p.png)", r"\<b\> \*a\* \_b\_ \`c\`", r"back\\slash"]


def test_metadata_is_what_dagster_takes() -> None:
    metadata = {COLUMN_SCHEMA: columns([("uid", pl.String)]), **table_metadata(pl.DataFrame({"a": [1]}))}
    dg.AssetMaterialization("table", metadata=metadata)


def test_a_plot_travels_within_the_metadata(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "plot.png")
    assert image(tmp_path / "plot.png").md_str.startswith("![plot](data:image/png;base64,iVBOR")


def test_columns_of_the_embeddings_are_those_of_the_table() -> None:
    from assets.embeddings import TYPES
    from clipcov_pipeline.proxy.vectors import table_schema

    assert list(TYPES) == table_schema(4).names
