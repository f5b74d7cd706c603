"""The YAML of a new experiment, by a look at its shards: what `clipcov init` writes."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.schema import FILE
from clipcov_pipeline.experiment.preflight import bytes_of, count_samples
from clipcov_pipeline.experiment.sizes import human
from clipcov_pipeline.pool.captions import caption_text
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.rows import UnreadableRowsError
from clipcov_pipeline.pool.samples import Sample, iter_samples
from clipcov_pipeline.pool.sources import find_shards
from clipcov_pipeline.pool.tars import NotATarError

LOOKED_AT = 200  # samples of the first shard
FRACTIONS, SMALL_POOL_FRACTIONS = (0.1, 0.25), (0.25, 0.5)
HOLDOUT = 0.1
SMALL = "clipcov-tiny-RN"  # comes with the package, and trains on a CPU
LARGE = "RN50"


class Look(NamedTuple):
    """What was seen of a pool.

    samples: good or not, None where they were not counted (remote shards); exact: whether all shards were
    counted. Of the first samples: words of a caption and smaller side in pixels, medians; image suffixes.
    """

    shards: int
    size: int
    samples: int | None
    exact: bool
    words: float
    side: float
    suffixes: Counter[str]


def look_at(source: str, storage_options: dict[str, Any] | None = None) -> Look:
    """Look at the shards of a source: their number and sizes, and the first samples of the first one.

    Raises:
        InputError: no shards, or no pair of image and caption among the first samples.
    """
    shards = find_shards(source, storage_options=storage_options)
    samples = _first_samples(shards, storage_options)
    if not samples:
        raise InputError(
            f"{source}: found no image with a caption of one key in {shards[0].name}, expected KEY.jpg (or"
            " another image) beside KEY.txt, as img2dataset writes them, or a table with a column of each"
        )
    counted = count_samples(shards)
    return Look(
        shards=len(shards),
        size=bytes_of(shards),
        samples=counted[0] if counted else None,
        exact=bool(counted and counted[1]),
        words=median(len(sample.caption.split()) for sample in samples),
        side=median(min(_size(sample.image)) for sample in samples),
        suffixes=Counter(sample.image_ext for sample in samples),
    )


def _first_samples(shards: Sequence[Shard], storage_options: dict[str, Any] | None) -> list[Sample]:
    try:
        found = islice(_samples(shards[0], storage_options), LOOKED_AT)
        return [sample for sample in found if min(_size(sample.image))]
    except (NotATarError, UnreadableRowsError, OSError) as error:
        raise InputError(f"{shards[0].url}: cannot be read ({' '.join(str(error).split())})") from error


def _samples(shard: Shard, storage_options: dict[str, Any] | None) -> Iterator[Sample]:
    if shard.rows is None:
        yield from iter_samples(shard, None, storage_options)
        return
    for row in shard.rows.rows(storage_options):
        if row.image is not None and row.caption is not None:
            yield Sample(row.key, row.image, row.image_ext, caption_text(row.caption, "replace"), row.meta)


def _size(image: bytes) -> tuple[int, int]:
    """Width and height in pixels; 0 where that cannot be told."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.size
    except Exception:  # any damage: the run will say which
        return 0, 0


def starter(name: str, source: str, look: Look, *, gpu: bool) -> str:
    """Return a commented YAML for a pool; gpu: whether there is one to train on."""
    samples = look.samples or 100_000
    pool = round(samples * (1 - HOLDOUT))
    fractions = FRACTIONS if pool >= 1000 else SMALL_POOL_FRACTIONS
    batch = _batch(round(pool * min(fractions)), gpu=gpu)
    seen = -(-max(3 * pool, 40 * batch) // batch) * batch
    return TEMPLATE.format(
        schema=FILE,
        name=name,
        source=source,
        seen_of_it=_in_words(look),
        counted=""
        if look.samples
        else f"\n  expected_samples: {samples}    # a guess: nobody has counted them",
        model=LARGE if gpu else SMALL,
        precision="amp" if gpu else "fp32",
        workers=8 if gpu else 1,
        n_clusters=max(10, min(1000, samples // 50)),
        batch=batch,
        seen=seen,
        passes=f"{seen / pool:.3g}",
        warmup=max(1, seen // batch // 10),
        fractions=", ".join(map(str, fractions)),
        holdout=HOLDOUT,
    )


def _batch(smallest: int, *, gpu: bool) -> int:
    """The largest power of two that the smallest subset fills four times, within reason."""
    batch = 512 if gpu else 256
    while batch > 2 and 4 * batch > smallest:
        batch //= 2
    return batch


def _in_words(look: Look) -> str:
    count = (
        f"{'' if look.exact else 'about '}{look.samples:,} samples" if look.samples else "samples not counted"
    )
    images = ", ".join(f".{suffix}" for suffix, _ in look.suffixes.most_common())
    size = f", {human(look.size)}" if look.size else ""
    return (
        f"{look.shards:,} shards, {count}{size}; of the first: {images}, smaller side {look.side:.0f} pixels,"
        f" captions of {look.words:.0f} words"
    )


TEMPLATE = """\
# yaml-language-server: $schema={schema}
# {seen_of_it}
# What is missing, and what it takes:  clipcov check THIS_FILE      Run it:  clipcov run --config THIS_FILE
# Paths start at this file's folder; a key that is left out has its default.
name: {name}

shards:
  source: {source}{counted}

# the model whose embeddings selection works on: one trained on the pool, where no weights are at hand;
# better  model: ViT-B-32, pretrained: laion2b_s34b_b79k  and no train
proxy:
  model: {model}
  train:
    samples_seen: {seen}
    batch_size: {batch}
    lr: 0.001
    warmup: {warmup}
    precision: {precision}
    workers: {workers}

labels:                   # latent classes: clusters, or  latent_classes: prompts, class_names: imagenet1k
  latent_classes: clusters
  n_clusters: {n_clusters}

select:
  fractions: [{fractions}]
  methods:
    clipcov: {{}}
    clip_score_per_class: {{}}
    random: {{}}

train:                    # every arm alike: {passes} passes over the pool, more over a subset
  model: {model}
  samples_seen: {seen}
  batch_size: {batch}
  lr: 0.001
  warmup: {warmup}
  precision: {precision}
  workers: {workers}
  seeds: [0]              # one seed measures little: [0, 1, 2]

evaluate:                 # your own sets:  sets: {{flickr: {{shards: ./flickr, tasks: [retrieval]}}}}
  holdout_fraction: {holdout}
  primary_metric: holdout/text_retrieval_recall@5
"""
