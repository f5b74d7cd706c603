"""Compares two subsets or two leaderboards that are stored: what differs, and which settings made it so."""

from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.index import Index
from clipcov_pipeline.experiment.reasons import flat, setting_changes
from clipcov_pipeline.experiment.recipes import recipe_key
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.store import Store

TOP_CLASSES = 10  # classes whose counts differ most


def stored(store: Store, stage: str) -> list[Record]:
    """Return all entries of a stage, newest first."""
    return sorted((r for r in store.records() if r.stage == stage), key=lambda r: -r.finished)


def find_record(store: Store, name: str) -> Record:
    """Return the entry of a name: ``STAGE/PARTITION``, a subset, ``NAME@FINGERPRINT`` or a fingerprint.

    A name alone means the entry that stands for it now; a fingerprint may be shortened to 6 digits or more.

    Raises:
        InputError: nothing, or more than one entry, has this name.
    """
    records = list(store.records())
    for record in records:
        short = record.partition if record.stage in ("subsets", "checkpoints") else record.name
        stands = store.current_fingerprint(record.stage, record.partition) == record.fingerprint
        if stands and name in (record.name, short):
            return record
    place, _, prefix = name.rpartition("@")
    found = [
        r
        for r in records
        if len(prefix) >= 6 and r.fingerprint.startswith(prefix) and place in ("", r.name, r.partition)
    ]
    if len(found) == 1:
        return found[0]
    near = sorted({r.name for r in records if r.stage in ("subsets", "leaderboard")})
    how = f"{len(found)} entries" if found else "no entry"
    raise InputError(
        f"{name!r}: found {how}, expected one: a name ({', '.join(near[:6]) or 'nothing is built'}),"
        " NAME@FINGERPRINT or a fingerprint of 6 digits or more (`clipcov diff --list STAGE`)"
    )


def settings_of(record: Record, index: Index) -> dict[str, Any]:
    """Return all settings that an entry depends on, by dotted key, from it and everything that it reads."""
    found: dict[str, Any] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [record]
    while waiting:
        each = waiting.pop()
        found |= _params(record, each)
        found[f"code version of {each.stage}"] = each.code_version
        for upstream in index.sources(each).values():
            if upstream is not None and (upstream.name, upstream.fingerprint) not in seen:
                seen.add((upstream.name, upstream.fingerprint))
                waiting.append(upstream)
    return found


def _params(record: Record, source: Record) -> dict[str, Any]:
    params = flat(source.params)
    if record.stage == "subsets" and source.stage == "rankings":  # two methods' settings side by side
        label = f"select.methods.{source.partition}."
        return {f"select.{key.removeprefix(label)}": value for key, value in params.items()}
    if record.stage == "leaderboard" and source.stage == "subsets":  # an arm's, not the experiment's
        del params["select.fraction"]
    return params


@dataclass(frozen=True)
class SubsetDiff:
    """How two subsets differ; uids are in the order of their ranks."""

    sizes: tuple[int, int]
    both: int
    jaccard: float
    only_a: list[str]
    only_b: list[str]
    classes: list[tuple[int, int, int]]
    """(latent class, count in A, count in B) where these differ, largest difference first."""
    ranks: dict[int, float]
    """k -> share that the first k of A and the first k of B have in common."""
    settings: list[str] = field(default_factory=list)
    source_ids: dict[str, str] = field(default_factory=dict)
    """uid -> the sample's own id, of those that only one of them has, where the json's is no UUID."""


def compare_subsets(a: pl.DataFrame, b: pl.DataFrame) -> SubsetDiff:
    """Compare two subsets: columns ``uid``, ``rank``, ``latent_class`` (``class`` in older files)."""
    first, second = set(a["uid"]), set(b["uid"])
    both = first & second
    counts_a, counts_b = _class_counts(a), _class_counts(b)
    classes = [(c, counts_a[c], counts_b[c]) for c in {*counts_a, *counts_b} if counts_a[c] != counts_b[c]]
    order_a, order_b = (frame.sort("rank")["uid"].to_list() for frame in (a, b))
    smaller = min(len(order_a), len(order_b))
    shares = (0.01, 0.1, 0.5, 1.0) if smaller else ()
    steps = sorted({max(1, round(smaller * share)) for share in shares})
    return SubsetDiff(
        sizes=(a.height, b.height),
        both=len(both),
        jaccard=len(both) / len(first | second) if first | second else 1.0,
        only_a=[uid for uid in order_a if uid not in both],
        only_b=[uid for uid in order_b if uid not in both],
        classes=sorted(classes, key=lambda row: (-abs(row[1] - row[2]), row[0])),
        ranks={k: len(set(order_a[:k]) & set(order_b[:k])) / k for k in steps},
        source_ids=_source_ids(a, first ^ second) | _source_ids(b, first ^ second),
    )


def _source_ids(frame: pl.DataFrame, uids: set[str]) -> dict[str, str]:
    if "source_id" not in frame.columns:
        return {}
    named = frame.select("uid", "source_id").drop_nulls()
    return {uid: name for uid, name in named.iter_rows() if uid in uids}


def _class_counts(frame: pl.DataFrame) -> Counter[int]:
    column = "latent_class" if "latent_class" in frame.columns else "class"
    return Counter(frame[column].to_list())


