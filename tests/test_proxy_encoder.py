"""Which models may be named, and that embeddings are those that open_clip gives."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.samples import Sample
from clipcov_pipeline.proxy.embeddings import embed_samples
from clipcov_pipeline.proxy.encoder import Encoder, load_encoder
from clipcov_pipeline.proxy.models import ModelSpec, check_model, register_model_configs, resolve_device

MODEL = "clipcov-tiny-RN"


def encoded(seed=0, mode="RGB", size=(40, 56), kind="png"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, *channels), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels, mode).save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import open_clip
    import torch

    register_model_configs()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(open_clip.create_model(MODEL).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return load_encoder(ModelSpec(MODEL, checkpoint), device="cpu", batch_size=4)


# ---- naming a model


def test_known_models_pass_without_importing_torch(tmp_path):
    weights = tmp_path / "w.pt"
    weights.touch()
    code = (
        "import sys; from clipcov_pipeline.proxy.encoder import ModelSpec, check_model;"
        f"[check_model(ModelSpec(*s)) for s in [('ViT-B-32', None), ('{MODEL}', {str(weights)!r})]];"
        "assert not {'torch', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (ModelSpec("clipcov-tny-RN"), "did you mean clipcov-tiny-RN"),
        (ModelSpec("ViT-B/32"), "ViT-B-32"),
        (ModelSpec("@@"), "list_models"),
        (ModelSpec("ViT-B-32", "/nowhere/x.pt"), "no checkpoint file at /nowhere/x.pt"),
        (ModelSpec("ViT-B-32", "weights.bin"), "no checkpoint file at weights.bin"),
        (ModelSpec("ViT-B-32", "opnai"), "choose one of openai, "),
        (ModelSpec(MODEL, "openai"), "this architecture has none"),
        (ModelSpec("ViT-B-32", "openai"), "'ViT-B-32-quickgelu'"),
        (ModelSpec("local-dir:/nowhere"), "no open_clip_config.json"),
        (ModelSpec("hf-hub:a/b", "openai"), "leave pretrained out"),
    ],
)
def test_models_that_cannot_be_had_are_refused_in_one_line(spec, says):
    with pytest.raises(InputError) as caught:
        check_model(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tags_of_open_clip_pass():
    check_model(ModelSpec("ViT-B-32", "laion2b_s34b_b79k"))
    check_model(ModelSpec("ViT-B-32-quickgelu", "openai"))


def test_weights_must_be_named_and_fit(checkpoint, tmp_path):
    with pytest.raises(InputError, match="random"):
        load_encoder(ModelSpec(MODEL))
    with pytest.raises(InputError, match="cannot be loaded into model ViT-S-16"):
        load_encoder(ModelSpec("ViT-S-16", checkpoint), device="cpu")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=r"broken\.pt cannot be loaded") as caught:
        load_encoder(ModelSpec(MODEL, str(broken)), device="cpu")
    assert "\n" not in str(caught.value)


def test_an_absent_device_is_refused():
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(InputError, match="tpu"):
        resolve_device("tpu")


# ---- embedding


def test_embeddings_are_open_clips_own(encoder, checkpoint):
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(MODEL, pretrained=checkpoint)
    model.eval()
    tokenizer = open_clip.get_tokenizer(MODEL)
    kinds = [("RGB", "webp"), ("L", "png"), ("RGBA", "png"), ("RGB", "jpeg")]
    images = [encoded(seed, *[kinds[seed % 4][0]], kind=kinds[seed % 4][1]) for seed in range(10)]
    texts = [f"drawing of {seed} " + "long words " * seed for seed in range(10)]
    with torch.no_grad():
        # as open_clip_train and CLIP_benchmark hand them over
        opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        pixels = torch.stack([preprocess(image) for image in opened])
        expected_images = model.encode_image(pixels, normalize=True).numpy()
        expected_texts = model.encode_text(tokenizer(texts), normalize=True).numpy()
    found_images, found_texts = encoder.encode_images(images), encoder.encode_texts(texts)
    assert found_images.dtype == found_texts.dtype == np.float32
    assert found_images.shape == found_texts.shape == (10, encoder.embed_dim)
    np.testing.assert_allclose(found_images, expected_images, atol=1e-6)
    np.testing.assert_allclose(found_texts, expected_texts, atol=1e-6)


def test_opened_images_are_taken_too(encoder):
    image = encoded(3)
    np.testing.assert_array_equal(
        encoder.encode_images([Image.open(io.BytesIO(image))]), encoder.encode_images([image])
    )


def test_nothing_gives_no_rows(encoder):
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, encoder.embed_dim)


def test_images_are_read_at_most_two_batches_ahead(encoder):
    read, ahead = 0, []

    def images():
        nonlocal read
        for seed in range(30):
            read += 1
            yield encoded(seed)

    encoder.encode_images(images(), lambda done: ahead.append(read - done))
    assert len(ahead) == 8
    assert max(ahead) <= 2 * encoder.batch_size


def samples_of(images):
    return [Sample(f"k{i}", image, "png", f"drawing {i}", None) for i, image in enumerate(images)]


def test_samples_without_an_embedding_are_refused(encoder):
    images = [encoded(seed) for seed in range(6)]
    images[2] = b"no image"
    images[5] = images[5][: len(images[5]) // 2]
    progress = []
    found = embed_samples(encoder, iter(samples_of(images)), list("abcdef"), progress=progress.append)
    assert found.uids == ["a", "b", "d", "e"]
    assert found.refused == [("c", "image_embedding_invalid"), ("f", "image_embedding_invalid")]
    assert progress == [4, 6]
    good = encoder.encode_images([images[row] for row in (0, 1, 3, 4)])
    np.testing.assert_allclose(found.image_embedding, good, atol=1e-3)
    for rows in (found.image_embedding, found.text_embedding):
        assert rows.dtype == np.float16
        np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=5e-4)


def test_nan_and_zero_outputs_are_refused():
    import torch

    class Odd(torch.nn.Module):
        """Image embedding: the mean colour; text embedding: NaN where the first token is 1."""

        def encode_image(self, pixels):
            return pixels.mean((2, 3))

        def encode_text(self, tokens):
            return torch.where(tokens[:, :1] == 1, torch.nan, tokens.float())

    def pixels(image):
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / np.float32(255))

    def tokenizer(texts):
        return torch.tensor([[int(text[-1] == "2"), 2, 3] for text in texts])

    black = io.BytesIO()
    Image.new("RGB", (56, 40)).save(black, "png")
    encoder = Encoder(Odd(), pixels, tokenizer, embed_dim=3, device="cpu", batch_size=4)
    images = [black.getvalue(), encoded(1), encoded(2), encoded(3)]
    found = embed_samples(encoder, samples_of(images), list("abcd"))
    assert found.refused == [("a", "image_embedding_invalid"), ("c", "text_embedding_invalid")]
    assert found.uids == ["b", "d"]


def test_uids_must_match_the_samples(encoder):
    with pytest.raises(ValueError, match="3 uids for 2 samples"):
        embed_samples(encoder, samples_of([encoded(0), encoded(1)]), list("abc"))
