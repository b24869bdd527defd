"""Readers: one exception for the content of a file, bounds before memory is taken, a list that no reader escapes."""

from __future__ import annotations

import ast
import csv
import gzip
import html.parser
import json
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ltp_sparse as ls
from ltp_sparse.cli import main
from ltp_sparse.deltas.lt_sft import FILE, read_lt_sft
from ltp_sparse.models import Adapter
from ltp_sparse.recipes import load_recipe
from ltp_sparse.recipes.checks import check_cell
from ltp_sparse.tasks import read_hub_text, read_pairs, read_text
from ltp_sparse.tasks.files import read_jsonl, read_table
from ltp_sparse.tasks.text import PassedOver
from ltp_sparse.weights import files
from ltp_sparse.weights.reading import READERS, FileFormatError, parse_json, parse_yaml, read_json, read_yaml

PACKAGE = Path(ls.__file__).parent
TESTS = Path(__file__).parents[1]

# --- the list ---------------------------------------------------------------------------------------------------------

_READS = {
    "open", ".read_text", ".read_bytes", "safe_open", "load_file", "from_pretrained", "load_dataset", "fromfile",
    "memmap", "safe_load",
}  # fmt: skip
_ALLOWED = {  # functions that read what is no file of a stranger, or nothing at all
    "backends.choice.choices": "a table that comes with the package",
    "cli.__init__.main": "the null device",
    "cli.memory._config": "transformers reads a config file, and its errors become one of the command line",
    "cli.report.run": "the report that has just been written",
    "recipes.engines.submit": "the number of a job, written by an earlier driver",
    "report.pages._embedded": "the plots that have just been drawn",
    "sync.stores.read": "bytes, which the readers of a store check",
    "tasks.hub.load_hub": "datasets reads and checks them",
}


