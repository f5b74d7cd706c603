"""The YAML of a new experiment, by a look at its shards: what `clipcov init` writes."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from statistics import median
from textwrap import indent
from typing import Any, NamedTuple

import yaml

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.schema import FILE
from clipcov_pipeline.experiment.config.yaml_loader import Loader
from clipcov_pipeline.experiment.preflight import bytes_of, count_samples
from clipcov_pipeline.experiment.sizes import human
from clipcov_pipeline.pool.captions import JSON_KEY, CaptionRule, caption_text
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.rows import UnreadableRowsError
from clipcov_pipeline.pool.samples import Sample, iter_samples
from clipcov_pipeline.pool.sources import find_shards
from clipcov_pipeline.pool.tars import NotATarError, iter_groups

LOOKED_AT = 200  # samples of the first shard
FRACTIONS, SMALL_POOL_FRACTIONS = (0.1, 0.25), (0.25, 0.5)
HOLDOUT = 0.1
SMALL = "clipcov-tiny-RN"  # comes with the package, and trains on a CPU
LARGE = "RN50"


class Look(NamedTuple):
    """What was seen of a pool.

    samples: good or not, None where they were not counted (remote shards); exact: whether all shards were
    counted. Of the first samples: words of a caption and smaller side in pixels, medians; image suffixes;
    keys of the json that hold texts which the `.txt` does not; where captions were read.
    """

    shards: int
    size: int
    samples: int | None
    exact: bool
    words: float
    side: float
    suffixes: Counter[str]
    text_keys: tuple[str, ...] = ()
    caption: str = "txt"


def look_at(source: str, storage_options: dict[str, Any] | None = None) -> Look:
    """Look at the shards of a source: their number and sizes, and the first samples of the first one.

    Raises:
        InputError: no shards, or no pair of image and caption among the first samples.
    """
    shards = find_shards(source, storage_options=storage_options)
    keys = _text_keys(shards[0], storage_options)
    caption = "txt"
    samples = _first_samples(shards, storage_options, caption)
    if not samples and keys:
        caption = f"{JSON_KEY}{keys[0]}"
        samples = _first_samples(shards, storage_options, caption)
    if not samples:
        raise InputError(
            f"{source}: found no image with a caption of one key in {shards[0].name}, expected KEY.jpg (or"
            " another image) beside KEY.txt, as img2dataset writes them, a KEY.json with texts, or a table"
            " with a column of each"
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
        text_keys=keys,
        caption=caption,
    )


def _first_samples(
    shards: Sequence[Shard], storage_options: dict[str, Any] | None, caption: str
) -> list[Sample]:
    found = _samples(shards[0], storage_options, CaptionRule.of(caption))
    return [sample for sample in islice(found, LOOKED_AT) if min(_size(sample.image))]


def _text_keys(shard: Shard, storage_options: dict[str, Any] | None) -> tuple[str, ...]:
    """Keys of the json that hold a text of their own in half of the first samples or more, the most first."""
    found, looked = Counter[str](), 0
    try:
        for text, meta in islice(_texts(shard, storage_options), LOOKED_AT):
            looked += 1
            found.update(key for key, value in meta.items() if _holds_text(value, text))
    except (NotATarError, UnreadableRowsError, OSError) as error:
        raise InputError(f"{shard.url}: cannot be read ({' '.join(str(error).split())})") from error
    return tuple(key for key, count in found.most_common() if 2 * count >= looked)


def _texts(shard: Shard, storage_options: dict[str, Any] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The caption of each sample, and what else is said of it."""
    if shard.rows is None:
        for group in iter_groups(shard, None, storage_options):
            yield caption_text(group.get("txt") or b"", "replace"), group.meta() or {}
    else:
        for row in shard.rows.rows(storage_options):
            yield caption_text(row.caption or b"", "replace"), row.meta or {}


def _holds_text(value: Any, known: str) -> bool:
    """Whether a value is, or lists, another text of several words: no address, no JSON in a string."""
    return any(
        isinstance(one, str)
        and " " in (text := one.strip())
        and text != known
        and text[0] not in "{["
        and "://" not in text
        for one in (value if isinstance(value, list) else [value])
    )


def _samples(shard: Shard, storage_options: dict[str, Any] | None, captions: CaptionRule) -> Iterator[Sample]:
    if shard.rows is None:
        yield from iter_samples(shard, None, storage_options, captions)
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
    training = TRAINING.format(
        seen=seen,
        batch=batch,
        warmup=max(1, seen // batch // 10),
        precision="amp" if gpu else "fp32",
        workers=8 if gpu else 1,
    )
    return TEMPLATE.format(
        schema=FILE,
        name=_as_yaml(name),
        source=_as_yaml(source),
        captions=_captions_in_words(look),
        seen_of_it=_in_words(look),
        counted=""
        if look.samples
        else f"\n  expected_samples: {samples}    # a guess: nobody has counted them",
        model=LARGE if gpu else SMALL,
        training=indent(training, "  "),
        proxy_training=indent(training, "    "),
        n_clusters=max(10, min(1000, samples // 50)),
        passes=f"{seen / pool:.3g}",
        fractions=", ".join(map(str, fractions)),
        holdout=HOLDOUT,
    )


def _batch(smallest: int, *, gpu: bool) -> int:
    """The largest power of two that the smallest subset fills four times, within reason."""
    batch = 512 if gpu else 256
    while batch > 2 and 4 * batch > smallest:
        batch //= 2
    return batch


def _as_yaml(text: str) -> str:
    """A text as it is, or in quotes where YAML takes it for another thing (`a #1`, `a: b`, `no`, `1e3`)."""
    try:
        plain = yaml.load(f"key: {text}\n", Loader) == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def _captions_in_words(look: Look) -> str:
    """Lines for the section `shards` where the json holds texts."""
    if not look.text_keys:
        return ""
    sources = [json.dumps(f"{JSON_KEY}{key}", ensure_ascii=False) for key in look.text_keys]
    if look.caption != "txt":
        return f"\n  caption: {sources[0]}    # no .txt; texts in the json: {', '.join(sources)}"
    rule = f"{{from: [txt, {', '.join(sources)}], rule: random}}"
    return f"\n  # caption: {rule}    # the .txt alone is read; this takes texts of the json, too"


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


TRAINING = """\
samples_seen: {seen}
batch_size: {batch}
lr: 0.001
warmup: {warmup}
precision: {precision}
workers: {workers}"""

TEMPLATE = """\
# yaml-language-server: $schema={schema}
# {seen_of_it}
# What is missing, and what it takes:  clipcov check THIS_FILE      Run it:  clipcov run --config THIS_FILE
# Paths start at this file's folder; a key that is left out has its default.
name: {name}

shards:
  source: {source}{captions}{counted}

# the model whose embeddings selection works on: one trained on the pool, where no weights are at hand;
# better  model: ViT-B-32, pretrained: laion2b_s34b_b79k  and no train
proxy:
  model: {model}
  train:
{proxy_training}

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
{training}
  seeds: [0]              # one seed measures little: [0, 1, 2]

evaluate:                 # your own sets:  sets: {{flickr: {{shards: ./flickr, tasks: [retrieval]}}}}
  holdout_fraction: {holdout}
  primary_metric: holdout/text_retrieval_recall@5
"""
