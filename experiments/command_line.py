"""Settings as frozen dataclasses, presets as instances of them, and absl flags that override them.

An entry point declares its settings once::

    @dataclasses.dataclass(frozen=True)
    class Settings:
        eps: float = setting(8 / 255, "radius of the threat model", "threat", unit="input units")

    PRESETS = {"small": Settings(eps=0.2), "paper": Settings()}

    if __name__ == "__main__":
        command_line.run(main, Settings, PRESETS, __doc__)

Every field is a flag, ``--help`` lists them by group with the value of each preset, and ``main``
gets the settings of ``--preset`` with the flags that were given put over them.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from robustjax import checks


def setting(
    default: Any, help: str, group: str, *, unit: str = "", choices: Sequence[str] | None = None
) -> Any:
    """A field of a settings class: its default, what it is, and where ``--help`` lists it."""
    return dataclasses.field(
        default=default,
        metadata={"help": help, "group": group, "unit": unit, "choices": choices},
    )


def run(
    main: Callable[[Any], None],
    settings_class: type,
    presets: Mapping[str, Any],
    description: str | None,
) -> None:
    """Defines the flags, parses the command line and calls ``main(settings)``.

    A ``ValueError`` ends the program with its sentence and status 1; ``--debug`` shows where it
    came from.
    """

    def parse(argv: Sequence[str]) -> Any:
        if any(word in ("--help", "-help", "-h", "--helpfull", "--helpshort") for word in argv):
            print(help_text(settings_class, presets, description))
            sys.exit(0)
        try:
            return parse_settings(argv[1:], settings_class, presets)
        except ValueError as error:
            sys.exit(f"error: {error}; see --help")

    def call(parsed: tuple[Any, bool]) -> None:
        settings, debug = parsed
        # absl turns on the information messages of every library that logs through it.
        logging.set_verbosity(logging.WARNING)
        try:
            main(settings)
        except ValueError as error:
            if debug:
                raise
            sys.exit(f"error: {error}")

    app.run(call, flags_parser=parse)


def parse_settings(
    words: Sequence[str], settings_class: type, presets: Mapping[str, Any]
) -> tuple[Any, bool]:
    """The settings of a command line's words, and whether ``--debug`` was among them.

    Raises:
      ValueError: a flag is unknown, its value is not one of its choices or of another type, or a
        word is no flag.
    """
    values = flags.FlagValues()
    _define(settings_class, presets, values)
    try:
        rest = values(["", *words], known_only=True)
        # absl's own flags (logging), and its complaint about what nobody knows.
        rest = flags.FLAGS(rest)
    except flags.Error as error:
        raise ValueError(_with_known_names(str(error), values)) from error
    if len(rest) > 1:
        raise ValueError(f"arguments must be flags (--name=value), got {rest[1]!r}")
    given = {
        field.name: _as_field(values[field.name].value)
        for field in dataclasses.fields(settings_class)
        if values[field.name].present
    }
    return dataclasses.replace(presets[values.preset], **given), values.debug


def check_choices(settings: Any) -> None:
    """Refuses a field whose value is not among its choices, for settings that no flags made.

    Raises:
      ValueError: naming the field, its value and its choices.
    """
    for field in dataclasses.fields(settings):
        value, choices = getattr(settings, field.name), field.metadata["choices"]
        if choices:
            for one in value if isinstance(value, tuple) else (value,):
                checks.choice(field.name, one, choices)


def help_text(settings_class: type, presets: Mapping[str, Any], description: str | None) -> str:
    """The text of ``--help``: flags by group, with units, choices and the value of each preset."""
    lines = [(description or "").strip(), "", "Flags; [in brackets: " + " | ".join(presets) + "]"]
    lines += ["", "run", f"  --preset: one of {', '.join(presets)} [{next(iter(presets))}]"]
    lines += ["  --debug: show the full traceback of an error [False]"]
    groups: dict[str, list[str]] = {"run": lines}
    for field in dataclasses.fields(settings_class):
        data = field.metadata
        fractions = data["unit"] == "input units"
        known = [_shown(getattr(preset, field.name), fractions) for preset in presets.values()]
        values = known[0] if len(set(known)) == 1 else " | ".join(known)
        text = f"  --{field.name}: {data['help']}"
        if data["unit"]:
            text += f", in {data['unit']}"
        if data["choices"]:
            text += f"; one of {', '.join(data['choices'])}"
        groups.setdefault(data["group"], ["", data["group"]]).append(f"{text} [{values}]")
    return "\n".join(line for group in groups.values() for line in group)


def join_hosts(settings: Any) -> None:
    """Starts ``jax.distributed`` if the flags of group "hosts" say so; before anything else."""
    if settings.distributed:
        jax.distributed.initialize(
            settings.coordinator_address, settings.num_processes, settings.process_id
        )


def _define(settings_class: type, presets: Mapping[str, Any], values: flags.FlagValues) -> None:
    flags.DEFINE_enum("preset", next(iter(presets)), list(presets), "", flag_values=values)
    flags.DEFINE_boolean("debug", False, "", flag_values=values)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        kind, choices = _bare(hints[field.name]), field.metadata["choices"]
        name, text = field.name, field.metadata["help"]
        if kind is bool:
            flags.DEFINE_boolean(name, None, text, flag_values=values)
            values[name].parser = _SwitchParser()
            continue
        if kind is int:
            parser = _WholeNumberParser()
        elif kind is float:
            parser = _NumberParser()
        elif kind is tuple:
            parser = _ListParser(choices)
        elif choices:
            parser = flags.EnumParser(list(choices))
        else:
            parser = flags.ArgumentParser()
        if kind is not hints[field.name] and kind is not tuple:
            parser = _OptionalParser(parser)
        flags.DEFINE(parser, name, None, text, flag_values=values)


class _OptionalParser(flags.ArgumentParser):
    """What the other parser takes, or the word ``None``."""

    def __init__(self, other: flags.ArgumentParser):
        self._other = other

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._other.parse(argument)

    def flag_type(self) -> str:
        return self._other.flag_type()


class _SwitchParser(flags.BooleanParser):
    """Booleans; absl's message for anything else is a tuple."""

    def parse(self, argument: Any) -> bool:
        try:
            return super().parse(argument)
        except (TypeError, ValueError) as error:
            raise ValueError(f"must be true or false, got {argument!r}") from error


