"""MultiNLI, SMSA, NusaX-senti and SIB-200 in the layouts of their original files, from the Hub, and with mistakes."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections import Counter

import pytest

from ltp_sparse.tasks import TASKS, task
from ltp_sparse.tasks.sib200 import LABELS as TOPICS
from ltp_sparse.tasks.text import split_sentences


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)


def test_every_task_says_what_it_is():
    for name, of in TASKS.items():
        assert of.name == name and of.kind in ("pair", "text") and of.metric in ("accuracy", "macro_f1")
        assert len(set(of.labels)) == len(of.labels) >= 3 and of.languages
    with pytest.raises(ValueError, match="unknown task 'mnli'; expected one of xnli, "):
        task("mnli")
    with pytest.raises(ValueError, match="nusax: language must be one of ace, .*, got 'id'"):
        task("nusax").load("test", "id", data=".")


def test_multinli_leaves_out_pairs_without_agreement(tmp_path):
    rows = [
        {"sentence1": f"p{i}", "sentence2": "h", "gold_label": g} for i, g in enumerate(("neutral", "-", "entailment"))
    ]
    write(tmp_path / "multinli_1.0" / "multinli_1.0_train.jsonl.gz", "".join(json.dumps(r) + "\n" for r in rows))
    pairs = task("multinli").load("train", "en", data=tmp_path)
    assert [(p.premise, p.label) for p in pairs] == [("p0", "neutral"), ("p2", "entailment")]
    with pytest.raises(FileNotFoundError, match="multinli_1.0_dev_matched.jsonl"):
        task("multinli").load("dev", "en", data=tmp_path)
    with pytest.raises(ValueError, match="split must be train or dev, got 'test'"):
        task("multinli").load("test", "en", data=tmp_path)


def test_the_subset_of_multinli_is_shuffled_alike_in_every_language(tmp_path):
    for language in ("en", "sw"):
        rows = [{"premise": f"{language}{i}", "hypothesis": "h", "label": i // 400} for i in range(1200)]
        write(tmp_path / "mnli_9k" / language / "train.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    of = task("mnli-9k")
    train, dev = (of.load(split, "en", data=tmp_path) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (300, 900)
    assert min(Counter(p.label for p in train).values()) > 70  # the file is sorted by label
    swahili = of.load("dev", "sw", data=tmp_path)
    assert [p.premise[2:] for p in dev] == [p.premise[2:] for p in swahili]
    write(
        tmp_path / "mnli_9k" / "en" / "train.jsonl", json.dumps({"premise": "p", "hypothesis": "h", "label": 3}) + "\n"
    )
    with pytest.raises(ValueError, match=r"train.jsonl, row 1: expected one of .* in column label, got 3"):
        of.load("train", "en", data=tmp_path)
    with pytest.raises(ValueError, match="mnli-9k: this subset is not on the Hub"):
        of.load("train", "en")


def test_smsa_in_full_and_trimmed(tmp_path):
    write(tmp_path / "smsa" / "train_preprocess.tsv.gz", "bagus sekali\tpositive\nbiasa\tneutral\n")
    write(tmp_path / "smsa" / "trimmed" / "train.tsv", "text\tlabel\nbagus sekali\t2\nburuk\t0\n")
    full = task("smsa-full").load("train", "id", data=tmp_path)
    assert [(t.text, t.label, t.language) for t in full] == [
        ("bagus sekali", "positive", "id"),
        ("biasa", "neutral", "id"),
    ]
    assert [t.label for t in task("smsa").load("train", "id", data=tmp_path)] == ["positive", "negative"]
    write(tmp_path / "smsa" / "trimmed" / "train.tsv", "text\tlabel\nbagus\t3\n")
    with pytest.raises(ValueError, match=r"train.tsv, row 1: expected one of negative, neutral, positive .*, got '3'"):
        task("smsa").load("train", "id", data=tmp_path)
    with pytest.raises(ValueError, match="the trimmed set is not on the Hub"):
        task("smsa").load("train", "id")


def test_nusax_reads_quoted_line_breaks(tmp_path):
    write(
        tmp_path / "nusax_senti" / "buginese" / "test.csv",
        'id,text,label\n1,"dua\nbaris, ""ya""",positive\n2,satu,negative\n',
    )
    texts = task("nusax").load("test", "bug", data=tmp_path)
    assert [t.text for t in texts] == ['dua\nbaris, "ya"', "satu"]
    write(tmp_path / "nusax_senti" / "buginese" / "test.csv", "id,text,label\n1,  ,positive\n")
    with pytest.raises(ValueError, match=r"test.csv, row 1: no text in column text"):
        task("nusax").load("test", "bug", data=tmp_path)


