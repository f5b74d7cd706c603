"""What a caption is, the same for every reader: the text of a member, of a key of the json, or of several.

Recaptioned pools have several captions a sample. A `CaptionRule` says where they are and which one counts;
every reader asks it, with the members' bytes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, get_args

Choice = Literal["first", "random", "join"]
MEMBERS = ("txt", "json")  # that captions are read from
JSON_KEY = "json:"
NO_TXT = "no .txt member"
SEPARATOR = " "  # between captions that are joined
Get = Callable[[str], bytes | None]  # a member's bytes by its suffix
_FORMS = "txt, json:KEY, a list of these, or {from: [...], rule: first | random | join}"


def caption_text(data: bytes, errors: str = "strict") -> str:
    """Return a caption without white space around it and without the byte-order mark some editors write.

    With the mark, equal captions would differ.

    Raises:
        UnicodeDecodeError: not UTF-8, unless ``errors`` is ``replace``.
    """
    return _stripped(data.decode("utf-8", errors))


def caption_digest(captions: Sequence[str]) -> str:
    """Return a sha256 (hex) of a sample's captions, in their order; of a single one it is the text's own."""
    return sha256("\0".join(captions).encode()).hexdigest()


def parse_meta(data: bytes | None) -> tuple[dict[str, Any] | None, str | None]:
    """Return a json member as a dict, and why there is a json but no dict."""
    if data is None:
        return None, None
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        kind = "is empty" if not data.strip() else "does not parse"
        kind = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else kind
        return None, f"the .json member {kind}"
    if not isinstance(meta, dict):
        return None, "the .json member is no object"
    return meta, None


class NoCaptionError(ValueError):
    """Why a sample has no caption, in words, and the `samples.SampleStatus` that this is."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class CaptionRule:
    """Where captions are, and which one counts of those that a sample has.

    Attributes:
        sources: ``txt`` (the member) or ``json:KEY`` (a key of the json's top level: a text or a list of
            texts), in the order of preference.
        choice: ``first``; ``join``, all in one with `SEPARATOR` between them; ``random``, a training draws
            one in each pass. All other readers take the first where a training draws: what they show and
            embed is then one and the same caption, that of the source named first.

    A source that is not there, that cannot be read or that is blank is passed over, as long as there is
    another.

    Raises:
        ValueError: no source, one twice, or an unknown word.
    """

    sources: tuple[str, ...] = ("txt",)
    choice: Choice = "first"

    def __post_init__(self) -> None:
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise ValueError(f"found {list(self.sources)}, expected {_FORMS}, each source once")
        for source in self.sources:
            if source != "txt" and (not source.startswith(JSON_KEY) or source == JSON_KEY):
                raise ValueError(f"found {source!r}, expected {_FORMS}")
        if self.choice not in get_args(Choice):
            raise ValueError(f"found the rule {self.choice!r}, expected {', '.join(get_args(Choice))}")

    @classmethod
    def of(cls, given: Any) -> "CaptionRule":
        """Return the rule that is written as in the YAML, see `written`; raises as the class."""
        if isinstance(given, CaptionRule):
            return given
        if isinstance(given, Mapping) and {"from"} <= given.keys() <= {"from", "rule"}:
            sources, choice = given["from"], given.get("rule", "first")
        else:
            sources, choice = given, "first"
        listed = [sources] if isinstance(sources, str) else sources
        if not isinstance(listed, list | tuple) or not all(isinstance(source, str) for source in listed):
            raise ValueError(f"found {given!r}, expected {_FORMS}")
        return cls(tuple(listed), choice)

    @property
    def written(self) -> str | dict[str, Any]:
        """The rule as the YAML has it: the source, where it is one, else ``{from: [...], rule: ...}``."""
        if len(self.sources) == 1 and self.choice == "first":
            return self.sources[0]
        return {"from": list(self.sources), "rule": self.choice}

    @cached_property  # asked for each sample of a training
    def members(self) -> tuple[str, ...]:
        """Suffixes of the members that are read, of `MEMBERS`, in that order."""
        there = {source.partition(":")[0] for source in self.sources}
        return tuple(member for member in MEMBERS if member in there)

    @property
    def draws(self) -> bool:
        """Whether a training draws one of several captions in each pass."""
        return self.choice == "random"

    def captions(self, get: Get) -> tuple[str, ...]:
        """Return the captions of a sample that may count: one, or with ``random`` each different one.

        The first is the one that everybody takes who does not draw.

        Args:
            get: the bytes of the sample's member of a suffix in `members`, None where it has none.

        Raises:
            NoCaptionError: there is none.
        """
        found: list[str] = []
        problems: list[NoCaptionError] = []
        for source in self.sources:
            try:
                found += _read(source, get)
            except NoCaptionError as error:
                problems.append(error)
            if found and self.choice == "first":
                return (found[0],)
        if not found:
            raise _together(problems)
        return tuple(dict.fromkeys(found)) if self.draws else (SEPARATOR.join(found),)


TXT = CaptionRule()  # where no YAML says otherwise


def _read(source: str, get: Get) -> list[str]:
    """The captions of one source, none blank; raises NoCaptionError where there is none."""
    if source == "txt":
        if (data := get("txt")) is None:
            raise NoCaptionError("missing_caption", NO_TXT)
        try:
            texts = [caption_text(data)]
        except UnicodeDecodeError:
            raise NoCaptionError("non_utf8_caption", "the .txt member is not UTF-8") from None
        what = "the .txt member"
    else:
        key = source.removeprefix(JSON_KEY)
        texts, what = _texts_of_key(get("json"), key), f"key {key!r} of the .json member"
    if not (found := [text for text in texts if text]):
        raise NoCaptionError("empty_caption", f"{what} has nothing but white space")
    return found


def _texts_of_key(data: bytes | None, key: str) -> list[str]:
    meta, problem = parse_meta(data)
    if meta is None:
        why = problem or "no .json member"
        raise NoCaptionError("missing_caption", f"{why}, where the caption is key {key!r}")
    if key not in meta:
        raise NoCaptionError("missing_caption", f"no key {key!r} in the .json member")
    value = meta[key]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        expected = "expected a text or a list of texts"
        raise NoCaptionError(
            "missing_caption", f"key {key!r} of the .json member is {_kind(value)}, {expected}"
        )
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        # half a character, which JSON can escape and no UTF-8 can hold
        raise NoCaptionError("non_utf8_caption", f"key {key!r} of the .json member is no valid Unicode")
    return [_stripped(text) for text in texts]


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list of other things"
    names = {bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "null")


def _together(problems: Sequence[NoCaptionError]) -> NoCaptionError:
    """One for all sources: of those that are there, if any is."""
    there = [problem for problem in problems if problem.status != "missing_caption"]
    return NoCaptionError((there or problems)[0].status, "; ".join(map(str, problems)))


def _stripped(text: str) -> str:
    return text.strip().lstrip("\ufeff").strip()
