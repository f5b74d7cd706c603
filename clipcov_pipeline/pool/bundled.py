"""The sample data that ships with the package: a pool of clip-art pairs and a held-out vendor's emoji.

From `unpack_sample` on, the sample takes exactly the path of a user's own shards. What it is and under which
licences: `sample_data/LICENSES.md`.
"""

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.samples import iter_samples

TRAIN = "clipart-train"

HELDOUT = "clipart-heldout-vendor"

ARCHIVE_SHA256 = {
    TRAIN: "ca03c6e822a62125052d4a47138def7b2c94cd9909f2c5805e8139e25f9c5fad",
    HELDOUT: "769ef2222a80be8ee020572ffe4c5d28b2226ce179f7d2dc7c0b200d99be2531",
}


# One time for all shards: unpacking again must not look like a change of the pool.
SHARD_MTIME = 1_704_067_200

_MARKER = ".unpacked"


def unpack_sample(folder: Path) -> tuple[Path, Path]:
    """Unpack the sample below `folder`; return (folder of the pool's shards, folder of the held-out shards).

    Done once: a folder that is complete is left as it is, also where shards were added to it or removed.
    A folder appears under its name only when it is complete.

    Raises:
        InputError: the packaged archive is damaged, or something else is in the way.
    """
    return _unpack(TRAIN, folder), _unpack(HELDOUT, folder)


def sample_class_names() -> list[str]:
    """Return the sample's list of class names for zero-shot prompts: 197 distinct names, sorted."""
    text = (_package_data() / "class_names.txt").read_text(encoding="utf-8")
    return text.splitlines()


def collect_class_names(train_dir: Path) -> list[str]:
    """Return the distinct `class_name` values in the json of the shards of a folder, sorted.

    `sample_data/class_names.txt` is this list for the sample's pool. To write it again:
    `python -m clipcov_pipeline.pool.bundled FOLDER > clipcov_pipeline/pool/sample_data/class_names.txt`.
    """
    return sorted(
        {
            str(sample.meta["class_name"])
            for shard in scan(str(train_dir))
            for sample in iter_samples(shard, None)
            if sample.meta and sample.meta.get("class_name")
        }
    )


def _package_data() -> Traversable:
    return resources.files("clipcov_pipeline.pool") / "sample_data"


def _unpack(name: str, folder: Path) -> Path:
    target = Path(folder) / name
    if _is_complete(target, name):
        return target
    if target.exists() and not (target / _MARKER).is_file():
        raise InputError(
            f"sample data: {target} is there but was not unpacked from this package; "
            "move it away or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        with resources.as_file(_package_data() / f"{name}.tar.xz") as archive:
            _check_archive(archive, name)
            _extract(archive, temporary)
        (temporary / _MARKER).write_text(ARCHIVE_SHA256[name] + "\n", encoding="ascii")
        temporary.chmod(0o755)
        _put_in_place(temporary, target, name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _is_complete(target: Path, name: str) -> bool:
    marker = target / _MARKER
    return marker.is_file() and marker.read_text(encoding="ascii").strip() == ARCHIVE_SHA256[name]


def _check_archive(archive: Path, name: str) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != ARCHIVE_SHA256[name]:
        raise InputError(
            f"sample data: {archive.name} has sha256 {found[:12]}..., "
            f"expected {ARCHIVE_SHA256[name][:12]}...; install the package again"
        )


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive, "r:xz") as tar:
        for member in _regular_files(tar):
            path = folder / Path(member.name).name
            data = tar.extractfile(member)
            assert data is not None, "a regular file always has data"
            with path.open("wb") as file:
                shutil.copyfileobj(data, file)
            os.utime(path, (SHARD_MTIME, SHARD_MTIME))


def _regular_files(tar: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    return (member for member in tar if member.isreg())


def _put_in_place(temporary: Path, target: Path, name: str) -> None:
    """Rename into place, over a folder left by an older package; another process may have been first."""
    if target.exists() and not _is_complete(target, name):
        shutil.rmtree(target)
    try:
        temporary.rename(target)
    except OSError:
        if not _is_complete(target, name):
            raise


if __name__ == "__main__":
    import sys

    sys.stdout.write("".join(f"{class_name}\n" for class_name in collect_class_names(Path(sys.argv[1]))))
