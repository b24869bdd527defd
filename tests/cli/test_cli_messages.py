"""Wrong calls of the command line: exit status 2, and one line that says what was expected, what came, what to do."""

import io
import json
import subprocess
import sys
import threading
import warnings

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from ltp_sparse.cli import main
from ltp_sparse.cli.options import COMMANDS, REPORTERS, CommandError, Parser

TRAIN = ["train", "--model", "mini-xlmr", "--output", "o", "--method", "bitfit"]
TSV = "text\tlabel\none\ta\ntwo\tb\nthree\ta\nfour\tb\n"

TABLE = [
    # options
    ("select --dens 0.2", ["unknown option --dens", "closest: --density"]),
    ("train --seed 1", ["unknown option --seed", "--seeds"]),
    ("evaluate runs --tasks xnli", ["unknown option --tasks", "--task"]),
    ("train --tiket t", ["unknown option --tiket, closest: --ticket; see"]),
    ("--verison", ["ltp-sparse: unknown option --verison, closest: --version; see ltp-sparse --help"]),
    ("selct", ["argument COMMAND: invalid choice: 'selct', closest: select (choose from"]),
    ("train --method ltpp", ["argument --method: invalid choice: 'ltpp', closest: ltp (choose from"]),
    ("demo --report-to wandbb", ["argument --report-to: invalid choice: 'wandbb', closest: wandb (choose from"]),
    (
        "select --model mini-xlmr --text t.tsv --report-to all --output o",
        ["--report-to all needs a --run-dir, where its logs are kept"],
    ),
    ("inspect a b", ["unexpected 'b'"]),
    ("train --task foo", ["argument --task: invalid choice: 'foo'", "xnli-fewshot", "nusax", "sib200"]),
    ("evaluate runs --task foo", ["argument --task: invalid choice: 'foo'", "americasnli"]),
    ("train --method foo", ["argument --method: invalid choice: 'foo'", "lt-sft"]),
    ("train --metric f1", ["invalid choice: 'f1'", "macro_f1"]),
    ("predict runs t.tsv --output t.tsv", ["--output t.tsv is also EXAMPLES", "would be overwritten; choose another"]),
    ("select --model mini-xlmr --text u.tsv t.tsv --output ./t.tsv", ["--output t.tsv is also --text"]),
    ("predict runs t.tsv --output a.xlsx", ["--output must end in .tsv or .jsonl, got a.xlsx"]),
    # data of one's own
    ([*TRAIN, "--train", "t.tsv", "--task", "xnli"], ["--task is for a known task, --train for your own data"]),
    ([*TRAIN, "--train", "t.tsv", "--data", "d"], ["--data is for a known task"]),
    ([*TRAIN, "--text-column", "text"], ["--text-column is for your own data; pass its file, --train"]),
    ([*TRAIN, "--train", "t.tsv", "--dev", "t.tsv", "--dev-share", "0.5"], ["--dev-share is for data without --dev"]),
    ([*TRAIN, "--train", "none.tsv"], ["none.tsv: no such file", "columns text, label"]),
    ([*TRAIN, "--train", "t.tsv", "--test", "none.tsv"], ["none.tsv: no such file"]),
    ([*TRAIN, "--train", "t.xlsx"], ["t.xlsx", ".parquet"]),
    ([*TRAIN, "--train", "t.tsv", "--text-column", "txt"], ["t.tsv", "txt", "text"]),
    ([*TRAIN, "--train", "t.tsv", "--label-column", "text"], ["expected different columns"]),
    ([*TRAIN, "--train", "one.tsv"], ["expected at least two classes, got a 2"]),
    ([*TRAIN, "--train", "t.tsv", "--words", "a"], ["--words expects CLASS=WORD", "got 'a'"]),
    ([*TRAIN, "--train", "t.tsv", "--words", "a=x", "a=y"], ["--words has two entries for 'a'"]),
    ([*TRAIN, "--train", "t.tsv", "--words", "a=x"], ["got none for 'b'; classes: a 2, b 2"]),
    ([*TRAIN, "--train", "t.tsv", "--words", "a=x", "b=y", "c=z"], ["got one for 'c'"]),
    ([*TRAIN[:-1], "prompt-only", "--train", "t.tsv"], ["needs a word for each class: --words a=WORD b=WORD"]),
    ([*TRAIN, "--ticket", "t"], ["--ticket is for ltp and random-ticket, not for bitfit"]),
    # recipes
    ("run ltp-table-1 --output o", ["no model 'FacebookAI/xlm-roberta-base'", "mini-xlmr, a small model, comes with"]),
    ("run ltp-table-1 --output o --model ./mini", ["run: --model: expected the folder of a model", "'./mini'"]),
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
    """Counted in modules, not in seconds: nothing but the standard library, and of that little."""
    script = (
        "import sys\nbefore = set(sys.modules)\nfrom ltp_sparse.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "new = set(sys.modules) - before\n"
        "known = {*sys.stdlib_module_names, 'ltp_sparse'}\n"
        "print([name for name in new if name.partition('.')[0] not in known], len(new) < 250)"
    )
    done = python("-c", script)
    assert done.stdout.splitlines()[-1] == "[] True", done.stdout + done.stderr


RUN = {"model": "mini-xlmr", "tokenizer": None, "method": "BitFit", "task": None, "shots": None, "language": "und"}

MISTAKES = [  # with names and files, which a first look at them shows
    ("train --train none.tsv", "no such file"),
    (
        "train --train t.tsv --text-column says",
        "expected a header with says, label; 'says' is not in",
    ),
    ("train --train t.jsonl --label-column class", "expected a column 'class', got text, label"),
    ("train --train t.parquet --label-column class", "expected a column 'class', got text, label"),
    ("train --train t.tsv --words a=x", "got none for 'b'"),
    ("train --method prompt-only --train t.tsv", "needs a word for each class: --words a=WORD b=WORD"),
    ("train --method ltp --train t.tsv", "--ticket is needed for ltp"),
    ("train --train t.tsv --test more.tsv", "more.tsv has the class 'c', which no training example has; classes: a, b"),
    ("train --train t.tsv --n-prompt 3", "--n-prompt is for soft prompts, not for bitfit"),
    ("train --train t.tsv --output full", "already holds trained seeds; pass --resume"),
    ("train --train t.tsv --output left", "has checkpoints of an interrupted run"),
    ("train --train t.tsv --model mini-xlm", "no model 'mini-xlm': there is no such folder"),
    ("train --train t.tsv --model mini-xlm", "the Hub cannot be reached; closest: 'mini-xlmr'"),
    ("train --train t.tsv --model ./modle", "got './modle', which does not exist; closest: 'model'"),
    ("train --train t.tsv --tokenizer mini-xlm", "--tokenizer: no model 'mini-xlm'"),
    ("select --model mini-xlm --text t.tsv", "--model: no model 'mini-xlm'"),
    ("select --model mini-xlmr --text none.tsv", "--text none.tsv: no such file or folder; expected a text or a table"),
    (
        "select --model mini-xlmr --text two.tsv",
        "two.tsv has the columns says, class; name the one with the text, ",
    ),
    ("select --model mini-xlmr --text two.csv", "two.csv has the columns says, class; name the one"),
    ("select --model mini-xlmr --text t.tsv --text-column txt", "'txt' is not in ['text', 'label']"),
    ("select --initial none --tuned model", "--initial none: no such file"),
    ("evaluate .", "not a run of ltp-sparse train"),
    ("evaluate run --test t.tsv --label-column class", "'class' is not in"),
    ("evaluate run --test none.tsv", "none.tsv: no such file"),
    ("evaluate moved --test t.tsv", "evaluate: the model of the run was not found"),
    ("predict run none.tsv", "no such file"),
    ("predict run ?a-text", "?a-text: no such file or folder; expected a file that ends in .tsv, .csv"),
    ("predict run t.tsv --text-column says", "'says' is not in"),
    ("export run --output full", "--output full is not empty; choose a new or empty folder"),
    ("inspect none", "TICKET none: no such file or folder; expected a ticket or a delta; ltp-sparse select makes one"),
    ("run unknown", "unknown recipe 'unknown'; known: "),
    ("report unknown full", "unknown recipe 'unknown'"),
    ("report ltp-table-1 none", "RESULTS none: no such file or folder"),
    ("memory --model ./modle", "closest: 'model'"),
    # one kind of file in place of another
    (
        "train --method ltp --ticket t.tsv --train t.tsv",
        "--ticket expects a ticket, but t.tsv is a table: pass it to --train",
    ),
    (
        "train --method ltp --ticket run --train t.tsv",
        "run is a run of ltp-sparse train: pass it to ltp-sparse evaluate, predict",
    ),
    (
        "train --method ltp --ticket weights.safetensors --train t.tsv",
        "is a file of weights: pass it to --initial or --tuned of",
    ),
    (
        "train --method ltp --ticket model --train t.tsv",
        "but model is a model: pass it to --model",
    ),
    ("train --train en", "--train expects a table, but en is a ticket: pass it to --ticket of"),
    ("train --train t.tsv --model en", "--model expects a model, but en is a ticket"),
    ("train --train t.tsv --model run", "--model expects a model, but run is a run of ltp-sparse train"),
    ("select --model mini-xlmr --text en", "--text expects a text or a table, but en is a ticket"),
    ("select --initial t.tsv --tuned model", "--initial expects a file of weights or a model, but t.tsv is a table"),
    ("evaluate t.tsv", "FOLDER expects a run of ltp-sparse train, but t.tsv is a table"),
    ("evaluate results", "FOLDER expects a run of ltp-sparse train, but results is a folder of results: pass it to"),
    ("predict run en", "EXAMPLES expects a table, but en is a ticket"),
    ("inspect t.tsv", "TICKET expects a ticket or a delta, but t.tsv is a table"),
    ("report ltp-table-1 run", "RESULTS expects a folder of results, but run is a run of ltp-sparse train"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Call -> (what is said, whether torch was imported for it), all of them in one process."""
    import ltp_sparse as ls
    from ltp_sparse.cli.runs import BAKED, record

    root = tmp_path_factory.mktemp("mistakes")
    for name in ("full/seed-1", "left/seed-1/checkpoint-3", "run/seed-1", "moved/seed-1", "results", "model"):
        (root / name).mkdir(parents=True)
    for name in ("full", "run", "moved"):
        (root / name / "seed-1" / BAKED).touch()
    for name, more in (("run", {}), ("moved", {"model": str(root / "gone")})):
        row = {**RUN, "verbalizer": "und", "labels": ["a", "b"], "columns": {"text": "text"}, **more}
        (root / name / "run.json").write_text(json.dumps(row))
        record(root / name, ["run.json"])
    (root / "results" / "results.jsonl").touch()
    (root / "model" / "config.json").write_text("{}")
    (root / "t.tsv").write_text(TSV)
    (root / "more.tsv").write_text(TSV + "five\tc\n")
    (root / "two.tsv").write_text(TSV.replace("text\tlabel", "says\tclass"))
    (root / "two.csv").write_text("says,class\na,b\n")
    (root / "t.jsonl").write_text('{"text": "one", "label": "a"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"], "label": ["a"]}), root / "t.parquet")
    save_file({"w": torch.zeros(2)}, root / "weights.safetensors")
    ls.Ticket.random({"w": torch.zeros(8)}, density=0.5, seed=0).save(root / "en")
    defaults = {"train": ["--model", "mini-xlmr", "--method", "bitfit", "--output", "o"], "select": ["--output", "o"]}
    calls = {}
    for call, _ in MISTAKES:
        name, *rest = call.split()
        calls[call] = [name, *defaults.get(name, []), *rest]
    script = (
        "import contextlib, io, json, sys\nfrom ltp_sparse.cli import main\nanswers = {}\n"
        f"for call, arguments in json.loads({json.dumps(calls)!r}).items():\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as told:\n        status = main(arguments)\n"
        "    answers[call] = (status, told.getvalue(), 'torch' in sys.modules or 'transformers' in sys.modules)\n"
        "print(json.dumps(answers))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistakes_in_names_and_files_are_told_before_torch_is_imported(call, message, answers):
    status, told, heavy = answers[call]
    assert message in told and told.count("\n") == 1
    assert (status, heavy) == (2, False)


def test_a_damaged_file_has_no_kind_that_would_hide_it(tmp_path):
    from ltp_sparse.cli.kinds import kind_of

    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert kind_of(tmp_path / "w.safetensors") == "file of weights"
    content = (tmp_path / "w.safetensors").read_bytes()
    for damaged in (b"", content[:20], b"\xff" * 40, content.replace(b"{", b"[")):
        (tmp_path / "w.safetensors").write_bytes(damaged)
        assert kind_of(tmp_path / "w.safetensors") is None


def test_a_mistyped_model_does_not_wait_for_the_hub(monkeypatch):
    """Whether a name was downloaded before decides where the Hub does not answer; a silent one costs seconds."""
    from ltp_sparse.tasks.hub import load_hub
    from ltp_sparse.weights import hub, locating

    release, ended = threading.Event(), []

    def silent(*_, **__):
        release.wait(60)
        ended.append(None)
        raise OSError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ValueError, match="no model 'owner/name'.*the Hub cannot be reached"):
        locating.locate("owner/name")
    with pytest.raises(ValueError, match="no data set 'owner/name': .* the Hub cannot be reached"):
        load_hub("owner/name", None, split="train")
    monkeypatch.setattr(hub, "_PATIENCE", 0.1)
    monkeypatch.setattr("socket.create_connection", silent)
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        locating.locate("owner/name")
    assert not ended
    release.set()
    monkeypatch.setattr(locating, "_is_cached", lambda name: True)
    assert locating.locate("owner/name") == ("owner/name", True)
    monkeypatch.setattr(locating, "hub_answers", lambda: True)
    assert locating.locate("owner/name") == ("owner/name", False)


@pytest.mark.slow
def test_the_library_is_whole_after_its_late_import():
    script = (
        "import ltp_sparse as ls, sys\nassert 'torch' not in sys.modules\n"
        "assert {name for name in ls.__all__ if getattr(ls, name) is None} == set()\n"
        "import torch; torch.ops.ltp_sparse.masked_adamw_; ls.encoding; assert not hasattr(ls, 'nothing')\n"
        "assert set(ls.__all__) <= set(dir(ls))"
    )
    assert python("-c", script).returncode == 0
    assert python("-c", "import torch, ltp_sparse; torch.ops.ltp_sparse.topk_delta").returncode == 0


def test_the_bare_command_prints_its_help(capsys):
    assert main([]) == 0
    assert "ltp-sparse demo" in capsys.readouterr().out


class Screen(io.StringIO):
    """Where bars and notes go; a terminal shows what stands behind the last carriage return of a line."""

    def __init__(self, tty):
        super().__init__()
        self.isatty = lambda: tty

    def lines(self):
        return [line.rpartition("\r")[2] if self.isatty() else line for line in self.getvalue().split("\n")]


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("error", [ValueError("expected x, got y"), KeyError("lost"), KeyboardInterrupt()])
def test_notes_and_errors_have_lines_of_their_own_beside_a_bar(tty, error, monkeypatch):
    from tqdm import tqdm

    def work(options):
        bar = tqdm(total=3, file=sys.stderr, ascii=True, ncols=60, mininterval=0)  # open when the error comes
        bar.update()
        sys.stderr.write(warnings.formatwarning("beware", UserWarning, "f", 1))  # pytest keeps warnings from the screen
        bar.update()
        kept.append(bar)
        raise error

    kept, screen = [], Screen(tty)
    monkeypatch.setattr("ltp_sparse.cli.cache.run", work)
    monkeypatch.setattr("sys.stderr", screen)
    assert main(["cache"]) == {ValueError: 2, KeyError: 1, KeyboardInterrupt: 130}[type(error)]
    kept[0].close()
    lines = screen.lines()
    assert "ltp-sparse: note: beware" in lines
    assert lines[-2].startswith("ltp-sparse: ") and lines[-1] == "" and "Traceback" not in screen.getvalue()


def test_errors_are_without_the_names_of_functions(monkeypatch, capsys):
    from ltp_sparse.prompting import Verbalizer

    def work(options):
        Verbalizer.from_words(None, {"a": "x"}, ("a", "b"))

    monkeypatch.setattr("ltp_sparse.cli.cache.run", work)
    assert main(["cache"]) == 2
    assert capsys.readouterr().err == "ltp-sparse: expected words for a, b, got a\n"
    monkeypatch.setenv("LTP_SPARSE_TRACEBACK", "1")
    assert main(["cache"]) == 2
    assert "in from_words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("too short; give more text or line_by_line=True", "too short; give more text or --line-by-line"),
        ("pass segment= as well", "pass --segment as well"),
        ("take strategy='vanilla' or epochs=3", "take --strategy vanilla or --epochs 3"),
        ("x.epochs=3, epochs=a(b) and pool=r", "x.epochs=3, epochs=a(b) and pool=r"),
    ],
)
def test_errors_speak_of_options_and_not_of_arguments(message, told, monkeypatch, capsys):
    def work(options):
        raise ValueError(message)

    monkeypatch.setattr("ltp_sparse.cli.select.run", work)
    assert main(["select"]) == 2
    assert capsys.readouterr().err == f"ltp-sparse: {told}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "install"),
    [("torch", "torch"), ("xxhash", "xxhash"), ("safetensors", "safetensors"), ("transformers", '"ltp-sparse[train]"')],
)
def test_a_missing_package_is_one_line(package, install, tmp_path):
    (tmp_path / "t.txt").write_text("a b\n" * 9)
    script = (
        "import sys\nfrom ltp_sparse.cli import main\n"
        "class Missing:\n"
        "    def find_spec(name, *_):\n"
        f"        if name.split('.')[0] == {package!r}: raise ModuleNotFoundError('no', name=name)\n"
        "sys.meta_path.insert(0, Missing)\n"
        f"sys.exit(main(['select', '--model', 'mini-xlmr', '--text', {str(tmp_path / 't.txt')!r}, '--output', 'o']))"
    )
    done = python("-c", script)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ltp-sparse: {package} is not installed; pip install {install}\n"


def test_version(capsys):
    import ltp_sparse

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"ltp-sparse {ltp_sparse.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_option_and_its_default(name):
    command = Parser().commands[name]
    shown = " ".join(command.format_help().split())
    for action in command._actions:
        if action.help == "==SUPPRESS==" or action.dest == "help":
            continue
        assert action.help, f"{name}: {action.dest} has no help"
        if action.default not in (None, False, [], "==SUPPRESS==") and "default" not in action.help:
            assert f"(default: {action.default})" in shown, action.dest


@pytest.mark.parametrize("name", ["select", "train", "run", "demo"])
def test_long_commands_report_to_what_is_asked_and_installed(name, monkeypatch):
    parser = Parser()
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package == "tensorboardX" or None)
    for reporter in ("tensorboard", "none", "all"):
        assert parser.parse([name, "--report-to", reporter]).report_to == reporter
    with pytest.raises(CommandError, match=f"{name}: argument --report-to: wandb needs a package .*pip install wandb"):
        parser.parse([name, "--report-to", "wandb"])


def test_reporters_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(REPORTERS) - {"none", "all"} == set(INTEGRATION_TO_CALLBACK)


def test_what_to_do_next_names_the_task_and_its_data():
    from ltp_sparse.cli.train import _check_source, _next

    for given, expected in (
        (["--data", "my data", "--shots", "4"], "--task xnli --data 'my data'"),
        (["--task", "sib200", "--words", "a=b"], "--task sib200"),
        (["--task", "smsa"], "--task nusax"),
    ):
        options = Parser().parse(["train", "--output", "runs/a", *given])
        _check_source(options)
        assert _next(options) == f"ltp-sparse evaluate runs/a {expected}"


def test_task_tables_are_those_of_the_tasks():
    from ltp_sparse.cli.tables import METRIC_NAMES, TASK_NAMES, TEST_TASKS
    from ltp_sparse.tasks import TASKS
    from ltp_sparse.training.evaluation import METRICS

    assert tuple(TASKS) == TASK_NAMES and tuple(METRICS) == METRIC_NAMES
    for name, test in TEST_TASKS.items():
        assert TASKS[name].labels == TASKS[test].labels and TASKS[name].kind == TASKS[test].kind
