"""Dagster resources: which experiment is worked on, and where MLflow keeps its runs."""

import dagster as dg

from clipcov_pipeline.experiment.project import Project


class Experiment(dg.ConfigurableResource):
    """The experiment's YAML: a path, a preset's name, or empty for $CLIPCOV_CONFIG or the sample."""

    config: str = ""

    def open(self) -> Project:
        """Read the YAML and list the shards, as they are now."""
        return Project.open(self.config or None)
