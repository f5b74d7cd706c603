"""What is out of date, and why: a pure function of the configuration, what lies outside, and the store.

The graph is written out in :func:`nodes`. A node's fingerprint covers its stage's code version, its
configuration, change tokens of what it reads from outside, and the *output digests* of what it reads from
the store. Upstream that is itself out of date leaves a node waiting: its fingerprint is not known yet, and a
re-run upstream that gives the same digest leaves the node untouched (early cutoff).
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from clipcov_pipeline.checks import stands_against
from clipcov_pipeline.config import FULL, Config, EvaluationSet, Protocol
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection import validate_method
from clipcov_pipeline.selection.methods import DEFAULT_WEIGHTS
from clipcov_pipeline.shards import Shard
from clipcov_pipeline.store import (
    WHOLE,
    Record,
    Store,
    digest_of,
    digest_of_file,
    fingerprint_from,
    node_name,
)

# Raise a stage's version when its code gives another result for the same input.
CODE_VERSIONS: dict[str, str] = {
    "raw_shards": "1",
    "proxy_model": "1",
    "embeddings": "1",
    "early_similarities": "1",
    "pseudo_labels": "1",
    "rankings": "2",
    "subsets": "1",
    "pool_map": "1",
    "subset_diagnostics": "1",
    "subset_galleries": "1",
    "checkpoints": "1",
    "scores": "3",
    "leaderboard": "2",
    "checkpoint_galleries": "1",
    "report": "2",
}
STAGES = tuple(CODE_VERSIONS)
PER_SHARD = ("raw_shards", "embeddings", "early_similarities")
HOLDOUT = "holdout"
OVERLAP = "overlap"


class Input(NamedTuple):
    """One output of one entry that a node reads."""

    stage: str
    partition: str
    output: str

    @property
    def name(self) -> str:
        """``STAGE/PARTITION#OUTPUT``, the key under which a record keeps the digest."""
        return f"{node_name(self.stage, self.partition)}#{self.output}"


@dataclass(frozen=True)
class World:
    """What the plan knows of the outside: listings and file digests, no content."""

    shards: tuple[Shard, ...]
    evaluation_shards: Mapping[str, tuple[Shard, ...]]
    tokens: Mapping[str, str]
    """Digests of small files that the configuration names (class names, model JSON, checkpoints)."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Evaluation sets whose folder is not there -> the folder: they have no scores, and are named."""

    def warnings(self) -> list[str]:
        """Return a line for every evaluation set that is left out."""
        return [
            f"evaluation set {name}: no folder {folder}: not scored, in no average (never counted as zero)"
            for name, folder in self.absent.items()
        ]


@dataclass(frozen=True)
class Node:
    """One entry that should exist."""

    stage: str
    partition: str
    params: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    after: tuple[Input, ...] = ()
    """Must be up to date before this is built, but is not part of the fingerprint."""
    needs: tuple[str, ...] = ()
    """Outputs that somebody reads: an entry of older code, which has not all of them, is built again."""

    @property
    def name(self) -> str:
        """``STAGE/PARTITION``."""
        return node_name(self.stage, self.partition)


class Status(StrEnum):
    """What has to be done for a node."""

    CURRENT = "current"  # nothing
    RESTORE = "restore"  # an earlier entry fits again: nothing is built
    BUILD = "build"
    WAIT = "wait"  # known only after what it reads has been built
    BLOCKED = "blocked"  # a failed check stands against building it


@dataclass(frozen=True)
class Step:
    """A node, what has to be done for it, and why in words."""

    node: Node
    status: Status
    why: tuple[str, ...] = ()
    fingerprint: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    record: Record | None = None

    @property
    def key(self) -> str:
        """The Dagster partition: parts of one partition (``RECIPE@SET``) share it."""
        return self.node.partition.partition("@")[0]


