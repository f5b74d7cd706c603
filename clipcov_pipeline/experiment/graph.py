"""Every entry that should exist, and what it is made from: one function a stage.

Pure: what lies outside is in the `World` that is handed in.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from clipcov_pipeline.experiment.config.base import FULL, HOLDOUT
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.select import DRAW_FROM
from clipcov_pipeline.experiment.recipes import (
    Recipe,
    evaluation_sets,
    gallery_set,
    method_names,
    objective_weights,
    recipes,
    subset_key,
)
from clipcov_pipeline.experiment.records import WHOLE, node_name
from clipcov_pipeline.experiment.stages import (
    CHECKPOINT_GALLERIES,
    CHECKPOINTS,
    EARLY_SIMILARITIES,
    EMBEDDINGS,
    LEADERBOARD,
    OVERLAP,
    POOL_MAP,
    PROXY_MODEL,
    PSEUDO_LABELS,
    RANKINGS,
    RAW_SHARDS,
    REPORT,
    SAMPLE_INDEX,
    SCORES,
    SUBSET_DIAGNOSTICS,
    SUBSET_GALLERIES,
    SUBSETS,
)
from clipcov_pipeline.experiment.world import World
from clipcov_pipeline.selection import columns_read, files_of, validate_method
from clipcov_pipeline.selection.methods import SIZE


class Input(NamedTuple):
    """One output of one entry that a node reads."""

    stage: str
    partition: str
    output: str

    @property
    def entry(self) -> str:
        """``STAGE/PARTITION``."""
        return node_name(self.stage, self.partition)

    @property
    def name(self) -> str:
        """``STAGE/PARTITION#OUTPUT``, the key under which a record keeps the digest."""
        return f"{self.entry}#{self.output}"


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

    @cached_property
    def name(self) -> str:
        """``STAGE/PARTITION``."""
        return node_name(self.stage, self.partition)


# of the stages that have one entry
WEIGHTS = Input(PROXY_MODEL, WHOLE, "weights")

EARLY_WEIGHTS = Input(PROXY_MODEL, WHOLE, "early")

LABELS = Input(PSEUDO_LABELS, WHOLE, "labels")

POOL = Input(PSEUDO_LABELS, WHOLE, "pool")

MAP = Input(POOL_MAP, WHOLE, "map")

INDEX = Input(SAMPLE_INDEX, WHOLE, "index")


def nodes(config: Config, world: World) -> Iterator[Node]:
    """Yield every entry that should exist, each after what it reads."""
    shards = [shard.name for shard in world.shards]
    arms, sets = recipes(config), evaluation_sets(config, world.absent)
    yield from _raw_shards(config, world)
    yield _proxy_model(config, world)
    yield from _embeddings(shards)
    if config.select.labels_of("c_rho"):
        yield from _early_similarities(shards)
    yield _pseudo_labels(config, world)
    yield _sample_index(shards)
    yield from _rankings(config, world)
    for method, fraction in dict.fromkeys((arm.method, arm.fraction) for arm in arms):
        yield _subset(config, method, fraction)
        if method != FULL:
            yield _subset_gallery(world, method, fraction)
    yield _pool_map(config)
    yield from _subset_diagnostics(config)
    yield from (_checkpoint(config, world, arm) for arm in arms)
    yield from (_scores(config, world, arm, name) for arm in arms for name in sets)
    yield _leaderboard(config, arms, sets)
    yield from _checkpoint_galleries(config, arms)
    yield _report(config, arms)


def _raw_shards(config: Config, world: World) -> Iterator[Node]:
    rules = {"shards": _image_rules(config)["shards"] | _caption(config)}
    for shard in world.shards:
        yield Node(
            RAW_SHARDS,
            shard.name,
            params=rules if shard.rows is None else {"shards": rules["shards"] | config.shards.columns},
            sources={"shard": f"{shard.name}@{shard.version}"},
            needs=("places",),
        )


def _proxy_model(config: Config, world: World) -> Node:
    params: dict[str, Any] = {"proxy": config.proxy.semantic()}
    tokens = _tokens(world, "proxy.model", "proxy.pretrained", "proxy.early")
    if config.proxy.train is None:
        return Node(PROXY_MODEL, WHOLE, params, tokens)
    manifests = tuple(_manifest(shard.name) for shard in world.shards)
    follows = config.proxy.retrain_with_pool
    return Node(
        PROXY_MODEL,
        WHOLE,
        params=params | _holdout(config) | ({"shards": caption} if (caption := _caption(config)) else {}),
        sources=tokens,
        inputs=manifests if follows else (),
        after=() if follows else manifests,
        needs=("weights", *(["early"] if config.select.labels_of("c_rho") else [])),
    )


