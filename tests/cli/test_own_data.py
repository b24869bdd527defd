"""Labelled data of one's own: every format, trained on, evaluated per language and labelled by the command line."""

import json
import warnings

import pytest
import torch
from helpers.own_data import COLUMNS, LABELS, QUICK, WORDS_GIVEN, rows, run, write_tsv
from helpers.tiny_nli import tiny_language_model, tiny_tokenizer

import ltp_sparse as ls
from ltp_sparse.tasks.own import Columns, classes_of, read_own, split_dev, warn_of_gaps
from ltp_sparse.tasks.texts import Text


@pytest.mark.slow
def test_from_a_file_to_scores_per_language(own_files, own_run, capsys):
    """Columns, words and classes are remembered; a label 0 is a label; each language of the file has its score."""
    assert run("evaluate", own_run, "--quiet", "--plot", own_files / "languages.png") == 0
    printed = capsys.readouterr().out
    assert "quy" in printed and "aym" in printed and "accuracy in percent" in printed
    assert "| always the largest class |" in printed
    (row,) = [json.loads(line) for line in (own_run / "results.jsonl").read_text().splitlines()]
    assert set(row["scores"]) == {"quy", "aym"} and row["examples"] == {"quy": 12, "aym": 12}
    described = json.loads((own_run / "run.json").read_text())
    assert described["labels"] == list(LABELS) and described["words"]["0"] == ["word9"]

    assert run("predict", own_run, own_files / "test.tsv", "--quiet", "--output", own_files / "labels.jsonl") == 0
    labelled = [json.loads(line) for line in (own_files / "labels.jsonl").read_text().splitlines()]
    gold = [row["class"] for row in rows(24, seed=2)]
    hits = {"quy": [], "aym": []}
    for found, label in zip(labelled, gold, strict=True):
        assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert found["class"] == max(found["probabilities"], key=found["probabilities"].get)
        hits[found["lang"]].append(found["class"] == label)
    assert {name: sum(of) / len(of) for name, of in hits.items()} == row["scores"]  # two routes, one answer
    assert row["mean"] > 0.4  # of four classes


def test_labelled_files_are_read_back_with_the_same_columns(own_files, own_run, capsys):
    assert run("predict", own_run, own_files / "test.tsv", "--quiet", "--output", own_files / "labels.tsv") == 0
    header, *lines = (own_files / "labels.tsv").read_text().splitlines()
    assert header.split("\t") == ["says", "lang", "class", *(f"p({label})" for label in LABELS)]
    assert all(sum(map(float, line.split("\t")[3:])) == pytest.approx(1, abs=1e-5) for line in lines)
    assert run("evaluate", own_run, "--test", own_files / "labels.tsv", "--quiet") == 0  # its own labels
    assert json.loads((own_run / "results.jsonl").read_text().splitlines()[-1])["mean"] == 1.0


def test_texts_without_their_language_are_labelled_too(own_files, own_run, tmp_path, capsys):
    header, *lines = (own_files / "test.tsv").read_text().splitlines()
    at = header.split("\t").index("lang")
    kept = [[cell for i, cell in enumerate(line.split("\t")) if i != at] for line in (header, *lines)]
    (tmp_path / "bare.tsv").write_text("".join("\t".join(line) + "\n" for line in kept))
    assert run("predict", own_run, own_files / "test.tsv", "--quiet", "--output", tmp_path / "with.jsonl") == 0
    with pytest.warns(UserWarning, match="no column 'lang': the texts are labelled without it"):
        assert run("predict", own_run, tmp_path / "bare.tsv", "--quiet", "--output", tmp_path / "without.jsonl") == 0
    found = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("with", "without")]
    assert [row["probabilities"] for row in found[0]] == [row["probabilities"] for row in found[1]]
    assert run("predict", own_run, tmp_path / "bare.tsv", "--language-column", "lang", "--quiet") == 2
    before = (own_run / "results.jsonl").read_bytes()
    assert run("evaluate", own_run, "--test", own_files / "test.tsv", "--plot", tmp_path / "a.xyz") == 2
    assert "--plot must end in " in capsys.readouterr().err and (own_run / "results.jsonl").read_bytes() == before
    assert run("evaluate", own_run, "--test", own_files / "test.tsv", "--quiet", "--plot", tmp_path / "a.PNG") == 0
    assert (tmp_path / "a.PNG").read_bytes()[1:4] == b"PNG"


