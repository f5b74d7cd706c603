"""The YAML's JSON Schema: editors complete and check by it."""

import json
from typing import Any

from clipcov_pipeline.experiment.config.experiment import Config

FILE = "clipcov.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the schema of an experiment's YAML.

    It knows keys, types and bounds; what keys have to agree on is told when the YAML is read.
    """
    schema = Config.model_json_schema()
    properties = schema["$defs"]["Select"]["properties"]
    methods = properties["methods"]
    # a list of names is a mapping of names to no parameters, and so is a name without a value
    mapping = methods | {"additionalProperties": {"type": ["object", "null"]}}
    names = {"type": "array", "items": {"type": "string"}}
    properties["methods"] = {
        "anyOf": [{k: mapping[k] for k in ("type", "additionalProperties")}, names],
        "description": methods["description"],
        "title": methods["title"],
    }
    schema["$defs"]["Bound"]["required"] = []  # bound or severity may be given alone
    return {"$schema": DIALECT, **schema}


def as_text() -> str:
    """Return the schema as it is written to a file."""
    return json.dumps(json_schema(), indent=1) + "\n"
