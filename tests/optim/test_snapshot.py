"""`Snapshot`: one pass of names and one digest of the base per run; edits of others are seen or refused."""

from dataclasses import replace

import pytest
import torch
from helpers.bits import weights
from helpers.tiny_nli import tiny_language_model, tiny_tokenizer, toy_pairs

import ltp_sparse as ls
from ltp_sparse.methods import METHODS
from ltp_sparse.optim.snapshot import Snapshot
from ltp_sparse.selection import pools
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.method import train_method
from ltp_sparse.weights import digests, names


@pytest.fixture
def model():
    return tiny_language_model(40)


def ticket_of(model) -> Ticket:
    ticket = Ticket.random(dict(ls.canonical_parameters(model)), density=0.3, seed=0, pool=pools.maskable)
    return ticket.fingerprinted(model)


def test_a_run_passes_over_the_names_three_times_and_reads_the_weights_twice(monkeypatch):
    """Snapshot, optimizer and the delta that is applied; digests before and after."""
    tokenizer = tiny_tokenizer()
    model = tiny_language_model(len(tokenizer))
    ticket = ticket_of(model)
    passes, hashed = [], []
    group, tile_digests = names.canonical_group, digests.tile_digests

    def counted_group(*arguments):
        passes.append(1)
        return group(*arguments)

    def counted_digests(tensor):
        hashed.append(tensor.numel())
        return tile_digests(tensor)

    monkeypatch.setattr(names, "canonical_group", counted_group)
    monkeypatch.setattr(digests, "tile_digests", counted_digests)
    method = METHODS["ltp"]()
    method = replace(method, settings=replace(method.settings, max_length=32, epochs=1))
    train_method(method, model, tokenizer, toy_pairs(16), toy_pairs(8, 1), ticket=ticket, progress=False)
    assert len(passes) == 4  # one of them over the buffers
    assert sum(hashed) <= 2 * sum(p.numel() for p in model.parameters())


def test_a_ticket_of_another_model_is_refused_by_name(model):
    name = "roberta.encoder.layer.0.output.dense.weight"
    longer = Ticket.random({name: torch.Size([3, 64])}, k=5)
    with pytest.raises(ValueError, match=rf"Snapshot: '{name}' has shape .* in the model and \[3, 64\] in the ticket"):
        Snapshot(model, longer)
    with pytest.raises(ValueError, match="LTP: no name of the ticket is in the model; '0.weight' is missing"):
        METHODS["ltp"]().ticket(model, Ticket.random({"0.weight": torch.Size([3, 64])}, k=5))


def test_values_come_back_whatever_others_wrote(model):
    before, ticket = weights(model), ticket_of(model)
    snapshot = Snapshot(model, ticket, [model.lm_head.layer_norm.weight], frozen=True)
    with torch.no_grad():
        for name in (*ticket.active_names, "lm_head.layer_norm.weight"):
            parameter = snapshot.parameters[name]
            parameter.data += torch.where(ticket.mask(name), 1.0, 0.0) if name in ticket.sets else 1.0
    assert all(torch.equal(v, snapshot.originals[n] + 1) for n, v in snapshot.delta().values.items())
    snapshot.put_back()
    assert snapshot.check_frozen().keys() == before.keys() - {"lm_head.layer_norm.weight"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("active", [False, True])
def test_an_entry_that_must_not_train_is_found(model, active):
    """Outside the ticket, or an inactive entry of it."""
    ticket = ticket_of(model)
    name = ticket.active_names[0] if active else "lm_head.layer_norm.bias"
    snapshot = Snapshot(model, ticket, frozen=True)
    parameter = snapshot.parameters[name].detach().view(-1)
    parameter[0 if not active else int((~ticket.mask(name)).view(-1).nonzero()[0])] += 1
    snapshot.put_back()
    with pytest.raises(RuntimeError, match=f"{name}' that must not train have changed"):
        snapshot.check_frozen()


def test_replaced_parameters_are_refused(model):
    snapshot = Snapshot(model, ticket_of(model), what="loop")
    layer = model.roberta.encoder.layer[0].output.dense
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    for call in (snapshot.delta, snapshot.put_back):
        with pytest.raises(ValueError, match="loop: the parameter 'weight' of a Linear has been replaced"):
            call()


def test_what_another_base_has_is_named(model):
    ticket = ticket_of(tiny_language_model(40, seed=1))
    snapshot = Snapshot(model, ticket)
    assert snapshot.selected_elsewhere == ticket.active_names
    assert snapshot.ticket.fingerprint == ticket_of(model).fingerprint
