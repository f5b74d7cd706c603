"""All of ``clipcov check``: what can be told of an experiment before anything runs."""

import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.batches import ArmSteps, repeats_findings, step_findings
from clipcov_pipeline.experiment.config.evaluate import EvaluationSet
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.disk import disk_finding, disk_needed
from clipcov_pipeline.experiment.duration import Part, stand_in, time_finding, time_needed
from clipcov_pipeline.experiment.evaluation_folders import list_folder
from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.experiment.lists_finding import lists_findings
from clipcov_pipeline.experiment.plan import make_plan
from clipcov_pipeline.experiment.rates import measure_rates, start_seconds
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.experiment.uid_finding import uid_finding
from clipcov_pipeline.experiment.weights import weights_findings
from clipcov_pipeline.experiment.world import (
    absent_sets,
    class_names,
    evaluation_source,
    observe,
    pool_shards,
    pool_source,
    primary_sets,
)
from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.sources import unread_parquet
from clipcov_pipeline.pool.tars import key_and_suffix
from clipcov_pipeline.redaction import public_address


@dataclass(frozen=True)
class Preflight:
    """What was found of an experiment; sizes in bytes, rates in samples a second, None where not known.

    parts: how long each stage will take (s), ``starts`` processes and runs; empty where nothing was measured.
    """

    name: str
    findings: tuple[Finding, ...]
    samples: int | None
    arms: tuple[ArmSteps, ...]
    disk: Mapping[str, int]
    rates: Mapping[str, float]
    parts: tuple[Part, ...]

    @property
    def can_run(self) -> bool:
        """Whether nothing is missing."""
        return all(finding.level != "missing" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {"can_run": self.can_run, **asdict(self)}

    def to_text(self) -> str:
        """A line a finding, and the verdict."""
        wide = max(len(finding.subject) for finding in self.findings)
        lines = [f"{item.level:8} {item.subject:{wide}}  {item.text}" for item in self.findings]
        count = sum(finding.level == "missing" for finding in self.findings)
        verdict = f"cannot run yet, missing: {count}" if count else "can run"
        return "\n".join([*lines, "", f"{self.name}: {verdict}"])


def preflight(config: Config, *, measure: bool = True) -> Preflight:
    """Look at everything that an experiment needs, without running or downloading any of it.

    Args:
        config: a loaded experiment.
        measure: time some steps of the models on this machine (up to about 20 s).

    Raises:
        InputError: an unknown architecture or tag, unusable class names: mistakes in the YAML.
    """
    pool_findings, shards = _pool(config)
    samples, size_finding = _pool_size(config, shards)
    findings = [
        *pool_findings,
        *size_finding,
        *uid_finding(shards),
        *weights_findings(config),
        *lists_findings(config),
        *_evaluation(config),
        *repeats_findings(config, Store(config.work / "store")),
    ]
    class_names(config)
    arms: list[ArmSteps] = []
    disk: dict[str, int] = {}
    if samples is not None:
        arms, said = step_findings(config, samples)
        pool_bytes = bytes_of(shards)
        disk = disk_needed(config, samples, pool_bytes, packed=any(shard.rows for shard in shards))
        findings += [*said, disk_finding(config, disk, assumed=not pool_bytes)]
    rates: dict[str, float] = {}
    parts: list[Part] = []
    if measure:
        rates, problems = measure_rates(config, shards)
        findings += problems
        if samples is not None:
            parts = _time(config, samples, arms, rates)
            findings += time_finding(config, parts, rates)
    return Preflight(config.name, tuple(findings), samples, tuple(arms), disk, rates, tuple(parts))


def _time(config: Config, samples: int, arms: Sequence[ArmSteps], rates: Mapping[str, float]) -> list[Part]:
    """Seconds of what the plan says is to be built; of a pool that is not there yet, of everything."""
    store = Store(config.work / "store")
    try:
        world = observe(config)
    except InputError:  # it is among the findings
        world = stand_in(config, samples)
    return time_needed(config, make_plan(config, world, store), store, samples, arms, rates, start_seconds())


def _pool(config: Config) -> tuple[list[Finding], list[Shard]]:
    try:
        shards = pool_shards(config)
    except InputError as error:
        return [Finding("missing", "pool", f"{error} (shards.source)")], []
    text = f"{len(shards):,} shards in {public_address(config.shards.source)}"
    if others := unread_parquet(pool_source(config), shards):
        text += f"; its {others:,} parquet files without a tar of that name are not read"
    return [Finding("ok", "pool", text)], shards


def _pool_size(config: Config, shards: Sequence[Shard]) -> tuple[int | None, list[Finding]]:
    expected, counted = config.shards.expected_samples, count_samples(shards)
    if counted is None:
        if expected is None:
            text = "not known: give shards.expected_samples to be told steps, disk and time"
            return None, [Finding("note", "pool size", text)]
        return expected, [Finding("note", "pool size", f"{expected:,} samples expected, none counted")]
    found, exact = counted
    text = f"{'' if exact else 'about '}{found:,} samples"
    if expected is not None and abs(found - expected) > 0.1 * expected:
        return found, [
            Finding("warning", "pool size", f"{text}, but shards.expected_samples is {expected:,}")
        ]
    return found, [Finding("ok", "pool size", text)]


def count_samples(shards: Sequence[Shard], seconds: float = 2.0) -> tuple[int, bool] | None:
    """Count the samples of local shards by their tars' headers, or their tables' rows, good or not.

    Returns:
        (samples, whether all shards were counted: after ``seconds`` the rest is taken to be as those by its
        size); None for remote or unreadable shards.
    """
    sizes = [_local_size(shard) for shard in shards]
    if not sizes or None in sizes:
        return None
    counted, read, deadline = 0, 0, time.monotonic() + seconds
    for index, shard in enumerate(shards):
        if index and time.monotonic() > deadline:
            return round(counted * sum(filter(None, sizes)) / max(read, 1)), False
        counted += _samples_of(shard)
        read += sizes[index] or 0
    return counted, True


def _samples_of(shard: Shard) -> int:
    """Samples of a local shard; none where it cannot be read: the run quarantines it."""
    if shard.rows is not None:
        return shard.rows.count() or 0
    try:
        with tarfile.open(shard.url) as tar:
            return len({key for member in tar if (key := key_and_suffix(member)[0]) is not None})
    except (tarfile.TarError, OSError):
        return 0


def _local_size(shard: Shard) -> int | None:
    if shard.rows is not None:
        return shard.rows.size()
    path = Path(shard.url)
    return path.stat().st_size if path.is_file() else None


def bytes_of(shards: Sequence[Shard]) -> int:
    """Return the bytes of the shards that are on this machine."""
    return sum(_local_size(shard) or 0 for shard in shards)


def _evaluation(config: Config) -> list[Finding]:
    absent = absent_sets(config)
    found = [_evaluation_set(config, name, chosen, absent) for name, chosen in config.evaluate.sets.items()]
    present = [name for name, one in zip(config.evaluate.sets, found, strict=True) if one is None]
    summary = [Finding("ok", "evaluation", f"present: {', '.join(present)}")] if present else []
    return [*summary, *filter(None, found), *_suites(config, absent)]


def _evaluation_set(
    config: Config, name: str, chosen: EvaluationSet, absent: Mapping[str, str]
) -> Finding | None:
    """Return what is wrong with a set; None when it can be scored."""
    if name in absent:
        needed = primary_sets(config)
        must = name in needed and all(member in absent for member in needed)
        rest = "the primary metric needs it" if must else "left out, in no average"
        text = f"{name}: no folder {absent[name]}: {rest}"
        return Finding("missing" if must else "warning", "evaluation", text)
    try:
        if chosen.benchmark is not None:
            list_folder(name, config.resolve(chosen.benchmark), chosen)
        else:
            scan(evaluation_source(config, name), dict(chosen.storage_options))
    except InputError as error:
        return Finding("missing", "evaluation", f"{name}: {error}")
    return None


def _suites(config: Config, absent: Mapping[str, str]) -> list[Finding]:
    """Return a warning for every average that is over fewer sets than the YAML has."""
    findings = []
    for name, suite in config.evaluate.suites.items():
        there = [member for member in suite.sets if member not in absent]
        if len(there) < len(suite.sets):
            text = f"{name}/{suite.metric} would be the mean of {len(there)} of its {len(suite.sets)} sets"
            text = text if there else f"{name}/{suite.metric} is not defined: no folder of its sets is there"
            findings.append(Finding("warning", "suite", text))
    return findings
