"""What lies outside the store: shards, evaluation sets, and the small files that the configuration names."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.digests import digest_of, digest_of_file
from clipcov_pipeline.experiment.evaluation_folders import list_folder
from clipcov_pipeline.experiment.records import WHOLE
from clipcov_pipeline.experiment.stages import PROXY_MODEL
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.sources import find_shards
from clipcov_pipeline.proxy.models import CHECKPOINT_SUFFIXES, MODEL_CONFIGS, ModelSpec, check_model


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


def observe(config: Config) -> World:
    """List the shards and hash the small files that the configuration names.

    The sample is unpacked to the work folder on first use; from there on it is a folder like any other.

    Raises:
        InputError: a missing or empty folder, an unknown model, a missing file.
    """
    tokens = _file_tokens(config)  # first: a mistake here is found before the sample is unpacked
    sets, set_tokens, absent = _evaluation_files(config)
    return World(
        tokens=tokens | set_tokens,
        shards=tuple(pool_shards(config, settle_seconds=config.shards.settle_seconds)),
        evaluation_shards=sets,
        absent=absent,
    )


def _evaluation_files(
    config: Config,
) -> tuple[dict[str, tuple[Shard, ...]], dict[str, str], dict[str, str]]:
    """Return (shards by set, tokens of the sets' small files, absent sets and their folders)."""
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


def pool_shards(config: Config, settle_seconds: float = 0) -> list[Shard]:
    """List the pool's shards. Raises InputError as `find_shards`."""
    return find_shards(
        pool_source(config),
        dict(config.shards.storage_options),
        settle_seconds=settle_seconds,
        captions=config.shards.caption,
        **config.shards.columns,
    )


def evaluation_source(config: Config, name: str) -> str:
    """Return where an evaluation set's shards are (of a set that has ``shards``)."""
    source = config.evaluate.sets[name].shards or ""
    return str(_unpacked_sample(config)[1]) if source == "sample" else config.location(source)


def _unpacked_sample(config: Config) -> tuple[Path, Path]:
    from clipcov_pipeline.pool.bundled import unpack_sample

    return unpack_sample(config.work / "sample")


def _file_tokens(config: Config) -> dict[str, str]:
    tokens: dict[str, str] = {}
    known = _known_tags(config)
    for section, settings in (("proxy", config.proxy), ("train", config.train)):
        description = MODEL_CONFIGS / f"{settings.model}.json"
        if description.is_file():
            tokens[f"{section}.model"] = digest_of_file(description)
        tokens |= _weights_token(config, f"{section}.pretrained", settings.model, settings.pretrained, known)
    if config.proxy.early:
        tokens |= _weights_token(config, "proxy.early", config.proxy.model, config.proxy.early)
    tokens |= _selection_tokens(config)
    if config.labels.latent_classes == "prompts":
        tokens["labels.class_names"] = digest_of(class_names(config))
    return tokens


def _weights_token(
    config: Config, key: str, model: str, pretrained: str | None, known: Container[tuple[str, str]] = ()
) -> dict[str, str]:
    """Check a model and its weights; return the change token of a checkpoint file under its key."""
    checkpoint = checkpoint_path(config, pretrained)
    stands = (model, checkpoint or "") in known
    check_weights(key, model, None if stands else checkpoint)
    if checkpoint and Path(checkpoint).is_file():
        return {key: change_token(Path(checkpoint))}
    return {}


def check_weights(key: str, model: str, pretrained: str | None) -> None:
    """Check that a model can be had, as `check_model`; ``key`` is where the YAML names its weights.

    Raises:
        InputError: names the key.
    """
    section, _, name = key.partition(".")
    try:
        check_model(ModelSpec(model, pretrained))
    except InputError as error:
        raise InputError(f"{section}.{str(error).replace('pretrained:', f'{name}:', 1)}") from error


def _selection_tokens(config: Config) -> dict[str, str]:
    """Check the files that methods and their filters read; return the digest of each under its key."""
    from clipcov_pipeline.selection import files_of
    from clipcov_pipeline.selection.external import check_uids_file
    from clipcov_pipeline.selection.filter_files import check_filter_file

    tokens = {}
    for label in config.select.methods:
        for key, file in files_of(*config.select.method_of(label)).items():
            path = config.resolve(file)
            try:
                check_uids_file(path) if key == "uids" else check_filter_file(key, path)
            except InputError as error:
                raise InputError(f"select.methods.{label}.{error}") from error
            tokens[f"select.methods.{label}.{key}"] = digest_of_file(path)
    return tokens


def _known_tags(config: Config) -> set[tuple[str, str]]:
    """Return (model, tag) of the proxy that stands: checked then, and a check is seconds of imports."""
    record = Store(config.work / "store").current(PROXY_MODEL, WHOLE)
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
    from clipcov_pipeline.pool.bundled import sample_class_names
    from clipcov_pipeline.proxy.prompts import load_class_names

    match config.labels.class_names:
        case "imagenet1k":
            return "imagenet1k"
        case "sample":
            return sample_class_names()
        case path:
            try:
                return load_class_names(config.resolve(path))
            except InputError as error:
                raise InputError(f"labels.{error}") from error


def latent_class_names(config: Config) -> list[str] | None:
    """Return the names of the latent classes by their number; None where classes are clusters.

    Raises:
        InputError: as `class_names`.
    """
    from clipcov_pipeline.proxy.prompts import imagenet_class_names

    if config.labels.latent_classes == "clusters":
        return None
    names = class_names(config)
    return imagenet_class_names() if isinstance(names, str) else names


def checkpoint_path(config: Config, pretrained: str | None) -> str | None:
    """Return a local checkpoint's absolute path; an open_clip tag is returned as it is."""
    return str(config.resolve(pretrained)) if pretrained and is_path(pretrained) else pretrained


def is_path(pretrained: str) -> bool:
    """Return whether weights are named by a path, not by an open_clip tag."""
    return "/" in pretrained or Path(pretrained).suffix in CHECKPOINT_SUFFIXES
