"""Reads of members: the quick look at headers agrees with tarfile's, and the disk is asked ahead."""

import os
import tarfile

import numpy as np
import pytest

from clipcov_pipeline.training import member_reads
from clipcov_pipeline.training.index_loader import LocalReads
from clipcov_pipeline.training.samples import Samples, Wanted
from clipcov_pipeline.training.training_index import read_training_index
from index_of import columns_of, write_index
from make_training import write_shards

HEADER = member_reads.HEADER


def header(name: str, size: int, form: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(form)[-HEADER:]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name", ["a.jpg", "d.e/00012.jpg", "folder/" * 15 + "a.jpg", "ü.jpg", "A.JPG", "b.c.jpg"]
)
def test_the_quick_look_is_tarfiles(form, name, monkeypatch):
    found = header(name, 3271, form)
    cases = [
        (found, "jpg", 3271),
        (found, "jpg", 3272),
        (found, "txt", 3271),
        (found, "c.jpg", 3271),
        (bytes(1) + found[1:], "jpg", 3271),
        (found[:124] + b"zzzzzzzzzzz\0" + found[136:], "jpg", 3271),
        (bytes(HEADER), "jpg", 3271),
        (found[:100], "jpg", 3271),
    ]
    quick = [member_reads._header_problem(*case) for case in cases]
    monkeypatch.setattr(member_reads, "_plainly_right", lambda *_: False)
    assert quick == [member_reads._header_problem(*case) for case in cases]
    assert all(quick[-2:])


def test_common_headers_need_no_other_look():
    assert member_reads._plainly_right(header("000000012.jpg", 3271, tarfile.GNU_FORMAT), "jpg", 3271)
    assert not member_reads._plainly_right(header("000000012.jpg", 3271, tarfile.GNU_FORMAT), "jpg", 3270)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked")
def test_the_disk_is_asked_for_a_batch_at_once_and_for_nothing_that_is_kept(tmp_path, monkeypatch):
    import torch

    write_shards(tmp_path, [6, 6])
    columns = columns_of(sorted(tmp_path.glob("*.tar")))
    index = read_training_index(write_index(tmp_path / "index.parquet", columns))
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, start, size, _how: asked.append((start, size)))
    samples = Samples(
        LocalReads(index), lambda image: torch.zeros(image.width), lambda _: torch.zeros(1, 4), 0
    )
    rows = np.asarray([0, 7, 3])
    for wanted in (rows, rows, np.asarray([7, 5])):
        samples.__getitems__(Wanted(wanted, np.arange(len(wanted))))
    assert [start for start, _ in asked] == [columns["image_offset"][row] - 512 for row in (0, 7, 3, 5)]
    ends = [columns["caption_offset"][row] + columns["caption_size"][row] for row in (0, 7, 3, 5)]
    assert [start + size for start, size in asked] == ends
