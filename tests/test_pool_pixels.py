"""Bytes in, pixels out: every reader sees the pixels of webdataset's ``pilrgb``, of all modes and formats."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluation.classifier import Classifier
from clipcov_pipeline.evaluation.pairs import embed_pairs
from clipcov_pipeline.evaluation.splits import DecodedImages, embed_split
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.pool.pixels import (
    HIGH_BIT_DEPTH,
    IMAGE_EXTENSIONS,
    IMAGE_FORMATS,
    RULES,
    ImageRules,
    UnusableImageError,
    check_rules,
    one_colour,
    open_image,
    to_rgb,
    usable_rgb,
)
from clipcov_pipeline.pool.samples import iter_samples
from clipcov_pipeline.proxy.embeddings import embed_samples
from clipcov_pipeline.proxy.encoder import Encoder
from clipcov_pipeline.report.search import image_query
from clipcov_pipeline.report.thumbnails import small_picture
from clipcov_pipeline.training.held_out import HeldOutPairs
from clipcov_pipeline.training.index_loader import IndexData, data_from_index
from clipcov_pipeline.training.samples import Samples, Wanted
from tests.make_shards import write_tar

SCALE = ImageRules(high_bit_depth="scale")
SIZE = 24, 16
SUFFIX = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "AVIF": "avif",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
DEEP = {"I;16", "I", "F"}
MODES = (
    "1",
    "L",
    "LA",
    "P",
    "P clear",
    "PA",
    "RGB",
    "RGB clear",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    *sorted(DEEP),
)


def picture(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """A random image of a mode, with smooth parts and clear ones, and what it is saved with."""
    rng, (width, height) = np.random.default_rng(len(mode)), SIZE
    if mode in DEEP:
        values = np.linspace(0, 65_535, width * height).reshape(height, width)
        values = values / 65_535 - 0.25 if mode == "F" else np.rint(values)
        kind = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
        return Image.fromarray(values.astype(kind)), {}
    image = Image.fromarray(rng.integers(0, 256, (4, 6, 4), np.uint8), "RGBA").resize(SIZE)
    plain = image.convert("RGB")
    if mode == "P clear":
        return plain.quantize(16), {"transparency": 3}
    if mode == "RGB clear":
        return plain, {"transparency": plain.getpixel((0, 0))}
    if mode == "PA":
        return plain.quantize(16).convert("PA"), {}
    if mode == "LAB":
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8), "LAB"), {}
    return (image if mode in ("RGBA", "LA") else plain).convert(mode), {}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_cases() -> dict[str, tuple[str, bytes]]:
    """Name -> (suffix, file) of every mode that Pillow writes in a format, and of some odd files."""
    cases: dict[str, tuple[str, bytes]] = {}
    for kind, suffix in SUFFIX.items():
        for mode in MODES:
            image, options = picture(mode)
            try:
                data = saved(image, kind, **options)
            except (OSError, ValueError, KeyError):
                continue  # the format has no such mode
            if mode not in DEEP or open_image(data).mode in HIGH_BIT_DEPTH:  # else clipped by Pillow
                cases[f"{kind} {mode}"] = suffix, data
    turned, frames = Image.Exif(), [picture("P")[0], picture("RGB")[0].convert("P")]
    turned[0x0112] = 6
    cases["JPEG turned"] = "jpeg", saved(picture("RGB")[0], "JPEG", exif=turned)
    cases["GIF moving"] = "gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    cases["WEBP moving"] = "webp", saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    cases["PNG hidden white"] = "png", saved(hidden_white(), "PNG")
    for kind in SUFFIX:
        cases[f"{kind} in .jpg"] = "jpg", cases[f"{kind} RGB"][1]
    return cases


def hidden_white() -> Image.Image:
    """A red square; the rest is clear, and white where that is dropped."""
    image = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    image.paste((200, 30, 30, 255), (6, 4, 14, 12))
    return image


def expected_of(data: bytes) -> np.ndarray:
    """webdataset's pixels; of high bit depth, the image's own range on 0 to 255, in float64."""
    with Image.open(io.BytesIO(data)) as image:
        if not image.mode.startswith(("I", "F")):
            return np.asarray(webdataset.autodecode.ImageHandler("pilrgb")(".png", data))
        values = np.asarray(image, np.float64)
    grey = np.rint((values - values.min()) * (255 / np.ptp(values))).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


CASES = make_cases()
EXPECTED = {name: expected_of(data) for name, (_, data) in CASES.items()}


class Seen:
    """Preprocessing as open_clip's in form, which keeps the pixels that it is given."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []
        self.transforms = [lambda image: image, None, None]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        assert image.mode == "RGB"
        self.pixels.append(np.asarray(image))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


class Model:
    logit_scale = torch.zeros(())

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, :3] + 1

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(tokens), 3)


