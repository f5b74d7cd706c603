"""A web-like pool planted on labelled photos, so that it is known which captions are right.

Any ImageFolder (a folder a class) becomes WebDataset shards with long-tailed classes, captions of which a
share is mismatched or says nothing, and near-duplicates. What is true of each sample travels in its json
under ``truth`` and in ``truth.parquet``: it is for scoring a selection, never for selecting. The rule is
issue 5's; all its numbers are fields of `Rule`.
"""

import json
import shutil
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from clipcov_pipeline.bench.captions import choose_caption, spoken
from clipcov_pipeline.bench.testbed_files import MARKER, find_photos, write_evaluation, write_pool
from clipcov_pipeline.bench.testbed_rule import Rule
from clipcov_pipeline.errors import InputError


def plant(images: Path, test_images: Path | None, out: Path, rule: Rule) -> None:
    """Write the pool's shards, the evaluation sets and the truth below ``out``; done once, marker last.

    ``pool/NNNNN.tar`` (img2dataset layout), ``eval/photos`` and ``eval/SHIFT`` (CLIP_benchmark's layout),
    ``eval/captions`` (pairs), ``classnames.txt``, ``truth.parquet`` and ``oracle.parquet`` (the uids whose
    caption names the right class, in random order).

    Raises:
        InputError: unusable photos, or ``out`` holds a pool that was planted by another rule.
    """
    settings = {
        "images": str(images.resolve()),
        "test_images": str(test_images and test_images.resolve()),
        **asdict(rule),
    }
    if (out / MARKER).is_file():
        found = json.loads((out / MARKER).read_text())
        if (before := found.get("test_images", "None")) != "None":
            found["test_images"] = str(Path(before).resolve())  # it used to be kept as it was given
        if found != settings:
            changed = next(k for k in settings if found.get(k) != settings[k])
            raise InputError(
                f"{out}: holds a pool planted with {changed}={found.get(changed)!r}, not"
                f" {settings[changed]!r}: choose another --out or remove it"
            )
        return
    pool, test = find_photos(images, test_images)
    if max(map(len, test.values())) < 2:
        raise InputError(
            "images: found one test photo in each class, expected at least 2: half of them train the linear"
            " probe"
        )
    for part in ("pool", "eval"):
        shutil.rmtree(out / part, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([rule.draw, 0])
    samples = plan_samples({name: len(files) for name, files in pool.items()}, rule, rng)
    write_pool(out / "pool", samples, pool, rule)
    (out / "classnames.txt").write_text("\n".join(spoken(name) for name in pool) + "\n")
    columns = ["uid", "key", "caption", "class_name", "caption_class", "kind", "source", "is_duplicate"]
    truth = pl.DataFrame(samples, infer_schema_length=None).select(columns)
    truth = truth.with_columns(right_class=pl.col("caption_class").eq_missing(pl.col("class_name")))
    truth.write_parquet(out / "truth.parquet")
    right = truth.filter("right_class")["uid"]
    right.sample(fraction=1.0, shuffle=True, seed=rule.draw).to_frame().write_parquet(out / "oracle.parquet")
    write_evaluation(out / "eval", test, rule)
    (out / MARKER).write_text(json.dumps(settings, indent=1))


def class_sizes(available: dict[str, int], rule: Rule, rng: np.random.Generator) -> dict[str, int]:
    """Sizes ``largest * imbalance ** (-rank / (classes - 1))`` over a random order of the classes.

    A class with fewer photos gives what it has.
    """
    order = rng.permutation(sorted(available))
    steps = max(len(order) - 1, 1)
    return {
        str(name): min(available[str(name)], round(rule.largest * rule.imbalance ** (-rank / steps)))
        for rank, name in enumerate(order)
    }


def plan_samples(available: dict[str, int], rule: Rule, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Every sample of the pool, shuffled: image, caption and what is true of it; nothing is read."""
    sizes = class_sizes(available, rule, rng)
    chosen = [
        (name, int(index))
        for name in sorted(sizes)
        for index in rng.permutation(available[name])[: sizes[name]]
    ]
    shares = [1 - rule.noise, 0.6 * rule.noise, 0.4 * rule.noise]
    kinds = rng.choice(
        ["faithful", "mismatched", "generic"],
        len(chosen),
        p=shares,
    )
    names = [name for name, _ in chosen]
    samples = []
    for (name, index), kind in zip(chosen, kinds, strict=True):
        caption, caption_class = choose_caption(str(kind), name, names, rng)
        source = f"{name}/{index}"
        samples.append(
            {"class_name": name, "index": index, "source": source, "is_duplicate": False}
            | {"kind": str(kind), "caption": caption, "caption_class": caption_class}
        )
    copied = rng.permutation(len(samples))[: round(rule.duplicates * len(samples))]
    for place, original in enumerate(copied):
        copy = {**samples[original], "is_duplicate": True}
        if place % 2:
            caption, caption_class = choose_caption(copy["kind"], copy["class_name"], names, rng)
            copy |= {"caption": caption, "caption_class": caption_class}
        samples.append(copy)
    shuffled = [samples[i] for i in rng.permutation(len(samples))]
    for number, sample in enumerate(shuffled):
        sample["key"] = f"{number:08d}"
        sample["uid"] = sha256(f"{rule.draw}/{number}".encode()).hexdigest()[:32]
    return shuffled