class _WholeNumberParser(flags.ArgumentParser):
    """Integers in decimal."""

    def parse(self, argument: Any) -> int:
        try:
            return int(argument)
        except ValueError as error:
            raise ValueError(f"must be a whole number, got {argument!r}") from error

    def flag_type(self) -> str:
        return "int"


class _NumberParser(flags.ArgumentParser):
    """Decimal numbers and fractions, as ``8/255``."""

    def parse(self, argument: str) -> float:
        try:
            above, _, below = str(argument).partition("/")
            return float(above) / float(below) if below else float(argument)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"must be a number or a fraction, got {argument!r}") from error

    def flag_type(self) -> str:
        return "float"


class _ListParser(flags.ArgumentParser):
    """Comma-separated names, or whole numbers where there are no choices."""

    def __init__(self, choices: Sequence[str] | None):
        self._choices = choices

    def parse(self, argument: Any) -> tuple:
        words = argument.split(",") if isinstance(argument, str) else argument
        words = [word.strip() for word in words if str(word).strip()]
        if not self._choices:
            return tuple(_WholeNumberParser().parse(word) for word in words)
        for word in words:
            if word not in self._choices:
                raise ValueError(f"must be of {', '.join(self._choices)}, got {word!r}")
        if not words:
            raise ValueError(f"must name at least one of {', '.join(self._choices)}")
        return tuple(words)

    def flag_type(self) -> str:
        return "list"


def _bare(hint: Any) -> type:
    """``int`` of ``int | None``, ``tuple`` of ``tuple[str, ...]``."""
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.get_origin(hint) or hint


def _as_field(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any, fractions: bool) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        pixels, decimal = value * 255, f"{value:g}"
        whole = f"{round(pixels)}/255" if abs(pixels - round(pixels)) < 1e-9 else decimal
        return min(decimal, whole, key=len) if fractions else decimal
    return str(value)


def _with_known_names(message: str, values: flags.FlagValues) -> str:
    """Suggestions for a misspelt flag: those of absl come from its own table, which lacks ours."""
    if "Unknown command line flag" not in message:
        return message
    import difflib

    word = message.split("'")[1]
    close = difflib.get_close_matches(word, list(values), n=3)
    return f"unknown flag --{word}" + (f", did you mean --{', --'.join(close)}?" if close else "")
