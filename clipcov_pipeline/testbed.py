"""A web-like pool planted on labelled photos, so that it is known which captions are right.

Any ImageFolder (a folder a class) becomes WebDataset shards with long-tailed classes, captions of which a
share is mismatched or says nothing, and near-duplicates. What is true of each sample travels in its json
under ``truth`` and in ``truth.parquet``: it is for scoring a selection, never for selecting. The rule is
issue 5's; all its numbers are fields of `Rule`.
"""

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from clipcov_pipeline.errors import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MARKER = "testbed.json"
SAMPLES_PER_SHARD = 1000
SHIFTS = ("grayscale", "edges", "colour_jitter", "low_resolution", "rotated")
PROMPTS = ("a photo of a {}", "a picture of the {}", "a {}", "a snapshot of one {}")

TEMPLATES = (
    "a photo of a {adjective} {name} {scene}",
    "a {adjective} {name} {scene}",
    "{adjective} {name} {scene}",
    "my {adjective} {name} {scene}",
    "the {name} {scene}",
    "picture of a {adjective} {name}",
    "we saw a {adjective} {name} {scene}",
    "one {adjective} {name}, {scene}",
    "{name} {scene}",
    "a close-up of a {adjective} {name}",
    "look at this {adjective} {name}",
    "this {name} was {scene}",
    "snapshot: {adjective} {name} {scene}",
    "a {name}, looking {adjective}",
    "stock photo of a {adjective} {name}",
    "{adjective} {name} for sale",
    "a {adjective} {name} seen {scene}",
    "image of the {name} {scene}",
    "another {adjective} {name} {scene}",
    "best {name} photo, {scene}",
)
ADJECTIVES = (
    "small", "large", "old", "new", "white", "dark", "red", "brown", "quiet", "pretty", "strange", "fine",
)  # fmt: skip
SCENES = (
    "in the morning", "at dusk", "on a sunny day", "in winter", "near the road", "by the water", "outside",
    "in the city", "in the country", "at home", "in the fog", "on holiday",
)  # fmt: skip
GENERIC = (
    "IMG_{number}", "DSC0{number}.JPG", "untitled", "click to enlarge", "image", "photo {number}",
    "view larger image", "thumbnail", "no description available", "free download", "picture of the day",
    "file {number}", "share this post", "gallery {number}",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """How a pool is planted.

    Attributes:
        draw: seed of everything: class order, images, captions, near-duplicates.
        largest: images of the largest class; imbalance: how many times larger it is than the smallest.
        noise: share of captions that are not faithful; 3 in 5 of these are another image's caption, the rest
            say nothing.
        duplicates: near-duplicates added, as a share of the images; half of them get a fresh caption.
        test_per_class, train_per_class, shifted_per_class: evaluation photos of each class: for zero-shot and
            k-NN, for the probe to learn from, and for each shifted version.
        retrieval_pairs: captioned test photos.
    """

    draw: int = 0
    largest: int = 5000
    imbalance: float = 10.0
    noise: float = 0.5
    duplicates: float = 0.25
    test_per_class: int = 500
    train_per_class: int = 300
    shifted_per_class: int = 100
    retrieval_pairs: int = 500


def class_folders(images: Path) -> dict[str, list[Path]]:
    """Class name -> image files, sorted, of an ImageFolder.

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
    """(pool photos, test photos) by class: ``train`` and ``test`` in a folder, else the last fifth of each
    class is for testing.

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
    _write_pool(out / "pool", samples, pool, rule)
    (out / "classnames.txt").write_text("\n".join(_spoken(name) for name in pool) + "\n")
    columns = ["uid", "key", "caption", "class_name", "caption_class", "kind", "source", "is_duplicate"]
    truth = pl.DataFrame(samples, infer_schema_length=None).select(columns)
    truth = truth.with_columns(right_class=pl.col("caption_class").eq_missing(pl.col("class_name")))
    truth.write_parquet(out / "truth.parquet")
    right = truth.filter("right_class")["uid"]
    right.sample(fraction=1.0, shuffle=True, seed=rule.draw).to_frame().write_parquet(out / "oracle.parquet")
    _write_evaluation(out / "eval", test, rule)
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
        caption, caption_class = _caption(str(kind), name, names, rng)
        source = f"{name}/{index}"
        samples.append({"class_name": name, "index": index, "source": source, "is_duplicate": False}
                       | {"kind": str(kind), "caption": caption, "caption_class": caption_class})  # fmt: skip
    copied = rng.permutation(len(samples))[: round(rule.duplicates * len(samples))]
    for place, original in enumerate(copied):
        copy = {**samples[original], "is_duplicate": True}
        if place % 2:
            caption, caption_class = _caption(copy["kind"], copy["class_name"], names, rng)
            copy |= {"caption": caption, "caption_class": caption_class}
        samples.append(copy)
    shuffled = [samples[i] for i in rng.permutation(len(samples))]
    for number, sample in enumerate(shuffled):
        sample["key"] = f"{number:08d}"
        sample["uid"] = sha256(f"{rule.draw}/{number}".encode()).hexdigest()[:32]
    return shuffled


def _caption(kind: str, name: str, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str | None]:
    """(caption, class that it names)."""
    if kind == "generic":
        return str(rng.choice(GENERIC)).format(number=rng.integers(1000, 10000)), None
    named = name if kind == "faithful" else names[int(rng.integers(len(names)))]
    return faithful_caption(named, rng), named


def faithful_caption(name: str, rng: np.random.Generator) -> str:
    """A caption that names the class, one of 20 templates with an adjective and a scene."""
    text = str(rng.choice(TEMPLATES)).format(
        adjective=rng.choice(ADJECTIVES), name=_spoken(name), scene=rng.choice(SCENES)
    )
    words = text.split(" ")
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1][0] in "aeiou":
            words[i] = "an"
    return " ".join(words)


