"""Evaluation folders in CLIP_benchmark's layout: against CLIP_benchmark's definitions, and broken."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluation.folder_scores import FolderSet, evaluate_folder
from clipcov_pipeline.evaluation.folders import list_split, read_class_names, read_templates
from clipcov_pipeline.evaluation.splits import DecodedImages, draw, kept_bytes
from clipcov_pipeline.experiment.config.evaluate import EvaluationSet
from clipcov_pipeline.experiment.evaluation_folders import list_folder
from clipcov_pipeline.proxy.encoder import Encoder
from clipcov_pipeline.proxy.models import register_model_configs
from clipcov_pipeline.proxy.prompts import class_embeddings
from make_benchmark import labelled, patches, write_classification, write_split
from make_shards import write_tar

NAMES = ["tench", "goldfish", "great white shark", "stingray", "hen", "ostrich"]
MODEL = "clipcov-tiny-RN"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """A real model with random weights."""
    import open_clip

    register_model_configs()
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL)
    return Encoder(
        model.eval(), preprocess, open_clip.get_tokenizer(MODEL), embed_dim=128, device="cpu", batch_size=7
    )


def score(encoder: Encoder, folder: Path, decoded: DecodedImages | None = None, **settings) -> list[dict]:
    chosen = EvaluationSet(benchmark=str(folder), **settings)
    shards, _ = list_folder("set", folder, chosen)
    return evaluate_folder(
        encoder, FolderSet.open("set", folder, chosen, shards), model=MODEL, pretrained="random",
        decoded=decoded or DecodedImages(),
        classifier=lambda names, templates: class_embeddings(encoder, names, templates),
    )  # fmt: skip


def images_of(encoder: Encoder, folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and targets by the webdataset library and open_clip's own preprocessing."""
    import webdataset

    urls = sorted(str(path) for path in (folder / split).glob("*.tar"))
    rows = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("webp", "cls")
    pixels, targets = zip(*((encoder.preprocess(image), label) for image, label in rows), strict=True)
    with torch.no_grad():
        embedded = encoder.model.encode_image(torch.stack(pixels))  # type: ignore[operator]
    return embedded / embedded.norm(dim=-1, keepdim=True), torch.tensor(targets)


def classifier_of(encoder: Encoder, folder: Path) -> torch.Tensor:
    """As CLIP_benchmark's `zero_shot_classifier`: [d, n_classes]."""
    names = [line.strip() for line in (folder / "classnames.txt").read_text().splitlines()]
    file = folder / "zeroshot_classification_templates.txt"
    templates = [line.strip() for line in file.read_text().splitlines()]
    columns = []
    with torch.no_grad():
        for name in names:
            texts = encoder.tokenizer([template.format(c=name) for template in templates])
            rows = encoder.model.encode_text(texts)  # type: ignore[operator]
            mean = (rows / rows.norm(dim=-1, keepdim=True)).mean(dim=0)
            columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


def test_zero_shot_scores_are_clip_benchmark_s(encoder, tmp_path):
    from sklearn.metrics import balanced_accuracy_score

    folder = write_classification(tmp_path / "set", NAMES, {"test": 9})
    (found,) = score(encoder, folder, tasks=["zeroshot_classification"])
    images, targets = images_of(encoder, folder, "test")
    logits = images @ classifier_of(encoder, folder)
    top = logits.topk(5, dim=1).indices == targets[:, None]
    assert found["metrics"] == pytest.approx(
        {
            "acc1": top[:, :1].any(1).float().mean().item(),
            "acc5": top.any(1).float().mean().item(),
            "mean_per_class_recall": balanced_accuracy_score(targets, logits.argmax(1)),
        }
    )
    fields = {key: found[key] for key in ("dataset", "model", "pretrained", "task", "language")}
    assert fields == {
        "dataset": "set",
        "model": MODEL,
        "pretrained": "random",
        "task": "zeroshot_classification",
        "language": "en",
    }
    assert (found["n_samples"], found["n_classes"], found["n_damaged"]) == (54, 6, 0)
    assert found["chance"]["acc1"] == pytest.approx(1 / 6)


def test_probe_and_neighbours_learn_from_the_train_split(encoder, tmp_path):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 5, "train": 12})
    probe, knn = score(encoder, folder, tasks=["linear_probe", "knn"])
    (train, labels), (test, targets) = (images_of(encoder, folder, split) for split in ("train", "test"))
    nearest = (test @ train.T).topk(20, dim=1)
    votes = torch.zeros(len(test), len(NAMES)).scatter_add(
        1, labels[nearest.indices], ((nearest.values - 1) / 0.07).exp()
    )
    assert knn["metrics"] == pytest.approx({"knn_acc1": (votes.argmax(1) == targets).float().mean().item()})
    assert (knn["k"], knn["n_train"], knn["n_samples"]) == (20, 72, 30)
    assert set(probe["metrics"]) == {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall"}
    assert (probe["n_train"], probe["n_valid"], probe["n_samples"]) == (72, 14, 30)
    (bounded,) = score(encoder, folder, tasks=["knn"], probe_samples=18)
    assert bounded["n_train"] == 18


def test_a_folder_s_own_validation_split_is_taken(encoder, tmp_path):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 3, "train": 6, "valid": 4})
    (probe,) = score(encoder, folder, tasks=["linear_probe"])
    assert (probe["valid_split"], probe["n_valid"], probe["n_train"]) == ("the folder's own", 24, 60)


