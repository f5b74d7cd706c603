"""Retrieval and zero-shot scores against brute force and against CLIP_benchmark's own definition."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluation.metrics import (
    record,
    retrieval_chance_level,
    retrieval_recall,
    zero_shot_chance_level,
    zero_shot_metrics,
)
from clipcov_pipeline.evaluation.pairs import embed_pairs, evaluate_names, evaluate_pairs, evaluate_retrieval
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from make_shards import image_bytes, tar_bytes, write_tar

KS = (1, 2, 5, 10)


def unit_rows(seed: int, n: int, dim: int = 16) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute_force_recall(image, text, image_of_caption, ks, shuffles=None) -> dict[str, float]:
    """By sorting: right answers go behind wrong ones that are as similar, or where a shuffle puts them."""
    image, text = image.astype(np.float64), text.astype(np.float64)

    def share(queries, candidates, is_right, k) -> float:
        hits = []
        for q, query in enumerate(queries):
            values = [-round(float(query @ candidate), 5) for candidate in candidates]
            for rng in shuffles or [None]:
                place = (
                    [is_right(q, c) for c in range(len(values))] if rng is None else rng.random(len(values))
                )
                order = sorted(range(len(values)), key=lambda c: (values[c], place[c]))
                hits.append(any(is_right(q, c) for c in order[:k]))
        return float(np.mean(hits))

    recall = {}
    for k in ks:
        recall[f"image_retrieval_recall@{k}"] = share(text, image, lambda t, i: image_of_caption[t] == i, k)
        recall[f"text_retrieval_recall@{k}"] = share(image, text, lambda i, t: image_of_caption[t] == i, k)
    return recall


def clip_benchmark_recall(image, text, image_of_caption, ks) -> dict[str, float]:
    """As CLIP_benchmark defines it (metrics/zeroshot_retrieval.py): any positive among torch's top k."""
    scores = torch.from_numpy(text) @ torch.from_numpy(image).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), torch.from_numpy(image_of_caption)] = True

    def share(scores, positive, k) -> float:
        top = torch.topk(scores, k, dim=1).indices
        return (positive.gather(1, top).sum(1) > 0).float().mean().item()

    return {f"image_retrieval_recall@{k}": share(scores, positive, k) for k in ks} | {
        f"text_retrieval_recall@{k}": share(scores.T, positive.T, k) for k in ks
    }


# --- retrieval -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_recall_is_clip_benchmark_s_where_nothing_ties(captions_per_image):
    image = unit_rows(0, 60)
    image_of_caption = np.random.default_rng(1).permutation(np.repeat(np.arange(60), captions_per_image))
    text = image[image_of_caption] + 1.5 * unit_rows(2, len(image_of_caption))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    ours = retrieval_recall(image, text, image_of_caption, KS)
    assert ours == pytest.approx(clip_benchmark_recall(image, text, image_of_caption, KS))
    assert ours == pytest.approx(brute_force_recall(image, text, image_of_caption, KS))
    assert 0.2 < ours["image_retrieval_recall@1"] < 1


def test_recall_over_several_blocks_is_exact(monkeypatch):
    image, image_of_caption = (
        unit_rows(0, 50),
        np.random.default_rng(1).permutation(np.repeat(np.arange(50), 2)),
    )
    text = unit_rows(2, 100)
    whole = retrieval_recall(image, text, image_of_caption, KS)
    monkeypatch.setattr("clipcov_pipeline.evaluation.metrics._BLOCK_ROWS", 7)
    assert retrieval_recall(image, text, image_of_caption, KS) == whole
    assert whole == pytest.approx(brute_force_recall(image, text, image_of_caption, KS))


def test_ties_count_against_the_model_where_that_is_asked_for():
    image, text = unit_rows(0, 40), unit_rows(0, 40)
    image[10] = image[11] = image[12]
    text[10] = text[11] = text[12]
    text[20] = text[21]
    ours = retrieval_recall(image, text, np.arange(40), KS, "miss")
    assert ours == pytest.approx(brute_force_recall(image, text, np.arange(40), KS))
    # captions 10 to 12 tie with three images; caption 20 is 21's, so misses its own image
    assert ours["image_retrieval_recall@1"] == pytest.approx(36 / 40)
    # images 10 to 12 tie with three captions; 21 ties with two; 20 has lost its caption
    assert ours["text_retrieval_recall@1"] == pytest.approx(35 / 40)


