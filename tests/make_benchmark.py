"""Evaluation folders in CLIP_benchmark's layout, and folders of labelled photos, for the tests."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from make_shards import Member, write_tar


def write_split(folder: Path, split: str, shards: Sequence[Iterable[Member]]) -> None:
    """Write a split: `SPLIT/nshards.txt` and its tars."""
    for index, members in enumerate(shards):
        write_tar(folder / split / f"{index}.tar", members)
    (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")


def labelled(key: str, label: int | str, seed: int, kind: str = "webp") -> list[Member]:
    """A sample of a classification set."""
    return [(f"{key}.{kind}", patches(seed)), (f"{key}.cls", f"{label}".encode())]


def patches(seed: int) -> bytes:
    """A lossless WebP of six coloured patches: images that a model with random weights tells apart."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((30, 20), Image.Resampling.NEAREST).save(file, "WEBP", lossless=True)
    return file.getvalue()


def write_classification(
    folder: Path, names: Sequence[str], splits: Mapping[str, int], templates: str = "a photo of a {c}.\n{c}\n"
) -> Path:
    """A folder with so many samples a class in each split, in two shards, of images all different."""
    folder.mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    if templates:
        (folder / "zeroshot_classification_templates.txt").write_text(templates)
    seed = 0
    for split, count in splits.items():
        shards: list[list[Member]] = [[], []]
        for index in range(count * len(names)):
            seed += 1
            shards[index % 2] += labelled(f"s{index:05d}", index % len(names), seed)
        write_split(folder, split, shards)
    return folder


def write_photos(folder: Path, classes: dict[str, int]) -> Path:
    """So many noise images a class, a folder a class."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder
