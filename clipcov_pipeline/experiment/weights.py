"""Whether the weights that an experiment starts from are on this machine."""

from pathlib import Path

from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.experiment.world import check_weights, checkpoint_path, is_path
from clipcov_pipeline.proxy.models import ModelSpec, check_model


def weights_findings(config: Config) -> list[Finding]:
    """Look for every weights file or tag that the YAML names; download nothing.

    Raises:
        InputError: an unknown architecture or tag.
    """
    wanted = [
        ("proxy.pretrained", config.proxy.model, config.proxy.pretrained),
        ("proxy.early", config.proxy.model, config.proxy.early),
        ("train.pretrained", config.train.model, config.train.pretrained),
    ]
    for model in (config.proxy.model, config.train.model):
        check_model(ModelSpec(model))
    return [_weights_of(config, key, model, tag) for key, model, tag in wanted if tag]


def _weights_of(config: Config, key: str, model: str, pretrained: str) -> Finding:
    path = checkpoint_path(config, pretrained) or ""
    if Path(path).is_file():
        return Finding("ok", "weights", f"{key}: {path}")
    if is_path(pretrained):
        return Finding("missing", "weights", f"{key}: no checkpoint file at {path}: put it there")
    check_weights(key, model, pretrained)
    if cached_weights(model, pretrained) is not None:
        return Finding("ok", "weights", f"{key}: {model} {pretrained} is in the cache")
    return Finding(
        "missing",
        "weights",
        f"{key}: {model} {pretrained} is not in this machine's cache: the first run downloads it from the"
        f" Hugging Face hub; offline, give {key} the path of a checkpoint",
    )


def cached_weights(model: str, tag: str) -> str | None:
    """Return where open_clip would find a tag's weights without a download; None where they are not."""
    import open_clip
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    known = open_clip.get_pretrained_cfg(model, tag)
    if hub := known.get("hf_hub"):
        repository, _, file = hub.rpartition("/")
        names = [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        names = [str(Path(file).with_suffix(".safetensors")), file] if file else names
        return next((path for name in names if (path := _in_cache(repository, name))), None)
    path = Path("~/.cache/clip").expanduser() / Path(known.get("url", "")).name
    return str(path) if path.is_file() else None


def _in_cache(repository: str, file: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return found if isinstance(found, str) else None