@dataclass(frozen=True)
class Plan:
    """All steps in dependency order."""

    steps: tuple[Step, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Step]:
        """Steps by ``STAGE/PARTITION``."""
        return {step.node.name: step for step in self.steps}

    def of(self, stage: str, key: str | None = None) -> list[Step]:
        """Return the steps of a stage, or of one Dagster partition of it."""
        return list(self._by_key.get((stage, key), ()))

    @cached_property
    def _by_key(self) -> Mapping[tuple[str, str | None], list[Step]]:
        found: dict[tuple[str, str | None], list[Step]] = {}
        for step in self.steps:
            for key in (None, step.key):
                found.setdefault((step.node.stage, key), []).append(step)
        return found

    @property
    def todo(self) -> list[Step]:
        """Return every step that is not current."""
        return [step for step in self.steps if step.status is not Status.CURRENT]

    @property
    def records(self) -> list[Record]:
        """Return the records of everything that is current."""
        current = (step.record for step in self.steps if step.status is Status.CURRENT)
        return [record for record in current if record is not None]

    def keys(self, stage: str) -> list[str]:
        """Return the Dagster partitions of a stage, in order."""
        return list(dict.fromkeys(step.key for step in self.of(stage)))

    def ready(
        self, skip: Container[tuple[str, str]] = (), only: Sequence[str] = ()
    ) -> tuple[str, list[str]] | None:
        """Return the first stage with something to build or restore, and its partitions; None when done.

        Args:
            skip: (stage, partition) pairs to leave alone, because they have failed.
            only: stages to look at; all when empty.
        """
        for stage in only or STAGES:
            steps = [s for s in self.of(stage) if s.status in (Status.BUILD, Status.RESTORE)]
            keys = list(dict.fromkeys(s.key for s in steps if (stage, s.key) not in skip))
            if keys:
                return stage, keys
        return None


# ---------------------------------------------------------------- the graph


def subset_key(method: str, fraction: float) -> str:
    """Return the partition of a subset: ``METHOD-fFRACTION``."""
    return f"{method}-f{fraction:g}"


def recipe_key(method: str, fraction: float, seed: int) -> str:
    """Return the partition of a trained arm: ``METHOD-fFRACTION-sSEED``."""
    return f"{subset_key(method, fraction)}-s{seed}"


class Recipe(NamedTuple):
    """One arm: a method, the fraction of the pool that it keeps, the seed and length of its training."""

    method: str
    fraction: float
    seed: int
    protocol: Protocol = "samples_seen"
    suffix: str = ""
    """Ends the partition's name where the experiment has arms of both protocols."""

    @property
    def key(self) -> str:
        """The arm's partition."""
        return recipe_key(self.method, self.fraction, self.seed) + self.suffix

    @property
    def subset(self) -> str:
        """The partition of the subset that it trains on."""
        return subset_key(self.method, self.fraction)


def recipes(config: Config) -> list[Recipe]:
    """Return every arm of the experiment, the full pool first.

    The first protocol's arms are named as they are where it is the only one, so that giving the other one
    as well trains nothing again.
    """
    arms = [(FULL, 1.0), *((m, f) for m in config.select.methods for f in config.select.fractions)]
    first = config.train.protocols[0]
    return [
        Recipe(method, fraction, seed, protocol, "" if protocol == first else f"-{protocol}")
        for protocol in config.train.protocols
        for method, fraction in arms
        for seed in config.train.seeds
    ]


def method_names(config: Config) -> dict[str, str]:
    """Return the method behind each label of ``select.methods``."""
    return {label: params.get("method", label) for label, params in config.select.methods.items()}


def evaluation_sets(config: Config, absent: Container[str] = ()) -> list[str]:
    """Return the names of the sets that every arm is scored on: all but those that are absent."""
    return [name for name in config.evaluate.tasks if name not in absent]


