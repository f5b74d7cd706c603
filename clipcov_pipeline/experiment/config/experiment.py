"""The whole configuration of an experiment, its paths, and what its sections have to agree on."""

import os
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import PrivateAttr, field_validator, model_validator

from clipcov_pipeline.experiment.config.automation import Automation, Ui
from clipcov_pipeline.experiment.config.base import KNOB, Section
from clipcov_pipeline.experiment.config.diagnostics import Diagnostics
from clipcov_pipeline.experiment.config.evaluate import Evaluate
from clipcov_pipeline.experiment.config.labels import Labels
from clipcov_pipeline.experiment.config.proxy import Embed, Proxy
from clipcov_pipeline.experiment.config.select import Select
from clipcov_pipeline.experiment.config.shards import Shards
from clipcov_pipeline.experiment.config.training import Train


def check_name(value: str) -> str:
    """Return an experiment's name; ValueError where it could not be a folder's everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(f"found {value!r}, expected letters, digits, dots, dashes or underscores")
    return value


class Config(Section):
    """One experiment."""

    name: str
    work_dir: Annotated[str, KNOB] = "work"
    shards: Shards = Shards()
    proxy: Proxy
    embed: Embed = Embed()
    labels: Labels = Labels()
    select: Select
    train: Train
    evaluate: Evaluate
    diagnostics: Diagnostics = Diagnostics()
    automation: Automation = Automation()
    ui: Ui = Ui()

    _base: Path = PrivateAttr(default_factory=Path.cwd)
    _path: Path | None = PrivateAttr(default=None)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_name(value)

    @model_validator(mode="after")
    def _early_proxy(self) -> Self:
        labels = self.select.labels_of("c_rho")
        if not labels:
            return self
        found = f"select.methods.{labels[0]}: c_rho compares with an early proxy, found none: "
        if self.proxy.train is None:
            if self.proxy.early is None:
                raise ValueError(f"{found}give proxy.early, a tag or checkpoint from earlier in its training")
        elif self.proxy.train.parts < 2:
            name = "epochs" if self.proxy.train.epochs else "num_checkpoints"
            raise ValueError(f"{found}give proxy.train.{name} 2 or more: it is the proxy after the first")
        return self

    @property
    def path(self) -> Path | None:
        """The YAML file this was read from."""
        return self._path

    @property
    def work(self) -> Path:
        """Absolute path of the folder that holds everything that is produced."""
        return self.resolve(os.environ.get("CLIPCOV_WORK_DIR") or self.work_dir)

    def resolve(self, path: str) -> Path:
        """Return ``path`` absolute: relative paths start at the YAML's folder (presets: the current one)."""
        return (self._base / Path(path).expanduser()).resolve()

    def location(self, source: str) -> str:
        """Return a shard source with a relative local path made absolute; URLs stay as they are."""
        return source if "://" in source else str(self._base / Path(source).expanduser())
