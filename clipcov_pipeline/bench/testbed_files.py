"""Writes a planted pool and its evaluation sets to disk."""

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.bench.captions import PROMPTS, faithful_caption, spoken
from clipcov_pipeline.bench.testbed_rule import SHIFTS, Rule
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.pixels import IMAGE_EXTENSIONS, ImageRules, UnusableImageError, usable_rgb

IMAGE_SUFFIXES = {f".{extension}" for extension in IMAGE_EXTENSIONS}

READ_ELSEWHERE = {".jpg", ".png", ".jpeg", ".webp"}  # by open_clip_train and CLIP_benchmark

MARKER = "testbed.json"

SAMPLES_PER_SHARD = 1000


def class_folders(images: Path) -> dict[str, list[Path]]:
    """Return class name -> image files, sorted, of an ImageFolder.

    Raises:
        InputError: no such folder, no class folder in it, or a class folder without an image.
    """
    if not images.is_dir():
        raise InputError(f"images: {images} is not a folder, expected one folder of images a class")
    found = {
        folder.name: sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        for folder in sorted(images.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }
    if len(found) < 2:
        raise InputError(f"images: {images} has {len(found)} class folders, expected at least 2")
    for name, files in found.items():
        if not files:
            raise InputError(
                f"images: the class folder {images / name} has no image"
                f" ({', '.join(sorted(IMAGE_SUFFIXES))}); remove the folder or fill it"
            )
    return found


def find_photos(
    images: Path, test_images: Path | None
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return (pool photos, test photos) by class.

    They are those in ``train`` and ``test`` where a folder has these; else the last fifth of each class is
    for testing.

    Raises:
        InputError: as `class_folders`, or the two do not have the same classes.
    """
    if test_images is None and (images / "train").is_dir() and (images / "test").is_dir():
        images, test_images = images / "train", images / "test"
    pool = class_folders(images)
    if test_images is None:
        cut = {name: max(1, len(files) // 5) for name, files in pool.items()}
        test = {name: files[-cut[name] :] for name, files in pool.items()}
        pool = {name: files[: -cut[name]] for name, files in pool.items()}
        if short := [name for name, files in pool.items() if not files]:
            raise InputError(f"images: class {short[0]!r} has one image only, expected at least 2: add some")
        return pool, test
    test = class_folders(test_images)
    if missing := sorted(set(test) - set(pool)):
        raise InputError(
            f"images: test class {missing[0]!r} is not among the pool's classes {', '.join(sorted(pool))}:"
            " name the same class folders in both"
        )
    if missing := sorted(set(pool) - set(test)):
        raise InputError(f"images: class {missing[0]!r} has no test photos in {test_images}: add its folder")
    return pool, test


def write_pool(
    folder: Path, samples: Sequence[dict[str, Any]], photos: dict[str, list[Path]], rule: Rule
) -> None:
    """Write the pool's shards; a sample that is a near-duplicate gets its photo changed a little.

    Raises:
        InputError: a photo that has to be decoded cannot be.
    """
    rng = np.random.default_rng([rule.draw, 1])

    def members() -> Iterator[dict[str, Any]]:
        for sample in samples:
            photo = photos[sample["class_name"]][sample["index"]]
            truth = {k: sample[k] for k in ("class_name", "caption_class", "kind", "source", "is_duplicate")}
            meta = {"uid": sample["uid"], "key": sample["key"], "caption": sample["caption"], "truth": truth}
            suffix, data = ("png", _near_duplicate(photo, rng)) if sample["is_duplicate"] else _stored(photo)
            yield {"__key__": sample["key"], suffix: data, "txt": sample["caption"], "json": meta}

    write_tars(folder, members(), SAMPLES_PER_SHARD, "{:05d}.tar")


def write_tars(folder: Path, members: Iterable[dict[str, Any]], per_tar: int, name: str) -> int:
    """Write WebDataset tars; return how many."""
    import webdataset as wds

    folder.mkdir(parents=True, exist_ok=True)
    n_tars = 0
    for n_tars, part in enumerate(batched(members, per_tar), start=1):
        path = os.fspath(folder / name.format(n_tars - 1))
        with wds.TarWriter(path, mtime=0, encoder=False) as writer:
            for member in part:
                data = {key: _bytes(value) for key, value in member.items() if key != "__key__"}
                writer.write({"__key__": member["__key__"], **data})
    return n_tars


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` items, the last one shorter (itertools.batched is newer than Python 3.11)."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def _stored(photo: Path) -> tuple[str, bytes]:
    """(suffix, bytes) of a photo as a member: as it is, or PNG where other tools would not take it."""
    suffix = photo.suffix.lower()
    if suffix in READ_ELSEWHERE:
        return suffix.removeprefix("."), photo.read_bytes()
    return "png", _png(_rgb(photo))


def _near_duplicate(photo: Path, rng: np.random.Generator) -> bytes:
    """The image less a sixteenth of its height and width, at its old size, 10 to 25 % brighter or darker."""
    from PIL import Image, ImageEnhance

    image = _rgb(photo)
    width, height = image.size
    left, top = (int(rng.integers(0, max(side // 16, 1) + 1)) for side in (width, height))
    box = (left, top, left + width - max(width // 16, 1), top + height - max(height // 16, 1))
    image = image.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    factor = 1 + float(rng.choice([-1, 1])) * float(rng.uniform(0.10, 0.25))
    return _png(ImageEnhance.Brightness(image).enhance(factor))


def write_evaluation(folder: Path, photos: dict[str, list[Path]], rule: Rule) -> None:
    """Write the evaluation sets of these test photos: as they are, shifted, and with captions.

    Raises:
        InputError: as `write_pool`.
    """
    rng = np.random.default_rng([rule.draw, 2])
    names = list(photos)
    shuffled = {name: [files[int(i)] for i in rng.permutation(len(files))] for name, files in photos.items()}
    test, train, shifted = [], [], []
    for label, name in enumerate(names):
        files = shuffled[name]
        n_test = min(rule.test_per_class, max(1, len(files) // 2))
        test += [(label, path) for path in files[:n_test]]
        train += [(label, path) for path in files[n_test : n_test + rule.train_per_class]]
        shifted += [(label, path) for path in files[: rule.shifted_per_class]]
    for split, rows in (("test", test), ("train", train)):
        _write_benchmark(folder / "photos", names, split, ((k, *_stored(p)) for k, p in rows))
    for shift in SHIFTS:
        rows = ((label, "png", _shifted(shift, path, rng)) for label, path in shifted)
        _write_benchmark(folder / shift, names, "test", rows)
    pairs = [test[i] for i in rng.permutation(len(test))[: rule.retrieval_pairs]]
    members = (
        {"__key__": f"{i:06d}", **dict([_stored(path)]), "txt": caption}
        for i, ((_, path), caption) in enumerate(
            zip(pairs, _distinct_captions([names[label] for label, _ in pairs], rng), strict=True)
        )
    )
    write_tars(folder / "captions", members, SAMPLES_PER_SHARD, "{:05d}.tar")


def _distinct_captions(classes: Sequence[str], rng: np.random.Generator) -> list[str]:
    captions: dict[str, None] = {}
    for name in classes:
        caption = faithful_caption(name, rng)
        while caption in captions:
            caption = (
                f"{faithful_caption(name, rng)} {rng.integers(1000)}"
                if len(captions) > 5000
                else (faithful_caption(name, rng))
            )
        captions[caption] = None
    return list(captions)


def _write_benchmark(
    folder: Path, names: Sequence[str], split: str, rows: Iterable[tuple[int, str, bytes]]
) -> None:
    """Write one split in the layout of CLIP_benchmark's webdataset folders."""
    members = (
        {"__key__": f"{i:06d}", suffix: data, "cls": str(label)}
        for i, (label, suffix, data) in enumerate(rows)
    )
    n_tars = write_tars(folder / split, members, SAMPLES_PER_SHARD, "{}.tar")
    (folder / split / "nshards.txt").write_text(f"{n_tars}\n")
    (folder / "classnames.txt").write_text("\n".join(spoken(name) for name in names) + "\n")
    templates = "\n".join(prompt.replace("{}", "{c}") for prompt in PROMPTS)
    (folder / "zeroshot_classification_templates.txt").write_text(templates + "\n")


def _shifted(shift: str, photo: Path, rng: np.random.Generator) -> bytes:
    """A version of the photo that no arm has seen."""
    from PIL import Image, ImageEnhance, ImageFilter, ImageOps

    image = _rgb(photo)
    match shift:
        case "grayscale":
            image = ImageOps.grayscale(image)
        case "edges":
            image = ImageOps.invert(
                ImageOps.autocontrast(ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES))
            )
        case "colour_jitter":
            for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
                image = enhance(image).enhance(float(rng.uniform(0.4, 1.6)))
        case "low_resolution":
            small = image.resize(
                (max(image.width // 3, 1), max(image.height // 3, 1)), Image.Resampling.BILINEAR
            )
            image = small.resize(image.size, Image.Resampling.BILINEAR)
        case "rotated":
            angle = float(rng.choice([-1, 1]) * rng.uniform(20, 40))
            image = image.rotate(angle, resample=Image.Resampling.BILINEAR)
    return _png(image.convert("RGB"))


def _rgb(photo: Path) -> Any:
    try:
        return usable_rgb(photo.read_bytes(), ImageRules(high_bit_depth="scale"))
    except UnusableImageError as error:
        raise InputError(
            f"images: {photo} is not usable ({error.status}: {error}); mend the file or remove it"
        ) from error


def _png(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