def nodes(config: Config, world: World) -> Iterator[Node]:
    """Yield every entry that should exist, each after what it reads."""
    names = [shard.name for shard in world.shards]
    manifests = tuple(Input("raw_shards", name, "manifest") for name in names)
    weights = Input("proxy_model", WHOLE, "weights")
    labels = Input("pseudo_labels", WHOLE, "labels")
    pool = Input("pseudo_labels", WHOLE, "pool")

    for shard in world.shards:
        yield Node(
            "raw_shards",
            shard.name,
            params={"shards": {"max_image_pixels": config.shards.max_image_pixels}},
            sources={"shard": f"{shard.name}@{shard.version}"},
        )
    yield _proxy_node(config, world, manifests)
    for name in names:
        yield Node("embeddings", name, inputs=(Input("raw_shards", name, "manifest"), weights))
    if config.select.labels_of("c_rho"):
        for name in names:
            inputs = (Input("raw_shards", name, "manifest"), Input("proxy_model", WHOLE, "early"))
            yield Node("early_similarities", name, inputs=inputs)
    holdout = {"evaluate": {"holdout_fraction": config.evaluate.holdout_fraction}}
    yield Node(
        "pseudo_labels",
        WHOLE,
        params={"labels": config.labels.semantic(), **holdout},
        sources=_tokens(world, "labels.class_names"),
        inputs=(weights, *(Input("embeddings", name, "rows") for name in names)),
    )
    for label, params in config.select.methods.items():
        # by method, so that the reason reads "select.methods.clipcov.mode greedy -> notebook"
        method = params.get("method", label)
        settings = {
            "method": method,
            **validate_method(method, {k: v for k, v in params.items() if k != "method"}),
        }
        early = names if method == "c_rho" else []
        yield Node(
            "rankings",
            label,
            params={"select": {"methods": {label: settings}}},
            sources=_tokens(world, f"select.methods.{label}.uids"),
            inputs=(labels, pool, *(Input("early_similarities", name, "similarities") for name in early)),
        )
    yield from _arm_nodes(config, world, labels, pool)


def _proxy_node(config: Config, world: World, manifests: tuple[Input, ...]) -> Node:
    tokens = _tokens(world, "proxy.model", "proxy.pretrained", "proxy.early")
    params: dict[str, Any] = {"proxy": config.proxy.semantic()}
    if config.proxy.train is None:
        return Node("proxy_model", WHOLE, params=params, sources=tokens)
    params["evaluate"] = {"holdout_fraction": config.evaluate.holdout_fraction}
    follows = config.proxy.retrain_with_pool
    needs = ("weights", *(["early"] if config.select.labels_of("c_rho") else []))
    return Node(
        "proxy_model",
        WHOLE,
        params=params,
        sources=tokens,
        inputs=manifests if follows else (),
        after=() if follows else manifests,
        needs=needs,
    )


def _arm_nodes(config: Config, world: World, labels: Input, pool: Input) -> Iterator[Node]:
    arms = recipes(config)
    for method, fraction in dict.fromkeys((arm.method, arm.fraction) for arm in arms):
        source = labels if method == FULL else Input("rankings", method, "ranking")
        yield Node(
            "subsets",
            subset_key(method, fraction),
            params={"select": {"fraction": fraction, "samples_per_shard": config.select.samples_per_shard}},
            inputs=(source, pool),
        )
        if method != FULL:
            yield Node(
                "subset_galleries",
                subset_key(method, fraction),
                sources=_tokens(world, "labels.class_names"),
                inputs=(Input("subsets", subset_key(method, fraction), "subset"), source, labels, pool),
            )
    yield Node(
        "pool_map",
        WHOLE,
        params={"diagnostics": _some(config.diagnostics.semantic(), "tsne_samples", "seed")},
        inputs=(labels, pool),
    )
    yield from _diagnostics_nodes(config, labels, pool)
    for arm in arms:
        settings = config.train.under(arm.protocol).semantic()
        training = {key: value for key, value in settings.items() if key != "seeds"}
        yield Node(
            "checkpoints",
            arm.key,
            params={"train": {**training, "seed": arm.seed}},
            sources=_tokens(world, "train.model", "train.pretrained"),
            inputs=(Input("subsets", arm.subset, "samples"),),
            # an error that the diagnostics show is to be seen before anything is trained
            after=() if arm.method == FULL else (Input("subset_diagnostics", arm.subset, "table"),),
        )
    sets = evaluation_sets(config, world.absent)
    for arm in arms:
        for name in sets:
            yield _score_node(config, world, arm, name)
    board: dict[str, Any] = {"primary_metric": config.evaluate.primary_metric}
    if config.evaluate.suites:
        board["suites"] = {name: suite.semantic() for name, suite in config.evaluate.suites.items()}
    # decides what is compared with what
    compared = {"methods": {name: {"method": m} for name, m in method_names(config).items()}}
    yield Node(
        "leaderboard",
        WHOLE,
        params={"evaluate": board, "select": compared},
        inputs=tuple(Input("scores", f"{arm.key}@{name}", "scores") for arm in arms for name in sets),
    )
    yield from _checkpoint_gallery_nodes(config)
    pictures = [Input("subset_galleries", arm.subset, "gallery") for arm in arms if arm.method != FULL]
    if gallery_set(config) is not None:
        pictures += [Input("checkpoint_galleries", arm.key, "gallery") for arm in arms]
    yield Node(
        "report",
        WHOLE,
        params={
            "evaluate": board,
            "select": compared,
            "diagnostics": {"checks": config.diagnostics.checks.model_dump()},
        },
        inputs=(
            Input("leaderboard", WHOLE, "scores"),
            *(Input("checkpoints", arm.key, "weights") for arm in arms),
            *dict.fromkeys(pictures),
            *_diagnostics_of(config),
        ),
    )


