"""What may be written down of addresses and settings: the one place that knows what is secret.

Secret are the values of ``storage_options``, and of an address its user and password and its query (a signed
address carries its signature there). Whatever an experiment keeps or shows goes through here.
"""

import re
from typing import Any

import yaml

HIDDEN = "(hidden)"

_ADDRESS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}")


def without_query(url: str) -> str:
    """Return a web address without query and fragment; of other addresses `?` and `#` belong to the path."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if _WEB.match(url) else url


def public_address(url: str) -> str:
    """Return an address as it may be written down: without user, password and query; paths as they are."""
    if "://" not in url:
        return url
    protocol, _, rest = without_query(url).partition("://")
    place, slash, path = rest.partition("/")
    user, _, host = place.rpartition("@")
    if ":" in user or _WEB.match(url):  # else it is a place, as in abfs://CONTAINER@ACCOUNT
        place = host
    return f"{protocol}://{place}{slash}{path}"


def redacted(text: str) -> str:
    """Return a text, such as an error's, with every address in it as `public_address`."""
    return _ADDRESS.sub(lambda found: public_address(found.group()), text)


def without_secrets(value: Any) -> Any:
    """Return settings with what is secret hidden.

    Args:
        value: what a YAML holds. What is given by a reference to the environment (``${NAME}``) stays.
    """
    if isinstance(value, dict):
        return {
            key: _hidden(item) if key == "storage_options" else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return redacted(value) if isinstance(value, str) and not _by_reference(value) else value


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item) for item in value]
    told = value is None or isinstance(value, bool) or _by_reference(value)
    return value if told else HIDDEN


def _by_reference(value: Any) -> bool:
    return isinstance(value, str) and _REFERENCE.search(value) is not None


def public_yaml(text: str, settings: Any) -> str:
    """Return a YAML's text with what is secret in it hidden; a text without secrets stays byte for byte.

    Args:
        text: the file's.
        settings: what it holds, references to the environment not replaced.
    """
    hidden = without_secrets(settings)
    if hidden == settings:
        return text
    note = "# Secrets are hidden; comments and layout are not kept. Give secrets as ${NAME} to keep both.\n"
    return note + yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True, width=100)
