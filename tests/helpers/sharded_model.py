"""A small model whose parameters divide unevenly, and the ways to shard it."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

VOCABULARY, WIDTH = 1031, 64


class Block(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, middle)
        self.down = nn.Linear(middle, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """An embedding of more than a tile, tied to the head, a block, and a layer of two rows."""

    def __init__(self, tied=True, middle=97):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.block = Block(middle)
        self.small = nn.Linear(WIDTH, 2)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.block(self.embed(ids))
        return self.head(hidden), self.small(hidden)


def net(dtype=torch.float32, tied=True, middle=97, seed=0):
    torch.manual_seed(seed)
    return Net(tied, middle).to(dtype)


def loss_of(model, seed, device="cpu"):
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed)).to(device)
    scores, small = model(ids)
    return cross_entropy(scores.flatten(0, 1).float(), ids.flatten().roll(1)) + small.float().square().mean()


def shard_rows(model, mesh, **options):
    """FSDP2, the block on its own; gradients are summed, not averaged."""
    from torch.distributed.fsdp import fully_shard

    for module in (model.block, model):
        fully_shard(module, mesh=mesh, **options)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def shard_columns(model, mesh):
    from torch.distributed.tensor import Shard

    even = {p for p in model.parameters() if p.shape[-1] % mesh.size() == 0}
    return shard_rows(model, mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1) if p in even else None)


def shard_tensors(model, mesh):
    """Tensor parallelism: rows of some parameters, columns of others."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"block.up": ColwiseParallel(), "block.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def whole(tensor):
    """All of a DTensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
