"""Captions of a testbed: faithful, wrong, or empty of meaning."""

from collections.abc import Sequence

import numpy as np

PROMPTS = ("a photo of a {}", "a picture of the {}", "a {}", "a snapshot of one {}")

TEMPLATES = (
    "a photo of a {adjective} {name} {scene}",
    "a {adjective} {name} {scene}",
    "{adjective} {name} {scene}",
    "my {adjective} {name} {scene}",
    "the {name} {scene}",
    "picture of a {adjective} {name}",
    "we saw a {adjective} {name} {scene}",
    "one {adjective} {name}, {scene}",
    "{name} {scene}",
    "a close-up of a {adjective} {name}",
    "look at this {adjective} {name}",
    "this {name} was {scene}",
    "snapshot: {adjective} {name} {scene}",
    "a {name}, looking {adjective}",
    "stock photo of a {adjective} {name}",
    "{adjective} {name} for sale",
    "a {adjective} {name} seen {scene}",
    "image of the {name} {scene}",
    "another {adjective} {name} {scene}",
    "best {name} photo, {scene}",
)

ADJECTIVES = (
    "small",
    "large",
    "old",
    "new",
    "white",
    "dark",
    "red",
    "brown",
    "quiet",
    "pretty",
    "strange",
    "fine",
)

SCENES = (
    "in the morning",
    "at dusk",
    "on a sunny day",
    "in winter",
    "near the road",
    "by the water",
    "outside",
    "in the city",
    "in the country",
    "at home",
    "in the fog",
    "on holiday",
)

GENERIC = (
    "IMG_{number}",
    "DSC0{number}.JPG",
    "untitled",
    "click to enlarge",
    "image",
    "photo {number}",
    "view larger image",
    "thumbnail",
    "no description available",
    "free download",
    "picture of the day",
    "file {number}",
    "share this post",
    "gallery {number}",
)


def choose_caption(
    kind: str, name: str, names: Sequence[str], rng: np.random.Generator
) -> tuple[str, str | None]:
    """(caption, class that it names)."""
    if kind == "generic":
        return str(rng.choice(GENERIC)).format(number=rng.integers(1000, 10000)), None
    named = name if kind == "faithful" else names[int(rng.integers(len(names)))]
    return faithful_caption(named, rng), named


def faithful_caption(name: str, rng: np.random.Generator) -> str:
    """A caption that names the class, one of 20 templates with an adjective and a scene."""
    text = str(rng.choice(TEMPLATES)).format(
        adjective=rng.choice(ADJECTIVES), name=spoken(name), scene=rng.choice(SCENES)
    )
    words = text.split(" ")
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1][0] in "aeiou":
            words[i] = "an"
    return " ".join(words)


def spoken(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
