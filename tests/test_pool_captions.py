"""`shards.caption`: bytes in, and by every reader the caption out that a plain reading has."""

import json
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from clipcov_pipeline.evaluation.pairs import embed_pairs
from clipcov_pipeline.pool.captions import CaptionRule
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.pool.samples import iter_samples
from clipcov_pipeline.subsets.export import export_subset
from clipcov_pipeline.subsets.files import Members
from clipcov_pipeline.subsets.index import training_rows, whole_index
from clipcov_pipeline.training.index_loader import LocalReads
from clipcov_pipeline.training.remote_reads import RemoteReads
from clipcov_pipeline.training.training_index import read_training_index, write_training_index
from make_shards import image_bytes, write_tar
from range_server import serve

ABSENT = object()
# key -> (.txt or None, what the json has under `re`; bytes: the json itself; None: no json)
SAMPLES: dict[str, tuple[bytes | None, Any]] = {
    "a": (b" an alt text\n", "a dog on grass"),
    "b": (b"  \n", ["two cats", " ", "cats on a sofa", "two cats"]),
    "c": (None, "only in the json"),
    "d": (b"only in the text", None),
    "e": (b"a broken json", b'{"re": "x'),
    "f": (b"a number", 7),
    "g": ("\ufeffwith a mark".encode(), "\ufeff with a mark "),
    "h": ("grüne Äpfel".encode(), "pommes vertes, \u2713 \U0001f34f"),
    "i": (b"key is absent", ABSENT),
    "j": (b"\xff\xfe", "the text is not UTF-8"),
    "k": (b"half a character", "\ud83d"),
    "l": (None, ABSENT),
    "m": (None, None),
    "n": (b" ", ["", " "]),
    "o": (b"no object", b"[1]"),
    "p": (b"mixed", ["a", 1]),
}
RULES: list[Any] = [
    "txt",
    "json:re",
    ["txt", "json:re"],
    ["json:re", "txt"],
    {"from": ["json:re", "txt"], "rule": "join"},
    {"from": "json:re", "rule": "join"},
    {"from": ["txt", "json:re"], "rule": "random"},
    {"from": "json:re", "rule": "random"},
]


def bare(text: str) -> str:
    return text.strip().replace("\ufeff", "").strip()


def texts_there(source: str, text: bytes | None, value: Any) -> list[str]:
    """The captions of a source, read by hand."""
    if source == "txt":
        try:
            return [bare(text.decode())] if text and bare(text.decode()) else []
        except UnicodeDecodeError:
            return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or "\ud83d" in value:
        return []
    return [bare(one) for one in value if bare(one)]


def by_hand(rule: Any, text: bytes | None, value: Any) -> list[str]:
    """The captions that may count; the first is the one that all but trainings take."""
    sources, choice = (rule["from"], rule["rule"]) if isinstance(rule, dict) else (rule, "first")
    sources = [sources] if isinstance(sources, str) else sources
    found = [one for source in sources for one in texts_there(source, text, value)]
    if choice == "join":
        return [" ".join(found)] if found else []
    return list(dict.fromkeys(found))[: None if choice == "random" else 1]


def expected(rule: Any) -> dict[str, list[str]]:
    captions = {key: by_hand(rule, *sample) for key, sample in SAMPLES.items()}
    return {key: found for key, found in captions.items() if found}


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    members = []
    for number, (key, (text, value)) in enumerate(SAMPLES.items()):
        members.append((f"{key}.png", image_bytes(number)))
        meta = value if isinstance(value, bytes) else json.dumps({"re": value} if value is not ABSENT else {})
        if value is not None:
            members.append((f"{key}.json", meta if isinstance(meta, bytes) else meta.encode()))
        if text is not None:
            members.append((f"{key}.txt", text))
    folder = tmp_path_factory.mktemp("pool")
    write_tar(folder / "0.tar", members)
    return folder


def report(pool: Path | str, rule: CaptionRule):
    (shard,) = scan(str(pool))
    return shard, read_shard(shard, max_pixels=10_000, captions=rule)


def index_of(pool: Path | str, rule: CaptionRule) -> tuple[Any, pl.DataFrame]:
    shard, read = report(pool, rule)
    return shard, whole_index(read.places.with_columns(shard=pl.lit(shard.name)))


def manifest(pool: Path, rule: CaptionRule, _: Path) -> dict[str, str]:
    good = report(pool, rule)[1].manifest.filter(pl.col("status") == "ok")
    return dict(good.select("key", "caption").iter_rows())


def embedding(pool: Path, rule: CaptionRule, _: Path) -> dict[str, str]:
    """What embeds, compares early and is shown."""
    (shard,) = scan(str(pool))
    return {sample.key: sample.caption for sample in iter_samples(shard, None, None, rule)}


class Seen:
    """An encoder that only notes what it is given."""

    def encode_images(self, images, _progress=None) -> np.ndarray:
        self.images = list(images)
        return np.zeros((len(self.images), 2), np.float32)

    def encode_texts(self, texts) -> np.ndarray:
        self.texts = list(texts)
        return np.zeros((len(self.texts), 2), np.float32)


