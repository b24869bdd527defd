"""The demo: data with labels true by construction, and the whole job in small."""

import hashlib
import json

import pytest
import torch

from ltp_sparse.demo import DemoSettings, demo
from ltp_sparse.methods import PromptSettings
from ltp_sparse.tasks.generated.facts import PARENT, Fact, relation
from ltp_sparse.tasks.generated.inference import SPLITS, documents, fact_pairs, pairs, sentences
from ltp_sparse.tasks.generated.languages import LANGUAGES, sentence
from ltp_sparse.tasks.pairs import LABELS

COUNT = 96


@pytest.fixture(scope="module")
def examples():
    return {split: fact_pairs(COUNT, split) for split in ("train", "dev", "test")}


def chain(node):
    return [] if node is None else [node, *chain(PARENT.get(node))]


def label_of(premise: Fact, hypothesis: Fact) -> str:
    """The label by rules of the test's own: sets of nodes on the way to the root."""
    assert (premise.agent, premise.action) == (hypothesis.agent, hypothesis.action)
    says = [(getattr(premise, slot), getattr(hypothesis, slot)) for slot in ("thing", "place")]
    if any(p and h and p not in chain(h) and h not in chain(p) for p, h in says):
        return "contradiction"
    return "entailment" if all(h is None or h in chain(p) for p, h in says) else "neutral"


@pytest.mark.slow
def test_labels_follow_from_the_facts(examples):
    for split in examples:
        for pair in examples[split]:
            assert pair.label == label_of(pair.premise, pair.hypothesis), pair


@pytest.mark.parametrize(
    ("premise", "hypothesis", "label"),
    [
        (("apple", "kitchen"), ("fruit", None), "entailment"),
        (("apple", "kitchen"), ("apple", "house"), "entailment"),
        (("fruit", None), ("apple", None), "neutral"),
        (("apple", None), ("apple", "garden"), "neutral"),
        (("apple", None), ("doll", None), "contradiction"),
        (("fruit", "kitchen"), ("apple", "outside"), "contradiction"),
    ],
)
def test_labels_of_known_pairs(premise, hypothesis, label):
    one, other = (Fact("child", "find", thing, place) for thing, place in (premise, hypothesis))
    assert relation(one, other) == label


def test_the_generated_data_stays_the_same():
    """mini-xlmr was trained on these documents, and reports compare scores on these pairs."""
    content = [pairs(30, "train", "sw", seed=3), pairs(60, "test", "de"), sentences(50, "fr"), list(documents(300))]
    digest = hashlib.sha256(repr(content).encode()).hexdigest()
    assert digest == "dd91e1409813f83a713db551e58573c31a34d0b03a375b4e53b04c7c5da9b562"


