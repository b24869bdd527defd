"""A ticket beside what PEFT and bitsandbytes do to a model: LoRA trains too, 4-bit weights stay as they are."""

import pytest
import torch
from helpers.tiny_causal import causal_model
from torch import nn

import ltp_sparse as ls


@pytest.mark.parametrize("gradients", ["dense", "packed"])
def test_lora_trains_beside_a_ticket(gradients):
    peft = pytest.importorskip("peft")
    base = causal_model("xglm")
    ticket = ls.Ticket.random(base, density=0.1, seed=0, pool="fc2.weight").fingerprinted(base)
    before = {name: p.detach().clone() for name, p in ls.canonical_parameters(base).items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "fc2"]))
    lora = [p for p in model.parameters() if p.requires_grad]
    named = ls.canonical_parameters(model)
    for name in ticket.active_names:
        named[name].requires_grad_()
    initial = [p.detach().clone() for p in lora]
    optimizer = ls.MaskedAdamW(model, ticket, lr=1e-2, dense=lora, gradients=gradients)
    ids = torch.arange(12).view(2, 6)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start) for p, start in zip(lora, initial, strict=True))
    for name, start in before.items():
        changed = named[name] != start
        assert changed.any() == (name in ticket.active_names)
        if name in ticket.active_names:
            assert not changed[~ticket.mask(name)].any()
    delta = ls.SparseDelta.between(before, {name: named[name].detach() for name in before}, ticket)
    fresh = causal_model("xglm")
    delta.apply(fresh)  # what the ticket learned, without the adapter
    parameters = ls.canonical_parameters(fresh)
    assert all(torch.equal(parameters[name], named[name]) for name in ticket.active_names)


class Quantised(nn.Module):
    """An embedding, a linear layer in 4 bit, and a head."""

    def __init__(self):
        super().__init__()
        bnb = pytest.importorskip("bitsandbytes", reason="4-bit weights are those of bitsandbytes: extra `quantised`")
        torch.manual_seed(0)
        self.embedding, self.norm, self.head = nn.Embedding(20, 64), nn.LayerNorm(64), nn.Linear(64, 4)
        self.linear = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
        self.linear.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
        self.to("cpu")  # quantises

    def forward(self, ids):
        return self.head(self.norm(self.linear(self.embedding(ids))))


@pytest.mark.parametrize("gradients", ["dense", "packed"])
def test_a_4_bit_base_trains_what_is_not_quantised(gradients):
    model = Quantised()
    packed = model.linear.weight
    assert packed.dtype == torch.uint8 and packed.quant_state is not None
    with pytest.warns(UserWarning, match="1 quantised tensors, e.g. 'linear.weight', are left out"):
        ticket = ls.Ticket.random(model, density=0.2, seed=0)
    assert "linear.weight" not in ticket.names and "linear.bias" in ticket.names
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ls.MaskedAdamW(model, ticket, lr=1e-2, gradients=gradients)
    for _ in range(3):
        model(torch.arange(20).view(2, 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.linear.weight is packed
    for name, p in model.named_parameters():
        changed = p.detach() != before[name]
        assert not changed.any() if name == "linear.weight" else not changed[~ticket.mask(name)].any()
    assert not torch.equal(model.embedding.weight, before["embedding.weight"])


def test_a_ticket_that_names_a_4_bit_weight_is_refused_before_anything_changes():
    model = Quantised()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    plain = {**shapes, "linear.weight": torch.Size([64, 64])}  # of the base before it was quantised
    for of in (shapes, plain):
        ticket = ls.Ticket.random(of, density=0.2, seed=0)
        with pytest.raises(TypeError, match="'linear.weight' is quantised .* .Params4bit of torch.uint8"):
            ls.MaskedAdamW(model, ticket, freeze=True)
        assert model.head.weight.requires_grad
        ls.MaskedAdamW(model, ticket.restrict(lambda name: name != "linear.weight"))
    with pytest.raises(TypeError, match="must be float32, bfloat16, float16, got torch.uint8"):
        ls.MaskedAdamW(model, ls.Ticket.random({"head.bias": [4]}, k=1), dense=[model.linear.weight])