def test_a_run_resumes_only_with_the_same_data(own_files, own_run, capsys):
    data = ["--train", own_files / "train.tsv", "--dev", own_files / "dev.tsv", *COLUMNS, *WORDS_GIVEN, *QUICK]
    model = ["--model", own_files / "model", "--ticket", own_files / "ticket.safetensors"]
    assert run("train", *model, *data, "--output", own_run, "--resume") == 0
    assert run("train", *model, *data, "--metric", "macro_f1", "--output", own_run, "--resume") == 2
    assert "holds seeds of a run with metric 'accuracy', but this one has 'macro_f1'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["bitfit", "discrete-prompt"])
def test_pairs_of_any_classes_without_dev(own_files, method, tmp_path, capsys):
    """A part of every class becomes dev, always the same part, and is said."""
    found = [{**row, "class": "yes" if i % 2 else "no"} for i, row in enumerate(rows(40))]
    write_tsv(tmp_path / "pairs.tsv", found)
    columns = ["--text-column", "says", "--pair-column", "second", "--label-column", "class"]
    words = ["--words", "yes=right", "no=wrong,never"] if method == "discrete-prompt" else []
    arguments = [
        "--model",
        own_files / "model",
        "--method",
        method,
        "--train",
        tmp_path / "pairs.tsv",
        *columns,
        *words,
    ]
    assert run("train", *arguments, *columns, *words, *QUICK, "--language", "quy", "--output", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "dev: 4 of the examples" in printed and "36 training and 4 dev pairs (quy)" in printed
    assert f"next: ltp-sparse evaluate {tmp_path / 'run'} --test FILE" in printed
    assert run("evaluate", tmp_path / "run", "--quiet") == 2
    assert "pass a file to test on, --test FILE" in capsys.readouterr().err
    assert run("evaluate", tmp_path / "run", "--test", tmp_path / "pairs.tsv", "--quiet") == 0
    assert "| quy |" in capsys.readouterr().out


def write_parquet(path, found, class_label=False):
    from datasets import ClassLabel, Dataset

    data = Dataset.from_list(found)
    (data.cast_column("class", ClassLabel(names=sorted(LABELS))) if class_label else data).to_parquet(path)


def write(path, found):
    name = path.name
    if name.endswith("parquet"):
        write_parquet(path, found, class_label=name.startswith("named"))
    elif ".jsonl" in name:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    elif name.endswith("csv"):
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    else:
        write_tsv(path, found)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet", "named.parquet", "folder"])
def test_every_format_gives_the_same_examples(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found, columns = rows(12), Columns(text="says", label="class", language="lang")
    expected = [Text(row["says"], row["class"], row["lang"]) for row in found]
    if name == "folder":  # as `datasets` finds it on the Hub: a file per split
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", rows(3, seed=5))
        write(tmp_path / name / "test.jsonl", found)
        assert len(read_own(tmp_path / name, columns)) == 3
        assert read_own(f"{tmp_path / name}@test", columns) == expected
        return
    write(tmp_path / name, found)
    assert read_own(tmp_path / name, columns) == expected
    pairs = read_own(tmp_path / name, Columns(text="says", pair="second", label="class"), language="quy")
    assert [(p.premise, p.hypothesis, p.label, p.language) for p in pairs] == [
        (row["says"], row["second"], row["class"], "quy") for row in found
    ]
    assert {e.label for e in read_own(tmp_path / name, columns, labelled=False)} == {None}


def test_numbers_and_truth_values_are_labels(tmp_path):
    values = [0, 1, True, "0", 2.0]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "t", "label": v}) + "\n" for v in values))
    assert [e.label for e in read_own(tmp_path / "a.jsonl", Columns())] == ["0", "1", "true", "0", "2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, "expected a column 'label', got text"),
        ({"text": "t", "label": None}, "row 2: expected a label in column 'label', a string or an integer, got None"),
        ({"text": "t", "label": ""}, "got ''"),
        ({"text": "t", "label": 0.5}, "got 0.5"),
        ({"text": "t", "label": ["a"]}, r"got \['a'\]"),
        ({"text": 3, "label": "a"}, "row 2: no text in column 'text'; expected a text, got a value of type int"),
        ({"text": None, "label": "a"}, "no text in column 'text'; expected a text, got null"),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    good = {"text": "t", "label": "a"}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ls.FileFormatError, match=message):
        read_own(tmp_path / "a.jsonl", Columns())


