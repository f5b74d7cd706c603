"""The training data of open_clip_train drawn from an index over the original shards.

`data_from_index` puts it, and held-out pairs beside it, in the place of `open_clip_train.main.get_data`. The
order is computed in the training process (`order.Order`), batches are made in its
data-loading processes (`samples.Samples`), and neither their number nor that of GPUs changes what is in a
batch. Random numbers of the training itself are seeded anew with each virtual epoch: a resumed run has the
same ones.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.captions import TXT, CaptionRule
from clipcov_pipeline.training.caption_draws import Captions, Given, WithCaptions
from clipcov_pipeline.training.draws import Draws, EachOnce, Fresh, Rows, Weighted
from clipcov_pipeline.training.held_out import HeldOutPairs
from clipcov_pipeline.training.member_reads import MemberReads
from clipcov_pipeline.training.order import Order
from clipcov_pipeline.training.remote_reads import RemoteReads, check_room, fetched_into, is_remote
from clipcov_pipeline.training.samples import KEPT_BYTES, Made, Reads, Refused, Samples, Wanted, place_seed
from clipcov_pipeline.training.seen import SEEN, write_seen
from clipcov_pipeline.training.training_index import TrainingIndex, read_training_index


@dataclass(frozen=True)
class IndexData:
    """What a training reads.

    Attributes:
        path: the index, `training_index.write_training_index`.
        batch_size: samples of a step, over all GPUs and parts.
        seed: of the order and of how images are varied.
        quota: samples of each class that every pass draws anew; None: every sample, by its weight.
        cache: folder for what is fetched of remote shards.
        storage_options: fsspec's, for remote shards.
        kept_bytes: of decoded samples that each data-loading process keeps.
        held_out: the index of the pairs that the model is evaluated on.
        captions: where captions are, and which one counts.
    """

    path: str
    batch_size: int
    seed: int
    quota: tuple[int, ...] | None = None
    cache: str = ""
    storage_options: dict[str, Any] = field(default_factory=dict)
    kept_bytes: int = KEPT_BYTES
    held_out: str | None = None
    captions: CaptionRule = TXT


@contextmanager
def data_from_index(settings: IndexData) -> Iterator[None]:
    """Inside the block open_clip_train trains on an index; counts are written to ``RUN/seen``.

    Pillow's bound on pixels, which a random crop of a large image meets again, is off: which images are too
    large was said when the shards were read.
    """
    from open_clip_train import main
    from PIL import Image

    get_data = main.get_data

    def get_index_data(args: Any, preprocess_fns: Any, epoch: int = 0, tokenizer: Any = None) -> Any:
        others = copy.copy(args)
        others.train_data = None
        data = get_data(others, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        if settings.held_out is not None:
            data["val"] = held_out_data(settings, args, preprocess_fns[1], tokenizer)
        return {"train": train_data(settings, args, preprocess_fns[0], epoch, tokenizer), **data}

    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    main.get_data = get_index_data
    try:
        yield
    finally:
        main.get_data, Image.MAX_IMAGE_PIXELS = get_data, bound


def train_data(
    settings: IndexData, args: Any, preprocess: Callable[[Any], Any], epoch: int, tokenizer: Any
) -> Any:
    """open_clip_train's ``DataInfo`` for an index; args: its parsed arguments.

    Raises:
        InputError: as `read_training_index`, `order_of` and `check_room`.
    """
    from open_clip_train.data import DataInfo

    index = read_training_index(settings.path, settings.captions)
    steps = _Steps(settings.batch_size, args.rank, args.world_size, args.accum_freq, args.train_num_samples)
    if (
        steps.local * args.world_size * args.accum_freq != settings.batch_size
        or steps.local != args.batch_size
    ):
        raise InputError(
            f"train.batch_size: {settings.batch_size} is not {args.world_size} GPUs x {args.accum_freq} parts"
            f" x {args.batch_size} samples; give a multiple"
        )
    batches = Batches(order_of(settings, index), steps, epoch, index.captions)
    samples = Samples(reads_of(settings, index), preprocess, tokenizer, settings.seed, settings.kept_bytes)
    folder = Path(args.logs) / args.name / SEEN
    loader = IndexLoader(samples, batches, len(index), args.workers, settings.seed, folder)
    return DataInfo(dataloader=loader, shared_epoch=batches)  # pyright: ignore[reportArgumentType]


def held_out_data(settings: IndexData, args: Any, preprocess: Callable[[Any], Any], tokenizer: Any) -> Any:
    """open_clip_train's ``DataInfo`` for the held-out index; args: its parsed arguments.

    Raises:
        InputError: as `read_training_index` and `check_room`.
    """
    from open_clip_train.data import DataInfo

    assert settings.held_out is not None
    index = read_training_index(settings.held_out, settings.captions)
    samples = Samples(reads_of(settings, index), preprocess, tokenizer, settings.seed, settings.kept_bytes)
    return DataInfo(dataloader=HeldOutPairs(samples, len(index), args.batch_size))  # pyright: ignore[reportArgumentType]


def order_of(settings: IndexData, index: TrainingIndex) -> Order:
    """The order that a training takes its batches in: of rows, or of captions where it draws these.

    Raises:
        InputError: weights or quotas that cannot be, both at once, or a batch larger than a pass.
    """
    draws: Draws
    if settings.quota is not None:
        if index.latent_class is None or (index.weight is not None and np.ptp(index.weight)):
            raise InputError(
                f"training index {settings.path}: fresh draws need a column latent_class and equal weights;"
                " write the index again"
            )
        draws = Fresh(index.latent_class, np.asarray(settings.quota), settings.seed)
    elif index.weight is not None and np.ptp(index.weight):
        draws = Weighted(index.weight, settings.seed, f"training index {settings.path}")
    else:
        draws = EachOnce(len(index), settings.seed)
    if index.captions is None:
        return Order(len(index), draws, settings.batch_size, index.content_hashes)
    sample = np.bitwise_xor.reduce(index.content_hashes)
    rows = index.captions.given(np.arange(len(index.captions))).rows
    images = [] if index.image_hash is None else [index.image_hash[rows]]
    drawn = WithCaptions(draws, index.captions, sample, settings.seed)
    return Order(len(rows), drawn, settings.batch_size, [rows, index.captions.hashes, *images])


def reads_of(settings: IndexData, index: TrainingIndex) -> Reads:
    """Where samples are read from: local tars, remote ones, or some of each.

    Raises:
        InputError: no room for what is wanted of remote shards, or no folder for it.
    """
    remote = [is_remote(shard) for shard in index.shards]
    if not any(remote):
        return LocalReads(index)
    if not settings.cache:
        raise InputError(
            f"training index {settings.path}: {index.shards[remote.index(True)]} is remote; give a cache"
            " folder"
        )
    check_room(index, settings.cache)
    return RemoteReads(index, fetched_into(index, settings.cache), settings.storage_options)


class LocalReads(MemberReads):
    """Reads of shards that lie on this machine."""

    def prepare(self, rows: Rows) -> None:
        """Nothing is to be fetched; the disk begins to read."""
        self.expect(rows)


@dataclass(frozen=True)
class _Steps:
    """How the batch of a step is shared: part ``p`` of GPU ``r`` is the ``p * gpus + r``-th slice of it."""

    batch_size: int
    rank: int
    gpus: int
    parts: int
    samples_per_epoch: int

    @property
    def local(self) -> int:
        return self.batch_size // (self.gpus * self.parts)

    @property
    def per_epoch(self) -> int:
        """Steps of a virtual epoch, as open_clip_train rounds them: a part of a batch is a whole one."""
        return math.ceil(self.samples_per_epoch / self.batch_size)

    def slices(self) -> Iterator[slice]:
        """What this GPU takes of a step's batch, part by part."""
        for part in range(self.parts):
            first = (part * self.gpus + self.rank) * self.local
            yield slice(first, first + self.local)


