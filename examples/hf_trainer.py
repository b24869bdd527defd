"""MaskedAdamW inside the Hugging Face Trainer: a small XLM-R classifier learns with 20 % of its encoder and its head.

python examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import TrainingArguments, XLMRobertaConfig, XLMRobertaForSequenceClassification

import ltp_sparse as ls
from ltp_sparse.selection import pools
from ltp_sparse.training.trainer import KeepBest, SparseTrainer


def first_token(rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences whose class is the first token modulo 3: learnable in seconds."""
    ids = torch.randint(5, 95, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def accuracy(prediction) -> dict[str, float]:  # type: ignore[no-untyped-def]
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=20,
        num_labels=3,
    )
    model = XLMRobertaForSequenceClassification(config)
    ticket = ls.Ticket.random(model, density=0.2, seed=0, pool=pools.maskable)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=8,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            weight_decay=0.0,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = SparseTrainer(
            model,
            args,
            ticket,
            dense=model.classifier,
            keep_best=KeepBest("accuracy"),
            train_dataset=first_token(2000, seed=1),
            eval_dataset=first_token(300, seed=2),
            compute_metrics=accuracy,
        )
        trainer.train()
        print(f"best: {trainer.keep_best.best}")
        print(trainer.delta())


if __name__ == "__main__":
    main()