def test_a_hypothesis_alone_tells_nothing(examples):
    by_hypothesis = {}
    for pair in examples["test"]:
        by_hypothesis.setdefault(pair.hypothesis, []).append(pair.label)
    for labels in by_hypothesis.values():
        assert [labels.count(label) for label in LABELS] == [len(labels) // 3] * 3


def test_splits_share_no_hypothesis_and_no_example_occurs_twice(examples):
    hypotheses = {split: {pair.hypothesis for pair in found} for split, found in examples.items()}
    assert not hypotheses["train"] & hypotheses["test"] and not hypotheses["dev"] & hypotheses["test"]
    assert all(len(set(found)) == COUNT for found in examples.values())
    assert sum(SPLITS.values()) == 100


def test_languages_are_parallel_and_examples_reproducible():
    english, swahili = pairs(60, "test", "en"), pairs(60, "test", "sw")
    assert [pair.label for pair in english] == [pair.label for pair in swahili]
    assert english == pairs(60, "test", "en")
    assert english != pairs(60, "test", "en", seed=1)
    assert sentences(50, "de") == sentences(50, "de")


@pytest.mark.parametrize(
    ("language", "in_garden", "outside"),
    [
        ("en", "The child finds an apple in the garden.", "The woman buys a rose outside."),
        ("de", "Das Kind findet im Garten einen Apfel.", "Die Frau kauft draußen eine Rose."),
        ("fr", "L'enfant trouve une pomme dans le jardin.", "La femme achète une rose dehors."),
        ("es", "El niño encuentra una manzana en el jardín.", "La mujer compra una rosa afuera."),
        ("ru", "Ребёнок находит в саду яблоко.", "Женщина покупает на улице розу."),
        ("tr", "Çocuk bahçede bir elma buluyor.", "Kadın dışarıda bir gül satın alıyor."),
        ("sw", "Mtoto anapata tofaa bustanini.", "Mwanamke ananunua waridi nje."),
        ("id", "Anak itu menemukan apel di kebun.", "Wanita itu membeli mawar di luar."),
    ],
)
def test_sentences_read_like_this(language, in_garden, outside):
    assert sentence(Fact("child", "find", thing="apple", place="garden"), language) == in_garden
    assert sentence(Fact("woman", "buy", thing="rose", place="outside"), language) == outside


def test_documents_answer_in_every_language():
    text = list(documents(600))
    answers = {document.answer for document in text} - {None}
    assert answers == {word for language in LANGUAGES.values() for word in language.answers.values()}
    assert all(document.text.endswith(f"{document.answer}.") for document in text if document.answer)
    assert any(document.answer is None for document in text)


@pytest.mark.slow
def test_the_whole_job_in_small(tmp_path, capsys):
    """Not enough training to learn anything: every step runs, the report is complete, nothing frozen has moved."""
    settings = DemoSettings(
        sentences=120,
        shots=2,
        test=6,
        seeds=(1,),
        prompt=PromptSettings(learning_rate=1e-3, epochs=1, max_length=64, encoder="mlp"),
    )
    threads = torch.get_num_threads()
    report = demo(tmp_path, settings, progress=False)
    assert torch.get_num_threads() == threads
    assert {path.name for path in tmp_path.iterdir()} == {
        "accuracy.png", "report.md", "results.jsonl", "ticket.png", "ticket.safetensors",
    }  # fmt: skip
    assert (tmp_path / "report.md").read_text() == report
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["LTP", "random ticket", "SP", "PT-frozen"]
    assert all(set(row["scores"]) == set(LANGUAGES) for row in rows)
    costs = [line.split("|") for line in report.splitlines() if line.startswith(("| LTP | ", "| PT-frozen | "))]
    frozen = [int(cells[5].replace(",", "")) for cells in costs if len(cells) == 8]
    changed = [int(cells[6]) for cells in costs if len(cells) == 8]
    assert len(frozen) == 2 and min(frozen) > 3_000_000 and changed == [0, 0]


@pytest.mark.slow
def test_the_demo_draws_whiskers_over_seeds(tmp_path, monkeypatch):
    from ltp_sparse import demo as module

    drawn = {}
    monkeypatch.setattr(module, "plot_accuracy", lambda means, path, **more: drawn.update(more))
    scores = {
        (method, seed): {"en": 0.5 + 0.1 * seed}
        for method in ("LTP", "random ticket", "SP", "PT-frozen")
        for seed in (1, 2)
    }

    def run_method(method, ticket, settings, *_):
        rows = [
            {"method": method.name, "shots": 1, "seed": seed, "scores": scores[method.name, seed], "mean": 0.5}
            for seed in settings.seeds
        ]
        return rows, ["1", "1", "1", "1", "0"]

    monkeypatch.setattr(module, "_run_method", run_method)
    demo(tmp_path, DemoSettings(sentences=60), progress=False)
    assert drawn["errors"]["LTP"]["en"] == pytest.approx(0.1 / 2**0.5)
    assert "standard deviation over 2 seeds" in drawn["title"]


def test_the_demo_tells_which_kernels_a_gpu_goes_without(monkeypatch):
    from ltp_sparse import demo as module

    assert torch.cuda.is_available() or module.gpu_hint() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status = {"reference": "ok", "compiled": "ltp_sparse._C_cuda is not built; LTP_SPARSE_EXT=cuda builds it"}
    monkeypatch.setattr(module, "available_backends", lambda device: status)
    assert "compiled: ltp_sparse._C_cuda is not built; LTP_SPARSE_EXT=cuda builds it" in module.gpu_hint()
    status["compiled"] = "ok"
    assert module.gpu_hint() is None


@pytest.mark.parametrize("density", [0.0005, 0.5])
def test_labels_of_the_ticket_plot_collide_with_nothing(density, tmp_path, monkeypatch):
    import ltp_sparse as ls
    from ltp_sparse.report import plots

    shapes = {f"roberta.encoder.layer.{i}.output.dense.weight": (400, 400) for i in range(24)}
    shapes["roberta.embeddings.word_embeddings.weight"] = (9000, 400)
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    plots.plot_ticket(ls.Ticket.random(shapes, density=density, seed=0), tmp_path / "t.png")
    (figure,) = kept
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in (*axes.texts, axes.title)]
    assert len(boxes) == 26
    for i, box in enumerate(boxes):
        others = [*boxes[:i], *(bar.get_window_extent() for bar in axes.patches), axes.lines[0].get_window_extent()]
        assert not any(box.overlaps(other) for other in others)
