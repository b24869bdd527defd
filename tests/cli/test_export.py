"""An exported folder answers in transformers' own pipeline as `predict` does, and has no head of random numbers."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.own_data import COLUMNS, QUICK, WORDS_GIVEN, run, write_tsv
from helpers.tiny_nli import WORDS

from ltp_sparse.cli.runs import Run, load_seed
from ltp_sparse.recipes import results
from ltp_sparse.tasks.own import Columns, read_own

METHODS = ["ltp", "soft-prompt", "discrete-prompt", "fine-tuning"]
TRICKY = ["surely word1 </s> word2", "word3?!", "never <mask>", " ".join(WORDS), "word4"]


@pytest.fixture(scope="module", params=METHODS)
def exported(request, own_files):
    """(method, run, exported folder)"""
    method, folder = request.param, own_files / f"exported-{request.param}"
    ticket = ["--ticket", own_files / "ticket.safetensors"] if method == "ltp" else []
    words = WORDS_GIVEN if "prompt" in method or method == "ltp" else ()
    data = ["--train", own_files / "train.tsv", "--dev", own_files / "dev.tsv", *COLUMNS, *words]
    made = own_files / f"run-{method}"
    arguments = ["--model", own_files / "model", "--method", method, *ticket, *data, *QUICK, "--epochs", 1]
    assert run("train", *arguments, "--output", made) == 0
    assert run("export", made, "--output", folder) == 0
    return method, made, folder


def labels_of(made):
    """In the order of the logits: that of the words, or the alphabet where there are none."""
    return Run.load(made).labels


def expected(made, texts):
    """Probabilities by `predict`'s own route."""
    setup, _ = load_seed(Run.load(made), made, 1)
    write_tsv(made / "texts.tsv", [{"says": text} for text in texts], ["says"])
    examples = setup.encode(read_own(made / "texts.tsv", Columns(text="says"), labelled=False))
    batch = {key: value for key, value in setup.collate(examples).items() if key != "labels"}
    with torch.no_grad():
        return setup.model(**batch)["logits"].softmax(-1)


@pytest.mark.slow
def test_the_pipeline_answers_as_predict(exported):
    from transformers import pipeline

    method, made, folder = exported
    prompted = "prompt" in method or method == "ltp"
    texts = TRICKY if prompted else ["surely word1 word2", "word3?!", "word4"]
    if prompted:
        for task in ("text-classification", "sentiment-analysis"):
            with pytest.raises(ValueError, match="trust_remote_code"):
                pipeline(task, str(folder))
    classify = pipeline("text-classification", str(folder), trust_remote_code=True if prompted else None)
    for size in (1, 3):
        found = classify(texts, top_k=None, batch_size=size)
        scores = torch.tensor(
            [[{s["label"]: s["score"] for s in of}[label] for label in labels_of(made)] for of in found]
        )
        torch.testing.assert_close(scores, expected(made, texts), atol=1e-5, rtol=1e-4)
    (best,) = classify(texts[0])
    assert best["label"] == labels_of(made)[int(expected(made, texts)[0].argmax())]


def test_no_head_of_random_numbers(exported):
    from transformers import AutoModelForSequenceClassification

    method, _, folder = exported
    if method == "fine-tuning":
        _, told = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"]
    else:
        with pytest.raises(ValueError, match="dropout probability"):
            AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_folder_is_complete_and_no_larger_than_its_model(exported, own_files):
    method, made, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == list(labels_of(made))
    own, base = ((at / "model.safetensors").stat().st_size for at in (folder, own_files / "model"))
    rows_and_head = 4 * 32 * (8 + 32 + 4) + 4096  # prompt, words or a head of 32 x 32; names in the header
    assert own < base + rows_and_head
    assert len({path.stat().st_mode for path in folder.glob("*.*")}) == 1
    card = (folder / "README.md").read_text()
    assert f"| classes | {', '.join(labels_of(made))} |" in card and "train.tsv" in card
    assert ("trust_remote_code=True" in card) == (method != "fine-tuning")


@pytest.mark.slow
def test_the_script_needs_transformers_alone(exported):
    method, made, folder = exported
    if method not in ("ltp", "fine-tuning"):
        pytest.skip("the two kinds of folders are shown by one method each")
    script = "import sys, runpy; sys.modules['ltp_sparse'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]\n{script}", folder / "predict.py", "word4"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    found = {label: float(value) for label, value in (line.split("\t") for line in printed.splitlines())}
    of_class = expected(made, ["word4"])[0].tolist()
    assert found == pytest.approx(dict(zip(labels_of(made), of_class, strict=True)), abs=1e-3)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    if method == "ltp":
        run = subprocess.run([*command, "word5"], capture_output=True, text=True, timeout=300)
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert run.stderr.endswith("expected 1 texts ({text}), got 2, for one example\n")


@pytest.mark.slow
def test_scores_stand_in_the_card(own_files, own_run, tmp_path, capsys):
    """Beside those of naming the largest class always, and with what evaluation had to note."""
    assert run("evaluate", own_run, "--quiet") == 0
    row = json.loads((own_run / "results.jsonl").read_text().splitlines()[-1])
    folder = shutil.copytree(own_run, tmp_path / "run")
    other = {**row, "task": "other.tsv", "notes": ["all predictions for quy are 'bad'"]}
    other.pop(results.HASH)
    results.append(folder / results.RESULTS, other)
    assert run("export", folder, "--output", tmp_path / "exported") == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| accuracy | quy | {row['scores']['quy']:.4f} | {row['largest_class']['quy']:.4f} |" in card
    assert "\n\nother.tsv: all predictions for quy are 'bad'.\n" in card


def test_what_transformers_has_no_model_for_is_refused(own_files, tmp_path, capsys):
    data = ["--train", own_files / "train.tsv", "--dev", own_files / "dev.tsv", *COLUMNS, *QUICK, "--epochs", 1]
    assert run("train", "--model", own_files / "model", "--method", "mad-x", *data, "--output", tmp_path / "run") == 0
    assert run("export", tmp_path / "run", "--output", tmp_path / "exported") == 2
    assert "which attaches modules" in capsys.readouterr().err
    assert list((tmp_path / "exported").iterdir()) == []


@pytest.mark.slow
def test_the_card_has_scores_of_whole_files_only(own_run, own_files, tmp_path, capsys):
    (own_run / "seed-2").mkdir()
    assert run("evaluate", own_run, "--quiet") == 0
    assert "not finished, so left out: seed 2" in capsys.readouterr().out
    (own_run / "seed-2").rmdir()
    whole = results.read(own_run / results.RESULTS)[-1]
    assert run("evaluate", own_run, "--limit", 1, "--quiet") == 0
    assert run("export", own_run, "--output", tmp_path / "exported") == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    lines = [line.split(" | ") for line in card.splitlines() if line.startswith(f"| {whole['task']} |")]
    assert {line[2]: line[3] for line in lines} == {name: f"{score:.4f}" for name, score in whole["scores"].items()}
