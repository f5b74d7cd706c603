"""What a training reads a second time, seen through open_clip_train's own pipeline."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcov_pipeline.training import kept_samples
from clipcov_pipeline.training.command import arguments, shard_list
from clipcov_pipeline.training.kept_samples import kept_in_memory, read_once
from clipcov_pipeline.training.spec import TrainSpec
from make_shards import write_tar

# webdataset leaves the tars it reads to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO")
CAPTIONS = [f"drawing {number}" for number in range(12)]


def write_tars(folder: Path, say: str = "{}") -> list[str]:
    """Three shards of four samples; the image of each is of one colour, its number."""
    paths = [folder / f"{shard:05d}.tar" for shard in range(3)]
    for shard, path in enumerate(paths):
        members = []
        for number in range(4 * shard, 4 * shard + 4):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(image, "png")
            caption = say.format(CAPTIONS[number]).encode()
            for suffix, data in (("png", image.getvalue()), ("txt", caption), ("json", b"{}")):
                members.append((f"{number:03d}.{suffix}", data))
        write_tar(path, members)
    return [str(path) for path in paths]


class Epochs:
    """open_clip_train's data of one training, an epoch at a time."""

    def __init__(self, shards: list[str], workers: int = 0):
        from open_clip_train import main
        from open_clip_train.params import parse_args

        spec = TrainSpec(
            model="RN50", train_data=shard_list(shards), n_samples=12, epochs=1, batch_size=4, lr=1e-3,
            warmup=0, log_dir="/nowhere", name="run", workers=workers,
        )  # fmt: skip
        args = parse_args(arguments(spec))
        args.world_size = 1
        number = (lambda image: np.asarray(image)[0, 0, 0],) * 2
        self.tokenized: Counter[str] = Counter()
        self.data = main.get_data(args, number, epoch=0, tokenizer=self.tokenize)["train"]

    def tokenize(self, text: str) -> list[str]:
        self.tokenized[text] += 1
        return [text]

    def next(self) -> list[tuple[int, str]]:
        batches = [zip(images, texts, strict=True) for images, texts in self.data.dataloader]
        return [(int(image), text) for batch in batches for image, text in batch]


def test_each_pass_has_every_sample_and_another_order(tmp_path):
    shards = write_tars(tmp_path)
    with kept_in_memory(shards):
        epochs = Epochs(shards)
        passes = [epochs.next() for _ in range(5)]
    assert all(sorted(seen) == list(enumerate(CAPTIONS)) for seen in passes)
    assert len({tuple(seen) for seen in passes}) > 1
    assert epochs.tokenized == dict.fromkeys(CAPTIONS, 1)


@pytest.mark.parametrize(("limit", "second"), [(10**6, CAPTIONS), (1000, [f"new {c}" for c in CAPTIONS])])
def test_shards_are_read_again_only_where_they_are_large(tmp_path, monkeypatch, limit, second):
    monkeypatch.setattr(kept_samples, "KEPT_BYTES", limit)
    shards = write_tars(tmp_path)
    with kept_in_memory(shards):
        epochs = Epochs(shards)
        assert sorted(epochs.next()) == list(enumerate(CAPTIONS))
        write_tars(tmp_path, "new {}")
        assert sorted(epochs.next()) == list(enumerate(second))


def test_data_loading_processes_keep_theirs(tmp_path):
    shards = write_tars(tmp_path)
    with kept_in_memory(shards):
        epochs = Epochs(shards, workers=1)
        first = epochs.next()
        for shard in shards:
            Path(shard).unlink()
        assert sorted(epochs.next()) == sorted(first) == list(enumerate(CAPTIONS))


def test_after_the_block_every_pass_reads(tmp_path):
    shards = write_tars(tmp_path)
    with kept_in_memory(shards):
        pass
    epochs = Epochs(shards)
    epochs.next()
    write_tars(tmp_path, "new {}")
    assert sorted(text for _, text in epochs.next()) == sorted(f"new {caption}" for caption in CAPTIONS)
    assert set(epochs.tokenized.values()) == {1}


def test_what_is_not_a_local_file_is_left_to_open_clip_train():
    from open_clip_train import data

    read = data.tarfile_to_samples_nothrow
    with kept_in_memory(["pipe:cat 00000.tar"]):
        assert data.tarfile_to_samples_nothrow is read


def test_a_sample_that_was_changed_is_as_it_was_in_the_next_pass():
    once = read_once(lambda shards: [{"txt": shard["url"]} for shard in shards])
    for sample in once([{"url": "a"}, {"url": "b"}]):
        sample["txt"] = "tokens"
    assert [sample["txt"] for sample in once([{"url": "b"}, {"url": "a"}])] == ["b", "a"]