def gallery_set(config: Config) -> str | None:
    """Return the set of pairs that checkpoint galleries look at: the primary metric's, else the first one."""
    pairs = [name for name, one in config.evaluate.sets.items() if one.shards is not None]
    pairs += [HOLDOUT] if config.evaluate.holdout_fraction else []
    primary = config.evaluate.primary_metric.partition("/")[0]
    return primary if primary in pairs else next(iter(pairs), None)


def _checkpoint_gallery_nodes(config: Config) -> Iterator[Node]:
    """Yield the pictures of what each model finds among held-out pairs, beside the full pool's."""
    name = gallery_set(config)
    if name is None:
        return
    for arm in recipes(config):
        full = arm._replace(method=FULL, fraction=1.0).key
        yield Node(
            "checkpoint_galleries",
            arm.key,
            params={"evaluate": {"set": name}},
            inputs=tuple(
                Input("scores", f"{key}@{name}", "neighbours") for key in dict.fromkeys([arm.key, full])
            ),
        )


def _diagnostics_nodes(config: Config, labels: Input, pool: Input) -> Iterator[Node]:
    """Yield what is said of every subset alone, and, as a part of it, beside the other methods' subsets."""
    draws = _some(config.diagnostics.semantic(), "random_draws", "seed")
    shared = (labels, pool, Input("proxy_model", WHOLE, "weights"), Input("pool_map", WHOLE, "map"))
    for fraction in config.select.fractions:
        subsets = [Input("subsets", subset_key(m, fraction), "subset") for m in config.select.methods]
        for label, subset in zip(config.select.methods, subsets, strict=True):
            weights = {"methods": {label: {"weights": objective_weights(config, label)}}}
            yield Node(
                "subset_diagnostics",
                subset.partition,
                params={"diagnostics": draws, "select": weights},
                inputs=(subset, *shared),
            )
            whose = {"diagnostics": {"overlap_of": label}}
            yield Node(
                "subset_diagnostics",
                f"{subset.partition}@{OVERLAP}",
                params=whose,
                inputs=(*subsets, labels),
                after=(shared[-1],),  # so that both parts are ready at once
            )


def _diagnostics_of(config: Config) -> Iterator[Input]:
    for fraction in config.select.fractions:
        for method in config.select.methods:
            subset = subset_key(method, fraction)
            yield Input("subset_diagnostics", subset, "table")
            yield Input("subset_diagnostics", f"{subset}@{OVERLAP}", OVERLAP)


def objective_weights(config: Config, label: str) -> dict[str, float]:
    """Return the weights of F's terms that a method works with; the default ones where it has no F."""
    params = dict(config.select.methods[label])
    settings = validate_method(params.pop("method", label), params)
    return dict(settings.get("weights", DEFAULT_WEIGHTS))


