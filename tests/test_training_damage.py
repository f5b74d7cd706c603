"""A training's folder after a full disk or a bad sector: damage is set aside, and the arm goes on."""

import subprocess
import sys

import pytest

from clipcov_pipeline.training import launch, result
from clipcov_pipeline.training.damage import set_aside_damaged
from clipcov_pipeline.training.folder import claim_folder, is_complete, keep_early
from clipcov_pipeline.training.spec import to_json
from index_of import index_of_noise, index_spec


@pytest.fixture
def undisturbed(tmp_path):
    """(spec of a run of three epochs of two steps, digest of the weights that it ends with)."""
    index = index_of_noise(tmp_path, [32])
    spec = index_spec(
        tmp_path, index, n_samples=32, samples_seen=96, num_checkpoints=3, keep_early=True, name="whole"
    )
    launch.launch(spec)
    return spec, result.finish(spec, tmp_path / "out")["weights_digest"]


def stopped(spec, name):
    """The same run, stopped in its third epoch."""
    from dataclasses import replace

    spec = replace(spec, name=name)

    def stop(point):
        if point["step"] == 3:
            keep_early(spec)
        if point["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.launch(spec, stop)
    return spec


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a link to it keeps its bytes
    path.write_bytes(data)


def halve(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_as_if_nothing_had_been(tmp_path, undisturbed):
    spec, digest = undisturbed
    for name, damage, left, said in (
        ("flipped", flip, ["epoch_latest.pt"], "goes on from epoch_1.pt, epoch 1"),
        ("halved", halve, ["epoch_latest.pt", "epoch_1.pt"], "no other checkpoint is left"),
    ):
        again = stopped(spec, name)
        checkpoints = again.folder / "checkpoints"
        assert not set_aside_damaged(again)  # nothing is wrong yet
        for file in left:
            damage(checkpoints / file)
        lines = set_aside_damaged(again)
        assert len(lines) == len(left) + 1
        assert said in lines[-1]
        assert {path.name for path in checkpoints.glob("*.damaged")} == {f"{file}.damaged" for file in left}
        launch.launch(again)
        assert result.finish(again, tmp_path / name / "out")["weights_digest"] == digest


def test_a_complete_run_whose_last_checkpoint_is_damaged_takes_the_newest(tmp_path, undisturbed):
    spec, digest = undisturbed
    flip(spec.folder / "checkpoints" / "epoch_3.pt")
    launch.launch(spec)
    assert is_complete(spec)
    assert result.finish(spec, tmp_path / "again")["weights_digest"] == digest


def test_a_half_written_note_of_the_settings_does_not_block_an_arm(tmp_path):
    spec = index_spec(tmp_path, index_of_noise(tmp_path, [32]), n_samples=32)
    claim_folder(spec)
    note = spec.folder / "spec.json"
    text = note.read_text()
    (spec.folder / "checkpoints").mkdir()
    note.write_text(text[: len(text) // 2])
    (line,) = set_aside_damaged(spec)
    assert "begins anew" in line
    claim_folder(spec)
    assert note.read_text() == text
    assert not (spec.folder / "checkpoints").exists()  # nobody knows what they were trained under


FULL_DISK = """
import resource, sys
from pathlib import Path
from clipcov_pipeline.training.folder import claim_folder
from clipcov_pipeline.training.spec import from_json
spec = from_json(Path(sys.argv[1]).read_text())
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
claim_folder(spec)
"""


def test_a_full_disk_leaves_no_half_note(tmp_path):
    spec = index_spec(tmp_path, index_of_noise(tmp_path, [32]), n_samples=32)
    (tmp_path / "training.json").write_text(to_json(spec))
    argv = [sys.executable, "-c", FULL_DISK, str(tmp_path / "training.json")]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "File too large" in run.stderr
    assert not list(spec.folder.iterdir())