def read_subset(path: Path) -> pl.DataFrame:
    """Read a subset's parquet, of the pipeline or of ``clipcov select``.

    Raises:
        InputError: not a parquet, or columns are missing.
    """
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"{path}: not readable ({reason}), expected a subset's parquet") from error
    missing = {"uid", "rank"} - set(frame.columns)
    if missing or not {"latent_class", "class"} & set(frame.columns):
        raise InputError(f"{path}: found columns {frame.columns}, expected uid, rank and latent_class")
    return frame


def subset_text(diff: SubsetDiff, names: tuple[str, str], shown: int = 5) -> str:
    """Return the comparison as text; ``shown`` uids of each side."""
    (n_a, n_b), (a, b) = diff.sizes, names
    lines = [
        f"A {a}: {n_a:,} samples",
        f"B {b}: {n_b:,} samples",
        f"in both {diff.both:,}, only A {len(diff.only_a):,}, only B {len(diff.only_b):,},"
        f" Jaccard {diff.jaccard:.4f}",
        "first k in common: " + ", ".join(f"k={k:,} {share:.1%}" for k, share in diff.ranks.items()),
    ]
    for name, uids in (("A", diff.only_a), ("B", diff.only_b)):
        if uids:
            more = f" and {len(uids) - shown:,} more" if len(uids) > shown else ""
            some = [f"{uid} ({own})" if (own := diff.source_ids.get(uid)) else uid for uid in uids[:shown]]
            lines.append(f"only {name}, best ranks first: {', '.join(some)}{more}")
    if diff.classes:
        lines.append(f"class counts that differ: {len(diff.classes):,}, most:")
        lines += [f"  class {c}: {x:,} -> {y:,} ({y - x:+,})" for c, x, y in diff.classes[:TOP_CLASSES]]
    return "\n".join([*lines, *_settings_text(diff.settings)])


def _settings_text(settings: list[str]) -> list[str]:
    return ["settings that differ:", *(f"  {text}" for text in settings)] if settings else []


@dataclass(frozen=True)
class BoardDiff:
    """How two leaderboards differ; an arm is (method, fraction, seed), scores are shares."""

    arms_only_a: list[str]
    arms_only_b: list[str]
    same: int
    scores: list[tuple[str, str, float, float]]
    """(arm, metric, score in A, score in B), largest difference first."""
    settings: list[str] = field(default_factory=list)


def compare_boards(a: pl.DataFrame, b: pl.DataFrame) -> BoardDiff:
    """Compare two tables of scores (`leaderboard.SCORE_SCHEMA`)."""
    rows_a, rows_b = _scores(a), _scores(b)
    arms_a, arms_b = ({arm: None for arm, _ in rows} for rows in (rows_a, rows_b))
    shared = [key for key in rows_a if key in rows_b]
    differing = [(*key, rows_a[key], rows_b[key]) for key in shared if rows_a[key] != rows_b[key]]
    return BoardDiff(
        arms_only_a=[arm for arm in arms_a if arm not in arms_b],
        arms_only_b=[arm for arm in arms_b if arm not in arms_a],
        same=len(shared) - len(differing),
        scores=sorted(differing, key=lambda row: -abs(row[2] - row[3])),
    )


def _scores(board: pl.DataFrame) -> dict[tuple[str, str], float]:
    return {
        (row.get("arm") or recipe_key(row["method"], row["fraction"], row["seed"]), row["metric"]): row[
            "value"
        ]
        for row in board.iter_rows(named=True)
    }


def board_text(diff: BoardDiff, names: tuple[str, str]) -> str:
    """Return the comparison as text, in percent."""
    lines = [f"A {names[0]}", f"B {names[1]}", f"scores: {len(diff.scores)} differ, {diff.same} are the same"]
    for arm, metric, x, y in diff.scores:
        lines.append(f"  {arm:28} {metric:40} {100 * x:6.1f} -> {100 * y:6.1f}  ({100 * (y - x):+.1f})")
    for name, arms in (("A", diff.arms_only_a), ("B", diff.arms_only_b)):
        if arms:
            lines.append(f"arms only in {name}: {', '.join(arms)}")
    return "\n".join([*lines, *_settings_text(diff.settings)])


def compare(store: Store, a: str, b: str) -> tuple[SubsetDiff | BoardDiff, tuple[str, str]]:
    """Compare two entries, or parquets of subsets, by name; return the difference and both titles.

    Raises:
        InputError: an unknown name, or two that are not of one kind.
    """
    if a.endswith(".parquet") and b.endswith(".parquet"):
        return compare_subsets(read_subset(Path(a)), read_subset(Path(b))), (a, b)
    first, second = find_record(store, a), find_record(store, b)
    kinds = (first.stage, second.stage)
    if kinds not in (("subsets", "subsets"), ("leaderboard", "leaderboard")):
        raise InputError(f"found {kinds[0]} and {kinds[1]}, expected two subsets or two leaderboards")
    index = Index(list(store.records()))
    settings = list(setting_changes(settings_of(first, index), settings_of(second, index)))
    titles = (title(first), title(second))
    if first.stage == "subsets":
        one, two = (read_subset(store.checked(r, "subset.parquet")) for r in (first, second))
        return replace(compare_subsets(one, two), settings=settings), titles
    one, two = (pl.read_parquet(store.checked(r, "scores.parquet")) for r in (first, second))
    return replace(compare_boards(one, two), settings=settings), titles


def title(record: Record) -> str:
    """Return name, fingerprint and time of an entry."""
    when = datetime.fromtimestamp(record.finished).isoformat(" ", "seconds")
    return f"{record.name}@{record.fingerprint[:12]} ({when})"
