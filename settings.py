"""How a setting is declared: name, type, range, default and one sentence of help stand at its dataclass field alone.

The check of a value, the flags of the commands, the fields of the HTTP API, the web page's form and the tables in the
docs are made from these declarations.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, HeterostepError

_KEY = "setting"
_CHECKED = ("int", "float", "bool", "str")
"""Kinds whose values are checked here; the class that has a field of any other kind checks it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting, as its field declares it.

    Attributes:
        name: of the field.
        kind: type of a value: ``int``, ``float``, ``bool``, ``str``, or another type's name, which the class that has
            the field checks itself.
        optional: whether None is a value; it means that heterostep deduces the setting.
        default: what is taken where nothing is given; `dataclasses.MISSING` if a value is needed.
        help: one sentence, or half of one, without a full stop.
        least: least value.
        above: limit that a value must exceed.
        most: greatest value.
        choices: the only values.
        words: names of numbers, which may be given in their place.
        flag: name on the command line, without dashes; empty for a setting that has no flag.
        metavar: stands for the value in `--help`.
        unit: of a value, for people.
    """

    name: str
    kind: str
    optional: bool
    default: Any
    help: str
    least: float | None
    above: float | None
    most: float | None
    choices: tuple[str, ...]
    words: tuple[tuple[str, float], ...]
    flag: str
    metavar: str
    unit: str

    @property
    def label(self) -> str:
        """Its name for people, as in a form."""
        return (self.flag or self.name).replace("-", " ").replace("_", " ").capitalize()

    @property
    def rule(self) -> str:
        """What a value must be, to stand after "must be"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind == "bool":
            return "True or False"
        noun = {"int": "a whole number", "float": "a finite number", "str": "a text"}.get(self.kind, f"a {self.kind}")
        words = "".join(f", or {word} ({number:g})" for word, number in self.words)
        return f"{noun}{f' of {self.unit}' if self.unit else ''}{self._range()}{words}"

    def _range(self) -> str:
        most = "" if self.most is None else _plain(self.most)
        if self.above is not None:
            return f" above {_plain(self.above)}" + (most and f" and at most {most}")
        if self.least is not None:
            return f" from {_plain(self.least)} to {most}" if most else f" of at least {_plain(self.least)}"
        return most and f" of at most {most}"

    def meant(self, value: Any) -> Any:
        """The number that a word stands for; any other value as it is."""
        return dict(self.words).get(value, value) if isinstance(value, str) else value

    def allows(self, value: Any) -> bool:
        """Whether a value has the right type and lies in the range."""
        value = self.meant(value)
        if value is None:
            return self.optional or self.kind not in _CHECKED
        if self.kind == "bool":
            return isinstance(value, bool)
        if self.kind in ("int", "float"):
            number = int if self.kind == "int" else int | float
            if isinstance(value, bool) or not isinstance(value, number):
                return False
            if not abs(value) <= sys.float_info.max:  # NaN, or what no float holds: `math.isfinite` fails at that
                return False
            return (
                (self.least is None or value >= self.least)
                and (self.above is None or value > self.above)
                and (self.most is None or value <= self.most)
            )
        if self.kind == "str":
            return isinstance(value, str) and (not self.choices or value in self.choices)
        return True


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    words: tuple[tuple[str, float], ...] = (),
    flag: str | None = None,
    metavar: str = "",
    unit: str = "",
) -> Any:
    """Declare a dataclass field that is a setting; see `Setting` for the arguments.

    `flag` None takes the field's own name. To get a new mutable default for each instance, pass its class.
    """
    declared = {
        "help": help, "least": least, "above": above, "most": most, "choices": choices, "words": words,
        "flag": flag, "metavar": metavar, "unit": unit,
    }  # fmt: skip
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={_KEY: declared})
    return dataclasses.field(default=default, metadata={_KEY: declared})


def like(cls: type, name: str, **changes: Any) -> Any:
    """Declare a dataclass field that is the same setting as another class's field, but for `changes` to it."""
    item = next(item for item in dataclasses.fields(cls) if item.name == name)
    return setting(**{"default": item.default, **item.metadata[_KEY], **changes})


def settings_of(cls: type) -> Iterator[Setting]:
    """Yield the settings that the fields of a dataclass declare, in their order."""
    for item in dataclasses.fields(cls):
        declared = item.metadata.get(_KEY)
        if declared is None:
            continue
        kind, optional = _kind(item.type)
        name = item.name
        flag = name.replace("_", "-") if declared["flag"] is None else declared["flag"]
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        metavar = declared["metavar"] or {"int": "N", "float": "X"}.get(kind, name.rpartition("_")[2].upper())
        yield Setting(
            name=name, kind=kind, optional=optional, default=default, **{**declared, "flag": flag, "metavar": metavar}
        )


def check(config: Any, error: type[HeterostepError] = ConfigError) -> None:
    """Check every setting of a dataclass instance; whole numbers for a float become floats, and so do words.

    Raises:
        HeterostepError: of class `error`: a value is of the wrong type or out of range. The message names the setting,
            the rule and the value.
    """
    for item in settings_of(type(config)):
        value = getattr(config, item.name)
        if not item.allows(value):
            raise error(f"{item.name} must be {item.rule}, not {value!r:.80}")
        if item.kind == "float" and value is not None:
            object.__setattr__(config, item.name, float(item.meant(value)))


def _kind(annotation: Any) -> tuple[str, bool]:
    """The type of an annotation, by name, and whether None is another."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    names = [part.strip() for part in text.split("|")]
    return " | ".join(name for name in names if name != "None"), "None" in names


def _plain(number: float) -> str:
    """2**63 - 1 as such, any other number as short as it is exact."""
    return "2**63 - 1" if number == 2**63 - 1 else f"{number:g}"
