"""Makes a training index of tars by tarfile's own reading, for tests."""

import hashlib
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from clipcov_pipeline.pool.pixels import IMAGE_EXTENSIONS
from clipcov_pipeline.pool.places import short_hash
from clipcov_pipeline.proxy.models import register_model_configs
from clipcov_pipeline.training.index_loader import IndexData, data_from_index
from clipcov_pipeline.training.training_index import write_training_index
from make_training import parsed, spec_for, write_shards


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
                ext = next(ext for ext in IMAGE_EXTENSIONS if f"{key}.{ext}" in members)
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


def index_spec(tmp_path, index, **changes):
    settings = {"n_samples": 48, "batch_size": 16, "samples_seen": 96, "num_checkpoints": 2, "workers": 0}
    return spec_for(tmp_path, **{**settings, "index": index, **changes})


class Data:
    """open_clip_train's training data of a spec, as its own `main` asks for it."""

    def __init__(self, spec, *, rank=0, gpus=1, epoch=0, preprocess=None, kept_bytes=2**28):
        from open_clip import create_model_and_transforms, get_tokenizer
        from open_clip_train import main

        register_model_configs()
        args = parsed(spec, gpus)
        args.rank = rank
        if preprocess is None:
            _, preprocess, _ = create_model_and_transforms(spec.model)
        settings = IndexData(
            spec.index,
            spec.batch_size,
            spec.seed,
            spec.quota,
            spec.cache,
            kept_bytes=kept_bytes,
            captions=spec.captions,
        )
        with data_from_index(settings):
            tokenizer = get_tokenizer(spec.model)
            self.info = main.get_data(args, (preprocess, preprocess), epoch=epoch, tokenizer=tokenizer)[
                "train"
            ]

    def epoch(self, number):
        self.info.set_epoch(number)
        return list(self.info.dataloader)


def same(left, right):
    assert len(left) == len(right) > 0
    for (images, texts), (other_images, other_texts) in zip(left, right, strict=True):
        assert images.equal(other_images)
        assert texts.equal(other_texts)


def index_of_noise(folder, sizes):
    """An index of new shards of noise images in a folder, see `write_shards`; its path."""
    write_shards(folder, sizes)
    return write_index(folder / "index.parquet", columns_of(sorted(folder.glob("*.tar"))))
