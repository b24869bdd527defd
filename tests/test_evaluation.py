"""Predictions and scores, apart from any method."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ltp_sparse.training.evaluation import evaluate, predict


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
