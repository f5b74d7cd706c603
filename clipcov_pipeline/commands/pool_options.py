"""Options that ``clipcov select`` and ``clipcov explain`` share: where the pool is, and the method."""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from clipcov_pipeline.errors import InputError

PATH = click.Path(path_type=Path)


def pool_options(command: Callable) -> Callable:
    """Where the pairs' caption embeddings and latent classes come from."""
    for option in reversed(
        [
            click.option("--text", type=PATH, help=".npy of the caption embeddings, when SOURCE is an .npy."),
            click.option(
                "--labels", type=PATH, help="Parquet: latent_class, label_similarity, and uid to match by."
            ),
            click.option(
                "--class-embedding", type=PATH, help=".npy [K, d] of class prompts: zero-shot classes."
            ),
            click.option("--clusters", type=int, help="No classes at hand: cluster the pairs into so many."),
            click.option("--scratch-dir", type=PATH, help="Folder for the scratch file of a large pool."),
        ]
    ):
        command = option(command)
    return command


def method_options(command: Callable) -> Callable:
    """The budget and the parameters of ClipCov."""
    for option in reversed(
        [
            click.option("--fraction", type=float, help="Share of the pool, above 0 and at most 1."),
            click.option("--count", type=int, help="Number of samples."),
            click.option("--mode", help="clipcov: greedy, strict or notebook."),
            click.option(
                "--param", "extra", multiple=True, metavar="NAME=JSON", help="Any parameter of the method."
            ),
            click.option("--seed", type=int, default=0, show_default=True),
            click.option("--threads", type=click.IntRange(1), help="Default: all processors."),
        ]
    ):
        command = option(command)
    return command


def parameters(mode: str | None, extra: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Method parameters from the options; the value of ``--param`` is JSON, or else text.

    Raises:
        InputError: a ``--param`` that is no NAME=VALUE.
    """
    found: dict[str, Any] = {"seed": seed}
    if mode is not None:
        found["mode"] = mode
    for text in extra:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--param: found {text!r}, expected NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def chosen_budget(fraction: float | None, count: int | None) -> float | int | None:
    """The one of the two that is given; None is everything.

    Raises:
        InputError: both are given.
    """
    if fraction is not None and count is not None:
        raise InputError(f"budget: found --fraction {fraction} and --count {count}, expected one of them")
    return fraction if fraction is not None else count


@contextmanager
def reading_progress():
    """Yields a callback that counts rows read: a bar on a terminal, one line at the end elsewhere."""
    from tqdm import tqdm

    bar = tqdm(unit=" pairs", unit_scale=True, desc="reading", disable=not sys.stderr.isatty())
    total = [0]

    def step(rows: int) -> None:
        total[0] += rows
        bar.update(rows)

    try:
        yield step
    finally:
        bar.close()
    if not sys.stderr.isatty():
        click.echo(f"read {total[0]:,} pairs", err=True)


def opened(source: Path, options: Mapping[str, Any], **how: Any) -> Any:
    """Open the pool that the options of `pool_options` and ``--seed`` describe; ``how`` as `open_pool`."""
    from clipcov_pipeline.selection.sources import Labelling, open_pool

    labelling = Labelling(*(options[name] for name in ("labels", "class_embedding", "clusters", "seed")))
    with reading_progress() as progress:
        return open_pool(
            source, options["text"], labelling, scratch_dir=options["scratch_dir"], progress=progress, **how
        )