def test_sources_that_are_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all PAR1")
    with pytest.raises(ls.FileFormatError, match="not a readable parquet file"):
        read_own(tmp_path / "a.parquet", Columns())
    (tmp_path / "a.tsv").write_text("text\tlabel\n")
    with pytest.raises(ls.FileFormatError, match="expected rows with the columns text, label, got none"):
        read_own(tmp_path / "a.tsv", Columns())
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match="expected a file that ends in .tsv, .csv, .jsonl, .parquet"):
        read_own(tmp_path / "a.xlsx", Columns())
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_own(tmp_path / "b.csv", Columns())
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_own("./nothing", Columns())


def test_quotes_around_cells_of_a_tsv_are_told(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"one ""two"""\ta\nthree\tb\n')
    with pytest.warns(UserWarning, match="1 of 2 texts begin and end with a double quote.*--quoted"):
        assert read_own(path, Columns())[0].text == '"one ""two"""'
    assert read_own(path, Columns(quoted=True))[0].text == 'one "two"'


def test_languages_that_nobody_named_are_told(tmp_path, recwarn):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\tlanguage\none\ta\tsw\ntwo\tb\tquy\nthree\tb\tsw\n")
    with pytest.warns(UserWarning, match=r"1 of 3 rows .*\(quy\).*count as 'sw'.*--language-column"):
        assert {example.language for example in read_own(path, Columns(), language="sw")} == {"sw"}
    assert [example.language for example in read_own(path, Columns(language="language"))] == ["sw", "quy", "sw"]
    read_own(path, Columns(), labelled=False)  # to predict, where a language changes nothing
    read_own(path, Columns(text="language"))
    assert not recwarn.list


def texts(*labels, text="t"):
    return [Text(text, label, "en") for label in labels]


def test_classes_and_their_words():
    assert classes_of(texts("b", "a", "b")) == ("a", "b")
    assert classes_of(texts("10", "9", "0")) == ("0", "9", "10")
    assert classes_of(texts("b", "a"), {"b": "w", "a": "v"}) == ("b", "a")
    with pytest.raises(ValueError, match="got none for 'c'; classes: a 1, b 2, c 1"):
        classes_of(texts("b", "a", "c", "b"), {"b": "w", "a": "v"})
    with pytest.raises(ValueError, match="got one for 'c'; classes: a 1, b 1"):
        classes_of(texts("b", "a"), {"b": "w", "a": "v", "c": "u"})
    with pytest.raises(ValueError, match="expected at least two classes, got a 2"):
        classes_of(texts("a", "a"))


def test_dev_takes_its_share_of_every_class():
    examples = texts(*"a" * 50, *"b" * 10, *"c" * 2, "d")
    train, dev = split_dev(examples, 0.2)
    assert {label: sum(e.label == label for e in dev) for label in "abcd"} == {"a": 10, "b": 2, "c": 1, "d": 0}
    assert len(train) + len(dev) == len(examples) and split_dev(examples, 0.2) == (train, dev)
    with pytest.raises(ValueError, match="expected a class with two examples"):
        split_dev(texts("a", "b"), 0.5)


def test_gaps_are_counted_in_one_warning():
    examples = [*texts("a", "a", "b"), *texts("b", "b", text="  ")]
    with pytest.warns(UserWarning) as told:
        warn_of_gaps(examples, ("a", "b", "c"), "dev")
    assert [str(w.message) for w in told] == [
        "dev: no example of c (a 2, b 3, c 0); 2 of 5 examples have a blank text (b 2), and are kept"
    ]


def test_training_tells_of_gaps_on_every_route(own_files):
    """The rule stands where all training passes: recipes and loops of one's own hear of it as the command line does."""
    from dataclasses import replace

    from ltp_sparse.methods import BitFit
    from ltp_sparse.training.evaluation import evaluate
    from ltp_sparse.training.method import train_method

    tokenizer = tiny_tokenizer()
    method = BitFit(settings=replace(BitFit().settings, epochs=1, max_length=16))
    examples = [*texts("a", "a", text="word1"), *texts("a", text=" ")]
    with pytest.warns(UserWarning, match=r"training examples: no example of b \(a 3, b 0\); 1 of 3 examples have a bl"):
        result = train_method(
            method,
            tiny_language_model(len(tokenizer)),
            tokenizer,
            examples,
            examples,
            labels=("a", "b"),
            progress=False,
        )
    with pytest.warns(UserWarning, match="evaluate en: no example of b"):
        evaluate(result, {"en": examples}, labels=("a", "b"), progress=False)


def test_words_of_two_classes_must_differ_as_tokens():
    from ltp_sparse.prompting import Verbalizer

    tokenizer = tiny_tokenizer()
    for words, message in (
        (
            {"a": "word1 surely", "b": "surely"},
            "'word1 surely' and 'surely' are the same token '\u2581surely'",
        ),
        (
            {"a": "word1", "b": "w\u00fcrde"},
            "the word 'w\u00fcrde' of class 'b' is not in the tokenizer, which splits it into \u2581 . <unk>",
        ),
        ({"a": "word1", "b": "\u00fc word2"}, "is not in the tokenizer"),
        ({"a": "word1", "b": ""}, "the word '' of class 'b' is not in the tokenizer, which splits it into nothing"),
    ):
        with pytest.raises(ValueError, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Verbalizer.from_words(tokenizer, words, ("a", "b"))


def test_text_for_a_ticket_comes_from_a_column(own_files, tmp_path, monkeypatch):
    from ltp_sparse.training import mlm

    seen = []
    monkeypatch.setattr(
        mlm, "tune_mlm", lambda model, tokenizer, texts, *_, **more: seen.append((texts, more)) or 1 / 0
    )
    arguments = [
        "--model",
        own_files / "model",
        "--text",
        own_files / "train.tsv",
        "--text-column",
        "says",
        "--max-lines",
        5,
    ]
    reports = ("--report-to", "all", "--run-dir", tmp_path / "run")
    assert run("select", *arguments, "--quiet", *reports, "--output", tmp_path / "t") == 1
    ((found, more),) = seen
    assert len(found) == 5 and set(found) <= {row["says"] for row in rows(48)} and more["report_to"] == "all"


def test_text_for_a_ticket_without_a_named_column(own_files, tmp_path, monkeypatch, capsys):
    """The column called text, or the only one; JSON lines with the key text and lists of lines as they always were."""
    from ltp_sparse.training import mlm

    seen = []
    monkeypatch.setattr(mlm, "tune_mlm", lambda model, tokenizer, texts, *_, **more: seen.append(texts) or 1 / 0)
    for name, content, texts in (
        ("a.tsv", "class\ttext\nx\tone\ny\ttwo\n", ["one", "two"]),
        ("b.csv", 'says\n"one, two"\nthree\n', ["one, two", "three"]),
        ("c.jsonl", '{"text": "one\\ntwo"}\n{"text": "three"}\n', ["one", "two", "three"]),
        ("d.tsv", "one\ntwo\n", ["one", "two"]),
        ("e.tsv", "text\none\n", ["one"]),
        ("F.TSV", "one\ntwo\n", ["one", "two"]),
    ):
        (tmp_path / name).write_text(content)
        arguments = ["--model", own_files / "model", "--text", tmp_path / name, "--quiet", "--output", tmp_path / "t"]
        assert run("select", *arguments) == 1
        assert seen.pop() == texts, name
        told = capsys.readouterr().out
        assert ("the column 'text' of" in told) == (name in ("a.tsv", "e.tsv")) and ("'says'" in told) == ("b" in name)
    arguments = ["--text", tmp_path / "a.tsv", tmp_path / "b.csv", "--output", tmp_path / "t"]
    assert run("select", "--model", own_files / "model", *arguments) == 2
    assert "the files of --text have different columns" in capsys.readouterr().err


def test_text_for_a_ticket_in_a_folder(own_files, tmp_path, monkeypatch, capsys):
    """Its tables are read as they would be one by one; without a column called text, the first one, which is told."""
    from ltp_sparse.training import mlm

    seen = []
    monkeypatch.setattr(mlm, "tune_mlm", lambda model, tokenizer, texts, *_, **more: seen.append(texts) or 1 / 0)
    for content, texts, told in (
        ("class\ttext\nx\tone\ny\ttwo\n", ["one", "two"], "text: the column 'text' of"),
        ("one\tx\ntwo\ty\n", ["one", "two"], "text: the first column of every .tsv in"),
        ("one\tone\ntwo\ty\n", ["one", "two"], "text: the first column of every .tsv in"),
    ):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / "a.tsv").write_text(content)
        arguments = [
            "--model",
            own_files / "model",
            "--text",
            tmp_path / "texts",
            "--quiet",
            "--output",
            tmp_path / "t",
        ]
        assert run("select", *arguments) == 1
        assert seen.pop() == texts and told in capsys.readouterr().out
    (tmp_path / "set").mkdir()  # as `datasets` finds it on the Hub
    write(tmp_path / "set" / "train.parquet", rows(3))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    named = ["--text", tmp_path / "set", "--text-column", "says", "--output", tmp_path / "t"]
    assert run("select", "--model", own_files / "model", *named) == 1
    assert seen.pop() == [row["says"] for row in rows(3)]
    (tmp_path / "texts" / "a.tsv").write_text("class\ttext\nx\tone\n")
    (tmp_path / "texts" / "b.txt").write_text("two\n")
    assert run("select", *arguments) == 2
    assert "the files of --text have different columns" in capsys.readouterr().err


def test_blanks_around_labels_and_languages_are_no_part_of_them(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,language\ngood,pos,en\nbad, neg, en\nnice,pos,en \n")
    found = read_own(tmp_path / "a.csv", Columns(language="language"))
    assert [(each.label, each.language) for each in found] == [("pos", "en"), ("neg", "en"), ("pos", "en")]


def test_probabilities_are_those_of_the_logits(own_files, own_run):
    from ltp_sparse.cli.runs import Run, load_seed
    from ltp_sparse.training.evaluation import class_logits, predict

    setup, _ = load_seed(Run.load(own_run), own_run, 1)
    examples = setup.encode(read_own(own_files / "test.tsv", Columns(text="says", label="class")))
    batch = {key: value for key, value in setup.collate(examples).items() if key != "labels"}
    logits = class_logits(setup.model, examples, setup.collate, batch_size=5)
    torch.testing.assert_close(logits, setup.model(**batch)["logits"].detach(), atol=1e-5, rtol=1e-4)
    assert predict(setup.model, examples, setup.collate, batch_size=5).tolist() == logits.argmax(-1).tolist()
