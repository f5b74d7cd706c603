"""An experiment whose stages are simulated; the plan and the store are real.

A simulated stage's output digests are a function of what the stage reads, so that early cutoff can be staged:
content is what counts, listings and file times only say where to look again. The fixtures `fresh` and `built`
give one.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.load import load_config
from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.plan import Plan, Status, Step, make_plan
from clipcov_pipeline.experiment.stages import CODE_VERSIONS, STAGES
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.experiment.world import World
from clipcov_pipeline.pool.listing import Shard

SETTINGS: dict[str, Any] = {
    "name": "simulated",
    "proxy": {"model": "proxy-net", "train": {"samples_seen": 1000}},
    "labels": {"class_names": "names.txt", "templates": ["a {}"]},
    "select": {"fractions": [0.25, 0.5], "methods": {"clipcov": {}, "random": {}}},
    "train": {"model": "arm-net", "samples_seen": 100, "lr": 0.001, "seeds": [0, 1]},
    "evaluate": {"sets": {"coco": {"shards": "coco"}}, "primary_metric": "coco/text_retrieval_recall@5"},
}
BOARD = {"leaderboard", "report"}
METHODS, FRACTIONS, SEEDS = ("clipcov", "random"), ("0.25", "0.5"), (0, 1)
OUTPUTS = {
    "raw_shards": ("manifest", "places", "source_ids"),
    "proxy_model": ("weights", "early"),
    "embeddings": ("rows",),
    "early_similarities": ("similarities",),
    "pseudo_labels": ("labels", "holdout", "pool"),
    "sample_index": ("index",),
    "rankings": ("ranking",),
    "subsets": ("samples", "subset"),
    "pool_map": ("map",),
    "subset_diagnostics": ("table", "overlap"),
    "subset_galleries": ("gallery",),
    "checkpoints": ("weights",),
    "scores": ("scores", "neighbours"),
    "checkpoint_galleries": ("gallery",),
    "report": ("report",),
    "leaderboard": ("scores",),
}
Change = Callable[[dict[str, Any]], object]


class Simulation:
    """An experiment whose stages give digests instead of files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.settings = copy.deepcopy(SETTINGS)
        self.shards = {name: f"content of {name}" for name in ("a", "b", "c")}
        self.times = dict.fromkeys(self.shards, 1)
        self.tokens = {"labels.class_names": digest_of(["cat", "dog"])}
        self.sets = {"coco": 1}
        self.same_result: set[str] = set()
        """Steps (or stages) whose output does not depend on what they read."""
        self.code_result = dict.fromkeys(STAGES, "")
        self.stats: dict[str, dict[str, Any]] = {}
        """What steps record, by name."""

    def edit(self, change: Change) -> None:
        """Change the YAML."""
        change(self.settings)

    @property
    def config(self) -> Config:
        path = self.folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        return load_config(str(path))

    @property
    def world(self) -> World:
        return World(
            shards=tuple(Shard(name, f"/{name}.tar", str(self.times[name])) for name in sorted(self.shards)),
            evaluation_shards={
                name: (Shard("00000", f"/{name}/00000.tar", str(version)),)
                for name, version in self.sets.items()
            },
            tokens=self.tokens,
        )

    def plan(self) -> Plan:
        return make_plan(self.config, self.world, self.store)

    def run(self, rounds: int = 50) -> dict[str, str]:
        """Do what the plan says, stage by stage, planning again after each; return what was done."""
        executed: dict[str, str] = {}
        for _ in range(rounds):
            plan = self.plan()
            ready = plan.ready()
            if ready is None:
                assert not plan.todo
                return executed
            stage, keys = ready
            for key in keys:
                for step in plan.of(stage, key):
                    if step.status in (Status.BUILD, Status.RESTORE):
                        assert step.node.name not in executed  # nothing is done twice
                        executed[step.node.name] = str(step.status)
                        self.execute(step)
        raise AssertionError(f"not done after {rounds} rounds: {executed}")

    def execute(self, step: Step) -> None:
        if step.status is Status.RESTORE:
            assert step.record is not None
            self.store.set_current(step.record)
            return
        node = step.node
        assert step.fingerprint is not None
        with self.store.write(
            node.stage,
            node.partition,
            step.fingerprint,
            code_version=CODE_VERSIONS[node.stage],
            params=node.params,
            sources=node.sources,
            inputs=step.inputs,
        ) as entry:
            entry.digests = {output: self.digest(step, output) for output in OUTPUTS[node.stage]}
            entry.stats = self.stats.get(node.name, {})
            for output, digest in entry.digests.items():
                (entry.folder / output).write_text(digest)

    def digest(self, step: Step, output: str) -> str:
        """The digest of an output as the real stage would have it: equal content gives an equal digest."""
        node = step.node
        params: Mapping[str, Any] = node.params
        read: Any = [step.inputs, node.sources]
        if output == "source_ids":
            return digest_of([])  # all samples have UUIDs
        if node.stage == "raw_shards":
            read = self.shards[node.partition]  # the bytes, not the listing
        if node.stage == "subsets":  # what was chosen, not where it lies
            read = {name: digest for name, digest in step.inputs.items() if name != "sample_index#index"}
        if (node.stage, output) == ("proxy_model", "weights"):
            params = {**params, "proxy": {k: v for k, v in params["proxy"].items() if k != "early"}}
        if (node.stage, output) == ("pseudo_labels", "pool"):
            params, read = {}, step.inputs
        if (node.stage, output) == ("pseudo_labels", "holdout"):
            params, read = params["evaluate"], step.inputs
        if self.same_result & {node.stage, node.name}:
            params, read = {}, ""
        return digest_of([node.name, output, params, read, self.code_result[node.stage]])


