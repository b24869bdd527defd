"""`ltp-sparse completion`: completion of commands, options and choices in bash and zsh."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from typing import Any

from ltp_sparse.cli.checks import need
from ltp_sparse.cli.options import COMMANDS, Parser, flags_of

HELP = "print the script that completes commands, options and choices in bash or zsh"
EXAMPLES = """\
  the script
    ltp-sparse completion bash
  in ~/.bashrc
    eval "$(ltp-sparse completion bash)"
  in ~/.zshrc
    eval "$(ltp-sparse completion zsh)\""""

_SCRIPT = """\
_ltp_sparse() {{
    local words= word="${{COMP_WORDS[COMP_CWORD]}}"
    case "$COMP_CWORD:${{COMP_WORDS[1]}}:${{COMP_WORDS[COMP_CWORD-1]}}:$word" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _ltp_sparse ltp-sparse
"""
_FOR_ZSH = """\
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", nargs="?", choices=("bash", "zsh"), help="the shell")


def run(options: argparse.Namespace) -> None:
    need(options, "shell")
    print((_FOR_ZSH if options.shell == "zsh" else "") + script(Parser()), end="")


def script(parser: Parser) -> str:
    """The completion as a bash function. If it has no words to offer, the shell completes file names."""
    cases: list[tuple[str, Iterable[Any]]] = [("1:*", COMMANDS)]
    for name, command in parser.commands.items():
        flags = flags_of(command)
        cases += [(f"*:{name}:{flag}:*", action.choices) for flag, action in flags.items() if action.choices]
        cases.append((f"*:{name}:*:-*", flags))
        positional = (tuple(action.choices or ()) for action in command._actions if not action.option_strings)
        cases.append((f"2:{name}:*", next(positional, ())))
    texts = ((pattern, " ".join(map(str, words))) for pattern, words in cases if words)
    return _SCRIPT.format(cases="\n".join(f"        {pattern}) words={shlex.quote(text)};;" for pattern, text in texts))
