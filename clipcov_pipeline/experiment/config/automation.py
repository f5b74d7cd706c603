"""The sections `automation` and `ui`."""

import re
from calendar import monthrange
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from clipcov_pipeline.experiment.config.base import KNOB, Count, NonNegativeFloat, Port, PositiveInt, Section

CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))

CRON_PART = re.compile(r"(\*|[0-9]+(-[0-9]+)?)(/[0-9]+)?")

LEAP_YEAR = 2024

WEEKDAYS = re.compile("sun|mon|tue|wed|thu|fri|sat", re.IGNORECASE)


def _cron(text: str) -> str:
    if len(fields := text.split(" ")) != len(CRON_FIELDS):
        raise ValueError(
            f"found {text!r}, expected five fields such as '0 3 * * *': minute hour day month weekday"
        )
    fields[-1] = WEEKDAYS.sub("0", fields[-1])
    for field, (name, low, high) in zip(fields, CRON_FIELDS, strict=True):
        if not all(CRON_PART.fullmatch(part) for part in field.split(",")):
            raise ValueError(
                f"found {text!r}, expected as {name} *, a number, a range (1-5), steps (*/5), commas between"
            )
        for step, number in re.findall(r"(/?)([0-9]+)", field):
            if step and not int(number):
                raise ValueError(f"found a step of 0 as {name} of {text!r}, expected at least 1")
            if not step and not low <= int(number) <= high:
                raise ValueError(f"found {number} as {name} of {text!r}, expected {low} to {high}")
    days, months = (field.split(",") for field in fields[2:4])
    plain = all(part.isdigit() for part in days + months)
    if plain and min(map(int, days)) > max(monthrange(LEAP_YEAR, int(month))[1] for month in months):
        raise ValueError(f"found {text!r}, expected a day that one of its months has")
    return text


class Automation(Section):
    """Unattended rebuilds; both are switched on in the Dagster UI."""

    cron: Annotated[str, AfterValidator(_cron), KNOB] = "0 3 * * *"
    """When the shard source is listed again: minute, hour, day of month, month, day of week."""
    sensor_seconds: Annotated[PositiveInt, KNOB] = 30
    settle_seconds: Annotated[NonNegativeFloat, KNOB] = 10.0
    """A tick waits while a local shard was written to within this time: it may still be growing."""
    max_retries: Annotated[Count, KNOB] = 2
    """How often a failed run of the sensor or schedule is tried again."""
    retry_seconds: Annotated[PositiveInt, KNOB] = 30
    """Wait before the first retry; it doubles with each."""
    pools: Annotated[dict[Literal["gpu", "embed"], PositiveInt], KNOB] = Field(
        default_factory=lambda: {"gpu": 1, "embed": 1}
    )
    """How many steps may train or evaluate (``gpu``) and embed (``embed``) at a time. Of several GPUs (those
    in ``CUDA_VISIBLE_DEVICES``, else all) ``clipcov run`` gives arms side by side one each, in turns, unless
    ``train.gpus`` is more than 1; runs of the Dagster UI and the sensor share the first. On a CPU they divide
    the cores among them (then ``train.workers: 0`` is best)."""


class Ui(Section):
    """Where the two user interfaces listen; links between them are made of these."""

    host: Annotated[str, KNOB] = "127.0.0.1"
    dagster_port: Annotated[Port, KNOB] = 3000
    mlflow_port: Annotated[Port, KNOB] = 5000
