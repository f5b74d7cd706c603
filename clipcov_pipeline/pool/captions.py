"""What a caption is: the text of its member, the same for every reader."""


def caption_text(data: bytes, errors: str = "strict") -> str:
    """Return a caption without white space around it and without the byte-order mark some editors write.

    With the mark, equal captions would differ.

    Raises:
        UnicodeDecodeError: not UTF-8, unless ``errors`` is ``replace``.
    """
    return data.decode("utf-8", errors).strip().lstrip("\ufeff").strip()
