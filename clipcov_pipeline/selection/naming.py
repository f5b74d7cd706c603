"""Finds samples of a pool by the names that people give them: uids, UUIDs written another way, source ids."""

from typing import NamedTuple, Protocol

import numpy as np

from clipcov_pipeline.uuids import hex_of


class Named(Protocol):
    """What is needed of a `Pool`; both are bytes [N], a source id is empty where a sample has none."""

    uid: np.ndarray | None
    source_id: np.ndarray | None


class Found(NamedTuple):
    """rows: int64 [m], the samples named, each once, in the order of the names. unknown: names of none.
    weight: float64 [m], the sum of the weights of a sample's names."""

    rows: np.ndarray
    unknown: int
    weight: np.ndarray


def find_named(pool: Named, names: np.ndarray, weights: np.ndarray | None = None) -> Found:
    """Find the samples of a pool by names, bytes [n], with weights, float [n] (1 each where not given).

    A name is a sample's uid as the pool has it; else a UUID, with or without dashes, in letters of any case;
    else a source id, which may be that of several samples.
    """
    names, weights = _once(names, np.ones(len(names)) if weights is None else weights)
    places = np.arange(len(names))
    parts: list[tuple[np.ndarray, np.ndarray]] = []  # (place of the name, row)
    left = places
    for key in (_as_it_is, _as_hex, _source_id):
        if len(left) == 0:
            break
        sought, own = key(pool, names[left])
        if own is None:
            continue
        at, rows = _matches(sought, own)
        parts.append((left[at], rows))
        left = np.setdiff1d(left, left[at])
    if not parts:
        return Found(np.empty(0, np.int64), len(left), np.empty(0))
    place, rows = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    order = np.argsort(place, kind="stable")
    rows, weights = _once(rows[order], weights[place[order]])
    return Found(rows, len(left), weights)


def _once(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values in the order of their first appearance, and the sum of the weights of each."""
    distinct, first, at = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return distinct[order], np.bincount(at, weights, len(distinct))[order]


def _as_it_is(pool: Named, names: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    return names, pool.uid


def _as_hex(pool: Named, names: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    sought = _hex(names)
    return sought, _hex(pool.uid) if pool.uid is not None and (sought != b"").any() else None


def _source_id(pool: Named, names: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    return names, pool.source_id


def _hex(names: np.ndarray) -> np.ndarray:
    """The 32 digits of UUIDs; empty for other names."""
    found = (hex_of(name.decode("utf-8", "replace")) or "" for name in names.tolist())
    return np.array([digits.encode() for digits in found], "S32")


def _matches(sought: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position in ``sought``, row) of every pair that is equal and not empty, by position, then by row."""
    order = np.argsort(own, kind="stable")
    first = np.searchsorted(own, sought, "left", sorter=order)
    stop = np.searchsorted(own, sought, "right", sorter=order)
    counts = np.where(sought == b"", 0, stop - first)
    at = np.repeat(np.arange(len(sought)), counts)
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return at, order[first[at] + inside]