def _embeddings(shards: Sequence[str]) -> Iterator[Node]:
    for name in shards:
        yield Node(EMBEDDINGS, name, inputs=(_manifest(name), WEIGHTS))


def _early_similarities(shards: Sequence[str]) -> Iterator[Node]:
    for name in shards:
        yield Node(EARLY_SIMILARITIES, name, inputs=(_manifest(name), EARLY_WEIGHTS))


def _pseudo_labels(config: Config, world: World) -> Node:
    return Node(
        PSEUDO_LABELS,
        WHOLE,
        params={"labels": config.labels.semantic(), **_holdout(config)},
        sources=_tokens(world, "labels.class_names"),
        inputs=(
            WEIGHTS,
            *(Input(EMBEDDINGS, shard.name, "rows") for shard in world.shards),
            # what a manifest has beside the rows
            *(Input(RAW_SHARDS, shard.name, "source_ids") for shard in world.shards),
        ),
    )


def _sample_index(shards: Sequence[str]) -> Node:
    return Node(SAMPLE_INDEX, WHOLE, inputs=tuple(Input(RAW_SHARDS, name, "places") for name in shards))


def _rankings(config: Config, world: World) -> Iterator[Node]:
    early = [Input(EARLY_SIMILARITIES, shard.name, "similarities") for shard in world.shards]
    manifests = [_manifest(shard.name) for shard in world.shards]
    for label in config.select.methods:
        method, params = config.select.method_of(label)
        # by method, so that the reason reads "select.methods.clipcov.mode greedy -> notebook"
        settings = {"method": method, **validate_method(method, params)}
        if method == "external":  # once ranked: an entry of then must not stand for one of now
            settings["weight_0"] = "left out"
        yield Node(
            RANKINGS,
            label,
            params={"select": {"methods": {label: settings}}},
            sources=_tokens(world, *(f"select.methods.{label}.{key}" for key in files_of(method, params))),
            inputs=(
                LABELS,
                POOL,
                *(early if method == "c_rho" else ()),
                *(manifests if SIZE & columns_read(method, params) else ()),
            ),
        )


def _order(method: str) -> Input:
    """What a method's subsets are cut from; the full pool is not ranked."""
    return LABELS if method == FULL else Input(RANKINGS, method, "ranking")


def _subset(config: Config, method: str, fraction: float) -> Node:
    select = config.select
    of_pairs = {"write_tars": True, "samples_per_shard": select.samples_per_shard, "members": "pair"}
    tars = of_pairs if select.write_tars else {}
    anew = {} if method == FULL or (share := select.draw_from(method)) is None else {DRAW_FROM: share}
    return Node(
        SUBSETS,
        subset_key(method, fraction),
        params={"select": {"fraction": fraction, **anew, **tars}},
        inputs=(_order(method), POOL, INDEX),
    )


def _subset_gallery(world: World, method: str, fraction: float) -> Node:
    key = subset_key(method, fraction)
    return Node(
        SUBSET_GALLERIES,
        key,
        sources=_tokens(world, "labels.class_names"),
        inputs=(Input(SUBSETS, key, "subset"), _order(method), LABELS, POOL),
    )


def _pool_map(config: Config) -> Node:
    drawn = _some(config.diagnostics.semantic(), "tsne_samples", "seed")
    return Node(POOL_MAP, WHOLE, params={"diagnostics": drawn}, inputs=(LABELS, POOL))


def _subset_diagnostics(config: Config) -> Iterator[Node]:
    """Yield what is said of every subset alone, and, as a part of it, beside the other methods' subsets."""
    draws = _some(config.diagnostics.semantic(), "random_draws", "seed")
    for fraction in config.select.fractions:
        subsets = [Input(SUBSETS, subset_key(m, fraction), "subset") for m in config.select.methods]
        for label, subset in zip(config.select.methods, subsets, strict=True):
            weights = {"methods": {label: {"weights": objective_weights(config, label)}}}
            yield Node(
                SUBSET_DIAGNOSTICS,
                subset.partition,
                params={"diagnostics": draws, "select": weights},
                inputs=(subset, LABELS, POOL, WEIGHTS, MAP),
            )
            yield Node(
                SUBSET_DIAGNOSTICS,
                f"{subset.partition}@{OVERLAP}",
                params={"diagnostics": {"overlap_of": label}},
                inputs=(*subsets, LABELS),
                after=(MAP,),  # so that both parts are ready at once
            )


def _checkpoint(config: Config, world: World, arm: Recipe) -> Node:
    settings = config.train.under(arm.protocol).semantic()
    training = {key: value for key, value in settings.items() if key != "seeds"}
    return Node(
        CHECKPOINTS,
        arm.key,
        params={"train": {**training, "seed": arm.seed}},
        sources=_tokens(world, "train.model", "train.pretrained"),
        inputs=(Input(SUBSETS, arm.subset, "samples"),),
        # an error that the diagnostics show is to be seen before anything is trained
        after=() if arm.method == FULL else (Input(SUBSET_DIAGNOSTICS, arm.subset, "table"),),
    )