def _sib(tmp_path, language, per_class, split="train"):
    rows, index = [], 0
    for label, count in zip(TOPICS, per_class, strict=True):
        for _ in range(count):
            rows.append(f'{index}\t{label}\t"{language} ""{index}"" {label}"')
            index += 1
    write(tmp_path / "sib200" / language / f"{split}.tsv.gz", "index_id\tcategory\ttext\n" + "\n".join(rows) + "\n")


def test_few_shot_draws_of_sentiment(tmp_path):
    for language in ("acehnese", "indonesian"):
        for split, count in (("train", 20), ("valid", 4)):
            rows = [
                f"{i},{language} {i},{label}" for i, label in enumerate(["negative", "neutral", "positive"] * count)
            ]
            write(tmp_path / "nusax_senti" / language / f"{split}.csv", "id,text,label\n" + "\n".join(rows) + "\n")
    of = task("nusax")
    drawn = {lang: of.load("train", lang, shots=5, data=tmp_path, seed=1) for lang in ("ace", "ind")}
    assert Counter(t.label for t in drawn["ace"]) == {"negative": 5, "neutral": 5, "positive": 5}
    assert [t.text.split()[1] for t in drawn["ace"]] == [t.text.split()[1] for t in drawn["ind"]]
    assert drawn["ace"] != of.load("train", "ace", shots=5, data=tmp_path, seed=2)
    assert len(of.load("dev", "ace", shots=5, data=tmp_path)) == 2 * 3
    assert len(of.load("dev", "ace", shots=20, data=tmp_path)) == 4 * 3  # as many as there are
    assert len(of.load("train", "ace", data=tmp_path)) == 60
    with pytest.raises(ValueError, match=r"nusax: shots must be in \[1, 20\], the smallest class of train, got 21"):
        of.load("train", "ace", shots=21, data=tmp_path)


def test_few_shot_draws_of_sib200(tmp_path):
    counts = (9, 8, 7, 6, 5, 5, 4)
    for language in ("eng_Latn", "swh_Latn"):
        _sib(tmp_path, language, counts)
        _sib(tmp_path, language, (3, 3, 3, 3, 3, 3, 2), "dev")
        _sib(tmp_path, language, counts, "test")
    of = task("sib200")
    assert len(of.load("train", "eng_Latn", data=tmp_path)) == sum(counts)
    assert of.load("train", "eng_Latn", data=tmp_path)[0].text == 'eng_Latn "0" science/technology'
    drawn = of.load("train", "eng_Latn", shots=4, data=tmp_path, seed=1)
    assert Counter(t.label for t in drawn) == dict.fromkeys(TOPICS, 4)
    assert drawn == of.load("train", "eng_Latn", shots=4, data=tmp_path, seed=1)
    assert drawn != of.load("train", "eng_Latn", shots=4, data=tmp_path, seed=2)
    swahili = of.load("train", "swh_Latn", shots=4, data=tmp_path, seed=1)
    assert [t.text.split()[1] for t in swahili] == [t.text.split()[1] for t in drawn]  # the same sentences
    for shots, per_class in ((1, 1), (4, 1), (5, 2), (8, 2)):  # a quarter, rounded up
        if shots <= 4:
            dev = of.load("dev", "eng_Latn", shots=shots, data=tmp_path, seed=1)
            assert Counter(t.label for t in dev) == dict.fromkeys(TOPICS, per_class)
    assert len(of.load("dev", "eng_Latn", shots=32, data=tmp_path)) == 2 * 7  # balanced, in full
    assert len(of.load("test", "eng_Latn", shots=4, data=tmp_path)) == sum(counts)
    with pytest.raises(ValueError, match=r"shots must be in \[1, 4\], the smallest class of train, got 5"):
        of.load("train", "eng_Latn", shots=5, data=tmp_path)
    _sib(tmp_path, "eng_Latn", counts)
    write(tmp_path / "sib200" / "eng_Latn" / "train.tsv.gz", "index_id\tcategory\ttext\n1\tnature\tx\n")
    with pytest.raises(ValueError, match=r"row 1: expected one of .* in column category, got 'nature'"):
        of.load("train", "eng_Latn", data=tmp_path)


class _HubData:
    """As much of a `datasets.Dataset` as is read."""

    def __init__(self, rows, features):
        self.rows, self.features, self.column_names = rows, features, list(rows[0])

    def __iter__(self):
        return iter(self.rows)


