"""The same pairs as tars, as parquet files in both layouts, and as a folder of images with metadata."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from make_shards import write_tar

Pair = tuple[str, bytes, str, str]  # key, image (png), caption, uid

HF_FEATURES = {
    "image": {"_type": "Image"},
    "sound": {"_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "uid": {"dtype": "string", "_type": "Value"},
}


def write_hf(path: Path, pairs: Sequence[Pair]) -> Path:
    """As `datasets` writes it: structs, and its own metadata in the schema; sound has the image's struct."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": image, "path": f"{key}.png"} for key, image, _, _ in pairs], struct),
            "sound": pa.array([{"bytes": b"RIFF", "path": None} for _ in pairs], struct),
            "text": [caption for _, _, caption, _ in pairs],
            "uid": [uid for *_, uid in pairs],
        }
    )
    return write_table(path, table, {"huggingface": json.dumps({"info": {"features": HF_FEATURES}})})


def write_img2dataset(path: Path, pairs: Sequence[Pair], **more: list[Any]) -> Path:
    """As img2dataset 1.47's `ParquetSampleWriter` does: the input's columns, its own, then the image's."""
    columns: dict[str, Any] = {
        "caption": [caption for _, _, caption, _ in pairs],
        "url": [f"https://example.org/{key}.png" for key, *_ in pairs],
        "uid": pa.array([uid for *_, uid in pairs], pa.string()),
        "key": [key for key, *_ in pairs],
        "status": ["success" for _ in pairs],
        "error_message": pa.nulls(len(pairs), pa.string()),
        "width": pa.array([24 for _ in pairs], pa.int32()),
        "exif": ["{}" for _ in pairs],
        "png": pa.array([image for _, image, _, _ in pairs], pa.binary()),
    }
    return write_table(path, pa.table(columns | more))


def write_table(path: Path, table: pa.Table, metadata: dict[str, str] | None = None, rows: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def write_folder(folder: Path, pairs: Sequence[Pair], kind: str = "csv") -> Path:
    """Images, and `metadata.csv` or `metadata.jsonl`; return the metadata file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": f"{key}.png", "text": caption, "uid": uid} for key, _, caption, uid in pairs]
    for key, image, *_ in pairs:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}.png"
        if not path.exists() or path.read_bytes() != image:
            path.write_bytes(image)
    table = folder / f"metadata.{kind}"
    with table.open("w", newline="", encoding="utf-8") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["file_name", "text", "uid"])
            writer.writeheader()
            writer.writerows(rows)
    return table


def write_tars(path: Path, pairs: Sequence[Pair]) -> Path:
    members = [
        member
        for key, image, caption, uid in pairs
        for member in (
            (f"{key}.png", image),
            (f"{key}.txt", caption.encode()),
            (f"{key}.json", json.dumps({"uid": uid}).encode()),
        )
    ]
    return write_tar(path, members)