def encoder_that_sees() -> tuple[Encoder, Seen]:
    seen, model = Seen(), Model()

    def tokens(texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 1)

    return Encoder(model, seen, tokens, embed_dim=3, device="cpu", workers=1), seen  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A shard of all cases; the key and the caption of each is its number."""
    path = tmp_path_factory.mktemp("pool") / "0.tar"
    members = [
        member
        for number, (suffix, data) in enumerate(CASES.values())
        for member in ((f"{number:03d}.{suffix}", data), (f"{number:03d}.txt", str(number).encode()))
    ]
    return scan(str(write_tar(path, members)))[0]


def test_all_modes_and_formats_are_here():
    assert set(SUFFIX) == set(IMAGE_FORMATS)
    assert set(SUFFIX.values()) < set(IMAGE_EXTENSIONS)
    modes = {open_image(data).mode for _, data in CASES.values()}
    assert modes >= {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"}
    assert len(CASES) > 45


# ---- the readers: each gives the pixels of all cases, in their order


def embedding(pool, _folder):
    encoder, seen = encoder_that_sees()
    embed_samples(encoder, iter_samples(pool, None), list(CASES))
    return seen.pixels


def scoring_pairs(pool, _folder):
    encoder, seen = encoder_that_sees()
    embed_pairs(encoder, [pool], read_shard(pool, **SCALE._asdict()).manifest)
    return seen.pixels


def scoring_folders(pool, _folder):
    encoder, pixels = encoder_that_sees()[0], []

    class Folder:
        pixels_key, pixels_of = "as it is", encoder.pixels_of

        def encode_pixels(self, found):
            pixels.extend(found)
            return np.ones((len(found), 3), np.float32)

    embed_split(Folder(), [pool], DecodedImages(), rules=SCALE)  # type: ignore[arg-type]
    return pixels


def searching(_pool, folder):
    encoder, seen = encoder_that_sees()
    for path in written(folder):
        image_query(encoder, path, SCALE)
    return seen.pixels


def mlflow_model(_pool, folder):
    encoder, seen = encoder_that_sees()
    Classifier(encoder).probabilities([str(path) for path in written(folder)], ["a", "b"])
    return seen.pixels


def galleries(_pool, _folder):
    return [np.asarray(small_picture(data, 96)) for _, data in CASES.values()]


def training_reads():
    class Reads:
        def prepare(self, rows):
            pass

        def read(self, row):
            return list(CASES.values())[row][1], ("caption",)

    return Reads()


def training(_pool, _folder):
    seen, rows = Seen(), np.arange(len(CASES))
    samples = Samples(training_reads(), seen, lambda _text: torch.zeros(1, 4), seed=0)
    samples.__getitems__(Wanted(rows, rows))
    return seen.pixels


def validation(_pool, _folder):
    seen, rows = Seen(), len(CASES)
    samples = Samples(training_reads(), seen, lambda _text: torch.zeros(1, 4), seed=0)
    assert sum(len(images) for images, _ in HeldOutPairs(samples, rows, 4)) == rows
    return seen.pixels


def written(folder):
    paths = [folder / f"{number}.{suffix}" for number, (suffix, _) in enumerate(CASES.values())]
    for path, (_, data) in zip(paths, CASES.values(), strict=True):
        path.write_bytes(data)
    return paths


READERS = (
    embedding,
    scoring_pairs,
    scoring_folders,
    searching,
    mlflow_model,
    galleries,
    training,
    validation,
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_bytes_in_pixels_out(reader, pool, tmp_path):
    found = reader(pool, tmp_path)
    assert len(found) == len(CASES)
    wrong = [
        name
        for pixels, (name, expected) in zip(found, EXPECTED.items(), strict=True)
        if not np.array_equal(pixels, expected)
    ]
    assert not wrong


# ---- what is usable


def test_high_bit_depth_is_kept_aside_unless_it_is_to_be_scaled(pool):
    deep = [set(name.split()) & DEEP != set() for name in CASES]
    assert sum(deep) >= 4
    kept = read_shard(pool, max_pixels=10_000).manifest
    assert kept["status"].to_list() == ["high_bit_depth" if it_is else "ok" for it_is in deep]
    assert set(kept.filter(deep)["reason"]) >= {
        "mode F, more than 8 bits a channel; high_bit_depth: scale takes it"
    }
    assert set(read_shard(pool, max_pixels=10_000, high_bit_depth="scale").manifest["status"]) == {"ok"}


def test_in_an_evaluation_folder_and_a_query_the_same_rules_hold(pool, tmp_path):
    encoder, number = encoder_that_sees()[0], list(CASES).index("PNG I;16")
    path = written(tmp_path)[number]
    with pytest.raises(InputError, match=r"\.png is not usable \(high_bit_depth: mode I;16, more"):
        image_query(encoder, path)
    encoder.encode_pixels = lambda pixels: np.ones((len(pixels), 3))  # type: ignore[method-assign]
    damaged = embed_split(encoder, [pool], DecodedImages()).damaged
    assert f"0/{number:03d}: high_bit_depth, mode I;16, more than 8 bits a channel" in damaged[0]


def test_a_scaled_ramp_is_neither_white_nor_black_and_values_that_are_no_numbers_are_damage():
    ramp = np.linspace(1000, 3000, 256).reshape(16, 16).astype(np.uint16)
    grey = np.asarray(to_rgb(saved(Image.fromarray(ramp), "PNG")))[:, :, 0].ravel()
    np.testing.assert_array_equal(grey, np.arange(256))
    broken = saved(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")
    with pytest.raises(UnusableImageError, match="not finite") as caught:
        to_rgb(broken)
    assert caught.value.status == "undecodable_image"


def test_one_colour_is_told_by_what_a_model_sees(tmp_path):
    grey = np.full((8, 8), 700, np.uint16)
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[2:5, 2:5, 3] = 255  # a black icon on clear black
    almost = np.full((8, 8, 3), 7, np.uint8)
    almost[-1, -1, 2] = 8
    cases = {
        "L": (Image.new("L", (8, 8), 9), (9, 9, 9)),
        "P": (Image.new("RGB", (8, 8), "red").quantize(4), (255, 0, 0)),
        "icon": (Image.fromarray(hidden), (0, 0, 0)),
        "deep": (Image.fromarray(grey), (0, 0, 0)),
        "almost": (Image.fromarray(almost), None),
    }
    members = []
    for key, (image, colour) in cases.items():
        data = saved(image, "PNG")
        assert one_colour(open_image(data)) == colour, key
        members += [(f"{key}.png", data), (f"{key}.txt", key.encode())]
    shard = scan(str(write_tar(tmp_path / "s.tar", members)))[0]
    found = read_shard(shard, max_pixels=10_000, high_bit_depth="scale").manifest
    assert found["status"].to_list() == ["one_colour"] * 4 + ["ok"]
    assert found["reason"][1] == "every pixel is (255, 0, 0) in RGB"
    # of no use to train on, but a query of an evaluation set like any other
    assert len(embed_pairs(encoder_that_sees()[0], [shard], found).uids) == 5


@pytest.mark.parametrize(
    ("size", "status"),
    [((341, 1), None), ((1, 341), None), ((1, 342), "too_thin"), ((684, 2), "too_thin"), ((3000, 9), None)],
)
def test_very_thin_images_are_bounded_by_their_size_after_resizing(size, status):
    image = Image.new("RGB", size)
    if status is None:
        check_rules(image, RULES)
        check_rules(image.resize((10_000, 40)), RULES._replace(max_resized_pixels=512 * 512 * 250))
        return
    with pytest.raises(
        UnusableImageError, match=f"{size[0]} x {size[1]}: 89653248 pixels once its"
    ) as caught:
        check_rules(image, RULES)
    assert caught.value.status == status
    check_rules(image, RULES._replace(max_resized_pixels=89_653_248))


def test_thin_images_are_kept_aside_with_a_reason(tmp_path):
    data = saved(picture("RGB")[0].resize((2000, 2)), "PNG")
    shard = scan(str(write_tar(tmp_path / "s.tar", [("a.png", data), ("a.txt", b"line")])))[0]
    (row,) = read_shard(shard, max_pixels=10_000).manifest.iter_rows(named=True)
    assert (row["status"], row["width"], row["height"]) == ("too_thin", 2000, 2)
    assert row["reason"].endswith("262144000 pixels once its short side is 512, over the bound of 89478485")


@pytest.mark.parametrize("kind", sorted(SUFFIX))
def test_pillows_own_bound_has_no_part(kind, monkeypatch, tmp_path):
    """In Pillow 100 pixels are warned of and 200 refused here, by some of its decoders on opening."""
    data = CASES[f"{kind} RGB"][1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    assert to_rgb(data).size == usable_rgb(data, RULES).size == SIZE
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(UnusableImageError, match="24 x 16 = 384 pixels, over the bound of 383"):
        usable_rgb(data, ImageRules(383))
    assert small_picture(data, 96).size == SIZE
    members = [(f"a.{SUFFIX[kind]}", data), ("a.txt", b"words")]
    shard = scan(str(write_tar(tmp_path / "s.tar", members)))[0]
    for bound, status in ((384, "ok"), (383, "too_many_pixels")):
        assert read_shard(shard, max_pixels=bound).manifest["status"][0] == status


def test_training_takes_a_large_image_too(monkeypatch):
    """Pillow would refuse the random crop of it."""
    from open_clip.transform import image_transform

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    vary = image_transform(8, is_train=True, aug_cfg={"scale": (0.9, 1.0)})
    image = to_rgb(CASES["PNG RGB"][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
            vary(image)
        with data_from_index(IndexData("", 1, 0)):
            assert vary(image).shape == (3, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", CASES["PNG RGB"][1][:60], b"II*\0\xff\xff\xff\xff"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_what_cannot_be_decoded_is_one_error(data):
    with pytest.raises(UnusableImageError) as caught:
        usable_rgb(data, RULES)
    assert caught.value.status == "undecodable_image"
    assert str(caught.value)
