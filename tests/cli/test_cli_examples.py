"""Every command in `--help`, README and docs is one that parses, and where that is cheap, one that runs."""

import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers.own_data import rows, run, write_tsv
from helpers.tiny_nli import toy_pairs

import ltp_sparse as ls
import ltp_sparse.demo  # noqa: F401  what binds the names that are replaced below must have bound them before
import ltp_sparse.training.export  # noqa: F401
from ltp_sparse.cli import main
from ltp_sparse.cli.options import COMMANDS, Parser

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/own-data.md",
    "docs/own-method.md",
    "docs/methods.md",
    "docs/memory.md",
    "docs/evidence.md",
    "docs/evidence-small-models.md",
    "docs/share.md",
    "docs/cluster.md",
]


class Reached(BaseException):
    """A command has got past all its checks, to where the work begins."""


def commands(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*ltp-sparse [a-z]", line)]


def blocks(page: str) -> str:
    """What stands between fences without a language."""
    parts = re.split(r"^```(.*)\n", (ROOT / page).read_text(), flags=re.M)
    return "\n".join(body for kind, body in zip(parts[1::4], parts[2::4], strict=True) if not kind)


HELP = [
    (name, command)
    for name in COMMANDS
    for command in commands(importlib.import_module(f"ltp_sparse.cli.{name}").EXAMPLES)
]
WRITTEN = [(page, command) for page in PAGES for command in commands(blocks(page))]


def arguments_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


@pytest.mark.parametrize(("where", "command"), [*HELP, *WRITTEN])
def test_examples_parse(where, command):
    assert Parser().parse(arguments_of(command)).command == arguments_of(command)[0]


def test_there_are_examples_everywhere():
    assert {name for name, _ in HELP} == set(COMMANDS) and {page for page, _ in WRITTEN} == set(PAGES)


@pytest.fixture(scope="module")
def stand_ins(own_files, tmp_path_factory):
    """A folder with a small file for every path that the examples name."""
    from ltp_sparse.cli.runs import BAKED, Run
    from ltp_sparse.tasks.own import Columns

    root = tmp_path_factory.mktemp("stand-ins")
    for name in ("base", "tuned"):
        (root / name).mkdir()
    for name in ("en", "hi", "ace"):
        shutil.copy(own_files / "ticket.safetensors", root / f"{name}.safetensors")
    (root / "wiki.en.txt").write_text("one line\n")
    for shots in (4, 16):
        for split in ("train", "dev"):
            for language, place in (("en", f"en/{split}_split,{shots}"), ("sw", f"rest/{split}_split,sw,{shots}")):
                path = root / "data" / split / f"{place}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [
                    {"lang": language, "sentence1": p.premise, "sentence2": p.hypothesis, "gold": p.label}
                    for p in toy_pairs(3 * shots)
                ]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "xnli_fewshot").symlink_to(root / "data")
    for split in ("train", "validation"):
        (root / "data" / "trimmed").mkdir(exist_ok=True)
        (root / "data" / "trimmed" / f"{split}.tsv").write_text("text\tlabel\n" + "word\t0\nword\t1\nword\t2\n" * 16)
    for name in ("train", "dev", "test", "other"):
        lines = [f"{'ace' if i % 2 else 'quy'}\tword {i}\t{'negative' if i % 3 else 'positive'}" for i in range(30)]
        (root / f"{name}.tsv").write_text("\n".join(["language\ttext\tlabel", *lines, ""]))
    (root / "new.jsonl").write_text('{"sentence": "word"}\n')
    (root / "pairs.tsv").write_text("premise\thypothesis\nword\tword\n")
    for name, more in (
        ("ltp-4", {"task": "xnli-fewshot"}),
        ("quy", {"task": None, "columns": Columns(), "test": "test.tsv", "labels": ("positive", "negative")}),
    ):
        made = Run(model="mini-xlmr", tokenizer=None, method="LTP", shots=4, language="en", verbalizer="en", **more)
        for seed in (1, 3):
            (root / "runs" / name / f"seed-{seed}").mkdir(parents=True)
            (root / "runs" / name / f"seed-{seed}" / BAKED).touch()
        made.save(root / "runs" / name)
    return root


EXECUTED = [
    command for name, command in HELP if name in ("select", "train", "evaluate", "predict", "export", "inspect")
]


@pytest.mark.parametrize("command", EXECUTED)
def test_examples_of_help_get_to_where_the_work_begins(command, stand_ins, monkeypatch, tmp_path):
    def reached(*_, **__):
        raise Reached

    monkeypatch.chdir(stand_ins)
    words = arguments_of(command)
    if words[0] == "inspect":
        assert main([word.replace("en.png", str(tmp_path / "en.png")) for word in words]) == 0
        return
    if words[0] == "train":
        words[words.index("--output") + 1] = str(tmp_path / "run")
    monkeypatch.setattr("ltp_sparse.models.backbone.load_backbone", reached)
    monkeypatch.setattr("ltp_sparse.selection.select", reached)
    monkeypatch.setattr(ls, "select", reached)
    monkeypatch.setattr("ltp_sparse.cli.runs.load_seed", reached)
    monkeypatch.setattr("ltp_sparse.training.export.export", reached)
    monkeypatch.setattr("ltp_sparse.tasks.read_hub_text", lambda *_, **__: ["one line"])
    if words[0] == "evaluate":  # XNLI and AmericasNLI are on the Hub
        monkeypatch.setattr("ltp_sparse.tasks.Task.load", lambda *_, **__: toy_pairs(3))
    with pytest.raises(Reached):
        main(words)


@pytest.mark.slow
def test_the_page_on_own_data_runs(own_files, tmp_path, monkeypatch, capsys):
    """Its commands as they stand, but for the model, the words it knows, and how long they train."""
    found = [
        {
            **row,
            "language": "ace" if i % 2 else "ban",
            "text": row["says"],
            "label": ("positive", "neutral", "negative")[i % 3],
        }
        for i, row in enumerate(rows(160))
    ]
    for name in ("train", "test"):
        write_tsv(tmp_path / f"{name}.tsv", found, ("language", "text", "label"))
    small = {
        "select": ["--model", own_files / "model", "--max-steps", 1, "--length", 16, "--quiet"],
        "train": [
            "--model", own_files / "model", "--epochs", 1, "--max-length", 24, "--seeds", 1, "--quiet",
            "--words", "positive=right", "neutral=maybe", "negative=wrong",
        ],
        "evaluate": ["--quiet"],
        "predict": ["--quiet"],
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for command in commands(blocks("docs/own-data.md")):
        words = arguments_of(command)
        assert run(*words, *small.get(words[0], [])) == 0, command
    printed = capsys.readouterr().out
    assert "| LTP |" in printed and "ace" in printed and "ban" in printed
    assert {"languages.png", "labelled.jsonl", "exported"} <= set(os.listdir(tmp_path))
    assert commands(blocks("docs/own-data.md"))[2] in commands(blocks("README.md"))