def scoring(pool: Path, rule: CaptionRule, _: Path) -> dict[str, str]:
    shard, read = report(pool, rule)
    encoder = Seen()
    pairs = embed_pairs(encoder, [shard], read.manifest, captions=rule)
    assert encoder.images == [image_bytes(list(SAMPLES).index(key)) for key in pairs.keys]
    return dict(zip(pairs.keys, encoder.texts, strict=True))


def tars(pool: Path, rule: CaptionRule, folder: Path) -> dict[str, str]:
    shard, index = index_of(pool, rule)
    (path,) = export_subset(index, [shard], folder / "out", "tars", members=Members(rule))
    with tarfile.open(path) as tar:
        texts = {member.name: tar.extractfile(member) for member in tar if member.name.endswith(".txt")}
        return {name[0]: bare(file.read().decode()) for name, file in texts.items() if file}


def hugging_face(pool: Path, rule: CaptionRule, folder: Path) -> dict[str, str]:
    shard, index = index_of(pool, rule)
    (path,) = export_subset(index, [shard], folder / "out", "hf", members=Members(rule))
    rows = pq.read_table(path).to_pylist()
    return {row["image"]["path"][0]: row["caption"] for row in rows}


def read_back(
    pool: Path | str, rule: CaptionRule, folder: Path, reads: Callable[[Any], Any]
) -> dict[str, Any]:
    shard, index = index_of(pool, rule)
    rows = training_rows(index, [shard])
    path = folder / "index.parquet"
    write_training_index(path, {column.name: column.to_arrow() for column in rows})
    keys = dict(index.select("uid", "key").iter_rows())
    found = reads(read_training_index(path, rule))
    found.prepare(np.arange(rows.height))
    return {keys[uid]: found.read(row)[1] for row, uid in enumerate(rows["uid"])}


def training(pool: Path, rule: CaptionRule, folder: Path) -> dict[str, Any]:
    return read_back(pool, rule, folder, LocalReads)


def training_remotely(pool: Path, rule: CaptionRule, folder: Path) -> dict[str, Any]:
    with serve(pool) as (url, _):
        return read_back(f"{url}/0.tar", rule, folder, lambda index: RemoteReads(index, folder / "cache"))


ONE = (manifest, embedding, scoring, tars, hugging_face)
ALL = (training, training_remotely)


@pytest.mark.parametrize(
    ("reader", "rule"),
    [
        *((reader, rule) for reader in (*ONE, training) for rule in RULES),
        *((training_remotely, rule) for rule in (RULES[1], RULES[3], RULES[6])),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_reader_has_the_caption_of_a_plain_reading(reader, rule, pool, tmp_path) -> None:
    captions: Mapping[str, list[str]] = expected(rule)
    read = reader(pool, CaptionRule.of(rule), tmp_path)
    if reader in ALL:
        assert {key: list(found) for key, found in read.items()} == captions
    else:
        assert read == {key: found[0] for key, found in captions.items()}


def test_what_keeps_a_sample_aside_names_the_key(pool) -> None:
    rows = report(pool, CaptionRule.of("json:re"))[1].manifest.rows_by_key("key", named=True, unique=True)
    assert {key: row["status"] for key, row in rows.items() if row["status"] != "ok"} == {
        **dict.fromkeys("defilmop", "missing_caption"),
        "k": "non_utf8_caption",
        "n": "empty_caption",
    }
    assert {key: rows[key]["reason"] for key in "defknp"} == {
        "d": "no .json member, where the caption is key 're' (there: .png, .txt)",
        "e": "the .json member does not parse, where the caption is key 're' (there: .json, .png, .txt)",
        "f": "key 're' of the .json member is a number, expected a text or a list of texts"
        " (there: .json, .png, .txt)",
        "k": "key 're' of the .json member is no valid Unicode",
        "n": "key 're' of the .json member has nothing but white space",
        "p": "key 're' of the .json member is a list of other things, expected a text or a list of texts"
        " (there: .json, .png, .txt)",
    }
    both = report(pool, CaptionRule.of(["txt", "json:re"]))[1].manifest
    reasons = dict(both.select("key", "reason").filter(pl.col("reason").is_not_null()).iter_rows())
    assert reasons == {
        "l": "no .txt member; no key 're' in the .json member (there: .json, .png)",
        "m": "no .txt member; no .json member, where the caption is key 're' (there: .png)",
        "n": "the .txt member has nothing but white space; key 're' of the .json member has nothing but"
        " white space",
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("json", "found 'json', expected txt, json:KEY, a list of these, or {from"),
        ("json:", "found 'json:', expected txt, json:KEY"),
        ([], "found [], expected txt"),
        (["txt", "txt"], "each source once"),
        ({"from": ["txt"], "rule": "last"}, "found the rule 'last', expected first, random, join"),
        ({"rule": "join"}, "found {'rule': 'join'}, expected txt"),
        ({"from": ["txt"], "rules": "join"}, "expected txt"),
        (7, "found 7, expected txt"),
    ],
)
def test_what_is_no_rule_is_refused(given, says) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        CaptionRule.of(given)


def test_a_rule_is_written_as_it_is_read() -> None:
    for rule in RULES:
        assert CaptionRule.of(CaptionRule.of(rule).written) == CaptionRule.of(rule)
    assert CaptionRule.of(["txt"]).written == CaptionRule.of({"from": "txt"}).written == "txt"
