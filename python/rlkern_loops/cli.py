"""The `rlkern` command: `rlkern train grpo --config run.yaml --steps 100`, and `rlkern info`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlkern_loops.errors import RunError, did_you_mean

# Imported when they are asked for: transformers takes seconds, and `rlkern info` must work
# where it is not installed.
LOOPS = {
    "grpo": ("rlkern_loops.grpo", "GRPOConfig"),
    "ppo": ("rlkern_loops.ppo", "PPOConfig"),
}


class UsageError(Exception):
    """Options that cannot be used; what they should be is in the message."""


def parse_config(config_class: Any, arguments: Sequence[str], prog: str) -> Any:
    """The options of a command line, those of its `--config FILE.yaml` below them.

    Args:
        config_class: a dataclass whose fields are bool, int, float, str, Literal, one of these or
            None, or a list of these, each with metadata {"help": ...}; its `__post_init__` raises
            ValueError for options that do not fit.
        arguments: of the command line. Options are written with hyphens or underscores.
        prog: what `--help` calls the command.

    Raises:
        UsageError: an unknown option, a value of another type, or one that the dataclass refuses.
        SystemExit: 0, for `--help`.
    """
    parser = _parser(config_class, prog)
    # Reversed, as of `--x` and `--no-x` the first is the one that takes a value.
    options = {action.dest: action for action in reversed(parser._actions)}
    del options["help"]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    try:
        file = first.parse_known_args(arguments)[0].config
        if file is not None:
            for name, value in _read_yaml(file, options, config_class).items():
                options[name].required = False
                parser.set_defaults(**{name: value})
        namespace, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        spelling = str(error.argument_name).rpartition("/")[2]
        raise UsageError(f"{spelling}: {error.message}") from error
    if unknown:
        raise UsageError(_unknown(unknown[0], options, config_class))
    values = {key: value for key, value in vars(namespace).items() if key != "config"}
    try:
        return config_class(**values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _parser(config_class: Any, prog: str) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:  # an option that is required, and missing
            raise UsageError(message)

    parser = Parser(
        config_class, prog=prog, usage="%(prog)s [--config FILE.yaml] [--option VALUE ...]",
        formatter_class=_Help, allow_abbrev=False, exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("--config", help="YAML file of options; the command line beats it.")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, with its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spelling = max(action.option_strings, key=lambda option: option.count("-"))
        if action.nargs == 0:
            return spelling
        return f"{spelling} {_kind(action)}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):
            return "The same as false."
        return super()._get_help_string(action)


def _kind(action: argparse.Action) -> str:
    if action.choices:
        return "|".join(map(str, action.choices))
    name = getattr(action.type, "__name__", "str")
    return {"string_to_bool": "bool", "str": "text"}.get(name, name)


def _unknown(argument: str, options: Iterable[str], config_class: Any) -> str:
    """What to say of an argument that no option took."""
    spelling = argument.partition("=")[0]
    if not spelling.startswith("-"):
        return f"unexpected argument {argument!r}"
    known = ["--" + name.replace("_", "-") for name in options]
    name = spelling.lstrip("-").replace("-", "_")
    hint = _whose(name, config_class) or did_you_mean("--" + name.replace("_", "-"), known)
    return f"unknown option {spelling!r}{hint}"


def _whose(name: str, config_class: Any) -> str:
    """' (an option of ...)' for an option that another loop has, else ''."""
    for loop, (module_name, config_name) in LOOPS.items():
        other = getattr(importlib.import_module(module_name), config_name)
        if other is not config_class and name in other.__dataclass_fields__:
            return f" (an option of {loop})"
    return ""


def _read_yaml(file: str, options: dict[str, argparse.Action], config_class: Any) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config: cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {file} is not YAML: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"config: expected options in {file}, got {type(found).__name__}")
    values = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name == "config":
            raise UsageError(f"{file}: config: expected on the command line alone, got {value!r}")
        if name not in options:
            hint = _whose(name, config_class) or did_you_mean(name, options)
            nested = "; options stand side by side, in no group" if isinstance(value, dict) else ""
            raise UsageError(f"{file}: unknown option {key!r}{hint}{nested}")
        values[name] = _convert(options[name], value, f"{file}: {key}")
    return values


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    """A value of the file as the option's type, by the rules of the command line.

    YAML reads 1e-6 as text, so a number may come as its spelling.
    """
    if value is None and action.default is None:
        return None
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_convert_one(action, item, where) for item in items]
    return _convert_one(action, value, where)


def _convert_one(action: argparse.Action, value: Any, where: str) -> Any:
    kind = action.type if callable(action.type) else str
    # A bool is an int to Python, and no number or text to whoever wrote the file.
    fits = not isinstance(value, (dict, list, type(None)))
    fits &= _kind(action) == "bool" or not isinstance(value, bool)
    try:
        if not fits:
            raise ValueError
        converted = kind(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        kind_found = "a mapping" if isinstance(value, dict) else type(value).__name__
        raise UsageError(f"{where}: expected {_kind(action)}, got {kind_found} {value!r}") from None
    if action.choices and converted not in action.choices:
        raise UsageError(f"{where}: expected {_kind(action)}, got {value!r}")
    return converted


def run(config_class: Any, train: Callable[[Any], Any], arguments: Sequence[str], name: str) -> int:
    """Trains by the given options: the command's exit code, 2 for options, 1 for the run."""
    try:
        train(parse_config(config_class, arguments, name))
    except UsageError as error:
        print(f"{name}: error: {error} (see {name} --help)", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _train(loop: str, arguments: Sequence[str]) -> int:
    module_name, config_name = LOOPS[loop]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("rlkern"):
            raise
        print(
            f"rlkern train: error: {error.name} is not installed: pip install 'rlkern[loops]'",
            file=sys.stderr,
        )
        return 1
    return run(getattr(module, config_name), module.train, arguments, f"rlkern train {loop}")


def _info(as_json: bool) -> int:
    from rlkern import info

    found = info.collect()
    print(json.dumps(found, indent=1) if as_json else info.as_text(found))
    return 0


class _Version(argparse.Action):
    """argparse's own wants the version before it is asked for; torch comes with it."""

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        import rlkern

        print(f"rlkern {rlkern.__version__}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="rlkern", description="Training loops on rlkern.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print rlkern's version")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model")
    loops = train.add_subparsers(dest="loop", required=True)
    for loop in LOOPS:
        # Its options are the loop's own, and so is its help.
        loops.add_parser(loop, help=f"rlkern train {loop} --help lists its options", add_help=False)
    info = commands.add_parser("info", help="what is built, what loads, what serves each operator")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    given, rest = parser.parse_known_args(arguments)
    if given.command == "train":
        return _train(given.loop, rest)
    if rest:
        parser.error(f"unexpected argument {rest[0]!r}")
    return _info(given.json)


if __name__ == "__main__":
    sys.exit(main())