def test_a_validation_split_without_labels_is_passed_over(encoder, tmp_path):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 3, "train": 12})
    write_split(folder, "valid", [[("v.webp", patches(1))]])
    (probe,) = score(encoder, folder, tasks=["linear_probe"])
    assert (probe["valid_split"] != "the folder's own", probe["n_valid"], probe["n_train"]) == (True, 14, 72)


def test_a_train_split_without_labels_is_told(encoder, tmp_path):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 3})
    write_split(folder, "train", [[("t.webp", patches(1))]])
    with pytest.raises(InputError, match=r"set: no image of its train split has a \.cls member"):
        score(encoder, folder, tasks=["knn"])


def test_retrieval_with_several_captions_an_image(encoder, tmp_path):
    captions = {index: [f"caption {index} {word}" for word in "abc"[: 1 + index % 3]] for index in range(12)}
    members = [
        member
        for index, lines in captions.items()
        for member in ((f"{index}.webp", patches(index)), (f"{index}.txt", "\n".join(lines).encode()))
    ]  # fmt: skip
    write_split(tmp_path, "test", [members[:10], members[10:]])
    (found,) = score(encoder, tmp_path, tasks=["retrieval"])
    pixels = torch.stack([encoder.preprocess(Image.open(io.BytesIO(d))) for n, d in members if "webp" in n])
    texts = encoder.tokenizer([line for lines in captions.values() for line in lines])
    with torch.no_grad():
        image, text = encoder.model.encode_image(pixels), encoder.model.encode_text(texts)  # type: ignore[operator]
    scores = (text / text.norm(dim=1, keepdim=True)) @ (image / image.norm(dim=1, keepdim=True)).T
    of_image = torch.tensor([index for index, lines in captions.items() for _ in lines])
    positive = of_image[:, None] == torch.arange(12)

    def share(scores, positive, k) -> float:  # CLIP_benchmark's recall_at_k, then > 0
        return (positive.gather(1, scores.topk(k, dim=1).indices).sum(1) > 0).float().mean().item()

    expected = {f"image_retrieval_recall@{k}": share(scores, positive, k) for k in (1, 5, 10)}
    expected |= {f"text_retrieval_recall@{k}": share(scores.T, positive.T, k) for k in (1, 5, 10)}
    assert found["metrics"] == pytest.approx(expected)
    assert (found["n_samples"], found["n_captions"], found["task"]) == (12, 24, "zeroshot_retrieval")


def test_damaged_images_are_counted_and_in_no_denominator(encoder, tmp_path):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 2})
    bad = [
        ("broken.webp", b"RIFF no image"),
        ("broken.cls", b"1"),
        ("unlabelled.webp", patches(3)),
    ]
    write_split(folder, "test", [labelled("good", 2, 7), [*bad, *labelled("fine", 3, 8)]])
    (found,) = score(encoder, folder, tasks=["zeroshot_classification"])
    assert (found["n_samples"], found["n_damaged"]) == (2, 2)
    assert "broken" in found["damaged"][0]
    write_split(folder, "test", [[*bad[:2]]])
    with pytest.raises(InputError, match=r"none of its 1 images is readable, first test__0/broken: "):
        score(encoder, folder, tasks=["zeroshot_classification"])


def test_images_are_decoded_once_for_all_checkpoints_as_memory_allows(encoder, tmp_path, monkeypatch):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 4, "train": 4})
    decoded, small = DecodedImages(), DecodedImages(max_bytes=1000)
    tasks = ["zeroshot_classification", "linear_probe", "knn"]
    first = score(encoder, folder, decoded, tasks=tasks)
    assert score(encoder, folder, small, tasks=tasks) == first
    assert small.used <= 1000
    count = []
    monkeypatch.setattr(Encoder, "pixels_of", lambda *_: count.append(1))
    assert score(encoder, folder, decoded, tasks=tasks) == first
    assert not count


@pytest.mark.parametrize(
    ("free", "limit", "processes", "kept"),
    [(100, None, 1, 50), (100, "max", 4, 12.5), (100, 16, 1, 8), (16, 100, 2, 4), (1, None, 1, 1)],
)
def test_decoded_images_may_take_a_share_of_the_free_memory(
    monkeypatch, tmp_path, free, limit, processes, kept
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free << 30))
    monkeypatch.setattr("clipcov_pipeline.evaluation.splits.CONTAINER_LIMIT", tmp_path / "memory.max")
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit if limit == 'max' else limit << 30}\n")
    assert kept_bytes(processes) == kept * 2**30


