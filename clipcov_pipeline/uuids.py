"""UUIDs as text, in the two ways in which people write them."""

import re

_UUID = re.compile(
    r"[0-9a-fA-F]{32}|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
)


def hex_of(text: str) -> str | None:
    """Return the 32 lower-case hex digits of a UUID or of 128 bits in hex; None where a text is neither."""
    return text.replace("-", "").lower() if _UUID.fullmatch(text) else None
