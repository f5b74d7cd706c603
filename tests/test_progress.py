"""Progress as text, with a clock that is set by hand."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from clipcov_pipeline import progress
from clipcov_pipeline.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def start() -> Callable[..., tuple[Progress, list[str]]]:
    def start(total: int | None, every: float = 5.0) -> tuple[Progress, list[str]]:
        lines: list[str] = []
        return Progress(lines.append, total, "images", every), lines

    return start


def test_the_line_has_bar_share_count_rate_and_time_left(clock, start):
    counter, lines = start(12_000)
    clock.now += 6
    counter.to(5_100)
    # 5,100 in 6 s are 850/s; 6,900 more take 8.1 s; 42.5 % of 20 blocks are 8.5
    assert lines == ["■■■■■■■■□□□□□□□□□□□□  42%  5,100/12,000 images  850/s  8 s left"]


def test_lines_come_not_more_often_than_asked(clock, start):
    counter, lines = start(1000)
    for _ in range(500):
        clock.now += 0.1
        counter.add()
    # 50 s in steps of a tenth: one line every 5 s, give or take the rounding of the clock
    assert 9 <= len(lines) <= 10
    assert counter.done == 500


def test_the_end_is_reported_where_there_was_a_line_before(clock, start):
    counter, lines = start(10)
    clock.now += 5
    counter.to(4)
    clock.now += 1
    counter.to(9)
    counter.to(10)
    assert [line.split()[1] for line in lines] == ["40%", "100%"]
    assert lines[-1] == "■■■■■■■■■■■■■■■■■■■■ 100%  10/10 images  2/s  0 s left"


def test_short_work_says_nothing(clock, start):
    counter, lines = start(10)
    for _ in range(10):
        clock.now += 0.4
        counter.add()
    assert lines == []


def test_an_unknown_total_has_no_bar_and_no_end(clock, start):
    counter, lines = start(None)
    clock.now += 10
    counter.add(25_000)
    assert lines == ["□□□□□□□□□□□□□□□□□□□□  25,000 images  2,500/s"]


@pytest.mark.parametrize(
    ("total", "done", "expected"),
    [
        (10, 0, "□□□□□□□□□□□□□□□□□□□□   0%  0/10 images  0/s"),
        (0, 0, "□□□□□□□□□□□□□□□□□□□□  0 images  0/s"),
        # a manifest that counts fewer than there are
        (10, 12, "■■■■■■■■■■■■■■■■■■■■ 100%  12/10 images  6/s  0 s left"),
    ],
)
def test_edges(clock, start, total, done, expected):
    counter, _ = start(total)
    clock.now += 2
    counter.done = done
    assert counter.text() == expected


def test_no_time_at_all_is_no_division_by_zero(start):
    counter, lines = start(10, every=0.0)
    counter.to(3)
    assert len(lines) == 1
    assert counter.rate > 0


def test_the_rate_is_since_the_start(clock, start):
    counter, _ = start(100)
    clock.now += 4
    counter.to(10)
    clock.now += 6
    counter.to(20)
    assert counter.rate == pytest.approx(2.0)