def _calls(function: ast.AST) -> set[str]:
    """Names of what a function calls to read, itself; files opened to be written do not count."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if name == "open" and any(set(mode) & set("wax") and len(mode) < 4 for mode in modes):
                continue
            if (
                _READS & {name, f".{name}" * isinstance(node.func, ast.Attribute)}
                or ast.unparse(node.func) == "torch.load"
            ):
                found.add(name)
    return found


def test_no_public_function_reads_files_that_is_not_listed():
    """Every function that opens a file is a listed reader, or a private helper of a module that has one."""
    import ltp_sparse.models.backbone  # noqa: F401  its readers list themselves when it is imported

    modules = {where.rsplit(".", 2 if where.split(".")[-2][:1].isupper() else 1)[0] for where in READERS.values()}
    strangers = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("ltp_sparse", *path.relative_to(PACKAGE).with_suffix("").parts))
        if "generated" in path.parts or path.name in ("export.py", "standalone.py"):  # write scripts that read
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not _calls(node):
                continue
            listed = any("reader(" in ast.unparse(decorator) for decorator in node.decorator_list)
            short = f"{module}.{node.name}".removeprefix("ltp_sparse.")
            if not listed and module not in modules and short not in _ALLOWED:
                strangers.append(f"{short}: {sorted(_calls(node))}")
    assert not strangers, "mark it with @reader, and add a case to tests/helpers/fuzz_readers.py"


@pytest.mark.slow
def test_every_reader_is_tried(tmp_path):
    from helpers import fuzz_readers

    assert {case.reader for case in fuzz_readers.cases(tmp_path)} == set(READERS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damaged_and_forged_files(tmp_path):
    """The thin version, in a process of its own: it forks, which a pool of threads does not survive."""
    command = [sys.executable, "-m", "helpers.fuzz_readers", "--files", "1500", "--seconds", "20"]  # no timing decides
    command += ["--output", str(tmp_path / "f")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    with (tmp_path / "f").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {outcome: sum(int(row[outcome]) for row in rows) for outcome in list(rows[0])[3:]}
    assert sum(counts.values()) >= 1400 and counts["refused"] > 750
    assert not any(counts[fault] for fault in ("other", "slow", "memory", "crash")), counts
    assert all(row["same"] == "1" for row in rows if row["damage"] == "none")


# --- JSON and YAML ----------------------------------------------------------------------------------------------------


def test_an_error_survives_pickling_and_names_file_and_place():
    error = pickle.loads(pickle.dumps(FileFormatError("a.json", "not JSON", "line 3")))
    assert (str(error), error.place, isinstance(error, ValueError)) == ("a.json, line 3: not JSON", "line 3", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 100 deep"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        ('{\n"a": 1,\n}', "line [23]: not JSON"),  # Python 3.13 names the line of the comma
        ('{"a": ' + "9" * 10_000 + "}", "not JSON"),
        ("[1]", "expected an object, a JSON object, got .1."),
        ('{"b": 1}', "it has no 'a'"),
        ("\0", "NUL"),
    ],
)
def test_json_that_is_none(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileFormatError, match=f"a.json.*{message}"):
        read_json(tmp_path / "a.json", "an object", ("a",))


def test_json_that_is_deep_but_not_too_deep():
    assert parse_json("[" * 90 + "]" * 90, "x") and parse_json('{"a": NaN}', "x")["a"] != 0


_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", "line 2: not YAML"),
        ("[" * 100_000, "line 1: YAML that is nested more than 100 deep"),
        ("- " * 20_000, "nested more than 100 deep"),
        (_LAUGHS, r"line \d: more than 100,000 values, aliases counted each time"),
        ("a: &a [*a]", "line 1: an alias of a value that contains it"),
        ("x: 1\na: 2\nx: 3", "line 3: the key 'x' occurs twice"),
        ("languages:\n  no: 1", "line 2: expected a string as a key, got 'no'; put it in quotes"),
        ("a: 2001-02-03", "a value of the type 'timestamp'"),
        ("a: !!python/object/apply:os.system [x]", "a value of the type"),
        ("a: !!int ''", "not YAML"),
        ("- 1", "expected a recipe, a mapping of names to values"),
    ],
)
def test_yaml_that_is_none(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(FileFormatError, match=f"a.yaml.*{message}"):
        read_yaml(tmp_path / "a.yaml", "a recipe")


def test_yaml_aliases_and_merges_are_read():
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, b: 2}", "x") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 2}}


# --- text, tables, JSON lines -----------------------------------------------------------------------------------------


def test_texts_are_texts(tmp_path):
    rows = [{"text": "Real."}, {"text": None}, {"text": ""}, {"text": "two\nlines"}, {"text": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(PassedOver, match="a.jsonl: 2 rows without a text"):
        assert read_text([path]) == ["Real.", "two", "lines"]
    for wrong in (["a"], 3.5, {"x": 1}, float("nan"), True, "\ud800", "a\0b"):
        path.write_text('{"text": "a"}\n' + json.dumps({"text": wrong}))
        with pytest.raises(FileFormatError, match="a.jsonl, row 2: .*'text'"):
            read_text([path])


def test_texts_of_a_file_and_of_a_data_set_are_the_same(tmp_path):
    rows = [{"text": "Real."}, {"text": None}, {"text": "two\nlines \u2028 here"}, {"text": " "}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(PassedOver):
        ours = read_text([tmp_path / "set" / "train.jsonl"])
    with pytest.warns(PassedOver):
        assert read_hub_text(str(tmp_path / "set")) == ours == ["Real.", "two", "lines \u2028 here"]


HEAD = "premise\thypothesis\tlabel\n"


@pytest.mark.parametrize(
    ("name", "content", "pairs"),
    [
        ("a.tsv", HEAD + "a\rx\tb\tneutral\n", [("a\rx", "b", "neutral")]),
        ("a.tsv", HEAD + "x" * 140_000 + "\tb\t\n", [("x" * 140_000, "b", None)]),
        ("a.tsv", HEAD + "a\tb\tneutral\n\nc\td\tneutral\n\n", [("a", "b", "neutral"), ("c", "d", "neutral")]),
        ("a.jsonl", '{"premise": "a", "hypothesis": "b"}\n\n{"premise": "c", "hypothesis": "d"}\n\n',
         [("a", "b", None), ("c", "d", None)]),
        ("a.csv", 'premise,hypothesis\n"%s","c ""d""\n e"\n' % ("x" * 140_000), [("x" * 140_000, 'c "d"\n e', None)]),
        ("a.csv", "premise,hypothesis\na\rb,c\n", [("a\rb", "c", None)]),
        ("a.csv", "premise,hypothesis\n\na,b\n", [("a", "b", None)]),
    ],
)  # fmt: skip
def test_tables_that_are_read(tmp_path, name, content, pairs):
    (tmp_path / name).write_bytes(content.encode())
    assert [(p.premise, p.hypothesis, p.label) for p in read_pairs(tmp_path / name)] == pairs


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"premise\thypothesis\tpremise\na\tb\tc\n", "header: the column 'premise' occurs twice"),
        ("a.csv", b'premise,hypothesis\n"a,b\nc,d\n', "row 1: a quote that is opened here is not closed"),
        ("a.csv", b'premise,hypothesis\n"a"x,b\n', "row 1: text after the closing quote"),
        ("a.tsv", HEAD.encode() + b"a\0\tb\tneutral\n", "line 2: a NUL character"),
        ("a.tsv", (HEAD + "a\tb\tneutral\n").encode("utf-16"), "line 1: this is UTF-16"),
        ("a.jsonl", b'{"premise": "a", "hypothesis": "b", "label": 0}', "row 1: expected one of .*got 0"),
        ("a.jsonl", b'{"premise": "a", "hypothesis": "b", "label": false}', "row 1: expected one of .*got False"),
        ("a.jsonl", b'{"premise": "a", "hypothesis": "b", "label": []}', r"row 1: expected one of .*got \[\]"),
        ("a.jsonl", b'{"premise": "a", "hypothesis": null}', "row 1: no text in column 'hypothesis'.*got null"),
        ("a.jsonl", b'{"premise": "a", "premise": "b", "hypothesis": "c"}', "row 1: .*the key 'premise' occurs twice"),
        ("a.jsonl", b"[" * 100_000, "row 1: JSON that is nested more than 100 deep"),
        ("a.tsv.gz", HEAD.encode(), "not a complete .gz file"),
        ("a.tsv.gz", gzip.compress(HEAD.encode() * 50, mtime=0)[:-12], "not a complete .gz file"),
        ("a.tsv.gz", gzip.compress(bytes(1 << 27), mtime=0), "unpacks to more than 50 times its size"),
    ],
)
def test_tables_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=f"{name}.*{message}"):
        read_pairs(tmp_path / name)


def test_quoted_tables_are_what_the_csv_module_makes_of_them(tmp_path):
    rows = [["a", 'say "hi"', "x,y"], ["", "line\nbreak", '"'], ["ü\u2028", "tab\t", "''"], [" s ", "0", '""']]
    for comma in (True, False):
        with (tmp_path / "t.csv").open("w", newline="") as file:
            csv.writer(file, delimiter="," if comma else "\t", lineterminator="\n").writerows([["k", "l", "m"], *rows])
        assert [list(r.values()) for _, r in read_table(tmp_path / "t.csv", quoted=True, comma=comma)] == rows


def test_blank_texts_of_pairs_are_told(tmp_path):
    (tmp_path / "a.tsv").write_text(HEAD + "\tb\tneutral\na\t \tneutral\na\tb\tneutral\n")
    with pytest.warns(UserWarning, match="2 of 3 pairs have a blank premise or hypothesis"):
        assert len(read_pairs(tmp_path / "a.tsv")) == 3


@pytest.mark.parametrize("name", ["cr.tsv", "cut.tsv.gz", "deep.jsonl", "zero.tsv", "twice.tsv"])
def test_commands_tell_a_damaged_file_in_one_line(tmp_path, capsys, name):
    content = {
        "cr.tsv": b"premise\na\rx\n", "cut.tsv.gz": gzip.compress(HEAD.encode())[:-9], "deep.jsonl": b"[" * 100_000,
        "zero.tsv": b"", "twice.tsv": b"premise\tpremise\na\tb\n",
    }[name]  # fmt: skip
    (tmp_path / name).write_bytes(content)
    columns = ["--text-column", "premise", "--label-column", "label", "--words", "yes=a", "no=b"]
    options = ["--model", "mini-xlmr", "--method", "prompt-only", *columns, "--output", str(tmp_path / "run")]
    assert main(["train", "--train", str(tmp_path / name), *options]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and name in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.safetensors", ["inspect", "{file}"]),
        ("b.safetensors", ["inspect", "{good}", "--compare", "{file}"]),
        ("c.yaml", ["run", "{file}", "--dry-run"]),
        ("d.yaml", ["report", "{file}", "{folder}"]),
        ("e.yaml", ["inspect", "{good}", "--config", "{file}"]),
        (
            "f.safetensors",
            ["train", "--model", "mini-xlmr", "--ticket", "{file}", "--task", "generated", "--output", "{folder}/out"],
        ),
        ("run.json", ["export", "{folder}", "--output", "{folder}/out"]),
        ("run.json", ["evaluate", "{folder}"]),
        ("g.jsonl", ["select", "--model", "mini-xlmr", "--text", "{file}", "--output", "{folder}/t.safetensors"]),
        ("h.json", ["cache", "--cache", "{folder}"]),
    ],
)
def test_commands_end_with_one_line_and_status_2(tmp_path, capsys, name, arguments):
    ls.Ticket.full({"w": [4]}).save(tmp_path / "good")
    (tmp_path / name).write_bytes(b"{[\0" * 50)
    (tmp_path / "h.safetensors").touch()
    arguments = [a.format(file=tmp_path / name, good=tmp_path / "good", folder=tmp_path) for a in arguments]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and name in told and "Traceback" not in told


# --- tickets, deltas, adapters ----------------------------------------------------------------------------------------


def forged(path: Path, **changes) -> Path:
    facts = {"parameters": {}, "fingerprint": {}, "metadata": {}, "k": 0, "n": 0, **changes}
    files.save(path, "ticket", {}, facts)
    return path


def test_tickets_take_no_more_than_they_have(tmp_path):
    """A claim is bounded over all parameters, before memory is taken for it."""
    full = {"shape": [2**40], "encoding": "full", "k": 2**40}
    many = forged(tmp_path / "a", parameters={f"w{i}": full for i in range(16)}, k=2**44, n=2**44)
    with pytest.raises(FileFormatError, match="at most 1,099,511,627,776 entries in all"):
        ls.Ticket.load(many)
    none = {"shape": [2**36], "encoding": "list16", "k": 0}
    with pytest.raises(FileFormatError, match="entries in all"):
        ls.Ticket.load(forged(tmp_path / "b", parameters={f"w{i}": none for i in range(64)}, n=2**42))


def test_tickets_that_contradict_themselves(tmp_path):
    one = {"w": {"shape": [4], "encoding": "full", "k": 4}}
    ls.Ticket.load(forged(tmp_path / "a", parameters=one, k=4, n=4))
    for wrong in ({"k": 3, "n": 4}, {"k": 4, "n": 5}, {"k": 4, "n": 4, "fingerprint": {"v": "x"}},
                  {"k": 4, "n": 4, "fingerprint": {"w": 3}}):  # fmt: skip
        with pytest.raises(FileFormatError, match="its content is not that of a ticket"):
            ls.Ticket.load(forged(tmp_path / "a", **{"parameters": one, **wrong}))


def test_metadata_that_json_cannot_hold_is_named_at_once():
    shapes = {"w": [4]}
    sets = ls.Ticket.full(shapes).sets
    with pytest.raises(TypeError, match=r"Ticket: metadata\['threshold'\] must be JSON.*Tensor"):
        ls.Ticket(sets, shapes, {"threshold": torch.ones(1)})
    with pytest.raises(TypeError, match=r"SparseDelta: metadata\['path'\]"):
        ls.SparseDelta(ls.Ticket.full(shapes), {"w": torch.ones(4)}, metadata={"path": Path("x")})
    with pytest.raises(TypeError, match=r"Adapter: metadata\['x'\]"):
        Adapter(4, 1, 2, metadata={"x": {1, 2}})


def test_adapters_take_no_more_than_they_have(tmp_path):
    adapter = Adapter(32, 2, 4, metadata={"language": "en"})
    adapter.save(tmp_path / "good")
    state = torch.random.get_rng_state()
    again = Adapter.load(tmp_path / "good")
    assert torch.equal(state, torch.random.get_rng_state()), "loading draws no numbers"
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
    assert all(p.requires_grad for p in again.parameters())
    for sizes in ({"hidden": 10**6, "layers": 2}, {"hidden": 32, "layers": 10**9}):
        facts = {**sizes, "reduction": 4, "invertible": False, "metadata": {}}
        files.save(tmp_path / "bad", "adapter", adapter.state_dict(), facts)
        with pytest.raises(FileFormatError, match="not that of an adapter"):
            Adapter.load(tmp_path / "bad")


# --- LT-SFT -----------------------------------------------------------------------------------------------------------


def written_by_lt_sft(tensor: torch.Tensor, base: torch.Tensor) -> dict:
    """A difference in the layout of its own writer: a list of steps whose first item is a number of numpy."""
    moved = (tensor - base).permute(*reversed(range(tensor.dim()))).reshape(-1)
    positions = moved.nonzero().view(-1).numpy()
    steps = [] if not len(positions) else [positions[0], *(positions[1:] - positions[:-1]).tolist()]
    return {"size": tensor.size(), "index_steps": steps, "values": moved[torch.from_numpy(positions)]}


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 7)


@pytest.mark.parametrize(
    "changed",
    [
        lambda d: d,
        lambda d: {**d, "index_steps": [int(s) for s in d["index_steps"]]},
        lambda d: {**d, "index_steps": np.array(d["index_steps"])},
        lambda d: {**d, "index_steps": np.array(d["index_steps"], dtype=np.int32)},
        lambda d: {**d, "index_steps": torch.tensor([int(s) for s in d["index_steps"]], dtype=torch.int32)},
        lambda d: {**d, "values": d["values"].tolist()},
        lambda d: {**d, "values": d["values"].numpy()},
        lambda d: {**d, "values": torch.nn.Parameter(d["values"])},
        lambda d: {**d, "size": list(d["size"])},
    ],
    ids=["list", "ints", "int64", "int32", "tensor", "list-values", "array-values", "parameter", "size"],
)
def test_all_that_lt_sft_writes_is_read(tmp_path, linear, changed):
    base = linear.weight.detach().clone()
    tuned = torch.where(torch.rand(7, 5) < 0.4, base + torch.randn(7, 5), base)
    torch.save({"diffs": {"weight": changed(written_by_lt_sft(tuned, base))}, "abs": {}}, tmp_path / FILE)
    delta = read_lt_sft(tmp_path, linear)
    delta.apply(linear)
    torch.testing.assert_close(linear.weight.detach(), tuned, atol=1e-6, rtol=0)
    assert torch.equal(linear.weight.detach() == base, tuned == base)


def test_names_of_older_numpy_are_known(tmp_path, linear):
    import zipfile

    diff = written_by_lt_sft(linear.weight.detach() + 1, linear.weight.detach())
    torch.save({"diffs": {"weight": {**diff, "values": diff["values"].numpy()}}}, tmp_path / "new")
    with zipfile.ZipFile(tmp_path / "new") as new, zipfile.ZipFile(tmp_path / FILE, "w") as old:
        for info in new.infolist():
            old.writestr(info.filename, new.read(info).replace(b"cnumpy._core.", b"cnumpy.core."))
    assert b"numpy.core.multiarray" in (tmp_path / FILE).read_bytes()
    assert read_lt_sft(tmp_path, linear).ticket.k == 35


def test_whole_tensors_half_values_and_empty_differences(tmp_path, linear):
    base = linear.weight.detach()
    diff = written_by_lt_sft(base + 0.5, base)
    torch.save({"diffs": {"weight": {**diff, "values": diff["values"].half()}}}, tmp_path / FILE)
    assert torch.equal(read_lt_sft(tmp_path, linear).values["weight"], (base + 0.5).reshape(-1))
    head = torch.nn.Parameter(torch.arange(3.0))
    torch.save({"abs": {"bias": torch.ones(7), "lm_head.bias": head}}, tmp_path / FILE)
    delta = read_lt_sft(tmp_path, linear)
    assert delta.ticket.k == 0 and torch.equal(delta.dense["lm_head.bias"], head) and set(delta.dense) > {"bias"}
    torch.save({"diffs": {"weight": written_by_lt_sft(base, base)}, "abs": {}}, tmp_path / FILE)
    assert read_lt_sft(tmp_path, linear).ticket.k == 0


def test_a_tied_parameter_is_known_by_its_other_name(tmp_path):
    from helpers.tiny_nli import tiny_language_model

    model = tiny_language_model(40, decoupled=False)
    base = model.get_input_embeddings().weight.detach()
    diff = written_by_lt_sft(base + 1, base)
    torch.save({"diffs": {"lm_head.decoder.weight": diff}}, tmp_path / FILE)
    assert list(read_lt_sft(tmp_path, model).values) == ["roberta.embeddings.word_embeddings.weight"]
    both = {"lm_head.decoder.weight": diff, "roberta.embeddings.word_embeddings.weight": diff}
    torch.save({"diffs": both}, tmp_path / FILE)
    with pytest.raises(FileFormatError, match="a second name of 'roberta.embeddings"):
        read_lt_sft(tmp_path, model)


def test_lt_sft_files_that_make_no_sense(tmp_path, linear):
    good = written_by_lt_sft(linear.weight.detach() + 1, linear.weight.detach())
    wide = torch.zeros(1).expand(2**36)
    for wrong, message in (
        ({**good, "index_steps": [1.5] * 35}, "expected a list of numbers"),
        ({**good, "index_steps": [True] * 35}, "expected a list of numbers"),
        ({**good, "index_steps": [2**70] * 35}, "a number out of range"),
        ({**good, "index_steps": [2**62] * 35}, "indices must ascend"),
        ({**good, "values": wide}, "more entries than the file"),
        ({**good, "values": "x"}, "expected a list of numbers or a tensor, got str"),
        ({**good, "size": [2**40, 2**40]}, "cannot have the shape"),
        ({**good, "size": None}, "expected a list of numbers"),
    ):
        torch.save({"diffs": {"weight": wrong}}, tmp_path / FILE)
        with pytest.raises(FileFormatError, match=f"'weight': .*{message}"):
            read_lt_sft(tmp_path, linear)
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(FileFormatError, match="not a readable file"):
        read_lt_sft(tmp_path, linear)


def test_a_flipped_bit_of_the_payload_is_found(tmp_path, linear):
    torch.save({"diffs": {}, "abs": {"bias": torch.ones(7)}}, tmp_path / FILE)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[content.index(torch.ones(7).numpy().tobytes()) + 2] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(FileFormatError, match="the checksum does not match"):
        read_lt_sft(tmp_path, linear)


# --- recipes ----------------------------------------------------------------------------------------------------------

CELL = "{method: soft-prompt, train: {task: generated, language: en}, test: {task: generated}}"


def cell(old: str, new: str) -> str:
    return f"cells: [{CELL.replace(old, new)}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cells: [ltp, spt]", "cells: expected a list of mappings"),
        ("cells: {label: x}", "cells: expected a list of mappings"),
        (f"by: label\ncells: [{CELL}]", "by: expected a list of texts"),
        (f"grid: [1, 2]\ncells: [{CELL}]", "grid: expected names with lists"),
        (f"grid: {{shots: 3}}\ncells: [{CELL}]", "grid: expected names with lists"),
        (f"chance: high\ncells: [{CELL}]", "chance: expected a number"),
        ("cells: [{method: ltp, shots: many}]", "cell 1, shots: expected a whole number"),
        ("cells: [{method: ltp, shots: true}]", "cell 1, shots: expected a whole number"),
        ("cells: [{method: ltp, train: xnli}]", "cell 1, train: expected task, language, stand_in, limit with values"),
        ("cells: [{method: ltp, train: {tasks: xnli}}]", "cell 1, train: unknown key 'tasks', closest: 'task'"),
        ("cells: [{method: ltp, ticket: {density: 1.5}}]", "ticket, density: expected a number in"),
        ("cells: [{method: ltp, ticket: {density: [0.1]}}]", "ticket, density: expected a number in"),
        ("cells: [{method: ltp}]", "train.task: no task; known: xnli, "),
        (cell("soft-prompt", "soft"), "method: unknown method 'soft'; known: ltp, "),
        (cell("task: generated, l", "task: snli, l"), "unknown task 'snli'; known: xnli, "),
        (cell("test: {task: generated", "test: {task: foo"), "test.task: unknown task 'foo'"),
        ("cells:\n  - {a: 1\n", "line 3: not YAML"),
        ("[" * 5000, "nested more than 100 deep"),
    ],
)
def test_recipes_that_are_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(FileFormatError, match=f"r.yaml.*{message}"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_recipes_of_too_many_cells(tmp_path):
    many = str(list(range(1, 1001)))
    (tmp_path / "r.yaml").write_text(f"grid: {{shots: {many}, seed: {many}, train.limit: {many}}}\ncells: [{CELL}]")
    start = time.process_time()
    with pytest.raises(FileFormatError, match="more than 100,000 cells; make the grid smaller"):
        load_recipe(str(tmp_path / "r.yaml"))
    assert time.process_time() - start < 5
    (tmp_path / "r.yaml").write_text(f"cells: [{CELL}]")
    with pytest.raises(FileFormatError, match="more than 100,000 cells"):
        load_recipe(str(tmp_path / "r.yaml"), [("shots", list(range(1, 1001))), ("seed", list(range(1000)))])


def test_settings_are_checked_before_any_work(tmp_path):
    for extra, message in (
        ("settings: {learning_rate: 1e-3}", "learning_rate must be a number, got '1e-3' .YAML takes"),
        ("ticket: {mlm: {epoch: 1}}", "ticket, mlm: unknown 'epoch', closest: 'epochs'"),
        ("ticket: {mlm: {epochs: two}}", "ticket, mlm: epochs must be a number"),
    ):
        (tmp_path / "r.yaml").write_text(f"cells: [{CELL[:-1]}, {extra}}}]")
        (one,) = load_recipe(str(tmp_path / "r.yaml")).cells
        with pytest.raises(ValueError, match=message):
            check_cell(one)


def test_plugins_run_only_if_allowed_and_only_beside_the_recipe(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    outside = tmp_path / "outside.py"
    outside.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "link.py").symlink_to(outside)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    recipe = folder / "r.yaml"
    for plugin in ("../outside.py", str(outside), "link.py", "own.txt", "."):
        recipe.write_text(f"plugins: [{plugin}]\ncells: [{CELL}]")
        with pytest.raises(FileFormatError, match="plugins: expected a .py file in the recipe's folder"):
            load_recipe(str(recipe), allow_plugins=True)
    recipe.write_text(f"plugins: [own.py]\ncells: [{CELL}]")
    for command in (["run", recipe, "--dry-run"], ["report", recipe, tmp_path], ["run", recipe, "--output", tmp_path]):
        assert main([*map(str, command)]) == 2
        assert "it wants to run the Python file 'own.py'; read that file" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert len(load_recipe(str(recipe), allow_plugins=True).cells) == 1
    assert (tmp_path / "ran").exists()


# --- reports ----------------------------------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script> | a\n# b **c** [d](e) =1+1 & % $ # _ { } ~ ^ \\"


OF_REPORTS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "img"),
    *("table", "thead", "tbody", "tr", "th", "td", "strong"),
}


class Seen(html.parser.HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.texts = set(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_text_comes_through_a_report_as_it_is(seed):
    """As a heading, a paragraph and a cell: no text makes a tag, and none loses a character."""
    from ltp_sparse.report.escaping import Sheet, for_markdown, plain
    from ltp_sparse.report.pages import _html

    chance, nasty = random.Random(seed), "ab12 \\*_{}[]()#+-.!|<>&;:/~=$%\"'^@?\t\n\u00fc"
    for _ in range(300):
        text = plain("".join(chance.choices(nasty, k=chance.randrange(1, 24)))) or "x"
        page = (
            f"# {for_markdown(text)}\n\n{for_markdown(text)}\n\n"
            + Sheet([["head one", "head two"], [text, text]], [False] * 2).markdown()
        )
        seen = Seen()
        seen.feed(_html(text, page))
        assert seen.tags <= OF_REPORTS and not seen.addresses, text
        assert [found for found in seen.texts if found.strip()].count(text) == 5, (text, seen.texts)
        seen = Seen()  # code spans stay what they are, for the notes of recipes
        seen.feed(_html(text, for_markdown(f"`{text}` {text}`")))
        assert seen.tags <= {*OF_REPORTS, "code"} and not seen.addresses, text


@pytest.mark.slow
def test_what_reports_print_is_escaped(tmp_path):
    from ltp_sparse.recipes.recipe import Cell, Recipe
    from ltp_sparse.report.pages import write_report

    labels = [EVIL, "=cmd()", "+1", "-1", "@x", "\tx", "_hidden", "$x$y$"]
    rows = [
        {"recipe": "r", "label": label, "seed": seed, "scores": {"en": 0.5 + seed / 10, "<b>": 0.4}, "mean": 0.5,
         "metric": "accuracy", "model": EVIL, "seconds": 1, "notes": [EVIL], "k": 0, "language_active": {}, "shots": 1}
        for label in labels for seed in (1, 2)
    ]  # fmt: skip
    recipe = Recipe(
        "r", EVIL, (Cell({"label": "x"}),), by=("label", "shots"), compare=("+1",), chance=0.3,
        plots=("languages", "labels", "shots"), notes=EVIL,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's of labels that it leaves out
        write_report(recipe, rows, tmp_path)

    page = (tmp_path / "report.md").read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page
    assert not any(line.startswith("# b") for line in page.splitlines())
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [2 + len(labels), 2 + len(labels) - 1, 2 + len(labels)]
    for table in tables:  # no label makes a column or a line
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1

    seen = Seen()
    seen.feed((tmp_path / "report.html").read_text())
    assert {"title", "h1", "p", "table", "td", "img"} <= seen.tags <= OF_REPORTS
    assert all(address.startswith("data:image/png;base64,") for address in seen.addresses) and seen.addresses
    for text in (EVIL, *labels):
        assert " ".join(text.split()) in seen.texts

    with (tmp_path / "table.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r")]
    assert "'=cmd()" in cells and "'-1" in cells

    tex = (tmp_path / "table.tex").read_text()
    assert r"\textless" not in tex and r"\& \% \$ \# \_ \{ \} \textasciitilde{} \textasciicircum{}" in tex
    assert r"\textbackslash{}" in tex and "_hidden" not in tex.replace(r"\_hidden", "")


def test_labels_of_plots_are_no_formulas(tmp_path):
    from ltp_sparse.report.plots import plot_accuracy

    plot_accuracy({"a $x_{$ b": {"$\\frac$": 0.5}}, tmp_path / "a.png", title="$\\nope$")
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(FileFormatError, match="row 1"):
        (tmp_path / "x.jsonl").write_text("3")
        list(read_jsonl(tmp_path / "x.jsonl"))
