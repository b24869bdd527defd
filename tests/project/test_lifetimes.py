"""No model outlives its last reference, whatever of the library has been used on it."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket
from ltp_sparse.optim.gradient_view import GradientView


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8)).to(dtype)


def train(model, optimizer):
    model(torch.arange(5)).float().square().sum().backward()
    optimizer.step()


def with_optimizer(**options):
    def use(model):
        optimizer = MaskedAdamW(model, Ticket.random(model, density=0.3, seed=0), **options)
        train(model, optimizer)
        model(torch.arange(3)).float().sum().backward()  # with gradients that no step has consumed
        return optimizer

    return use


def with_packed_parameters(model):
    packed = ls.PackedParameters(model, Ticket.random(model, density=0.3, seed=0))
    optimizer = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1, momentum=0.9))
    train(model, optimizer)
    return packed, optimizer


def with_a_schedule(model):
    optimizer = with_optimizer(gradients="packed")(model)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)


def with_a_delta(model):
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[1].weight.add_(1)
    ticket = ls.select(model, tuned, k=10)
    delta = ls.SparseDelta.between(model, tuned, ticket)
    delta.apply(model)
    return delta, ticket


def with_digests(model):
    ticket = Ticket.random(model, density=0.3, seed=0)
    return ls.frozen_digests(model, ticket), ls.memory_report(model, ticket)


USES = {
    "dense": with_optimizer(),
    "packed": with_optimizer(gradients="packed"),
    "8bit": with_optimizer(states="8bit"),
    "8bit-packed": with_optimizer(states="8bit", gradients="packed"),
    "pull": with_optimizer(pull=1e-3),
    "clip": with_optimizer(max_grad_norm=0.1, gradients="packed"),
    "schedule": with_a_schedule,
    "parameters": with_packed_parameters,
    "delta": with_a_delta,
    "digests": with_digests,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_goes_with_its_last_reference(use, dtype):
    model = build(dtype)
    held = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    used = use(model)
    del model, used
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


@pytest.mark.parametrize("kind", ["optimizer", "parameters"])
def test_hooks_go_with_what_made_them(kind):
    """The model lives on and trains as any other."""
    model = build()
    used = USES["packed" if kind == "optimizer" else "parameters"](model)
    assert isinstance(model[1].weight.grad, GradientView) and model[0].sparse
    del used
    gc.collect()
    assert not model._forward_pre_hooks and not model[0].sparse and not model._ddp_params_and_buffers_to_ignore
    assert not isinstance(model[1].weight.grad, GradientView)
    model.zero_grad()
    model(torch.arange(3)).sum().backward()
    assert type(model[1].weight.grad) is torch.Tensor and type(model[0].weight.grad) is torch.Tensor
    MaskedAdamW(model, Ticket.full(model), gradients="packed").remove()


def test_an_attached_optimizer_keeps_its_packed_parameters():
    model = build()

    def attached():
        packed = ls.PackedParameters(model, Ticket.full(model))
        return packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1))

    optimizer = attached()
    gc.collect()
    before = model[1].weight.detach().clone()
    train(model, optimizer)
    assert not torch.equal(before, model[1].weight)