def arms(
    methods: Iterable[str] = METHODS, fractions: Iterable[str] = FRACTIONS, full: bool = True
) -> list[str]:
    """Names of subsets, written out as a user would expect them."""
    return [*(["full-f1"] if full else []), *(f"{m}-f{f}" for m in methods for f in fractions)]


def trained(subsets: Iterable[str], sets: Iterable[str] = ("coco", "holdout")) -> set[str]:
    """The checkpoints of these subsets, their scores and pictures, and the leaderboard."""
    recipes = [f"{subset}-s{seed}" for subset in subsets for seed in SEEDS]
    checkpoints = {f"checkpoints/{recipe}" for recipe in recipes}
    return checkpoints | scored(recipes, sets) | BOARD


def scored(recipes: Iterable[str], sets: Iterable[str]) -> set[str]:
    """The scores on these sets; pictures are of the primary metric's set, coco."""
    recipes, sets = list(recipes), list(sets)
    pictures = {f"checkpoint_galleries/{recipe}" for recipe in recipes if "coco" in sets}
    return {f"scores/{recipe}@{name}" for recipe in recipes for name in sets} | pictures


def selected(subsets: Iterable[str] = ()) -> set[str]:
    """The subsets, their pictures, what is said of each, and the overlaps at their fractions."""
    subsets = list(subsets)
    fractions = {subset.partition("-f")[2] for subset in subsets} - {"1"}
    pictures = {f"subset_galleries/{subset}" for subset in subsets if subset != "full-f1"}
    return {f"subsets/{subset}" for subset in subsets} | pictures | diagnosed(subsets, fractions)


def diagnosed(subsets: Iterable[str], fractions: Iterable[str]) -> set[str]:
    named = [subset for subset in subsets if subset != "full-f1"]
    methods = {*METHODS, *(subset.partition("-f")[0] for subset in named)}
    overlaps = {f"subset_diagnostics/{m}-f{f}@overlap" for m in methods for f in fractions}
    return {f"subset_diagnostics/{subset}" for subset in named} | overlaps


FROM_SUBSETS = selected(arms()) | trained(arms())


FROM_LABELS = {"pseudo_labels", "rankings/clipcov", "rankings/random", "pool_map"} | FROM_SUBSETS


EVERYTHING = (
    {f"{stage}/{name}" for stage in ("raw_shards", "embeddings") for name in "abc"}
    | {"proxy_model", "sample_index"}
    | FROM_LABELS
)


def builds(names: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(names, "build")


def set_key(path: str, value: Any) -> Change:
    """A change of one key of the YAML."""

    def change(settings: dict[str, Any]) -> None:
        *sections, key = path.split(".")
        for section in sections:
            settings = settings.setdefault(section, {})
        settings[key] = value

    return change


def why(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {step.node.name: step.why for step in plan.todo}


# --- the graph --------------------------------------------------------------------------------------