class Batches(torch.utils.data.Sampler[Wanted]):
    """The batches of one virtual epoch after another; open_clip_train says which through `set_value`.

    captions: what the order is of, where it is not of rows.
    """

    def __init__(self, order: Order, steps: _Steps, epoch: int, captions: Captions | None = None) -> None:
        self.order, self.steps, self.epoch, self._captions = order, steps, epoch, captions
        self.repeated = 0

    def set_value(self, epoch: int) -> None:
        """As open_clip_train's ``SharedEpoch``."""
        self.epoch = epoch

    def get_value(self) -> int:
        return self.epoch

    def __len__(self) -> int:
        return self.steps.per_epoch * self.steps.parts

    def __iter__(self) -> Iterator[Wanted]:
        self.repeated = 0
        first = self.epoch * self.steps.per_epoch
        for step in range(first, first + self.steps.per_epoch):
            drawn = self.order.batch(step)
            places = np.arange(step * len(drawn), (step + 1) * len(drawn))
            self.repeated += self.order.repeats(drawn)
            for part in self.steps.slices():
                rows, captions = self._given(drawn[part])
                yield Wanted(rows, places[part], captions)

    def _given(self, drawn: Rows) -> Given | tuple[Rows, None]:
        return (drawn, None) if self._captions is None else self._captions.given(drawn)


class IndexLoader:
    """What open_clip_train takes for a DataLoader: batches of (images, tokens), counted as they are given.

    Attributes:
        num_batches: of a virtual epoch for this GPU; num_samples: of a virtual epoch for all.
    """

    def __init__(
        self, samples: Samples, batches: Batches, n_rows: int, workers: int, seed: int, folder: Path
    ) -> None:
        self._batches, self._n_rows, self._seed, self._folder = batches, n_rows, seed, folder
        self.num_batches = len(batches)
        self.num_samples = batches.steps.per_epoch * batches.steps.batch_size
        self._loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(seed),  # it draws from the training's own otherwise
        )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of the virtual epoch that was set.

        Raises:
            InputError: a data-loading process refused what it read.
            RuntimeError: fewer batches came than the epoch has.
        """
        epoch, rank = self._batches.epoch, self._batches.steps.rank
        torch.manual_seed(place_seed(self._seed + rank, -1 - epoch))
        counts, given = np.zeros(self._n_rows, np.int32), 0
        batches = iter(self._loader)
        while (made := next(batches, None)) is not None:
            if isinstance(made, Refused):
                # let go of the processes now: the error holds this frame, and torch waits seconds for each
                # process that garbage collection finds instead
                del batches, self._loader
                raise InputError(made.message)
            np.add.at(counts, made.rows, 1)
            given += 1
            yield made.images, made.texts
        if given < self.num_batches:
            raise RuntimeError(
                f"training data: virtual epoch {epoch} gave {given} batches, expected {self.num_batches};"
                " see the log of the data-loading processes"
            )
        write_seen(self._folder, epoch, rank, counts, 0 if rank else self._batches.repeated)


def _as_it_is(made: Made | Refused) -> Made | Refused:
    return made
