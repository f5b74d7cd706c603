"""Says in words why an entry is out of date."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clipcov_pipeline.experiment.graph import Node
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.experiment.store import Store


def own_reasons(node: Node, store: Store) -> Iterator[str]:
    """Say what is known already of a node that waits: its settings and code, not yet what it reads."""
    previous = store.current(node.stage, node.partition)
    if previous is not None:
        yield from reasons_for(node, previous.inputs, previous)


def waits_for(blocking: Sequence[str]) -> str:
    rest = f" and {len(blocking) - 1} more" if len(blocking) > 1 else ""
    return f"waits for {blocking[0]}{rest}"


def reasons_for(node: Node, inputs: Mapping[str, str], previous: Record | None) -> Iterator[str]:
    """Say in words how a node differs from the entry that stands for it now."""
    if previous is None:
        yield "not built yet"
        return
    version = CODE_VERSIONS[node.stage]
    if previous.code_version != version:
        yield f"code version of {node.stage} {previous.code_version} -> {version}"
    yield from setting_changes(flat(previous.params), flat(node.params))
    yield from _changes(previous.sources, node.sources)
    yield from _changes(previous.inputs, inputs)


def setting_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``KEY OLD -> NEW`` for every dotted key that differs; ``default`` where one side has none."""
    for name in sorted({*old, *new}):
        before, after = old.get(name, "default"), new.get(name, "default")
        if before != after:
            yield f"{name} {before} -> {after}"


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    for names, verb in (
        (changed, "changed"),
        (sorted(new.keys() - old.keys()), "added"),
        (sorted(old.keys() - new.keys()), "removed"),
    ):
        if len(names) > 3:
            yield f"{names[0]} and {len(names) - 1} more {verb}"
        else:
            yield from (f"{name} {verb}" for name in names)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys; tuples become lists, as JSON has them."""
    values_by_key: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            values_by_key |= flat(value, f"{prefix}{key}.")
        else:
            values_by_key[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return values_by_key
