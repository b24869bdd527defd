"""Files of format 1, written by 0.1: read, verified by SHA-256, and compared with bases by SHA-256."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_nli import tiny_language_model
from torch import nn

import ltp_sparse as ls
from ltp_sparse.optim.snapshot import Snapshot
from ltp_sparse.selection import pools
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights import files
from ltp_sparse.weights.digests import EARLIER, fingerprint
from ltp_sparse.weights.reading import FileFormatError

FILES = Path(__file__).parent / "format_1"


def base() -> nn.Module:
    """What the files were made from."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.arange(12.0).view(3, 4)), nn.Parameter(torch.arange(5.0))
    return model


def with_old_fingerprint(ticket: Ticket, model: nn.Module) -> Ticket:
    named = dict(ls.canonical_parameters(model))
    old = fingerprint({name: named[name] for name in ticket.active_names}, like=dict.fromkeys(named, EARLIER))
    return Ticket(ticket.sets, ticket.shapes, ticket.metadata, old)


def test_a_ticket():
    ticket = Ticket.load(FILES / "ticket.safetensors")
    assert {name: ticket.indices(name).tolist() for name in ticket.names} == {"a": [0, 4], "b": [3, 4]}
    assert ticket.fingerprint == {"a": "620360538b9255a98ea9d2b1a25802c6", "b": "ebc1d2a5e355a84cb4c2075da54fd4e6"}
    assert ticket == ticket.fingerprinted(base())


def test_a_delta_knows_its_base():
    delta, model = ls.SparseDelta.load(FILES / "delta.safetensors"), base()
    delta.apply(model)
    assert model.b.tolist() == [0, 1, 2, 4.5, 6] and model.a.view(-1)[4] == 5
    second = ls.SparseDelta.load(FILES / "delta.safetensors")
    second.apply(model)  # on top: what lies below the first is compared
    second.revert(model)
    delta.revert(model)
    current = fingerprint({name: p.detach() for name, p in model.named_parameters()})
    delta.apply(model, digests=current)  # of another kind than the delta's
    delta.revert(model)
    with torch.no_grad():
        model.a[2, 3] += 1
    with pytest.raises(ValueError, match="'a' is not the tensor this delta was made from"):
        delta.apply(model)


def test_saved_again_it_is_of_the_current_format(tmp_path):
    ticket = Ticket.load(FILES / "ticket.safetensors")
    ticket.save(tmp_path / "t")
    assert files.verify(tmp_path / "t").startswith("xxh3:")
    again = Ticket.load(tmp_path / "t")
    assert again == ticket and again.fingerprint == ticket.fingerprint


@pytest.mark.parametrize("kind", ["ticket", "delta"])
def test_damage_is_found(tmp_path, kind):
    content = bytearray((FILES / f"{kind}.safetensors").read_bytes())
    for at in (len(content) - 8, content.index(b"requested_k" if kind == "ticket" else b"fingerprint")):
        damaged = content.copy()
        damaged[at] ^= 1
        (tmp_path / "f").write_bytes(damaged)
        with pytest.raises(FileFormatError, match="checksum does not match its content; the file is damaged"):
            files.load(tmp_path / "f", kind)
        with pytest.raises(FileFormatError, match="checksum does not match its content; the file is damaged"):
            files.verify(tmp_path / "f")


@pytest.mark.parametrize("checksum", ["", "0" * 31, "xxh3:", 5, None, [], "sha512:" + "0" * 64], ids=str)
def test_a_checksum_of_no_known_kind_is_damage(tmp_path, checksum):
    """Not even one so short that it would agree with anything."""
    content = (FILES / "ticket.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    ours = json.loads(header["__metadata__"][files.KEY])
    header["__metadata__"][files.KEY] = json.dumps({**ours, "checksum": checksum})
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    for read in (lambda path: files.load(path, "ticket"), files.verify):
        with pytest.raises(FileFormatError, match="damaged|not a readable file of ltp_sparse"):
            read(tmp_path / "f")


def test_a_run_goes_on_from_one():
    """Ticket and delta of an interrupted run: the base is the same, or it is told."""
    model = tiny_language_model(40)
    ticket = Ticket.random(dict(ls.canonical_parameters(model)), density=0.3, seed=0, pool=pools.maskable)
    old = with_old_fingerprint(ticket, model)
    snapshot = Snapshot(model, old)
    assert snapshot.selected_elsewhere == []
    assert snapshot.ticket.fingerprint == ticket.fingerprinted(model).fingerprint
    values = {name: values + 1 for name, values in snapshot.originals.items()}
    saved = ls.SparseDelta(old, values, snapshot.originals)
    with torch.no_grad():  # a step that the interrupted run had not taken
        for name in ticket.active_names:
            snapshot.parameters[name][ticket.mask(name)] += 0.5
    snapshot.restore(saved)
    assert all(torch.equal(v, values[name]) for name, v in snapshot.delta().values.items())

    first = ticket.active_names[0]
    other = Ticket(old.sets, old.shapes, {}, {**old.fingerprint, first: "0" * 32})
    with pytest.raises(ValueError, match="was saved for another ticket or another base model"):
        snapshot.restore(ls.SparseDelta(other, values, snapshot.originals))
    snapshot.put_back()
    assert Snapshot(model, other).selected_elsewhere == [first]


def test_the_state_of_an_optimizer_loads():
    model, tickets = nn.Linear(70, 30), []
    for seed in (0, 1):
        tickets.append(Ticket.random(model, density=0.3, seed=seed))
    states = []
    for ticket in tickets:
        state = ls.MaskedAdamW(model, ticket).state_dict()
        old = []
        for index_set in ticket.sets.values():
            bits = bytes(index_set.bitmap().numpy())
            old.append(hashlib.sha256(f"{index_set.n} ".encode() + bits).hexdigest()[:32])
        state["ltp_sparse"] = {"version": 1, "index_sets": old}
        states.append(state)
    ls.MaskedAdamW(model, tickets[0]).load_state_dict(states[0])
    with pytest.raises(ValueError, match="the state was saved for another ticket"):
        ls.MaskedAdamW(model, tickets[0]).load_state_dict(states[1])
    states[0]["ltp_sparse"]["index_sets"] = ["", 3]
    with pytest.raises(ValueError, match="the state was saved for another ticket"):
        ls.MaskedAdamW(model, tickets[0]).load_state_dict(states[0])


def test_tickets_of_two_kinds_know_no_common_base():
    old = Ticket.load(FILES / "ticket.safetensors")
    assert (old | old.fingerprinted(base())).fingerprint == {}
    assert (old | old).fingerprint == old.fingerprint
