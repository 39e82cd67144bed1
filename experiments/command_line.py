"""Settings as frozen dataclasses, presets as instances of them, and absl flags that override them.

An entry point declares its settings once::

    @dataclasses.dataclass(frozen=True)
    class Settings:
        eps: float = setting(8 / 255, "radius of the threat model", "threat", unit="input units")

    PRESETS = {"small": Settings(eps=0.2), "paper": Settings()}

    if __name__ == "__main__":
        command_line.run(main, Settings, PRESETS, __doc__)

Every field is a flag, ``--help`` lists them by group with the value of each preset, and ``main``
gets the settings of ``--preset`` with the flags that were given put over them. The flags of
``Common`` are those of every entry point: errors, compilation, hosts.
"""

import dataclasses
import gc
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from experiments import launch
from robustjax import checks
from robustjax.training import interruption


def setting(
    default: Any,
    help: str,
    group: str,
    *,
    unit: str = "",
    choices: Sequence[str] | None = None,
    positional: bool = False,
) -> Any:
    """A field of a settings class: its default, what it is, and where ``--help`` lists it.

    The one that is ``positional``, a ``tuple[str, ...]``, is no flag: it takes the words of the
    command line that are none.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "unit": unit,
            "choices": choices,
            "positional": positional,
        },
    )


@dataclasses.dataclass(frozen=True)
class Common:
    """What every entry point can be told, beside its own settings."""

    # fmt: off
    debug: bool = setting(False, "show the full traceback of an error", "run")
    compilation_cache: str | None = setting(
        None, "folder in which compiled programs are kept from run to run; None: that of "
        "JAX_COMPILATION_CACHE_DIR, or none", "run")
    distributed: bool = setting(
        False, "join the processes of a cluster that JAX can find itself: a TPU pod, Slurm, Open "
        "MPI, Kubernetes. Start one process on each host, with the same flags", "hosts")
    coordinator_address: str | None = setting(
        None, "HOST:PORT of process 0, a free port; with the next two, for any other cluster; "
        "None: JAX_COORDINATOR_ADDRESS", "hosts")
    num_processes: int | None = setting(
        None, "how many processes there are; None: JAX_NUM_PROCESSES", "hosts")
    process_id: int | None = setting(
        None, "which of them this one is, from 0 on; None: JAX_PROCESS_ID", "hosts")
    join_timeout: int = setting(
        300, "how long a process waits for the others to join", "hosts", unit="seconds")
    heartbeat_timeout: int = setting(
        100, "how long another process may be silent before this one ends with an error", "hosts",
        unit="seconds")
    # fmt: on

    def __post_init__(self):
        checks.integer("join_timeout", self.join_timeout, at_least=1)
        checks.integer("heartbeat_timeout", self.heartbeat_timeout, at_least=1)


def run(
    main: Callable[[Any], None],
    settings_class: type,
    presets: Mapping[str, Any],
    description: str | None,
) -> None:
    """Defines the flags, parses the command line and calls ``main(settings)``.

    A ``ValueError`` ends the program with its sentence and status 1; ``--debug`` shows where it
    came from. A run that was told to end by SIGTERM and has saved its state ends with status
    ``interruption.EXIT_CODE``, 75.
    """

    def parse(argv: Sequence[str]) -> Any:
        if any(word in ("--help", "-help", "-h", "--helpfull", "--helpshort") for word in argv):
            print(help_text(settings_class, presets, description))
            sys.exit(0)
        try:
            return parse_settings(argv[1:], settings_class, presets)
        except ValueError as error:
            sys.exit(f"error: {error}; see --help")

    def call(parsed: tuple[Any, Common]) -> None:
        settings, common = parsed
        # What was imported stays. The collector need not walk it again and again while programs
        # are traced, which took a fourth of that time.
        gc.freeze()
        # absl turns on the information messages of every library that logs through it.
        logging.set_verbosity(logging.WARNING)
        if common.compilation_cache is not None:
            jax.config.update("jax_compilation_cache_dir", common.compilation_cache)
            # Small programs, too: there are many of them, and reading one takes milliseconds.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        try:
            launch.join(common)
            with launch.peers_watched(common.debug):
                launch.check_settings(settings)
                main(settings)
        except interruption.Interrupted as told:
            print(told, file=sys.stderr)
            sys.exit(interruption.EXIT_CODE)
        except (ValueError, OSError) as error:  # a full disk is an OSError
            if common.debug:
                raise
            sys.exit(f"error: {error}")

    app.run(call, flags_parser=parse)


def parse_settings(
    words: Sequence[str], settings_class: type, presets: Mapping[str, Any]
) -> tuple[Any, Common]:
    """The settings of a command line's words, and the flags of ``Common`` among them.

    Raises:
      ValueError: a flag is unknown, its value is not one of its choices or of another type, or a
        word is no flag and there is no positional field to take it.
    """
    values = flags.FlagValues()
    _define(settings_class, presets, values)
    positional = next((f.name for f in dataclasses.fields(settings_class) if _takes_words(f)), None)
    if positional is not None:  # flags may follow words
        values.set_gnu_getopt()
        flags.FLAGS.set_gnu_getopt()
    try:
        rest = values(["", *words], known_only=True)
        # absl's own flags (logging), and its complaint about what nobody knows.
        rest = flags.FLAGS(rest)
    except flags.Error as error:
        raise ValueError(_with_known_names(str(error), values)) from error
    if len(rest) > 1 and positional is None:
        raise ValueError(f"arguments must be flags (--name=value), got {rest[1]!r}")

    def given(kind: type) -> dict[str, Any]:
        return {
            field.name: _as_field(values[field.name].value)
            for field in dataclasses.fields(kind)
            if not _takes_words(field) and values[field.name].present
        }

    words_given = {positional: tuple(rest[1:])} if len(rest) > 1 else {}
    settings = dataclasses.replace(presets[values.preset], **words_given, **given(settings_class))
    return settings, Common(**given(Common))


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
    groups: dict[str, list[str]] = {"run": lines}
    listed = [(field, presets.values()) for field in dataclasses.fields(settings_class)]
    listed += [(field, [Common()]) for field in dataclasses.fields(Common)]
    for field, shown in listed:
        data = field.metadata
        fractions = data["unit"] == "input units"
        known = [shown_value(getattr(preset, field.name), fractions) for preset in shown]
        values = known[0] if len(set(known)) == 1 else " | ".join(known)
        name = f"{field.name.upper()}..." if _takes_words(field) else f"--{field.name}"
        text = f"  {name}: {data['help']}"
        if data["unit"]:
            text += f", in {data['unit']}"
        if data["choices"]:
            text += f"; one of {', '.join(data['choices'])}"
        groups.setdefault(data["group"], ["", data["group"]]).append(f"{text} [{values}]")
    return "\n".join(line for group in groups.values() for line in group)


def _define(settings_class: type, presets: Mapping[str, Any], values: flags.FlagValues) -> None:
    flags.DEFINE_enum("preset", next(iter(presets)), list(presets), "", flag_values=values)
    hints = typing.get_type_hints(settings_class) | typing.get_type_hints(Common)
    for field in (*dataclasses.fields(settings_class), *dataclasses.fields(Common)):
        kind, choices = _bare(hints[field.name]), field.metadata["choices"]
        name, text = field.name, field.metadata["help"]
        if _takes_words(field):
            continue
        if kind is bool:
            flags.DEFINE_boolean(name, None, text, flag_values=values)
            values[name].parser = _SwitchParser()
            continue
        if kind is int:
            parser = _WholeNumberParser()
        elif kind is float:
            parser = _NumberParser()
        elif kind is tuple:
            parser = _ListParser(choices, of_words=typing.get_args(hints[name])[0] is str)
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
    """Comma-separated names; where there are no choices, any words or whole numbers."""

    def __init__(self, choices: Sequence[str] | None, *, of_words: bool):
        self._choices, self._of_words = choices, of_words

    def parse(self, argument: Any) -> tuple:
        words = argument.split(",") if isinstance(argument, str) else argument
        words = [word.strip() for word in words if str(word).strip()]
        if not self._choices and self._of_words:
            return tuple(words)
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


def _takes_words(field: dataclasses.Field) -> bool:
    return field.metadata["positional"]


def shown_value(value: Any, fractions: bool) -> str:
    """A setting's value in a few characters; ``fractions``: multiples of 1/255 as such."""
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