def test_the_draw_for_the_probe_is_by_class(tmp_path):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 1, "train": 10})
    chosen = EvaluationSet(benchmark=str(folder), tasks=("knn",))
    shards, _ = list_folder("set", folder, chosen)
    drawn = draw([shard for shard in shards if shard.name.startswith("train")], 12)
    by_class = np.bincount([int(key[1:]) % len(NAMES) for _, key in drawn])
    assert by_class.tolist() == [2] * len(NAMES)


def test_templates_in_both_spellings_and_from_the_yaml(encoder, tmp_path):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 1}, templates="a {c}\n\nthe {}\n")
    assert read_templates(folder) == ["a {}", "the {}"]
    (folder / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(
        InputError, match=r"evaluate.sets.set: .*templates.txt is missing: add it, or give `tem"
    ):
        score(encoder, folder, tasks=["zeroshot_classification"])
    (found,) = score(encoder, folder, tasks=["zeroshot_classification"], templates=["a {}", "the {}"])
    assert (found["n_templates"], found["templates_from"]) == (2, "yaml")


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / "test" / "1.tar").unlink(), r"1.tar is missing, .* says 2 shards"),
        (lambda f: (f / "test" / "nshards.txt").write_text("many"), "holds 'many', expected the number"),
        (lambda f: (f / "test" / "nshards.txt").unlink(), "nshards.txt is missing: is this a folder"),
        (lambda f: (f / "classnames.txt").unlink(), "classnames.txt is missing: write one class name a line"),
        (lambda f: (f / "classnames.txt").write_text("a\nb\n"), "found the class index 5, expected below 2"),
        (lambda f: (f / "classnames.txt").write_bytes(b"\xff\xfe\xfa"), "cannot be read as UTF-8"),
        (lambda f: (f / "zeroshot_classification_templates.txt").write_text("a photo"), "found 'a photo'"),
        (lambda f: (f / "test" / "0.tar").write_bytes(b"no tar at all" * 99), "copy the folder again"),
        (lambda f: (f / "dataset_type.txt").write_text("multilabel"), "says multilabel, expected"),
        (lambda f: (f / "dataset_type.txt").write_text("retrieval"), "expected retrieval alone"),
        (lambda f: write_tar(f / "test" / "0.tar", labelled("x", "cat", 1)), None),
    ],
)  # fmt: skip
def test_broken_folders_are_named_in_one_line(encoder, tmp_path, break_it, says):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 2})
    break_it(folder)
    if says is None:
        assert score(encoder, folder, tasks=["zeroshot_classification"])[0]["n_damaged"] == 1
        return
    with pytest.raises(InputError, match=says) as error:
        score(encoder, folder, tasks=["zeroshot_classification"])
    assert "\n" not in str(error.value)


def test_a_probe_needs_a_train_split(encoder, tmp_path):
    folder = write_classification(tmp_path / "set", NAMES, {"test": 2})
    with pytest.raises(InputError, match=r"train/nshards.txt is missing"):
        score(encoder, folder, tasks=["linear_probe"])
    write_split(folder, "train", [labelled("only", 0, 1)])
    with pytest.raises(InputError, match=r"split: found 'train', expected another"):
        score(encoder, folder, tasks=["knn"], split="train")


def test_list_files_are_read_as_clip_benchmark_reads_them(tmp_path):
    """Its builder: `[line.strip() for line in text.splitlines() if line.strip()]`, and `int(text)`."""
    (tmp_path / "classnames.txt").write_bytes(b"\xef\xbb\xbf tench\r\n\r\nhen \n  \nhen\n\n")
    assert read_class_names(tmp_path) == ["tench", "hen", "hen"]
    (tmp_path / "zeroshot_classification_templates.txt").write_text("\na {c}.\n\n{c}\n")
    assert read_templates(tmp_path) == ["a {}.", "{}"]
    write_tar(tmp_path / "test" / "0.tar", [("a.txt", b"x")])
    for text in ("1", " +1\n", "\ufeff1\r\n"):
        (tmp_path / "test" / "nshards.txt").write_text(text, encoding="utf-8")
        assert len(list_split("set", tmp_path, "test")) == 1
    for text in ("", "0", "-1", "one"):
        (tmp_path / "test" / "nshards.txt").write_text(text)
        with pytest.raises(InputError, match="expected the number of shards"):
            list_split("set", tmp_path, "test")
    (tmp_path / "classnames.txt").write_text("\n \n")
    with pytest.raises(InputError, match="found no class name"):
        read_class_names(tmp_path)