def _scores(config: Config, world: World, arm: Recipe, name: str) -> Node:
    checkpoint, partition = Input(CHECKPOINTS, arm.key, "weights"), _part(arm, name)
    ties = {} if config.evaluate.ties == "expected" else {"ties": config.evaluate.ties}
    if name == HOLDOUT:
        inputs = (checkpoint, Input(PSEUDO_LABELS, WHOLE, "holdout"))
        return Node(SCORES, partition, {"evaluate": ties} if ties else {}, inputs=inputs)
    settings = config.evaluate.sets[name]
    place = {"shards", "benchmark"}  # what is there counts, not where
    semantic = {key: value for key, value in settings.semantic().items() if key not in place}
    shards = {f"{name}/{shard.name}": shard.version for shard in world.evaluation_shards[name]}
    files = [key for key in world.tokens if key.startswith(f"evaluate.sets.{name}.")]
    return Node(
        SCORES,
        partition,
        params={"evaluate": {"sets": {name: semantic}, **ties}, **_image_rules(config)},
        sources={**shards, **_tokens(world, *files)},
        inputs=(checkpoint,),
    )


def _leaderboard(config: Config, arms: Sequence[Recipe], sets: Sequence[str]) -> Node:
    scores = tuple(Input(SCORES, _part(arm, name), "scores") for arm in arms for name in sets)
    return Node(LEADERBOARD, WHOLE, params=_compared(config), inputs=scores)


def _checkpoint_galleries(config: Config, arms: Sequence[Recipe]) -> Iterator[Node]:
    """Yield the pictures of what each model finds among held-out pairs, beside the full pool's."""
    name = gallery_set(config)
    if name is None:
        return
    for arm in arms:
        both = dict.fromkeys([arm, arm._replace(method=FULL, fraction=1.0)])
        yield Node(
            CHECKPOINT_GALLERIES,
            arm.key,
            params={"evaluate": {"set": name}},
            inputs=tuple(Input(SCORES, _part(one, name), "neighbours") for one in both),
        )


def _report(config: Config, arms: Sequence[Recipe]) -> Node:
    pictures = [Input(SUBSET_GALLERIES, arm.subset, "gallery") for arm in arms if arm.method != FULL]
    if gallery_set(config) is not None:
        pictures += [Input(CHECKPOINT_GALLERIES, arm.key, "gallery") for arm in arms]
    return Node(
        REPORT,
        WHOLE,
        params={**_compared(config), "diagnostics": {"checks": config.diagnostics.checks.model_dump()}},
        inputs=(
            Input(LEADERBOARD, WHOLE, "scores"),
            *(Input(CHECKPOINTS, arm.key, "weights") for arm in arms),
            *dict.fromkeys(pictures),
            *_diagnostics_of(config),
        ),
    )


def _diagnostics_of(config: Config) -> Iterator[Input]:
    for fraction in config.select.fractions:
        for method in config.select.methods:
            subset = subset_key(method, fraction)
            yield Input(SUBSET_DIAGNOSTICS, subset, "table")
            yield Input(SUBSET_DIAGNOSTICS, f"{subset}@{OVERLAP}", OVERLAP)


def _compared(config: Config) -> dict[str, Any]:
    """What decides what is compared with what, and by which metric."""
    board: dict[str, Any] = {"primary_metric": config.evaluate.primary_metric}
    if config.evaluate.suites:
        board["suites"] = {name: suite.semantic() for name, suite in config.evaluate.suites.items()}
    methods = {label: {"method": method} for label, method in method_names(config).items()}
    return {"evaluate": board, "select": {"methods": methods}}


def _image_rules(config: Config, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What decides which images are usable; and of tables, which columns are read."""
    rules = ("max_image_pixels", "max_resized_pixels", "high_bit_depth")
    return {"shards": {**_some(config.shards.semantic(), *rules), **(columns or {})}}


def _caption(config: Config) -> dict[str, Any]:
    """What decides which caption counts, where it is not the `.txt`."""
    return {name: value for name, value in config.shards.semantic().items() if name == "caption"}


def _holdout(config: Config) -> dict[str, Any]:
    return {"evaluate": {"holdout_fraction": config.evaluate.holdout_fraction}}


def _manifest(shard: str) -> Input:
    return Input(RAW_SHARDS, shard, "manifest")


def _part(arm: Recipe, name: str) -> str:
    """The partition of an arm's scores on one evaluation set."""
    return f"{arm.key}@{name}"


def _some(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _tokens(world: World, *names: str) -> dict[str, str]:
    return {name: world.tokens[name] for name in names if name in world.tokens}