def _some(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _score_node(config: Config, world: World, arm: Recipe, name: str) -> Node:
    checkpoint = Input("checkpoints", arm.key, "weights")
    partition = f"{arm.key}@{name}"
    if name == HOLDOUT:
        return Node("scores", partition, inputs=(checkpoint, Input("pseudo_labels", WHOLE, "holdout")))
    settings: EvaluationSet = config.evaluate.sets[name]
    files = {f"{name}/{shard.name}": shard.version for shard in world.evaluation_shards[name]}
    named = f"evaluate.sets.{name}."
    files |= {key: token for key, token in world.tokens.items() if key.startswith(named)}
    place = {"shards", "benchmark"}  # what is there counts, not where
    semantic = {key: value for key, value in settings.semantic().items() if key not in place}
    params: dict[str, Any] = {"evaluate": {"sets": {name: semantic}}}
    if settings.shards is not None:
        params["shards"] = {"max_image_pixels": config.shards.max_image_pixels}
    return Node(
        "scores",
        partition,
        params=params,
        sources=files,
        inputs=(checkpoint,),
    )


def _tokens(world: World, *names: str) -> dict[str, str]:
    return {name: world.tokens[name] for name in names if name in world.tokens}


# ---------------------------------------------------------------- what is out of date


def make_plan(config: Config, world: World, store: Store) -> Plan:
    """Compare what should exist with what the store holds; reads records only, changes nothing."""
    done: dict[str, Step] = {}
    against: dict[str, tuple[str, ...]] = {}  # what stands against building anything from an entry
    for node in nodes(config, world):
        step = _step(node, done, store)
        above = {node_name(item.stage, item.partition) for item in (*node.inputs, *node.after)}
        reasons = sorted({reason for name in above for reason in against[name]})
        # the report shows what failed: it is never held up
        if reasons and step.status is Status.BUILD and node.stage != "report":
            rest = (f"and {len(reasons) - 1} more",) if len(reasons) > 1 else ()
            step = replace(step, status=Status.BLOCKED, why=(reasons[0], *rest))
        done[node.name] = step
        own = stands_against(config, step.record) if step.record else ()
        against[node.name] = (*reasons, *own)
    return Plan(tuple(done.values()))


def fingerprint_of(node: Node, inputs: Mapping[str, str]) -> str:
    """Return the fingerprint (64 hex) of a node that reads outputs with these digests."""
    return fingerprint_from(
        stage=node.stage,
        code_version=CODE_VERSIONS[node.stage],
        params=node.params,
        sources=node.sources,
        inputs=inputs,
    )


def _step(node: Node, done: Mapping[str, Step], store: Store) -> Step:
    blocking = _unreadable(node.inputs, done)
    if blocking:
        return Step(node, Status.WAIT, why=(*_own_reasons(node, store), _waits(blocking)))
    inputs = {item.name: _digest(done, item) for item in node.inputs}
    fingerprint = fingerprint_of(node, inputs)
    record = store.find(node.stage, node.partition, fingerprint)
    damage = _unfit(node, store, record) if record is not None else None
    if damage is not None:
        record = None  # never served
    current = store.current_fingerprint(node.stage, node.partition)
    if record is not None and current == fingerprint:
        return Step(node, Status.CURRENT, (), fingerprint, inputs, record)
    blocking = _unreadable(node.after, done)
    if record is None and blocking:
        return Step(node, Status.WAIT, why=(_waits(blocking),))
    previous = store.find(node.stage, node.partition, current) if current else None
    why = (damage,) if damage is not None else tuple(_reasons(node, inputs, previous))
    status = Status.RESTORE if record is not None else Status.BUILD
    return Step(node, status, why, fingerprint, inputs, record)


def _unfit(node: Node, store: Store, record: Record) -> str | None:
    """Say why an entry cannot serve although its fingerprint fits; None when it can."""
    if missing := [name for name in node.needs if name not in record.digests]:
        return f"was built without {missing[0]}, which is read now"
    damage = store.glance(record)
    return f"damaged: {damage}" if damage is not None else None


def _own_reasons(node: Node, store: Store) -> Iterator[str]:
    """Say what is known already of a node that waits: its settings and code, not yet what it reads."""
    previous = store.current(node.stage, node.partition)
    if previous is not None:
        yield from _reasons(node, previous.inputs, previous)


def _unreadable(inputs: Sequence[Input], done: Mapping[str, Step]) -> list[str]:
    names = dict.fromkeys(node_name(item.stage, item.partition) for item in inputs)
    return [name for name in names if not _is_readable(done[name])]


def _is_readable(step: Step) -> bool:
    """What will be restored can be read already, but for embeddings, whose rows have to come back."""
    if step.status is Status.RESTORE:
        return step.node.stage != "embeddings"
    return step.status is Status.CURRENT


def _digest(done: Mapping[str, Step], item: Input) -> str:
    record = done[node_name(item.stage, item.partition)].record
    assert record is not None  # it is readable
    return record.digests[item.output]


def _waits(blocking: Sequence[str]) -> str:
    rest = f" and {len(blocking) - 1} more" if len(blocking) > 1 else ""
    return f"waits for {blocking[0]}{rest}"


def _reasons(node: Node, inputs: Mapping[str, str], previous: Record | None) -> Iterator[str]:
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


# ---------------------------------------------------------------- the outside


def observe(config: Config) -> World:
    """List the shards and hash the small files that the configuration names.

    The sample is unpacked to the work folder on first use; from there on it is a folder like any other.

    Raises:
        InputError: a missing or empty folder, an unknown model, a missing file.
    """
    from clipcov_pipeline.shards import scan

    options = dict(config.shards.storage_options)
    tokens = _file_tokens(config)  # first: a mistake here is found before the sample is unpacked
    sets, set_tokens, absent = _evaluation_files(config)
    return World(
        tokens=tokens | set_tokens,
        shards=tuple(scan(pool_source(config), options, settle_seconds=config.shards.settle_seconds)),
        evaluation_shards=sets,
        absent=absent,
    )


def _evaluation_files(
    config: Config,
) -> tuple[dict[str, tuple[Shard, ...]], dict[str, str], dict[str, str]]:
    """Return (shards by set, tokens of the sets' small files, absent sets and their folders)."""
    from clipcov_pipeline.benchmark_folders import list_folder
    from clipcov_pipeline.shards import scan

    absent = absent_sets(config)
    shards: dict[str, tuple[Shard, ...]] = {}
    tokens: dict[str, str] = {}
    for name, chosen in config.evaluate.sets.items():
        if name in absent:
            continue
        if chosen.benchmark is None:
            shards[name] = tuple(scan(evaluation_source(config, name), dict(chosen.storage_options)))
        else:
            shards[name], files = list_folder(name, config.resolve(chosen.benchmark), chosen)
            tokens |= {f"evaluate.sets.{name}.{file}": token for file, token in files.items()}
    members = primary_sets(config)
    if all(name in absent for name in members):
        raise InputError(
            f"evaluate.primary_metric: found {config.evaluate.primary_metric!r}, but there is no folder"
            f" {' nor '.join(absent[name] for name in members)}: put the data there, or name another metric"
        )
    return shards, tokens, absent


def primary_sets(config: Config) -> tuple[str, ...]:
    """Return the evaluation sets that the primary metric is made of."""
    primary = config.evaluate.primary_metric.partition("/")[0]
    suite = config.evaluate.suites.get(primary)
    return suite.sets if suite else (primary,)


def absent_sets(config: Config) -> dict[str, str]:
    """Return the evaluation sets whose folder is not there, and the folder."""
    folders = {
        name: config.resolve(chosen.benchmark)
        for name, chosen in config.evaluate.sets.items()
        if chosen.benchmark is not None
    }
    return {name: str(folder) for name, folder in folders.items() if not folder.is_dir()}


def pool_source(config: Config) -> str:
    """Return where the pool's shards are: the source of the YAML, or the unpacked sample's folder."""
    if config.shards.source == "sample":
        return str(_unpacked_sample(config)[0])
    return config.location(config.shards.source)


def evaluation_source(config: Config, name: str) -> str:
    """Return where an evaluation set's shards are (of a set that has ``shards``)."""
    source = config.evaluate.sets[name].shards or ""
    return str(_unpacked_sample(config)[1]) if source == "sample" else config.location(source)


def _unpacked_sample(config: Config) -> tuple[Path, Path]:
    from clipcov_pipeline.sample import unpack_sample

    return unpack_sample(config.work / "sample")


def _file_tokens(config: Config) -> dict[str, str]:
    from clipcov_pipeline.embed import MODEL_CONFIGS, ModelSpec, check_model
    from clipcov_pipeline.selection.external import check_uids_file

    tokens: dict[str, str] = {}
    known = _known_tags(config)
    for section, settings in (("proxy", config.proxy), ("train", config.train)):
        checkpoint = checkpoint_path(config, settings.pretrained)
        unknown = None if (settings.model, checkpoint) in known else checkpoint
        try:
            check_model(ModelSpec(settings.model, unknown))
        except InputError as error:
            raise InputError(f"{section}.{error}") from error
        description = MODEL_CONFIGS / f"{settings.model}.json"
        if description.is_file():
            tokens[f"{section}.model"] = digest_of_file(description)
        if checkpoint and Path(checkpoint).is_file():
            tokens[f"{section}.pretrained"] = change_token(Path(checkpoint))
    if early := checkpoint_path(config, config.proxy.early):
        try:
            check_model(ModelSpec(config.proxy.model, early))
        except InputError as error:
            raise InputError(f"proxy.{str(error).replace('pretrained:', 'early:', 1)}") from error
        if Path(early).is_file():
            tokens["proxy.early"] = change_token(Path(early))
    for label in config.select.labels_of("external"):
        key = f"select.methods.{label}.uids"
        path = config.resolve(config.select.methods[label]["uids"])
        try:
            check_uids_file(path)
        except InputError as error:
            raise InputError(f"select.methods.{label}.{error}") from error
        tokens[key] = digest_of_file(path)
    if config.labels.latent_classes == "prompts":
        tokens["labels.class_names"] = digest_of(class_names(config))
    return tokens


def _known_tags(config: Config) -> set[tuple[str, str]]:
    """Return (model, tag) of the proxy that stands: checked then, and a check is seconds of imports."""
    record = Store(config.work / "store").current("proxy_model", WHOLE)
    if record is None or not (tag := record.stats.get("pretrained")) or is_path(tag):
        return set()
    return {(record.stats["model"], tag)}


def change_token(path: Path) -> str:
    """Return size and modification time: enough to look again, the content decides what follows."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def class_names(config: Config) -> list[str] | str:
    """Return the class names that the prompts are made of; ImageNet's by their name, as open_clip has them.

    Raises:
        InputError: a missing file, a duplicate or blank name.
    """
    from clipcov_pipeline.prompts import load_class_names
    from clipcov_pipeline.sample import sample_class_names

    match config.labels.class_names:
        case "imagenet1k":
            return "imagenet1k"
        case "sample":
            return sample_class_names()
        case path:
            return load_class_names(config.resolve(path))


def latent_class_names(config: Config) -> list[str] | None:
    """Return the names of the latent classes by their number; None where classes are clusters.

    Raises:
        InputError: as `class_names`.
    """
    from clipcov_pipeline.prompts import imagenet_class_names

    if config.labels.latent_classes == "clusters":
        return None
    names = class_names(config)
    return imagenet_class_names() if isinstance(names, str) else names


def checkpoint_path(config: Config, pretrained: str | None) -> str | None:
    """Return a local checkpoint's absolute path; an open_clip tag is returned as it is."""
    return str(config.resolve(pretrained)) if pretrained and is_path(pretrained) else pretrained


def is_path(pretrained: str) -> bool:
    """Return whether weights are named by a path, not by an open_clip tag."""
    from clipcov_pipeline.embed import CHECKPOINT_SUFFIXES

    return "/" in pretrained or Path(pretrained).suffix in CHECKPOINT_SUFFIXES
