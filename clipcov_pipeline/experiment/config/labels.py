"""The section `labels`."""

from typing import Any, Literal

from pydantic import field_validator

from clipcov_pipeline.experiment.config.base import Count, Section, checked_templates


class Labels(Section):
    """How latent classes are found."""

    latent_classes: Literal["prompts", "clusters"] = "prompts"
    class_names: str = "imagenet1k"
    """``imagenet1k``, ``sample``, or a text file with one class name a line (for ``prompts``)."""
    templates: str | tuple[str, ...] = "imagenet"
    """``imagenet`` (open_clip's 80) or a list of strings with ``{}`` (for ``prompts``)."""
    n_clusters: int | Literal["auto"] = 100
    """``auto``: the number of largest silhouette on a sample of the pool (for ``clusters``)."""
    seed: Count = 0

    @field_validator("n_clusters", mode="before")
    @classmethod
    def _n_clusters(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
            raise ValueError(f"found {value!r}, expected auto or a whole number of at least 2")
        return value

    @field_validator("templates", mode="before")
    @classmethod
    def _templates(cls, value: Any) -> Any:
        return value if value == "imagenet" else checked_templates(value, "imagenet or ")

    def semantic(self) -> dict[str, Any]:
        """Leave out what the chosen kind of latent class does not read."""
        unused = {"n_clusters", "seed"} if self.latent_classes == "prompts" else {"class_names", "templates"}
        return {key: value for key, value in super().semantic().items() if key not in unused}
