"""What machine A pushes, machine B loads and serves: the page, and the commands, against a stand-in of the Hub."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_stand_in import here
from helpers.own_data import rows, run, write_tsv

import ltp_sparse as ls
from ltp_sparse.models.backbone import load_backbone

PAGE = Path(__file__).parents[2] / "docs" / "share.md"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with here(monkeypatch, tmp_path / "cache-of-a") as hub:
        yield hub


def machine_b(hub, folder, code):
    """Standard output of Python code in a process of its own, with an empty cache and without a token."""
    folder.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_runs_from_training_to_serving(hub, tmp_path, monkeypatch):
    """Its commands and code as they stand, but for the number of epochs; the first code runs on another machine."""
    a = tmp_path / "a"
    a.mkdir()
    monkeypatch.chdir(a)
    labels = ("positive", "neutral", "negative")
    found = [{"text": row["says"], "label": labels[i % 3]} for i, row in enumerate(rows(24))]
    for name in ("train", "test"):
        write_tsv(a / f"{name}.tsv", found, ("text", "label"))
    model, _ = load_backbone("mini-xlmr", decoupled=False)
    ls.Ticket.random(model, density=0.02, seed=0, pool=ls.selection.pools.maskable).save(a / "ace.safetensors")
    small = {"train": ["--epochs", 1, "--max-length", 32, "--quiet"], "evaluate": ["--quiet"]}
    names, served = {}, ""
    for kind, body in re.findall(r"^```(python|)\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S):
        if kind and not served:
            served = machine_b(hub, tmp_path / "b", body)
            exec("import ltp_sparse as ls", names)
        elif kind:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(body, str(PAGE), "exec"), names)
        for line in body.replace("\\\n", " ").splitlines() if not kind else ():
            words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
            if words[0] == "ltp-sparse":
                assert run(*words[1:], *small.get(words[1], [])) == 0, line
            else:
                told = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True)
    best = max(told.stdout.split("\n")[:3], key=lambda line: float(line.split("\t")[1]))  # what A's own export says
    assert f"'label': '{best.split(chr(9))[0]}'" in served
    assert out.getvalue() == "True\n" and names["inexact"] == 0
    assert names["delta"].metadata["hub"].startswith("owner/ace-delta@")
    card = hub.repositories["owner/ace-delta"].commits[names["delta"].metadata["hub"].partition("@")[2]]["README.md"]
    for line in ("| base model | mini-xlmr |", "| method | ltp |", "| data | train.tsv |", "| test.tsv | accuracy |"):
        assert line in card.decode()
    assert "load_trained(model" in card.decode()


def test_push_and_pull_of_a_ticket(hub, own_files, tmp_path, capsys):
    ticket = own_files / "ticket.safetensors"
    assert run("push", ticket, "owner/en", "--base", "mini-xlmr", "--data", "text", "--private") == 0
    address = re.search(r"owner/en@\w{40}", capsys.readouterr().out)[0]
    for name in ("owner/en", address):
        assert run("pull", name, "--output", tmp_path / "t") == 0
        assert capsys.readouterr().out.endswith(f"{address} written to {tmp_path / 't'}\n")
        assert ls.Ticket.load(tmp_path / "t") == ls.Ticket.load(ticket)
        assert ls.Ticket.load(tmp_path / "t").metadata["hub"] == address


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "none", "owner/x"], "SOURCE none: no such file or folder"),
        (["push", "t.safetensors", "no name"], "expected a repository of the Hub, owner/name"),
        (["push", "t.safetensors", "owner/x", "--seed", "1"], "--seed is for a run; leave it out"),
        (["push", "model", "owner/x", "--base", "y"], "--base is not for an exported folder"),
        (["push", "model", "owner/x"], "model: expected one of ticket (ticket.safetensors), delta"),
        (["push", "t.safetensors"], "push: NAME is needed"),
        (["pull", "owner/none", "--output", "o"], "owner/none: no such repository on "),
        (["pull", "owner/foreign", "--output", "o"], "it holds a.txt"),
    ],
)
def test_mistakes_are_one_line(arguments, message, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hub.add("owner/foreign", {"a.txt": b"a"})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    ls.Ticket.random({"w": [8]}, density=0.5).save(tmp_path / "t.safetensors")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "o").exists()
