"""Makes a training index of tars by tarfile's own reading, for tests."""

import hashlib
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from clipcov_pipeline.training.training_index import short_hash, write_training_index


def columns_of(tars: Iterable[Path | str], version: Mapping[str, str] | None = None, url: str = "{}") -> dict:
    """Columns of an index of all samples of these tars; url: what the tar's path is formatted into."""
    rows = []
    for tar in map(Path, tars):
        stat = tar.stat()
        token = (version or {}).get(tar.name, f"{stat.st_size}-{stat.st_mtime_ns}")
        with tarfile.open(tar) as file:
            members = {member.name: member for member in file}
            for name in sorted(member for member in members if member.endswith(".txt")):
                key = name.removesuffix(".txt")
                ext = next(ext for ext in ("webp", "png", "jpg") if f"{key}.{ext}" in members)
                image, caption = members[f"{key}.{ext}"], members[name]
                rows.append(
                    {
                        "uid": hashlib.sha256(f"{tar.stem}/{key}".encode()).hexdigest()[:32],
                        "shard": url.format(tar) if url == "{}" else url.format(tar.name),
                        "shard_version": token,
                        "image_ext": ext,
                        "image_offset": image.offset_data,
                        "image_size": image.size,
                        "caption_offset": caption.offset_data,
                        "caption_size": caption.size,
                        "image_hash": _hash(file.extractfile(image).read()),
                        "caption_hash": _hash(file.extractfile(caption).read().decode().strip().encode()),
                    }
                )
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_index(path: Path, columns: dict, rows: Iterable[int] | None = None, **more: object) -> str:
    """Write these rows (all by default) and further columns; the index's path."""
    rows = list(range(len(columns["uid"]))) if rows is None else list(rows)
    chosen = {name: [values[row] for row in rows] for name, values in columns.items()}
    write_training_index(path, {**chosen, **{name: np.asarray(values) for name, values in more.items()}})
    return str(path)


def _hash(data: bytes) -> int:
    return short_hash(hashlib.sha256(data).hexdigest())