def test_equal_images_that_differ_by_rounding_tie():
    image = np.repeat(unit_rows(0, 1), 2, axis=0)
    text = image.copy()
    image[0] *= np.float32(1 + 2e-7)
    for ties, value in (("miss", 0.0), ("expected", 0.5)):
        assert retrieval_recall(image, text, np.arange(2), (1,), ties) == {
            "image_retrieval_recall@1": value,
            "text_retrieval_recall@1": value,
        }


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_a_tie_counts_its_expected_value(captions_per_image):
    """Beside the mean over random orders: a recall over shuffles is what each copy's chance comes to."""
    of = np.repeat(np.arange(12), captions_per_image)
    image, text = unit_rows(0, 12, 4), unit_rows(0, 12, 4)[of] + 0.4 * unit_rows(5, len(of), 4)
    image[3] = image[4] = image[5]
    text[0], text[7], text[8] = text[9], text[9], text[9]
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    ours = retrieval_recall(image, text, of, KS)
    shuffles = [np.random.default_rng(seed) for seed in range(1500)]
    assert ours == pytest.approx(brute_force_recall(image, text, of, KS, shuffles), abs=0.012)
    assert ours != pytest.approx(retrieval_recall(image, text, of, KS, "miss"), abs=0.012)


def test_ties_as_clip_benchmark_has_them():
    image, text = unit_rows(0, 40), unit_rows(0, 40)
    image[10] = image[11] = image[12]
    text[20] = text[21] = text[22] = text[23] = text[24]
    theirs = clip_benchmark_recall(image, text, np.arange(40), KS)
    assert retrieval_recall(image, text, np.arange(40), KS, "clip_benchmark") == pytest.approx(theirs)


def test_collapsed_models_score_chance_and_diverged_ones_nothing():
    same = np.repeat(unit_rows(0, 1), 30, axis=0)
    level = retrieval_chance_level(np.arange(30), 30, KS)
    assert retrieval_recall(same, same, np.arange(30), KS) == pytest.approx(level)
    assert zero_shot_metrics(same, same, np.arange(30)) == pytest.approx(zero_shot_chance_level(30))
    assert set(retrieval_recall(same, same, np.arange(30), KS, "miss").values()) == {0.0}
    same[:] = np.nan
    for ties in ("expected", "clip_benchmark", "miss"):
        assert set(retrieval_recall(same, same, np.arange(30), KS, ties).values()) == {0.0}
        assert set(zero_shot_metrics(same, same, np.arange(30), ties).values()) == {0.0}


def test_a_nan_row_is_one_miss_and_harms_no_other():
    image = unit_rows(0, 20)
    text = image.copy()
    image[3] = np.nan
    ours = retrieval_recall(image, text, np.arange(20), (1,))
    assert ours == pytest.approx({"image_retrieval_recall@1": 19 / 20, "text_retrieval_recall@1": 19 / 20})


@pytest.mark.parametrize("image_of_caption", [[0, 1], [0, 0, 0], [0, 1, 3], [0, 1, -1]])
def test_pairs_that_do_not_fit_are_refused(image_of_caption):
    with pytest.raises(ValueError, match="image"):
        retrieval_recall(unit_rows(0, 3), unit_rows(1, 3), np.array(image_of_caption))


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_retrieval_chance_level_is_what_random_embeddings_score(captions_per_image):
    image_of_caption = np.repeat(np.arange(20), captions_per_image)
    runs = [
        retrieval_recall(
            unit_rows(2 * run, 20, 64),
            unit_rows(2 * run + 1, len(image_of_caption), 64),
            image_of_caption,
            KS,
        )
        for run in range(300)
    ]
    for name, level in retrieval_chance_level(image_of_caption, 20, KS).items():
        assert np.mean([run[name] for run in runs]) == pytest.approx(level, abs=0.02)


