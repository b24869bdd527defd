"""Wrong calls of the command line: exit status 2, and one line that says what was expected, what came, what to do."""

import subprocess
import sys

import pytest

from ltp_sparse.cli import main
from ltp_sparse.cli.options import COMMANDS, build_parser

TRAIN = ["train", "--model", "m", "--output", "o", "--method", "bitfit"]
TSV = "text\tlabel\none\ta\ntwo\tb\nthree\ta\nfour\tb\n"

TABLE = [
    # options
    ("select --dens 0.2", ["unknown option --dens", "closest: --density"]),
    ("train --seed 1", ["unknown option --seed", "--seeds"]),
    ("evaluate runs --tasks xnli", ["unknown option --tasks", "--task"]),
    ("inspect a b", ["unexpected 'b'"]),
    ("train --task foo", ["argument --task: invalid choice: 'foo'", "xnli-fewshot", "nusax", "sib200"]),
    ("evaluate runs --task foo", ["argument --task: invalid choice: 'foo'", "americasnli"]),
    ("train --method foo", ["argument --method: invalid choice: 'foo'", "lt-sft"]),
    ("train --metric f1", ["invalid choice: 'f1'", "macro_f1"]),
    ("predict runs t.tsv --output a.xlsx", ["--output must end in .tsv or .jsonl, got a.xlsx"]),
    # data of one's own
    ([*TRAIN, "--train", "t.tsv", "--task", "xnli"], ["--task is of a known task, --train of data of your own"]),
    ([*TRAIN, "--train", "t.tsv", "--data", "d"], ["--data is of a known task"]),
    ([*TRAIN, "--text-column", "text"], ["--text-column is of data of your own; give their file, --train"]),
    ([*TRAIN, "--train", "t.tsv", "--dev", "t.tsv", "--dev-share", "0.5"], ["--dev-share is for data without --dev"]),
    ([*TRAIN, "--train", "none.tsv"], ["none.tsv: no such file", "columns text, label"]),
    ([*TRAIN, "--train", "t.tsv", "--test", "none.tsv"], ["none.tsv: no such file"]),
    ([*TRAIN, "--train", "t.xlsx"], ["t.xlsx", ".parquet"]),
    ([*TRAIN, "--train", "t.tsv", "--text-column", "txt"], ["t.tsv", "txt", "text"]),
    ([*TRAIN, "--train", "t.tsv", "--label-column", "text"], ["a column of its own for each"]),
    ([*TRAIN, "--train", "one.tsv"], ["expected at least two classes, got a 2"]),
    ([*TRAIN, "--train", "t.tsv", "--words", "a"], ["--words expects CLASS=WORD", "got 'a'"]),
    ([*TRAIN, "--train", "t.tsv", "--words", "a=x", "a=y"], ["--words has two entries for 'a'"]),
    ([*TRAIN, "--train", "t.tsv", "--words", "a=x"], ["got none for 'b'; classes: a 2, b 2"]),
    ([*TRAIN, "--train", "t.tsv", "--words", "a=x", "b=y", "c=z"], ["got one for 'c'"]),
    ([*TRAIN[:-1], "prompt-only", "--train", "t.tsv"], ["needs a word for each class: --words a=WORD b=WORD"]),
    ([*TRAIN, "--ticket", "t"], ["--ticket is of ltp and random-ticket, not of bitfit"]),
    # recipes
    ("run own.yaml --dry-run", ["'xnly'", "xnli-fewshot", "sib200"]),
]


@pytest.mark.parametrize(("arguments", "words"), TABLE, ids=[str(i) for i in range(len(TABLE))])
def test_a_wrong_call_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.tsv").write_text(TSV)
    (tmp_path / "one.tsv").write_text("text\tlabel\none\ta\ntwo\ta\n")
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    (tmp_path / "own.yaml").write_text(
        "title: t\nmodel: xlm-roberta-base\ncells: [{method: bitfit, train: {task: xnly}, test: {task: xnli}}]\n"
    )
    assert main(arguments.split() if isinstance(arguments, str) else arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ltp-sparse: ") and error.count("\n") == 1
    for word in words:
        assert word in error


def python(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--task", "foo"], ["--version"]])
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    script = (
        "import sys\nfrom ltp_sparse.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'yaml') if name in sys.modules])"
    )
    done = python("-c", script)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_library_is_whole_after_its_late_import():
    script = (
        "import ltp_sparse as ls, sys\nassert 'torch' not in sys.modules\n"
        "assert {name for name in ls.__all__ if getattr(ls, name) is None} == set()\n"
        "import torch; torch.ops.ltp_sparse.masked_adamw_; ls.encoding; assert not hasattr(ls, 'nothing')\n"
        "assert set(ls.__all__) <= set(dir(ls))"
    )
    assert python("-c", script).returncode == 0
    assert python("-c", "import torch, ltp_sparse; torch.ops.ltp_sparse.topk_delta").returncode == 0


def test_version(capsys):
    import ltp_sparse

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"ltp-sparse {ltp_sparse.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_option_and_its_default(name):
    command = build_parser().commands[name]
    shown = " ".join(command.format_help().split())
    for action in command._actions:
        if action.help == "==SUPPRESS==" or action.dest == "help":
            continue
        assert action.help, f"{name}: {action.dest} has no help"
        if action.default not in (None, False, [], "==SUPPRESS==") and "default" not in action.help:
            assert f"(default: {action.default})" in shown, action.dest


@pytest.mark.parametrize("name", ["select", "train", "run"])
def test_long_commands_report_to_what_is_asked(name):
    assert build_parser().parse([name, "--report-to", "tensorboard"]).report_to == "tensorboard"


def test_what_to_do_next_names_the_task_and_its_data():
    from ltp_sparse.cli.train import _next

    for given, expected in (
        (["--data", "my data", "--shots", "4"], "--task xnli --data 'my data'"),
        (["--task", "sib200", "--words", "a=b"], "--task sib200"),
        (["--task", "smsa"], "--task nusax"),
    ):
        options = build_parser().parse(["train", "--output", "runs/a", *given])
        assert _next(options) == f"ltp-sparse evaluate runs/a {expected}"


def test_task_tables_are_those_of_the_tasks():
    from ltp_sparse.cli.tables import METRIC_NAMES, TASK_NAMES, TEST_TASKS
    from ltp_sparse.tasks import TASKS
    from ltp_sparse.training.evaluation import METRICS

    assert tuple(TASKS) == TASK_NAMES and tuple(METRICS) == METRIC_NAMES
    for name, test in TEST_TASKS.items():
        assert TASKS[name].labels == TASKS[test].labels and TASKS[name].kind == TASKS[test].kind
