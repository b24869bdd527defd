"""The command line, run as a user does, on a tiny model and local files."""

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from filelock import FileLock
from helpers.tiny_nli import WORDS, tiny_language_model, tiny_tokenizer, toy_pairs

import ltp_sparse as ls
from ltp_sparse.cli import main
from ltp_sparse.cli.checks import CommandError
from ltp_sparse.cli.runs import Run, finished_seeds, load_seed, record, seeds_to_train
from ltp_sparse.prompting import CLASSES

SHOTS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder, text, and a K-shot sample in the original layout."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    tiny_language_model(len(tokenizer), decoupled=False).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator)) for _ in range(60)]
    (root / "text.txt").write_text("\n".join(lines))
    for split, seed in (("train", 0), ("dev", 1)):
        folder = root / "data" / split / "en"
        folder.mkdir(parents=True)
        rows = [
            {"lang": "en", "sentence1": p.premise, "sentence2": p.hypothesis, "gold": p.label}
            for p in toy_pairs(3 * SHOTS, seed=seed)
        ]
        (folder / f"{split}_split,{SHOTS}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def ticket(files):
    path = files / "en.safetensors"
    arguments = ["--text", files / "text.txt", "--max-steps", 2, "--batch-size", 4, "--length", 16, "--density", 0.05]
    assert run("select", "--model", files / "model", *arguments, "--output", path, "--quiet") == 0
    return path


@pytest.fixture(scope="module")
def trained(files, ticket):
    folder = files / "run"
    assert run("train", *train_arguments(files, ticket), "--seeds", 1, 2, "--output", folder) == 0
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def train_arguments(files, ticket):
    settings = ["--epochs", 2, "--max-length", 40, "--learning-rate", 1e-2, "--quiet"]
    return ["--model", files / "model", "--ticket", ticket, "--data", files / "data", "--shots", SHOTS, *settings]


def test_select_writes_a_ticket_of_the_asked_size(files, ticket, capsys):
    loaded = ls.Ticket.load(ticket)
    assert loaded.k == int(0.05 * loaded.metadata["maskable"])
    assert loaded.metadata["strategy"] == "decoupled"
    assert run("inspect", ticket, "--plot", files / "plot.png", "--compare", ticket) == 0
    printed = capsys.readouterr().out
    assert "layer 1" in printed and "attention" in printed and "Jaccard overlap 1.0000" in printed
    assert (files / "plot.png").stat().st_size > 1000


def test_a_delta_is_inspected_by_its_ticket_and_nothing_else_is(files, ticket, trained, tmp_path, capsys):
    from ltp_sparse import files as own

    assert run("inspect", trained / "seed-1" / "trained.safetensors") == 0
    assert repr(ls.Ticket.load(ticket)).split(",")[0] in capsys.readouterr().out
    shutil.copy(ticket, tmp_path / "ticket.safetensors")
    shutil.copy(trained / "seed-1" / "trained.safetensors", tmp_path / "delta.safetensors")
    assert run("inspect", tmp_path) == 0 and "Ticket(" in capsys.readouterr().out
    own.save(tmp_path / "a", "adapter", {}, {})
    assert run("inspect", tmp_path / "a") == 2
    assert "expected a ticket, got an adapter" in capsys.readouterr().err


def test_select_from_two_checkpoints(files, tmp_path, capsys):
    tuned = tiny_language_model(len(tiny_tokenizer()), decoupled=False, seed=1)
    tuned.save_pretrained(tmp_path / "tuned")
    output = tmp_path / "ticket.safetensors"
    arguments = ["--initial", files / "model", "--tuned", tmp_path / "tuned", "--density", 0.1, "--output", output]
    assert run("select", *arguments) == 0
    assert ls.Ticket.load(output).density == pytest.approx(0.1, abs=1e-4)


def test_a_run_is_evaluated_per_language(files, trained, capsys):
    lines = ["language\tpremise\thypothesis\tlabel"]
    for language in ("aym", "quy"):
        lines += [f"{language}\t{p.premise}\t{p.hypothesis}\t{p.label}" for p in toy_pairs(30, seed=2)]
    (files / "data" / "test.tsv").write_text("\n".join([*lines, ""]))
    arguments = ["--task", "americasnli", "--data", files / "data", "--languages", "aym", "quy", "--quiet"]
    assert run("evaluate", trained, *arguments, "--plot", files / "bars.png") == 0
    table = capsys.readouterr().out
    assert "| LTP | 4 | 2 |" in table and "±" in table
    rows = [json.loads(line) for line in (trained / "results.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows[-2:]] == [1, 2]
    assert rows[-1]["scores"]["aym"] == rows[-1]["scores"]["quy"]  # the same pairs


def test_training_resumes_and_refuses_to_overwrite(files, ticket, trained, capsys):
    before = (trained / "seed-1" / "baked.safetensors").read_bytes()
    assert run("train", *train_arguments(files, ticket), "--seeds", 1, "--output", trained) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert run("train", *train_arguments(files, ticket), "--seeds", 1, 2, "--output", trained, "--resume") == 0
    assert (trained / "seed-1" / "baked.safetensors").read_bytes() == before


def test_interrupted_runs_are_not_started_anew_by_oversight(files, ticket, tmp_path, capsys):
    left = tmp_path / "run" / "seed-1" / "phase-1" / "checkpoint-7"
    left.mkdir(parents=True)
    arguments = [*train_arguments(files, ticket), "--seeds", 1, "--output", tmp_path / "run"]
    assert run("train", *arguments) == 2
    assert "has checkpoints of an interrupted run; pass --resume to continue, or another --output" in (
        capsys.readouterr().err
    )
    select = ["select", "--model", files / "model", "--text", files / "text.txt", "--run-dir", left.parent]
    assert run(*select, "--output", tmp_path / "t") == 2
    assert "pass --resume to continue, or another --run-dir" in capsys.readouterr().err
    assert left.is_dir()


@pytest.mark.parametrize("harm", ["missing", "damaged", "swapped", "folder", "description"])
def test_a_run_that_has_lost_something_is_not_taken_for_whole(harm, files, trained, tmp_path, capsys):
    """Else a mean over fewer seeds, or of other weights, would be told."""
    folder = shutil.copytree(trained, tmp_path / "run")
    seeds = [folder / f"seed-{seed}" / "baked.safetensors" for seed in (1, 2)]
    if harm == "missing":
        seeds[1].unlink()
    elif harm == "damaged":
        seeds[1].write_bytes(seeds[1].read_bytes()[:-1] + b"\x55")
    elif harm == "swapped":
        contents = [path.read_bytes() for path in seeds]
        for path, content in zip(seeds, reversed(contents), strict=True):
            path.write_bytes(content)
    elif harm == "folder":
        shutil.rmtree(seeds[1].parent)
    else:
        path = folder / "run.json"
        path.write_text(path.read_text().replace('"language": "en"', '"language": "eo"'))
    (tmp_path / "pairs.tsv").write_text("premise\thypothesis\na\tb\n")
    for command in (
        ["evaluate", folder, "--task", "americasnli", "--data", files / "data", "--languages", "aym"],
        ["predict", folder, tmp_path / "pairs.tsv", "--seed", 2],
        ["export", folder, "--seed", 2, "--output", tmp_path / "exported"],
    ):
        assert run(*command) == 2
        error = capsys.readouterr().err
        assert "manifest.json" in error and ("seed-2/baked" in error or "run.json" in error or "seed-1/baked" in error)


def test_runs_of_earlier_versions_are_read_and_said_so(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "manifest.json").unlink()
    assert finished_seeds(folder) == [1, 2]
    assert "has no manifest.json" in capsys.readouterr().out
    (folder / "seed-3").mkdir()
    (folder / "seed-3" / "baked.safetensors").write_bytes(b"x")
    record(folder, ["seed-3/baked.safetensors"])
    assert finished_seeds(folder) == [1, 2, 3]


def test_seeds_that_another_process_trains_are_passed_over(tmp_path, capsys):
    from filelock import FileLock

    for seed in (1, 3):
        (tmp_path / f"seed-{seed}").mkdir()
    (tmp_path / "seed-3" / "baked.safetensors").write_bytes(b"x")
    with FileLock(tmp_path / "seed-1" / "train.lock"):
        assert list(seeds_to_train(tmp_path, [1, 2, 3])) == [2]
    told = capsys.readouterr().out
    assert "seed 1: skipped, another process is training it" in told and "seed 3: skipped, another process has" in told


@pytest.mark.parametrize(
    "command",
    [
        ["select", "--initial", "a", "--tuned", "b", "--output", "{}"],
        ["run", "evidence-generated", "--output", "{}"],
        ["demo", "--output", "{}"],
        ["report", "evidence-generated", "results", "--output", "{}"],
        ["inspect", "ticket", "--plot", "{}"],
    ],
    ids=lambda command: command[0],
)
def test_commands_look_where_they_write_before_they_work(command, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert run(*(str(tmp_path / "pipe") if word == "{}" else word for word in command)) == 2
    assert str(tmp_path / "pipe") in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_seeds_of_another_run_are_not_joined(files, ticket, trained, tmp_path, capsys):
    """They would be evaluated as seeds of this one."""
    before = (trained / "run.json").read_bytes()
    soft = [a for a in train_arguments(files, ticket) if a not in ("--ticket", ticket)]
    other = tmp_path / "other.safetensors"
    ls.Ticket.random(dict(ls.Ticket.load(ticket).shapes), k=100).save(other)
    changes = [
        (["--method", "soft-prompt", *soft], "holds seeds of a run with method 'LTP', but this one has 'SP'"),
        ([*train_arguments(files, ticket), "--epochs", 3], "was trained with epochs 2, not 3"),
        ([*train_arguments(files, ticket), "--ticket", other], "was trained on another ticket than --ticket"),
    ]
    for arguments, message in changes:
        assert run("train", *arguments, "--seeds", 1, 3, "--output", trained, "--resume") == 2
        error = capsys.readouterr().err
        assert message in error and "choose another --output" in error
    assert not (trained / "seed-3").exists() and (trained / "run.json").read_bytes() == before


def test_a_folder_in_which_no_seed_has_begun_is_free(tmp_path):
    """The lock of a seed that failed is left; while a process holds it, the folder is that process's."""
    facts = {"tokenizer": None, "method": "LTP", "task": "xnli", "shots": 4, "language": "en", "verbalizer": "en"}
    lock = tmp_path / "seed-1" / "train.lock"
    lock.parent.mkdir()
    lock.touch()
    first, second = (Run(model, **facts) for model in "ab")
    first.save(tmp_path)
    second.check_continues(tmp_path)
    with FileLock(lock), pytest.raises(CommandError, match="holds seeds of a run with model 'a', but this one has 'b'"):
        second.check_continues(tmp_path)
    lock.with_name("baked.safetensors").touch()
    with pytest.raises(CommandError, match="choose another --output"):
        second.check_continues(tmp_path)


@pytest.mark.parametrize("method", ["random-ticket", "soft-prompt", "prompt-only"])
def test_controls(files, ticket, tmp_path, method, capsys):
    arguments = list(train_arguments(files, ticket))
    if method != "random-ticket":
        at = arguments.index("--ticket")
        del arguments[at : at + 2]
    assert run("train", "--method", method, *arguments, "--seeds", 1, "--output", tmp_path / "run") == 0
    assert (tmp_path / "run" / "seed-1" / "baked.safetensors").is_file()


def test_a_seed_finds_nothing_of_the_one_before(files, ticket, tmp_path, capsys):
    """What a method attaches to the language model has to leave it; lengths end where the model's positions do."""
    arguments = list(train_arguments(files, ticket))
    for option in ("--ticket", "--max-length"):
        at = arguments.index(option)
        del arguments[at : at + 2]
    for folder, seeds in (("both", (1, 2)), ("alone", (2,))):
        assert run("train", "--method", "mad-x", *arguments, "--seeds", *seeds, "--output", tmp_path / folder) == 0
        assert "inputs have at most 64 tokens" in capsys.readouterr().out
    both, alone = (ls.SparseDelta.load(tmp_path / f / "seed-2" / "trained.safetensors") for f in ("both", "alone"))
    assert all(torch.equal(tensor, alone.dense[name]) for name, tensor in both.dense.items())


@pytest.mark.slow
def test_predict_and_the_exported_folder_agree(files, trained, tmp_path, capsys):
    """The exported folder needs transformers alone: its own script, without this library, gives the same scores."""
    pairs = toy_pairs(9, seed=3)
    long = " ".join(WORDS)  # 60 tokens, of which 40 less template and prompt are left
    for premise, hypothesis in ((long, long), (long, "word1"), ("word2", long), ("word1 <mask> word2", "</s> word3")):
        pairs.append(dataclasses.replace(pairs[0], premise=premise, hypothesis=hypothesis))
    (tmp_path / "pairs.tsv").write_text(
        "premise\thypothesis\n" + "".join(f"{p.premise}\t{p.hypothesis}\n" for p in pairs)
    )
    assert run("predict", trained, tmp_path / "pairs.tsv", "--output", tmp_path / "labels.tsv", "--quiet") == 0
    labels = [line.split("\t")[2] for line in (tmp_path / "labels.tsv").read_text().splitlines()[1:]]
    assert run("export", trained, "--output", tmp_path / "exported") == 0
    script = (
        "import json, sys; sys.modules['ltp_sparse'] = None; sys.path.insert(0, sys.argv[1]); import predict as p\n"
        "classify = p.load(sys.argv[1])\n"
        "for line in open(sys.argv[2]).read().splitlines()[1:]:\n"
        "    scores = classify(dict(zip(('text', 'text_pair'), line.split('\\t'))), top_k=None)\n"
        "    print(json.dumps({score['label']: score['score'] for score in scores}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "exported", tmp_path / "pairs.tsv"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    scores = [json.loads(line) for line in done.stdout.splitlines()]
    assert [max(score, key=score.get) for score in scores] == labels
    setup, _ = load_seed(Run.load(trained), trained, 1)
    batch = setup.collate(setup.encode(pairs))
    expected = setup.model(**{key: value for key, value in batch.items() if key != "labels"})["logits"].softmax(-1)
    torch.testing.assert_close(torch.tensor([[s[c] for c in CLASSES] for s in scores]), expected, atol=1e-5, rtol=1e-4)


def test_options_come_from_a_file_and_flags_win(files, tmp_path, capsys):
    config = tmp_path / "select.yaml"
    config.write_text(f"initial: {files / 'model'}\ntuned: {files / 'model'}\ndensity: 0.5\noutput: {tmp_path / 'a'}\n")
    with pytest.warns(UserWarning, match="only 0 of"):
        assert run("select", "--config", config, "--output", tmp_path / "b") == 0
    assert (tmp_path / "b").is_file() and not (tmp_path / "a").exists()
    config.write_text(f"ticket: {tmp_path / 'b'}\nby: [module, layer]\n")
    assert run("inspect", "--config", config) == 0
    config.write_text(f"ticket: {tmp_path / 'b'}\nby: module\n")  # one value, where the flag takes several
    assert run("inspect", "--config", config) == 0


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("select", "densty: 0.5", "unknown option 'densty'"),
        ("select", "density: 1.5", "density: must be in (0, 1], got 1.5"),
        ("select", "density: much", "density: could not convert string to float: 'much'"),
        ("select", "density: [0.1, 0.2]", "density takes one value, got [0.1, 0.2]"),
        ("select", "resume: maybe", "resume must be true or false, got 'maybe'"),
        ("train", "epochs: 3.5", "epochs: invalid literal for int() with base 10: '3.5'"),
        ("train", "seeds: [1, two]", "seeds: invalid literal for int()"),
        ("train", "method: LTP", "method must be one of ltp, "),
        ("train", "language: no", "language must be a string or a number, got False; put a string in quotes"),
        ("inspect", "by: [layer, rows]", "by must be one of layer, module, parameter, got 'rows'"),
        ("select", "a: [", "while parsing"),
        ("select", "- a", "expected options by name"),
    ],
)
def test_mistakes_in_a_file_name_the_option(command, line, message, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(line + "\n")
    assert run(command, "--config", config) == 2
    error = capsys.readouterr().err
    assert f"--config {config}" in error and message in error and error.count("\n") == 1


TEXT = ["select", "--model", "mini-xlmr", "--text", "t.txt", "--output", "o"]
PAIR = ["select", "--initial", "a", "--tuned", "b", "--output", "o"]
TRAIN = ["train", "--model", "mini-xlmr", "--output", "o"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selct"], "invalid choice: 'selct'"),
        (["select"], "--output is needed"),
        (
            ["select", "--density", "1.5"],
            "argument --density: must be in (0, 1], got 1.5; see ltp-sparse select --help",
        ),
        (["select", "--max-lines", "0"], "--max-lines: must be at least 1, got 0"),
        (["train", "--output", "x"], "--model is needed"),
        ([*TRAIN, "--method", "bitfit", "--encoder", "mlp"], "--encoder is for soft prompts, not for bitfit"),
        ([*TRAIN, "--method", "bitfit", "--match", "pool"], "--match is for random-ticket, not for bitfit"),
        ([*TRAIN, "--method", "spt"], "invalid choice: 'spt'"),
        (TRAIN, "--ticket is needed for ltp; make one with ltp-sparse select"),
        ([*TRAIN, "--method", "soft-prompt", "--language", "aym"], "'aym'; pass --verbalizer, one of ar, "),
        ([*TRAIN, "--method", "bitfit", "--task", "nusax"], "nusax: language must be one of ace, "),
        (["inspect"], "inspect: TICKET is needed"),
        (["inspect", "missing.safetensors"], "no such file"),
        (["evaluate", "."], "not a run of ltp-sparse train"),
        (["evaluate", ".", "--limit", "-1"], "--limit: must be at least 1, got -1"),
        (["predict", ".", "p.tsv", "--batch-size", "-1"], "--batch-size: must be at least 1, got -1"),
        (["predict", ".", "missing.tsv"], "not a run of ltp-sparse train"),
        (["select", "--model", "m", "--output", "o"], "either --text FILES or --hub-text"),
        ([*TEXT, "--intersect"], "--intersect needs a --segment"),
        ([*TEXT[:-1], "/proc/none/o"], "--output /proc/none/o cannot be written"),
        ([*TEXT[:-1], "."], "--output must be a file, but . is not"),
        ([*PAIR, "--segment", "middle"], "--segment is for tuning and not for a comparison"),
        ([*PAIR, "--text", "t.txt"], "--text is for tuning"),
        (
            ["memory", "--model", "./nothing"],
            "a Hub name ('owner/name'), got './nothing'",
        ),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_the_system_or_a_missing_package_says_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").touch()
    monkeypatch.setattr("ltp_sparse.Ticket.load", lambda path: (_ for _ in ()).throw(PermissionError(13, "No", "t")))
    assert main(["inspect", "t"]) == 2
    assert capsys.readouterr().err == "ltp-sparse: [Errno 13] No: 't'\n"
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["inspect", "t", "--config", "c"]) == 2
    assert capsys.readouterr().err == 'ltp-sparse: yaml is not installed; pip install "ltp-sparse[train]"\n'


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").touch()
    monkeypatch.setattr("ltp_sparse.Ticket.load", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["inspect", "t"]) == 130
    assert capsys.readouterr().err == "ltp-sparse: stopped\n"
    monkeypatch.setattr("ltp_sparse.cli.train._task_data", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*TRAIN, "--ticket", "t"]) == 130
    assert "run the same command with --resume to continue" in capsys.readouterr().err


def test_predictions_are_read_as_they_were_written(files, trained, tmp_path):
    """A .tsv has no quotes: those of a text are its own."""
    from ltp_sparse.tasks import read_pairs

    (tmp_path / "pairs.csv").write_text('premise,hypothesis\n"word1 ""word2""","word3\nword4\tword5"\n')
    assert run("predict", trained, tmp_path / "pairs.csv", "--output", tmp_path / "labels.tsv", "--quiet") == 0
    (pair,) = read_pairs(tmp_path / "labels.tsv")
    assert (pair.premise, pair.hypothesis) == ('word1 "word2"', "word3 word4 word5") and pair.label in CLASSES


def test_predictions_do_not_overwrite_a_column(files, trained, tmp_path, capsys):
    for name in ("label", "probabilities"):
        (tmp_path / "pairs.tsv").write_text(f"{name}\thypothesis\nword1\tword2\n")
        command = ("predict", trained, tmp_path / "pairs.tsv", "--text-column", name, "--pair-column", "hypothesis")
        assert run(*command, "--output", tmp_path / "out.jsonl", "--quiet") == 2
        assert f"the column '{name}' has the name of a column of the result" in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl").exists()


def test_an_export_does_not_overwrite_its_model(files, trained, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in (files / "model").iterdir()}
    assert run("export", trained, "--output", files / "model" / ".." / "model") == 2
    assert "is not empty; choose a new or empty folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (files / "model").iterdir()} == before
    assert run("export", trained, "--seed", 7, "--output", tmp_path) == 2
    assert "expected one of its seeds 1, 2, got 7" in capsys.readouterr().err


def test_memory_knows_the_model_of_the_package():
    from ltp_sparse.cli.memory import _config

    assert _config("mini-xlmr").model_type == "xlm-roberta"


@pytest.mark.slow
def test_quiet_shows_no_bar(files, trained, tmp_path):
    (tmp_path / "pairs.tsv").write_text("premise\thypothesis\nword1\tword2\n")
    script = f"""
from ltp_sparse.cli import main
assert main(["predict", {str(trained)!r}, {str(tmp_path / "pairs.tsv")!r}, "--quiet"]) == 0
assert main(["export", {str(trained)!r}, "--output", {str(tmp_path / "exported")!r}, "--quiet"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    told = [
        line for line in done.stderr.splitlines() if "kernels-community" not in line
    ]  # bitsandbytes, if it is there
    assert told == [] and done.stdout.splitlines()[1].startswith("word1\tword2\t")


def test_help_teaches_by_example(capsys):
    for command in ("select", "train", "evaluate", "predict", "export", "inspect", "demo"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert f"ltp-sparse {command}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.slow
def test_help_imports_no_transformers():
    script = "import sys; from ltp_sparse.cli import Parser; Parser(); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


def test_what_the_tables_say_of_methods_is_so():
    from dataclasses import fields

    from ltp_sparse.cli.tables import PROMPT_METHODS, TICKET_METHODS
    from ltp_sparse.methods import METHODS
    from ltp_sparse.prompting import WORDS
    from ltp_sparse.tasks.xnli import LANGUAGES

    of = {name: METHODS[name]() for name in METHODS}
    assert {name for name, method in of.items() if method.needs_ticket} == set(TICKET_METHODS)
    assert {name for name, method in of.items() if method.scores_words} == set(PROMPT_METHODS)
    with_prompts = {name for name, m in of.items() if {"n_prompt", "encoder"} <= {f.name for f in fields(m.settings)}}
    assert with_prompts == set(PROMPT_METHODS)
    assert set(WORDS) == set(LANGUAGES)


def test_method_names_are_those_of_the_methods():
    from ltp_sparse.cli.tables import MASKED_METHOD_NAMES, METHOD_NAMES
    from ltp_sparse.methods import METHODS

    assert tuple(METHODS) == METHOD_NAMES
    for_pairs = (name for name, kind in METHODS.items() if kind.backbone == "masked" and "pair" in kind.inputs)
    assert tuple(for_pairs) == MASKED_METHOD_NAMES