def _spoken(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def _write_pool(
    folder: Path, samples: Sequence[dict[str, Any]], photos: dict[str, list[Path]], rule: Rule
) -> None:
    rng = np.random.default_rng([rule.draw, 1])

    def members() -> Iterator[dict[str, Any]]:
        for sample in samples:
            data = photos[sample["class_name"]][sample["index"]].read_bytes()
            truth = {k: sample[k] for k in ("class_name", "caption_class", "kind", "source", "is_duplicate")}
            meta = {"uid": sample["uid"], "key": sample["key"], "caption": sample["caption"], "truth": truth}
            suffix = photos[sample["class_name"]][sample["index"]].suffix.lower().lstrip(".")
            if sample["is_duplicate"]:
                data, suffix = _near_duplicate(data, rng), "png"
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
    """Lists of ``size`` items, the last one shorter (itertools.batched is newer than Python 3.11)."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def _near_duplicate(data: bytes, rng: np.random.Generator) -> bytes:
    """The image less a sixteenth of its height and width, at its old size, 10 to 25 % brighter or darker."""
    from PIL import Image, ImageEnhance

    image = _rgb(data)
    width, height = image.size
    left, top = (int(rng.integers(0, max(side // 16, 1) + 1)) for side in (width, height))
    box = (left, top, left + width - max(width // 16, 1), top + height - max(height // 16, 1))
    image = image.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    factor = 1 + float(rng.choice([-1, 1])) * float(rng.uniform(0.10, 0.25))
    return _png(ImageEnhance.Brightness(image).enhance(factor))


def _write_evaluation(folder: Path, photos: dict[str, list[Path]], rule: Rule) -> None:
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
        _write_benchmark(folder / "photos", names, split, ((k, p.read_bytes(), p.suffix) for k, p in rows))
    for shift in SHIFTS:
        rows = ((label, _shifted(shift, path.read_bytes(), rng), ".png") for label, path in shifted)
        _write_benchmark(folder / shift, names, "test", rows)
    pairs = [test[i] for i in rng.permutation(len(test))[: rule.retrieval_pairs]]
    members = (
        {"__key__": f"{i:06d}", path.suffix.lstrip(".").lower(): path.read_bytes(), "txt": caption}
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
            caption = f"{faithful_caption(name, rng)} {rng.integers(1000)}" if len(captions) > 5000 else (
                faithful_caption(name, rng))  # fmt: skip
        captions[caption] = None
    return list(captions)


def _write_benchmark(
    folder: Path, names: Sequence[str], split: str, rows: Iterable[tuple[int, bytes, str]]
) -> None:
    """Write one split in the layout of CLIP_benchmark's webdataset folders."""
    members = (
        {"__key__": f"{i:06d}", suffix.lstrip(".").lower(): data, "cls": str(label)}
        for i, (label, data, suffix) in enumerate(rows)
    )
    n_tars = write_tars(folder / split, members, SAMPLES_PER_SHARD, "{}.tar")
    (folder / split / "nshards.txt").write_text(f"{n_tars}\n")
    (folder / "classnames.txt").write_text("\n".join(_spoken(name) for name in names) + "\n")
    templates = "\n".join(prompt.replace("{}", "{c}") for prompt in PROMPTS)
    (folder / "zeroshot_classification_templates.txt").write_text(templates + "\n")


def _shifted(shift: str, data: bytes, rng: np.random.Generator) -> bytes:
    """A version of the photo that no arm has seen."""
    from PIL import Image, ImageEnhance, ImageFilter, ImageOps

    image = _rgb(data)
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


def _rgb(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def _png(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
