"""Every entry that should exist, and what it is made from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.config.evaluate import EvaluationSet
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.recipes import (
    Recipe,
    evaluation_sets,
    gallery_set,
    method_names,
    objective_weights,
    recipes,
    subset_key,
)
from clipcov_pipeline.experiment.stages import HOLDOUT, OVERLAP
from clipcov_pipeline.experiment.store import WHOLE, node_name
from clipcov_pipeline.experiment.world import World
from clipcov_pipeline.selection import validate_method


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
