"""Completion by the Tab key, in the shell itself."""

import shutil
import subprocess

import pytest

from ltp_sparse.cli import main
from ltp_sparse.cli.options import COMMANDS


@pytest.fixture
def script(capsys):
    def of(shell: str) -> str:
        assert main(["completion", shell]) == 0
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["se"], ["select"]),
        ([""], list(COMMANDS)),
        (["train", "--met"], ["--method", "--metric"]),
        (["train", "--method", "lt"], ["ltp", "lt-sft"]),
        (["train", "--ticket", "a", "--method", "lt"], ["ltp", "lt-sft"]),
        (["train", "--ticket", ""], []),  # then the shell completes file names
        (["completion", ""], ["bash", "zsh"]),
        (["unknown", "--f"], []),
    ],
)
def test_bash_completes(typed, offered, script):
    words = " ".join(f"'{word}'" for word in ["ltp-sparse", *typed])
    call = f"COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _ltp_sparse; echo ${{COMPREPLY[*]}}\ncomplete -p ltp-sparse"
    done = subprocess.run(["bash", "-uc", script("bash") + call], capture_output=True, text=True, check=True)
    found, registered = done.stdout.splitlines()
    assert sorted(found.split()) == sorted(offered)
    assert registered == "complete -o default -F _ltp_sparse ltp-sparse"


def test_zsh_takes_the_completion_of_bash(script):
    text = script("zsh")
    assert text.endswith(script("bash")) and "bashcompinit" in text
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-fn"], input=text, text=True, check=True)
