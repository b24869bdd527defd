"""Options of the command line: flags, a YAML file under them, and what several commands share."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("select", "train", "evaluate", "predict", "export", "inspect", "run", "report", "cache", "memory", "demo")


class CommandError(Exception):
    """A mistake in the options."""


class Parser:
    """The parser of all commands: modules of this package with `HELP`, `EXAMPLES`, `add_options` and `run`."""

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser(
            prog="ltp-sparse",
            description="Select a ticket of weights, and train it for the price of the ticket.",
            epilog="A first look, offline: ltp-sparse demo. Help on a command: ltp-sparse COMMAND --help",
        )
        commands = self.parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        self.commands: dict[str, argparse.ArgumentParser] = {}
        for name in COMMANDS:
            module = importlib.import_module(f"ltp_sparse.cli.{name}")
            command = commands.add_parser(
                name,
                help=module.HELP,
                description=module.HELP[0].upper() + module.HELP[1:] + ".",
                epilog=f"examples:\n{module.EXAMPLES}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_options(command)
            command.add_argument("--config", type=Path, metavar="YAML", help="options by name; flags win over the file")
            command.set_defaults(run=module.run)
            self.commands[name] = command

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        options = self.parser.parse_args(argv)
        if options.config is None:
            return options
        # a second parse with the file's values as defaults, so that flags win
        command = self.commands[options.command]
        command.set_defaults(**_read_config(options.config, command))
        return self.parser.parse_args(argv)


def build_parser() -> Parser:
    return Parser()


def _read_config(path: Path, command: argparse.ArgumentParser) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise CommandError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise CommandError(
            f"--config {path}: expected options by name, e.g. 'density: 0.2', got {type(values).__name__}"
        )
    actions = {action.dest: action for action in command._actions if action.dest not in ("help", "config")}
    converted = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise CommandError(f"--config {path}: unknown option {key!r}; known: {', '.join(sorted(actions))}")
        action = actions[name]
        if action.choices is not None and value not in action.choices:
            raise CommandError(
                f"--config {path}: {key} must be one of {', '.join(map(str, action.choices))}, got {value!r}"
            )
        convert = action.type if callable(action.type) else (lambda v: v)
        if value is None or isinstance(action, argparse._StoreTrueAction):
            converted[name] = value
        else:
            converted[name] = [convert(v) for v in value] if isinstance(value, list) else convert(value)
    return converted


def need(options: argparse.Namespace, *names: str) -> None:
    """Raises for options that neither flags nor the file give."""
    for name in names:
        if getattr(options, name) in (None, []):
            raise CommandError(
                f"{options.command}: --{name.replace('_', '-')} is needed; see ltp-sparse {options.command} --help"
            )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder of the base model, or its Hub name, e.g. xlm-roberta-base")
    parser.add_argument("--tokenizer", help="folder or Hub name of the tokenizer, where it is not beside the model")


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the task's original files; without it, the Hub by name")


def add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 under autocast; weights stay float32")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
