"""Readers of the tasks: original files, Hub layout, one's own files, and what they say of bad ones."""

import gzip
import json

import pytest

from ltp_sparse.tasks import LABELS, languages, load_pairs, read_hub_text, read_pairs, read_text
from ltp_sparse.tasks.xnli import FaultyRows

TEST_SIZES = {"nah": 738, "oto": 748}
REVISED_DEV_SIZES = {"cni": 658, "nah": 585, "oto": 222}
FIRST_DEV_SIZES = {"cni": 658, "nah": 376, "oto": 222}


def few_shot_folder(tmp_path, language="en", shots=1, split="train", **changes):
    """The files of one K-shot sample, in the layout and spelling of the original repository."""
    folder = tmp_path / split / ("en" if language == "en" else "rest")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"lang": language, "sentence1": f"p {label} {i}", "sentence2": f"h {label} {i}", "gold": label, "file_idx": i}
        for i in range(shots)
        for label in LABELS
    ]
    rows[0] |= changes
    name = f"{split}_split,{shots}.jsonl" if language == "en" else f"{split}_split,{language},{shots}.jsonl"
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_few_shot_reads_the_original_layout(tmp_path):
    pairs = load_pairs("xnli-fewshot", "train", "en", shots=2, data=few_shot_folder(tmp_path, shots=2))
    assert [pair.label for pair in pairs] == [*LABELS, *LABELS]
    assert pairs[0].premise == "p entailment 0"
    assert {pair.language for pair in pairs} == {"en"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold": "yes"}, r"row 1: expected one of entailment, neutral, contradiction in column label, got 'yes'"),
        ({"lang": "de"}, r"row 1: expected language 'en' in column lang, got 'de'"),
        ({"gold": "neutral"}, r"expected 1 pairs of each label, got .*'neutral': 2"),
    ],
    ids=["label", "language", "balance"],
)
def test_few_shot_names_the_bad_row(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_pairs("xnli-fewshot", "train", "en", shots=1, data=few_shot_folder(tmp_path, **changes))


def test_faulty_arabic_rows_are_reported_and_kept(tmp_path):
    folder = few_shot_folder(tmp_path, language="ar", file_idx=390_000)
    with pytest.warns(FaultyRows, match="1 of 3 Arabic rows"):
        assert len(load_pairs("xnli-fewshot", "train", "ar", shots=1, data=folder)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("xnly", "test", "en"), "unknown task 'xnly'"),
        (("xnli", "test", "xx"), "language must be one of ar, bg"),
        (("xnli", "train", "en"), "train on xnli-fewshot"),
        (("xnli-fewshot", "train", "en"), "shots must be one of 1, 2, 4"),
        (("americasnli", "train", "aym"), "train or dev with shots"),
    ],
)
def test_unknown_names_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(*arguments, data=tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test-sw\.tsv\.gz.*Pass the folder"):
        load_pairs("xnli", "test", "sw", data=tmp_path)
    with pytest.raises(ValueError, match="not on the Hub"):
        load_pairs("xnli-fewshot", "train", "en", shots=4)


def test_xnli_rows_end_at_line_feeds_only(tmp_path, monkeypatch):
    """The Greek test set has a U+001D inside a sentence, at which str.splitlines would cut."""
    monkeypatch.setitem(__import__("ltp_sparse.tasks.xnli", fromlist=["_ROWS"])._ROWS, "test", 2)
    (tmp_path / "test").mkdir()
    with gzip.open(tmp_path / "test" / "test-el.tsv.gz", "wt", encoding="utf-8", newline="") as file:
        file.write('one\x1done\t"quoted\ntwo\ttwo\n')
    (tmp_path / "test-labels.tsv").write_text("label\tgenre\nneutral\tx\nentailment\tx\n")
    pairs = load_pairs("xnli", "test", "el", data=tmp_path)
    assert [(p.premise, p.hypothesis, p.label) for p in pairs] == [
        ("one\x1done", '"quoted', "neutral"),
        ("two", "two", "entailment"),
    ]


def test_a_short_row_and_a_bad_encoding_are_named(tmp_path):
    (tmp_path / "dev").mkdir()
    path = tmp_path / "dev" / "dev-en.tsv"
    path.write_text("a\tb\tneutral\nonly one\n")
    with pytest.raises(ValueError, match=r"dev-en\.tsv, row 2: expected 3 columns .*got 1"):
        load_pairs("xnli", "dev", "en", data=tmp_path)
    path.write_bytes(b"a\tb\tneutral\n\xff\tb\tneutral\n")
    with pytest.raises(ValueError, match=r"line 2: not UTF-8"):
        load_pairs("xnli", "dev", "en", data=tmp_path)


def americas_folder(tmp_path, per_class=3):
    rows = [f"aym\tp{label}{i}\th{i}\t{label}" for i in range(per_class) for label in LABELS]
    text = "\n".join(["language\tpremise\thypothesis\tlabel", *rows, "quy\tp\th\tneutral"]) + "\n"
    for name in ("dev.tsv", "test.tsv", "revised/anli.dev.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_americasnli_draws_are_disjoint_balanced_and_fixed(tmp_path):
    folder = americas_folder(tmp_path, per_class=9)
    train, dev = (load_pairs("americasnli", split, "aym", shots=4, data=folder) for split in ("train", "dev"))
    assert not set(train) & set(dev)
    for drawn in (train, dev):
        assert [[p.label for p in drawn].count(label) for label in LABELS] == [4, 4, 4]
    assert train == load_pairs("americasnli", "train", "aym", shots=4, data=folder)
    assert len(load_pairs("americasnli", "test", "aym", data=folder)) == 27
    with pytest.raises(ValueError, match="two draws of 5 need 10"):
        load_pairs("americasnli", "train", "aym", shots=5, data=folder)


def test_hub_layout_by_name(tmp_path, monkeypatch):
    """`load_dataset` on a local folder in the layout of the Hub's; label numbers are read by their names."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
    )
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0]}
    (tmp_path / "sw").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "sw" / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: sw\n  data_files:\n  - split: test\n    path: sw/test-*\n---\n"
    )
    monkeypatch.setattr("ltp_sparse.tasks.xnli.HUB_NAME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pairs = load_pairs("xnli", "test", "sw")
    assert [(p.premise, p.label) for p in pairs] == [("a", "contradiction"), ("b", "entailment")]


def test_own_pairs(tmp_path):
    (tmp_path / "a.tsv").write_text('premise\thypothesis\nIt "rains.\tIt is wet.\n')
    (tmp_path / "b.csv").write_text('hypothesis,premise,label\n"x, y","z\nz",neutral\n')
    (tmp_path / "c.jsonl").write_text('{"premise": "p", "hypothesis": "h"}\n')
    assert read_pairs(tmp_path / "a.tsv")[0].premise == 'It "rains.'
    pair = read_pairs(tmp_path / "b.csv")[0]
    assert (pair.premise, pair.hypothesis, pair.label) == ("z\nz", "x, y", "neutral")
    assert read_pairs(tmp_path / "c.jsonl")[0].label is None
    (tmp_path / "d.tsv").write_text("premise\tother\na\tb\n")
    with pytest.raises(ValueError, match=r"row 1: no text in column 'hypothesis'; columns: premise, other"):
        read_pairs(tmp_path / "d.tsv")
    (tmp_path / "e.csv").write_bytes(b"\xef\xbb\xbfpremise,hypothesis\nx,y\n")  # as spreadsheets write it
    assert [pair.premise for pair in read_pairs(tmp_path / "e.csv")] == ["x"]
    (tmp_path / "f.jsonl").write_text('{"premise": "x", "hypothesis": "y"}\n\n')
    assert len(read_pairs(tmp_path / "f.jsonl")) == 1
    for content in ("", "premise\thypothesis\n"):
        (tmp_path / "g.tsv").write_text(content)
        with pytest.raises(ValueError, match=r"g.tsv: no pair in it; expected a header"):
            read_pairs(tmp_path / "g.tsv")
    with pytest.raises(FileNotFoundError, match=r"h.tsv: no such file; expected pairs"):
        read_pairs(tmp_path / "h.tsv")


def test_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.tsv").write_text("three\tx\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "four"}\n')
    assert read_text([tmp_path]) == ["one", "two", "three", "four"]
    sample = read_text([tmp_path], max_lines=2, seed=1)
    assert len(sample) == 2 and sample == read_text([tmp_path], max_lines=2, seed=1)
    assert sorted({tuple(read_text([tmp_path], max_lines=2, seed=seed)) for seed in range(20)}) != [tuple(sample)]
    with pytest.raises(ValueError, match="max_lines must be at least 1, got 0"):
        read_text([tmp_path], max_lines=0)
    (tmp_path / "a.bin").touch()
    with pytest.raises(ValueError, match="expected a .txt"):
        read_text([tmp_path / "a.txt", tmp_path / "a.bin"])


def test_hub_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n{"text": ""}\n{"text": "three"}\n')
    assert read_hub_text(str(tmp_path)) == ["one", "two", "three"]
    with pytest.raises(ValueError, match="no column 'body'; it has text"):
        read_hub_text(str(tmp_path), column="body")


@pytest.mark.slow
@pytest.mark.parametrize("language", languages("xnli"))
def test_real_xnli(shared_data, language):
    assert len(load_pairs("xnli", "dev", language, data=shared_data)) == 2490
    test = load_pairs("xnli", "test", language, data=shared_data)
    assert [[pair.label for pair in test].count(label) for label in LABELS] == [1670] * 3
    for shots in (1, 4, 128):
        for split in ("train", "dev"):
            if language == "ar" and split == "train" and shots > 2:
                with pytest.warns(FaultyRows):
                    pairs = load_pairs("xnli-fewshot", split, language, shots=shots, data=shared_data)
            else:
                pairs = load_pairs("xnli-fewshot", split, language, shots=shots, data=shared_data)
            assert len(pairs) == 3 * shots


@pytest.mark.parametrize("language", languages("americasnli"))
def test_real_americasnli(shared_data, language):
    assert len(load_pairs("americasnli", "test", language, data=shared_data)) == TEST_SIZES.get(language, 750)
    assert len(load_pairs("americasnli", "dev", language, data=shared_data)) == REVISED_DEV_SIZES.get(language, 743)
    assert len(load_pairs("americasnli", "train", language, shots=32, data=shared_data)) == 96


def test_real_first_release_of_americasnli(shared_data):
    from ltp_sparse.tasks.americasnli import americasnli

    for language in languages("americasnli"):
        pairs = americasnli("dev", language, shared_data, revised=False)
        assert len(pairs) == FIRST_DEV_SIZES.get(language, 743)
