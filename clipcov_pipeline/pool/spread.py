"""Which of many are looked at, where all would be too many."""


def evenly(total: int, count: int) -> list[int]:
    """Return up to ``count`` places of ``total``, evenly spread, the first and last among them."""
    if total <= count or count <= 1:
        return list(range(min(total, count)))
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]
