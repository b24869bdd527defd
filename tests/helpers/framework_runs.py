"""A small model, its batches and its plain run, the reference for runs in frameworks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ltp_sparse import MaskedAdamW, Ticket

LR, DECAY, LIMIT, BATCH, STEPS = 1e-2, 0.1, 0.2, 8, 6
BAD_STEP = 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.mix = nn.Linear(8, 8)
        self.LayerNorm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, labels=None):
        hidden = self.LayerNorm(torch.tanh(self.mix(self.embedding(input_ids)))).mean(1)
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def build_net():
    torch.manual_seed(4)
    return Net()


def examples(count=BATCH * STEPS):
    ids = torch.randint(40, (count, 5), generator=torch.Generator().manual_seed(9))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batches(size=BATCH):
    rows = examples()
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def ticket_of(model):
    return Ticket.random(model, density=0.3, seed=1, pool=lambda name: name.split(".")[0] in ("embedding", "mix"))


def make_optimizer(model):
    ticket = ticket_of(model)
    return MaskedAdamW(model, ticket, lr=LR, weight_decay=DECAY, dense=model.head, max_grad_norm=LIMIT, freeze=True)


def trained_mask(name, parameter, ticket):
    if name.startswith("head."):
        return torch.ones_like(parameter, dtype=torch.bool)
    return ticket.mask(name) if name in ticket.names else torch.zeros_like(parameter, dtype=torch.bool)


def assert_only_trained_entries_moved(before, after, ticket):
    for name, old in before.items():
        mask = trained_mask(name, old, ticket)
        moved = old != after[name]
        assert not moved[~mask].any(), name
        assert moved[mask].any() or not mask.any(), name


def poison(model, calls, active):
    """An infinite gradient in one entry of `mix.weight`, active or not, in backward number BAD_STEP."""
    mask = ticket_of(model).mask("mix.weight")
    index = int((mask if active else ~mask).flatten().nonzero()[0])

    def hook(gradient):
        calls.append(1)
        if len(calls) != BAD_STEP + 1:
            return None
        gradient = gradient.clone()
        gradient.view(-1)[index] = torch.inf
        return gradient

    model.mix.weight.register_hook(hook)


def plain_run(*, size=BATCH, accumulation=1, skip=None):
    """The reference of all frameworks, bit for bit: (model, norms)."""
    model = build_net()
    optimizer, norms = make_optimizer(model), []
    for number, batch in enumerate(batches(size)):
        (model(**batch)["loss"] / accumulation).backward()
        if (number + 1) % accumulation == 0:
            if number // accumulation != skip:
                optimizer.step()
                norms.append(optimizer.grad_norm.item())
            optimizer.zero_grad()
    return model, norms


def training_arguments(folder, **options):
    from transformers import TrainingArguments

    defaults = {
        "output_dir": str(folder), "num_train_epochs": 1, "per_device_train_batch_size": BATCH, "learning_rate": LR,
        "weight_decay": DECAY, "max_grad_norm": LIMIT, "lr_scheduler_type": "constant", "logging_steps": 1,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "remove_unused_columns": False,
        "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})
