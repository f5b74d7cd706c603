"""Members' headers: the quick look agrees with tarfile's reading of all kinds of tars."""

import tarfile

import pytest

from clipcov_pipeline.training import member_reads

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
