"""Finds the entry that an input was read from."""

from collections.abc import Iterator

from clipcov_pipeline.experiment import graph
from clipcov_pipeline.experiment.records import Record

LABELS, POOL, PLACES = graph.LABELS.name, graph.POOL.name, graph.INDEX.name


class Index:
    """Finds the entry that an input was read from."""

    def __init__(self, records: list[Record]) -> None:
        self._by_output: dict[tuple[str, str], Record] = {}
        self._labels: dict[tuple[str, str], Record] = {}
        for record in sorted(records, key=lambda record: record.finished):
            for output, digest in record.digests.items():
                self._by_output[f"{record.name}#{output}", digest] = record
            if {"labels", "pool"} <= record.digests.keys():
                self._labels[record.digests["labels"], record.digests["pool"]] = record

    def source(self, name: str, digest: str) -> Record | None:
        """Return the newest entry whose output ``STAGE/PARTITION#OUTPUT`` has this digest, or None."""
        return self._by_output.get((name, digest))

    def sources(self, record: Record) -> dict[str, Record | None]:
        """Return the entry behind each input.

        One pool has several pseudo-labels: which of them a subset was cut by, its ranking says.
        """
        found = {name: self.source(name, digest) for name, digest in record.inputs.items()}
        for each in (record, *found.values()):
            if POOL in found and each is not None and LABELS in each.inputs:
                labels = self._labels.get((each.inputs[LABELS], record.inputs[POOL]))
                return {**found, POOL: labels, **({LABELS: labels} if LABELS in found else {})}
        return found

    def missing_inputs(self, record: Record) -> Iterator[str]:
        """Say which inputs no stored entry has."""
        for name, digest in record.inputs.items():
            if self.source(name, digest) is None:
                yield f"input {name} has digest {digest[:12]}, which no entry of the store has"
