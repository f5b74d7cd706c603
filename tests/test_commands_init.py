"""`clipcov init`: what it writes for real shards can be checked and run."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.load import load_config
from clipcov_pipeline.experiment.preflight import preflight
from clipcov_pipeline.experiment.starter import Look, starter
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from lab import Lab
from make_shards import image_bytes, sample_members, write_pool, write_tar
from make_tables import write_folder, write_hf


def init(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["init", *map(str, arguments)])


def test_what_it_writes_can_run(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", n_shards=4, samples_per_shard=250)
    result = init(tmp_path / "pool", "--out", tmp_path / "mine" / "e.yaml", "--name", "mine")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("4 shards, 1,000 samples, ")
    config = load_config(str(tmp_path / "mine" / "e.yaml"))
    assert (config.name, config.train.batch_size, config.train.samples_seen) == ("mine", 32, 2720)
    assert preflight(config, measure=False).can_run
    with pytest.raises(InputError, match="expected a new file"):
        raise init(tmp_path / "pool", "--out", tmp_path / "mine" / "e.yaml").exception or AssertionError


@pytest.mark.parametrize(
    ("folder", "name"), [("pool #1", "no"), ("my: pool", "1e3"), ("it's [a] pool", "pool")]
)
def test_names_that_yaml_takes_for_other_things_are_quoted(tmp_path: Path, folder: str, name: str) -> None:
    write_pool(tmp_path / folder, n_shards=1, samples_per_shard=10)
    result = init(tmp_path / folder, "--out", tmp_path / "e.yaml", "--name", name)
    assert result.exit_code == 0, result.output
    config = load_config(str(tmp_path / "e.yaml"))
    assert (config.shards.source, config.name) == (str(tmp_path / folder), name)


@pytest.mark.slow
def test_its_selection_runs_as_it_is(sample_shards: Path, tmp_path: Path) -> None:
    assert init(sample_shards / "00000.tar", "--out", tmp_path / "experiment.yaml").exit_code == 0
    lab = Lab(tmp_path)
    executed = lab.run(
        ("raw_shards", "proxy_model", "embeddings", "pseudo_labels", "sample_index", "rankings")
    )
    assert executed["rankings"] == 3


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a.txt", b"no image")], "found no image with a caption of one key in 0, expected KEY.jpg"),
        ([("a.png", b"no image"), ("a.txt", b"x")], "found no image with a caption"),
    ],
)
def test_shards_without_pairs_are_refused(members: list, says: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "pool" / "0.tar", members)
    error = init(tmp_path / "pool", "--out", tmp_path / "e.yaml").exception
    assert isinstance(error, InputError)
    assert says in str(error)
    assert not (tmp_path / "e.yaml").exists()


@pytest.mark.parametrize("with_txt", [True, False])
def test_texts_in_the_json_are_named_and_read_where_there_is_no_txt(with_txt: bool, tmp_path: Path) -> None:
    more = {
        "re_caption": "a dog on grass",
        "more, of them": ["two dogs", "a dog again"],
        "url": "http://a/b c",
        "exif": '{"a": "b c"}',
    }
    members = [
        member
        for number in range(4)
        for member in sample_members(f"{number}", f"caption {number}", number, **more)
        if with_txt or not member[0].endswith(".txt")
    ]
    write_tar(tmp_path / "pool" / "0.tar", members)
    result = init(tmp_path / "pool", "--out", tmp_path / "e.yaml")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in (tmp_path / "e.yaml").read_text().splitlines() if "caption:" in line]
    assert "url" not in line
    assert "exif" not in line
    if with_txt:
        commented = yaml.safe_load(line.replace("# ", "", 1))["caption"]
        assert commented == {"from": ["txt", "json:re_caption", "json:more, of them"], "rule": "random"}
    else:  # then the json's own caption is one, too
        assert "json:more, of them" in line
        rule = load_config(str(tmp_path / "e.yaml")).shards.caption
        (shard,) = scan(str(tmp_path / "pool"))
        statuses = read_shard(shard, max_pixels=10_000, captions=rule).manifest["status"]
        assert statuses.to_list() == ["ok"] * 4


@pytest.mark.parametrize("samples", [None, 80, 500, 12_000, 3_000_000])
@pytest.mark.parametrize("gpu", [True, False])
def test_batches_fit_the_smallest_subset(samples: int | None, gpu: bool, tmp_path: Path) -> None:
    from collections import Counter

    path = tmp_path / "e.yaml"
    path.write_text(starter("x", "/pool", Look(3, 0, samples, True, 8, 200, Counter(jpg=200)), gpu=gpu))
    config = load_config(str(path))
    smallest = 0.9 * (samples or 100_000) * min(config.select.fractions)
    assert config.train.batch_size <= max(2, smallest / 4)
    assert (config.train.samples_seen or 0) % config.train.batch_size == 0
    assert config.shards.expected_samples == (None if samples else 100_000)


def test_a_name_that_yaml_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool")
    error = init(tmp_path / "pool", "--out", tmp_path / "e.yaml", "--name", "My Pool: x").exception
    assert "--name: found 'My Pool: x', expected letters" in str(error)
    assert not (tmp_path / "e.yaml").exists()


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_tables_are_looked_at_and_counted_as_tars_are(kind: str, tmp_path: Path) -> None:
    given = [(f"{n:03d}", image_bytes(n), f"caption {n}", f"{n + 1:032x}") for n in range(60)]
    if kind == "parquet":
        write_hf(tmp_path / "pool" / "a.parquet", given)
    else:
        write_folder(tmp_path / "pool", given)
    result = init(tmp_path / "pool", "--out", tmp_path / "e.yaml")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("1 shards, 60 samples, ")
    assert ".png, smaller side 16 pixels, captions of 2 words" in result.output
    found = preflight(load_config(str(tmp_path / "e.yaml")), measure=False)
    assert (found.can_run, found.samples) == (True, 60)
    images = sum(len(image) for _, image, *_ in given)
    assert images <= found.disk["pool packed into tars"] <= 1.5 * images
    assert any("pool packed into tars" in finding.text for finding in found.findings)
