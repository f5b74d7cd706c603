"""What ``clipcov check`` says of the lists of samples that the YAML names."""

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.selection.external import check_weights_file


def lists_findings(config: Config) -> list[Finding]:
    """Read the weights of every list of an external method; "missing" where samples cannot be drawn by it."""
    found = []
    for label in config.select.labels_of("external"):
        path = config.resolve(config.select.methods[label]["uids"])
        try:
            check_weights_file(path)
            found.append(Finding("ok", "lists", f"select.methods.{label}.uids: {path}"))
        except InputError as error:
            found.append(Finding("missing", "lists", f"select.methods.{label}.{error}"))
    return found
