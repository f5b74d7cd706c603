"""Class names, templates, and the classifier built of them."""

import numpy as np
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.proxy.prompts import (
    class_embeddings,
    imagenet_class_names,
    imagenet_templates,
    load_class_names,
)


class TableEncoder:
    """Embeds a text as the row that a table gives for it."""

    def __init__(self, table):
        self.table = table

    def encode_texts(self, texts):
        return np.array([self.table[text] for text in texts], np.float32)


def test_class_embeddings_are_the_scaled_mean_over_templates():
    encoder = TableEncoder(
        {"a cat": [1, 0, 0], "no cat": [0, 1, 0], "a {x}": [0.6, 0.8, 0], "no {x}": [0.6, 0, 0.8]}
    )
    found = class_embeddings(encoder, ["cat", "{x}"], ["a {}", "no {}"])
    # by hand: (1,1,0)/sqrt(2) and (1.2,0.8,0.8)/sqrt(2.72)
    expected = [[0.70710678, 0.70710678, 0], [0.72760688, 0.48507125, 0.48507125]]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert found.dtype == np.float32


def test_templates_that_cancel_give_a_row_of_nan_without_a_warning():
    encoder = TableEncoder({"a": [1, 0], "not a": [-1, 0], "b": [0, 1], "not b": [0, 1]})
    found = class_embeddings(encoder, ["a", "b"], ["{}", "not {}"])
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1], [0, 1])


@pytest.mark.parametrize(("templates", "says"), [([], "empty"), (["{}", "a photo"], "'a photo'")])
def test_unusable_templates_are_refused(templates, says):
    with pytest.raises(InputError, match=says):
        class_embeddings(TableEncoder({}), ["a"], templates)


def test_imagenet_names_and_templates():
    names, templates = imagenet_class_names(), imagenet_templates()
    assert len(names) == 1000
    assert names[0] == "tench"
    assert len(templates) == 80
    assert templates[0] == "a bad photo of a {}."
    assert all(template.count("{}") == 1 for template in templates)


def test_classifier_is_the_one_that_open_clip_builds():
    import open_clip
    import torch

    from clipcov_pipeline.proxy.encoder import Encoder
    from clipcov_pipeline.proxy.models import register_model_configs

    register_model_configs()
    torch.manual_seed(0)
    model = open_clip.create_model("clipcov-tiny-RN").eval()
    tokenizer = open_clip.get_tokenizer("clipcov-tiny-RN")
    names, templates = ["cat", "blue house", "smiling face"], ["{}", "a drawing of a {}.", "the {}"]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates).T.numpy()
    encoder = Encoder(model, None, tokenizer, embed_dim=128, device="cpu")
    np.testing.assert_allclose(class_embeddings(encoder, names, templates), expected, atol=1e-6)


def write(tmp_path, data):
    path = tmp_path / "names.txt"
    path.write_bytes(data)
    return path


def test_class_names_one_a_line(tmp_path):
    data = "\ufeffcat\n  blue house \r\nétoile\n".encode()
    assert load_class_names(write(tmp_path, data)) == ["cat", "blue house", "étoile"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"cat\ndog\ncat\n cow\ncow\n", "'cat', 'cow' more than once"),
        (b"\n \n", "names no class"),
        (b"", "names no class"),
        (b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_class_lists_are_refused_in_one_line(tmp_path, data, says):
    with pytest.raises(InputError, match=says) as caught:
        load_class_names(write(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_a_missing_class_list_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        load_class_names(tmp_path / "nowhere.txt")
