"""Options of the command line: flags, defaults from a YAML file, and options of several commands."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ltp_sparse import __version__
from ltp_sparse.cli.checks import CommandError
from ltp_sparse.weights.reading import FileFormatError, read_yaml

COMMANDS = (
    *("select", "train", "evaluate", "predict", "export", "inspect", "run", "report", "cache", "memory", "demo"),
    *("push", "pull", "completion"),
)

_SERVICES = (
    *("tensorboard", "wandb", "trackio", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive"),
    *("flyte", "kubeflow", "mlflow", "neptune", "swanlab"),
)
"""Services to which the Trainer of transformers can log."""
REPORTERS = ("none", "all", *_SERVICES)
_REPORTER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
}


class _ArgumentParser(argparse.ArgumentParser):
    """Reports errors in one line with the closest choice, like all other mistakes, and without the list of options."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{_closest(str(value), known)} (choose from {', '.join(known)})"
            )

    def error(self, message: str) -> NoReturn:
        raise CommandError(
            f"{self.prog.removeprefix('ltp-sparse').strip()}: {message}; see {self.prog} --help".removeprefix(": ")
        )


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of an option that does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS) or default == [] or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown})".strip().replace("%", "%%") if text else f"default: {shown}"


class Parser:
    """The parser of all commands: modules of this package with `HELP`, `EXAMPLES`, `add_options` and `run`."""

    def __init__(self) -> None:
        self.parser = _ArgumentParser(
            prog="ltp-sparse",
            description="Select a ticket of weights, and train it for the price of the ticket.",
            epilog="To start, offline: ltp-sparse demo. Help on a command: ltp-sparse COMMAND --help",
            allow_abbrev=False,
        )
        self.parser.add_argument("--version", action="version", version=f"ltp-sparse {__version__}")
        commands = self.parser.add_subparsers(dest="command", metavar="COMMAND")
        self.commands: dict[str, argparse.ArgumentParser] = {}
        for name in COMMANDS:
            module = importlib.import_module(f"ltp_sparse.cli.{name}")
            command = commands.add_parser(
                name,
                help=module.HELP,
                description=module.HELP[0].upper() + module.HELP[1:] + ".",
                epilog=f"examples:\n{module.EXAMPLES}",
                formatter_class=_Help,
                allow_abbrev=False,
            )
            module.add_options(command)
            command.add_argument(
                "--config", type=Path, metavar="YAML", help="file with options by name; flags override it"
            )
            positional = frozenset(a.dest for a in command._actions if not a.option_strings)
            command.set_defaults(run=module.run, positional=positional)
            self.commands[name] = command

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options of a command, from its flags, its `--config` file and its defaults, in this order."""
        options = self._parse(argv)
        if options.config is None:
            return options
        # parse again with the file's values as defaults, so that flags override them
        command = self.commands[options.command]
        command.set_defaults(**_read_config(options.config, command))
        return self._parse(argv)

    def _parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Like `parse_args`, but the error for an unknown option names the closest one."""
        options, unknown = self.parser.parse_known_args(argv)
        command = self.parser if options.command is None else self.commands[options.command]
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                command.error(f"unexpected {unknown[0]!r}")
            command.error(f"unknown option {flag}{_closest(flag, flags_of(command))}")
        if options.command is None:
            command.error("a command is needed")
        return options


def flags_of(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Long option -> its action, without hidden ones."""
    shown = (action for action in command._actions if action.help != argparse.SUPPRESS)
    return {flag: action for action in shown for flag in action.option_strings if flag.startswith("--")}


def _closest(given: str, known: Iterable[str]) -> str:
    """A phrase with the names that begin with the given one, or the closest name; empty if none is close."""
    known = list(known)
    close = [name for name in known if name.startswith(given)] or difflib.get_close_matches(given, known, n=1)
    return f", closest: {', '.join(close)}" if close else ""


def _read_config(path: Path, command: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        values = read_yaml(path, "options by name, e.g. 'density: 0.2'")
    except (OSError, FileFormatError) as error:
        raise CommandError(f"--config {error}") from error
    actions = {action.dest: action for action in command._actions if action.dest not in ("help", "config")}
    converted = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise CommandError(f"--config {path}: unknown option {key!r}; known: {', '.join(sorted(actions))}")
        converted[name] = _converted(actions[name], value, f"--config {path}: {key}")
    return converted


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    """A value of the file, converted like the value of a flag."""
    if value is None:
        return None
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise CommandError(f"{where} must be true or false, got {value!r}")
        return value
    several = action.nargs == "+"
    if isinstance(value, list) and not several:
        raise CommandError(f"{where} takes one value, got {value!r}")
    found = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool | dict | list):
            raise CommandError(f"{where} must be a string or a number, got {one!r}; put a string in quotes")
        try:
            found.append(action.type(str(one)) if callable(action.type) else str(one))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise CommandError(f"{where}: {error}") from error
        if action.choices is not None and found[-1] not in action.choices:
            raise CommandError(f"{where} must be one of {', '.join(map(str, action.choices))}, got {one!r}")
    return found if several else found[0]


def at_least_one(text: str) -> int:
    """The type of options that are counts."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def share(text: str) -> float:
    """The type of a density."""
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return number


_MODEL = "the base model: a folder, a Hub name, e.g. xlm-roberta-base, or mini-xlmr (in the package)"


def add_model(parser: argparse.ArgumentParser, description: str = _MODEL) -> None:
    """Adds --model and --tokenizer."""
    parser.add_argument("--model", help=description)
    parser.add_argument("--tokenizer", help="folder or Hub name of the tokenizer, if it is not with the model")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds --data, the folder of original files."""
    parser.add_argument(
        "--data", type=Path, help="folder of the task's original files (default: download from the Hub)"
    )


def add_report_to(parser: argparse.ArgumentParser) -> None:
    """Adds --report-to."""
    parser.add_argument(
        "--report-to",
        type=_reporter,
        choices=REPORTERS,
        metavar="NAME",
        default="none",
        help="service to log to: tensorboard, wandb, trackio or another one of transformers; all; none",
    )


def _reporter(text: str) -> str:
    """The type of --report-to. Its package must be installed, which transformers would notice much later."""
    packages = _REPORTER_PACKAGES.get(text, (text,))
    if text in _SERVICES and not any(map(importlib.util.find_spec, packages)):
        raise argparse.ArgumentTypeError(f"{text} needs a package that is not installed; pip install {packages[0]}")
    return text


def add_computing(parser: argparse.ArgumentParser) -> None:
    """Adds --bf16 and --quiet."""
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16, weights in float32; slow on CPUs without AVX-512"
    )
    add_quiet(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds --quiet."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def quieten(options: argparse.Namespace) -> None:
    """With --quiet, turns off the progress bars of transformers as well."""
    if options.quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
