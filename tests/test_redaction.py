"""No secret is written down: not of storage_options, not of a signed address, not of user:password@."""

from pathlib import Path

import pytest
import yaml

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.load import preset_path, read_config
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.redaction import public_address, public_yaml, redacted
from lab import Lab
from make_shards import write_pool
from range_server import serve

KEY, SIGNATURE, PASSWORD = "AKIAPLANTEDKEY", "PLANTEDSIGNATURE", "PLANTEDPASSWORD"
SECRETS = (KEY, SIGNATURE, PASSWORD)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("/data/a?b#c@d", "/data/a?b#c@d"),
        ("s3://bucket/a?b.tar", "s3://bucket/a?b.tar"),
        (
            "abfs://container@account.dfs.core.windows.net/p",
            "abfs://container@account.dfs.core.windows.net/p",
        ),
        ("sftp://me:PASS@host:22/p@q", "sftp://host:22/p@q"),
        ("https://token@host/a.tar?sig=x&y#z", "https://host/a.tar"),
        ("https://host/{00000..00012}.tar?sig=x", "https://host/{00000..00012}.tar"),
    ],
)
def test_addresses(address: str, shown: str) -> None:
    assert public_address(address) == shown
    assert redacted(f"found '{address}', expected") == f"found '{shown}', expected"
    assert str(InputError(f"{address} is gone")) == f"{shown} is gone"


@pytest.mark.parametrize("preset", sorted(preset_path("sample").parent.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_yaml_without_secrets_is_kept_byte_for_byte(preset: Path) -> None:
    assert read_config(str(preset))[1] == preset.read_text()


def settings(source: str, **options: object) -> dict:
    found = yaml.safe_load(preset_path("sample").read_text())
    return found | {"shards": {"source": source, "storage_options": options}}


def test_a_kept_yaml_hides_secrets_and_keeps_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", KEY)
    path = tmp_path / "a.yaml"
    text = "# mine\n" + yaml.safe_dump(settings("pool", key="${PLANTED}", anon=True))
    path.write_text(text)
    config, kept = read_config(str(path))
    assert config.shards.storage_options == {"key": KEY, "anon": True}
    assert kept == text
    plain = settings(f"https://u:{PASSWORD}@h/p.tar?sig={SIGNATURE}", client={"secret": KEY}, anon=True)
    kept = public_yaml(yaml.safe_dump(plain), plain)
    assert not any(secret in kept for secret in SECRETS)
    assert yaml.safe_load(kept) == settings("https://h/p.tar", client={"secret": "(hidden)"}, anon=True)


def test_a_variable_that_is_not_set_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(settings("pool", key="${CLIPCOV_NOT_SET}")))
    with pytest.raises(InputError) as caught:
        read_config(str(path))
    assert str(caught.value).startswith("shards.storage_options.key: found ${CLIPCOV_NOT_SET}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["00000.tar", "{00000..00001}.tar"])
def test_signing_again_changes_no_name_and_shards_are_read_by_the_whole_address(
    tmp_path: Path, pattern: str
) -> None:
    pool = write_pool(tmp_path / "pool")
    with serve(pool) as (address, sent):
        first, second = (scan(f"{address}/{pattern}?sig={SIGNATURE}{n}") for n in "12")
        report = read_shard(first[0], max_pixels=10_000)
    assert [shard.name for shard in first] == [path.stem for path in sorted(pool.glob("*.tar"))][: len(first)]
    assert [(s.name, s.version) for s in first] == [(s.name, s.version) for s in second]
    assert (report.quarantined, report.manifest.height) == (None, 3)
    assert sent.asked
    assert all(SIGNATURE in path for path in sent.asked)


def test_an_experiment_writes_no_secret(
    tmp_path: Path, sample_shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the samples' tars served by a web server, with a key, a signature and a password planted."""
    lab = Lab.create(tmp_path / "lab", sample_shards)
    folder = lab.shard(0).parent
    with serve(folder) as (address, sent):
        place = address.removeprefix("http://")
        lab.edit(
            lambda s: s["shards"].update(
                source=f"http://me:{PASSWORD}@{place}/{lab.shard(0).name}?sig={SIGNATURE}",
                storage_options={"headers": {"X-Planted": KEY}},
            )
        )
        lab.run(only=("raw_shards",))
    assert any(SIGNATURE in path for path in sent.asked)
    assert list(lab.folder.rglob("manifest.parquet"))
    assert holding(lab.folder, besides=lab.yaml) == []
    assert not any(secret in "".join(capfd.readouterr()) for secret in SECRETS)


def holding(folder: Path, besides: Path) -> list[Path]:
    """The files that have a secret in their bytes or their name."""
    return [
        path
        for path in folder.rglob("*")
        if path != besides
        and any(
            secret in str(path) or (path.is_file() and secret.encode() in path.read_bytes())
            for secret in SECRETS
        )
    ]
