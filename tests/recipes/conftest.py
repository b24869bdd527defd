import json
from pathlib import Path

import pytest
from helpers.tiny_nli import WORDS, tiny_language_model, tiny_tokenizer, toy_pairs


def _jsonl(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny model, and data sets in their original layouts, all of the toy inference task."""
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = tiny_tokenizer()
    tiny_language_model(len(tokenizer), decoupled=False).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = folder / "data"
    for split, seed in (("train", 0), ("dev", 1)):
        for shots in (1, 2):
            rows = [
                {"lang": "en", "sentence1": p.premise, "sentence2": p.hypothesis, "gold": p.label, "file_idx": 0}
                for p in toy_pairs(3 * shots, seed=seed)
            ]
            _jsonl(data / "xnli_fewshot" / split / "en" / f"{split}_split,{shots}.jsonl", rows)
    test = toy_pairs(5010, seed=2)
    (data / "xnli" / "test").mkdir(parents=True)
    for language in ("en", "sw"):
        lines = "".join(f"{p.premise}\t{p.hypothesis}\n" for p in test)
        (data / "xnli" / "test" / f"test-{language}.tsv").write_text(lines)
    (data / "xnli" / "test-labels.tsv").write_text("label\tgenre\n" + "".join(f"{p.label}\tg\n" for p in test))
    number = {"entailment": 0, "neutral": 1, "contradiction": 2}
    rows = [
        {"premise": p.premise, "hypothesis": p.hypothesis, "label": number[p.label]} for p in toy_pairs(930, seed=3)
    ]
    _jsonl(data / "mnli_9k" / "en" / "train.jsonl", rows)
    header = "language\tpremise\thypothesis\tlabel\n"
    for split in ("dev", "test"):
        pairs = [(language, p) for language in ("aym", "gn") for p in toy_pairs(60, seed=4)]
        text = header + "".join(f"{lang}\t{p.premise}\t{p.hypothesis}\t{p.label}\n" for lang, p in pairs)
        (data / "americasnli").mkdir(exist_ok=True)
        (data / "americasnli" / f"{split}.tsv").write_text(text)
    (data / "corpora").mkdir()
    for language in ("en", "aym"):
        lines = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(10)) for i in range(80)]
        (data / "corpora" / f"{language}.txt").write_text("\n".join(lines))
    return folder