# --- zero-shot -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_zero_shot_against_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    image, classifier = unit_rows(0, 200), unit_rows(1, 12)
    # class 11 has no image
    targets = np.random.default_rng(2).choice(11, size=200, p=np.arange(1, 12) / 66)
    image += 0.8 * classifier[targets]
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    scores = image @ classifier.T
    ours = zero_shot_metrics(image, classifier, targets)
    assert ours["acc1"] == pytest.approx(top_k_accuracy_score(targets, scores, k=1, labels=range(12)))
    assert ours["acc5"] == pytest.approx(top_k_accuracy_score(targets, scores, k=5, labels=range(12)))
    assert ours["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(targets, scores.argmax(1)))


def test_zero_shot_ties_count_by_the_rule_chosen():
    classifier = unit_rows(0, 6)
    classifier[1] = classifier[0]
    ours = zero_shot_metrics(classifier, classifier, np.arange(6), "miss")
    assert ours == pytest.approx({"acc1": 4 / 6, "acc5": 1.0, "mean_per_class_recall": 4 / 6})
    ours = zero_shot_metrics(classifier, classifier, np.arange(6))
    assert ours == pytest.approx({"acc1": 5 / 6, "acc5": 1.0, "mean_per_class_recall": 5 / 6})


def test_zero_shot_chance_level():
    assert zero_shot_chance_level(1869)["acc5"] == pytest.approx(5 / 1869)
    assert zero_shot_chance_level(3) == pytest.approx(
        {"acc1": 1 / 3, "acc5": 1, "mean_per_class_recall": 1 / 3}
    )


@pytest.mark.parametrize("targets", [[0, 1], [0, 1, 6], [0, 1, -1]])
def test_targets_that_do_not_fit_are_refused(targets):
    with pytest.raises(ValueError, match="targets"):
        zero_shot_metrics(unit_rows(0, 3), unit_rows(1, 6), np.array(targets))


# --- records ---------------------------------------------------------------------------------------------


def test_record_has_clip_benchmark_s_shape():
    made = record("set", "zeroshot_retrieval", "ViT-B-32", "x.pt", {"a": 0.5}, 10, seed=3)
    back = json.loads(json.dumps(made))
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= back.keys()
    assert back["metrics"] == {"a": 0.5}
    assert (back["n_samples"], back["seed"], back["language"]) == (10, 3, "en")
    with pytest.raises(ValueError, match="a is nan"):
        record("set", "zeroshot_retrieval", "m", "p", {"a": float("nan")}, 10)


# --- from shards to records ---------------------------------------------------------------------------------


class PixelEncoder:
    """Embeds an image as its pixels, and the text `noise SEED` as the pixels of the image of this seed."""

    def encode_images(self, images: Iterable[bytes], progress=None) -> np.ndarray:
        rows = []
        for done, image in enumerate(images, 1):
            pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), np.float32).ravel()
            rows.append((pixels - pixels.mean()) / np.linalg.norm(pixels - pixels.mean()))
            if progress:
                progress(done)
        return np.stack(rows)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.encode_images([image_bytes(int(text.split()[-1])) for text in texts])


def noise(key: str, seed: int, caption_seed: int | None = None):
    caption = f"noise {seed if caption_seed is None else caption_seed}"
    return [(f"{key}.png", image_bytes(seed)), (f"{key}.txt", caption.encode())]


@pytest.fixture
def evaluation_set(tmp_path):
    """Twelve readable pairs in two shards, `a` with two damaged ones; two images share a name."""
    first = [m for i in range(6) for m in noise(f"{i:03d}", i)]
    damaged = [("100.png", b"broken"), ("100.txt", b"noise 100"), ("101.txt", b"noise 101")]
    second = [m for i in range(6, 11) for m in noise(f"{i:03d}", i)] + noise("011", 11, caption_seed=10)
    write_tar(tmp_path / "set" / "a.tar", first[:4] + damaged + first[4:])
    write_tar(tmp_path / "set" / "b.tar", second)
    shards = scan(str(tmp_path / "set"))
    return shards, pl.concat(read_shard(shard, max_pixels=10_000).manifest for shard in shards)


NAMED: Any = {"dataset": "set", "model": "pixels", "pretrained": "none"}


def test_evaluation_reads_each_image_once_and_counts_the_damaged(evaluation_set):
    shards, manifest = evaluation_set
    steps: list[int] = []
    pairs = embed_pairs(PixelEncoder(), shards, manifest, progress=steps.append)
    retrieval, names = evaluate_pairs(PixelEncoder(), pairs, **NAMED, tasks=("retrieval", "zeroshot_names"))
    assert steps == list(range(1, 13))
    assert (retrieval["task"], names["task"]) == ("zeroshot_retrieval", "zeroshot_classification")
    for made in (retrieval, names):
        assert (made["n_samples"], made["n_damaged"], made["n_without_embedding"]) == (12, 2, 0)
        assert made["metrics"].keys() == made["chance"].keys()
    # images 10 and 11 share the name "noise 10", which is image 10's
    assert retrieval["metrics"]["image_retrieval_recall@1"] == pytest.approx(11 / 12)
    # image 10 has its own caption and 11's, which is the same text
    assert retrieval["metrics"]["text_retrieval_recall@1"] == pytest.approx(10.5 / 12)
    assert retrieval["ties"] == names["ties"] == "expected"
    assert retrieval["chance"]["image_retrieval_recall@5"] == pytest.approx(5 / 12)
    assert names["n_classes"] == 11
    assert names["metrics"]["acc1"] == pytest.approx(11 / 12)
    assert names["chance"]["acc1"] == pytest.approx(1 / 11)


