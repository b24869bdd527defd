"""Predictions and scores, apart from any method."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ltp_sparse.report.tables import make_table, markdown
from ltp_sparse.training.autocast import SlowBfloat16
from ltp_sparse.training.evaluation import evaluate, largest_class, predict, result_row


class FirstToken(nn.Module):
    """Its class is the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, input_ids):
        return {"logits": self.weight[input_ids[:, 0]]}


def collate(examples):
    length = max(len(example["input_ids"]) for example in examples)
    rows = [example["input_ids"] + [0] * (length - len(example["input_ids"])) for example in examples]
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor([example["labels"] for example in examples])}


EXAMPLES = [{"input_ids": [i % 4] * (1 + i % 3), "labels": i % 4} for i in range(11)]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_predictions_come_in_the_order_of_the_examples(batch_size):
    model = FirstToken().train()
    seen = []
    found = predict(model, EXAMPLES, collate, batch_size=batch_size, progress=seen.append)
    assert found.tolist() == [example["labels"] for example in EXAMPLES] and sum(seen) == len(EXAMPLES)
    assert model.training
    assert predict(model, [], collate).tolist() == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_predicts_nothing_at_random(batch_size):
    with pytest.raises(ValueError, match=f"predict: batch_size must be at least 1, got {batch_size}"):
        predict(FirstToken(), EXAMPLES, collate, batch_size=batch_size)


def test_evaluation_refuses_what_it_cannot_score():
    ready = SimpleNamespace(model=FirstToken(), encode=list, collate=collate)
    assert evaluate(ready, {"en": EXAMPLES}, progress=False) == {"en": 1.0}
    with pytest.raises(ValueError, match="metric must be one of accuracy, macro_f1, got 'f1'"):
        evaluate(ready, {"en": EXAMPLES}, metric="f1", progress=False)
    for examples in ([], [{**EXAMPLES[0], "labels": -100}]):
        with pytest.raises(ValueError, match="expected labelled examples in 'sw'"):
            evaluate(ready, {"en": EXAMPLES, "sw": examples}, progress=False)


def test_predictions_of_one_class_are_told_unless_the_examples_are_of_one():
    ready = SimpleNamespace(model=FirstToken(), encode=list, collate=collate)
    stuck = [{**example, "input_ids": [2]} for example in EXAMPLES]
    with pytest.warns(UserWarning, match="all predictions for en, sw are 'c'"):
        languages = {"en": stuck, "sw": stuck, "de": EXAMPLES}
        evaluate(ready, languages, labels=("a", "b", "c", "d"), progress=False, notes=(notes := []))
    assert notes == ["all predictions for en, sw are 'c'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(ready, {"de": EXAMPLES, "en": [{"input_ids": [2], "labels": 2}] * 3}, progress=False)


def test_the_largest_class_stands_under_the_scores():
    """As accuracy its share; as macro F1 what naming it always gives."""
    examples = {"quy": [SimpleNamespace(label=label) for label in "aabc"], "aym": [SimpleNamespace(label="b")] * 2}
    assert largest_class(examples) == {"quy": 0.5, "aym": 1.0}
    assert largest_class(examples, "macro_f1")["quy"] == pytest.approx(2 * 2 / (4 + 2) / 3)
    scores = {"quy": 0.75, "aym": 1.0}
    rows = [result_row(scores, method="LTP", seed=s, largest_class=largest_class(examples)) for s in (1, 2)]
    assert "| always the largest class |  | 50.00 | 100.00 | 75.00 |" in markdown(make_table(rows, ("method",)))
    other = result_row(scores, method="SP", seed=1, largest_class={"quy": 0.25, "aym": 1.0})  # of another test file
    assert "| always the largest class |  |  | 100.00 |  |" in markdown(make_table([*rows, other], ("method",)))
    old = result_row(scores, method="SP", seed=1)
    assert "always" not in markdown(make_table([old], ("method",)))


@pytest.mark.parametrize(
    ("processor", "dtype", "told"),
    [
        ("AVX2", torch.bfloat16, True),
        ("AVX512", torch.bfloat16, False),
        ("AVX2", None, False),
        ("AVX2", torch.float16, False),
    ],
)
def test_a_processor_that_is_slow_at_bfloat16_is_told(monkeypatch, processor, dtype, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    examples = [{"input_ids": [1], "labels": 1}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert predict(FirstToken(), examples, collate, dtype=dtype).tolist() == [1]
    assert [one.category for one in caught] == [SlowBfloat16] * told