def test_texts_from_the_hub(monkeypatch):
    class ClassLabel:
        names = ("positive", "neutral", "negative")

    asked = []
    rows = {
        "indonlp/NusaX-senti": ([{"text": "a", "label": 2}], {"label": ClassLabel()}),
        "indonlp/indonlu": ([{"text": "b", "label": 0}], {"label": ClassLabel()}),
        "Davlan/sib200": ([{"text": "c", "category": "travel"}], {"category": None}),
    }

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return _HubData(*rows[name])

    module = types.SimpleNamespace(ClassLabel=ClassLabel, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert task("nusax").load("dev", "ace")[0].label == "negative"
    assert task("smsa-full").load("train", "id")[0].label == "positive"
    assert task("sib200").load("dev", "amh_Ethi")[0].label == "travel"  # any of the 205
    assert asked == [
        ("indonlp/NusaX-senti", "ace", "validation"),
        ("indonlp/indonlu", "smsa", "train"),
        ("Davlan/sib200", "amh_Ethi", "validation"),
    ]
    rows["Davlan/sib200"] = ([{"text": "c", "topic": "travel"}], {})
    with pytest.raises(ValueError, match="no column 'category', only"):
        task("sib200").load("dev", "amh_Ethi")


SIZES = [
    ("mnli-9k", "train", "vi", 8100, 2700), ("mnli-9k", "dev", "en", 900, 300),
    ("smsa", "train", "id", 10617, None), ("smsa", "dev", "id", 1251, None), ("smsa", "test", "id", 492, None),
    ("smsa-full", "train", "id", 11000, None), ("smsa-full", "test", "id", 500, None),
    ("nusax", "train", "bbc", 500, None), ("nusax", "dev", "nij", 100, None), ("nusax", "test", "bug", 400, None),
    ("sib200", "train", "tha_Thai", 701, None), ("sib200", "dev", "arb_Arab", 99, None),
    ("sib200", "test", "eng_Latn", 204, None), ("americasnli-first", "dev", "nah", 376, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "split", "language", "rows", "per_class"), SIZES)
def test_real_files(shared_data, name, split, language, rows, per_class):
    examples = task(name).load(split, language, data=shared_data)
    assert len(examples) == rows
    counts = Counter(example.label for example in examples)
    assert set(counts) == set(task(name).labels)
    if per_class:
        assert all(abs(count - per_class) < 0.1 * rows for count in counts.values())


def test_real_draws_of_sib200_are_parallel(shared_data):
    of = task("sib200")
    english, thai = (
        of.load("train", language, shots=8, data=shared_data, seed=3) for language in ("eng_Latn", "tha_Thai")
    )
    assert [t.label for t in english] == [t.label for t in thai] and len(english) == 56


@pytest.mark.slow
def test_the_generated_task_needs_no_files():
    from ltp_sparse.tasks.generated.languages import LANGUAGES

    of = task("generated")
    assert of.languages == tuple(LANGUAGES)
    train = of.load("train", "sw", shots=4, seed=1)
    assert Counter(p.label for p in train) == dict.fromkeys(of.labels, 4)
    assert [p.label for p in train] == [p.label for p in of.load("train", "en", shots=4, seed=1)]  # parallel
    assert train != of.load("train", "sw", shots=4, seed=2)
    test = of.load("test", "en", seed=1)
    assert test == of.load("test", "en", seed=2) and len(test) == 300
    assert not {p.hypothesis for p in train} & {p.hypothesis for p in of.load("test", "sw")}


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("Early life", []),
        ("He met Dr. Smith in the U.S. and left. Then J. R. R. Tolkien wrote it! Did he?",
         ["He met Dr. Smith in the U.S. and left.", "Then J. R. R. Tolkien wrote it!", "Did he?"]),
        ('He said "No." Then he left (at last.) Well.', ['He said "No."', "Then he left (at last.)", "Well."]),
        ("中国是一个国家。它很大！对吗？", ["中国是一个国家。", "它很大！", "对吗？"]),
        ("यह एक वाक्य है। दूसरा वाक्य है।", ["यह एक वाक्य है।", "दूसरा वाक्य है।"]),
        ("Version 2.5 is out. it works.", ["Version 2.5 is out. it works."]),
        ("  ", []),
    ],
)  # fmt: skip
def test_paragraphs_are_cut_into_sentences(paragraph, sentences):
    assert split_sentences(paragraph) == sentences


def test_a_long_line_without_an_end_is_no_heading():
    thai = "ภาษาไทยไม่มีเครื่องหมายจบประโยค แต่มีช่องว่าง และประโยคนี้ยาวพอสมควรจริงๆ นะครับ"
    assert split_sentences(thai) == [thai]