def test_unique_leaves_out_repeated_captions_and_images(tmp_path):
    members = [*noise("0", 0), *noise("1", 1), *noise("2", 2, caption_seed=1), *noise("3", 0, caption_seed=3)]
    shards = scan(str(write_tar(tmp_path / "s.tar", members)))
    pairs = embed_pairs(PixelEncoder(), shards, read_shard(shards[0], max_pixels=10_000).manifest)
    made = evaluate_retrieval(pairs, **NAMED, unique=True)
    assert (made["n_samples"], made["n_left_out"]) == (2, 2)
    assert set(made["metrics"].values()) == {1.0}


def test_a_filtered_manifest_evaluates_just_its_rows(evaluation_set):
    shards, manifest = evaluation_set
    chosen = manifest.filter(pl.col("key").is_in(["001", "004", "009"]))
    pairs = embed_pairs(PixelEncoder(), shards, chosen)
    assert pairs.captions == ["noise 1", "noise 4", "noise 9"]
    assert pairs.uids == chosen["uid"].to_list()
    assert np.einsum("ij,ij->i", pairs.image_embedding, pairs.text_embedding) == pytest.approx(np.ones(3))


def test_shards_that_nothing_is_chosen_of_are_not_opened(evaluation_set):
    shards, manifest = evaluation_set
    Path(shards[0].url).unlink()
    pairs = embed_pairs(PixelEncoder(), shards, manifest.filter(pl.col("shard") == "b"))
    assert pairs.keys == ["006", "007", "008", "009", "010", "011"]


def test_rows_follow_the_shards_whatever_the_manifest_s_order(evaluation_set):
    shards, manifest = evaluation_set
    by_shard = manifest.sort("shard", descending=True, maintain_order=True)
    pairs = embed_pairs(PixelEncoder(), shards, by_shard)
    good = np.einsum("ij,ij->i", pairs.image_embedding, pairs.text_embedding) > 0.999
    assert good.sum() == 11


def test_prompt_templates_are_averaged(evaluation_set):
    shards, manifest = evaluation_set
    pairs = embed_pairs(PixelEncoder(), shards, manifest.filter(pl.col("key") != "011"))
    made = evaluate_names(PixelEncoder(), pairs, **NAMED, templates=["{}", "a picture of {}"])
    assert made["metrics"] == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0}
    for templates, words in ((["a picture"], "'a picture' has no {}"), ([], "the list is empty")):
        with pytest.raises(InputError, match=words):
            evaluate_names(PixelEncoder(), pairs, **NAMED, templates=templates)


def test_set_without_a_readable_pair(tmp_path):
    shards = scan(str(write_tar(tmp_path / "s.tar", [("a.txt", b"x")])))
    with pytest.raises(InputError, match="none of its 1 pairs is readable"):
        embed_pairs(PixelEncoder(), shards, read_shard(shards[0], max_pixels=10_000).manifest)


def test_shard_that_changed_since_its_manifest(evaluation_set):
    shards, manifest = evaluation_set
    with pytest.raises(InputError, match="shard b of the manifest is gone"):
        embed_pairs(PixelEncoder(), shards[:1], manifest)
    Path(shards[1].url).write_bytes(tar_bytes([m for i in (6, 8, 7) for m in noise(f"{i:03d}", i)]))
    with pytest.raises(InputError, match="shard b no longer holds sample '007'"):
        embed_pairs(PixelEncoder(), shards, manifest)


def test_damaged_pairs_are_named(evaluation_set):
    shards, manifest = evaluation_set
    pairs = embed_pairs(PixelEncoder(), shards, manifest)
    named = ["a/100: not an image of the formats", "a/101: no member"]
    for made in evaluate_pairs(PixelEncoder(), pairs, **NAMED, tasks=("retrieval", "zeroshot_names")):
        assert [text[: len(start)] for text, start in zip(made["damaged"], named, strict=True)] == named
