"""Publisher and follower: equal bits at every version, and what is refused."""

import copy
import gc
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.bits import assert_same, bits, weights
from torch import nn

import ltp_sparse as ls
from ltp_sparse.sync import FolderStore, Follower, FsspecStore, Publisher, open_store, records, stores
from ltp_sparse.weights.reading import FileFormatError


class Tiny(nn.Module):
    """Two dtypes, a tied weight, a scalar, a parameter without active entries."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(70, 20, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(nn.Linear(20, 20, dtype=torch.bfloat16) for _ in range(2))
        self.norm = nn.LayerNorm(20)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(20, 70, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight


@pytest.fixture
def pair():
    """A model, and a copy for a follower."""
    torch.manual_seed(3)
    model = Tiny()
    return model, copy.deepcopy(model)


def ticket_of(model):
    return ls.Ticket.random(model, density=0.2, seed=1, pool=r"layers|embed|norm\.weight|scale")


@torch.no_grad()
def train(model, ticket, step, share=0.3):
    """Any bits at some of the active entries, signs of zeros among them."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in ls.canonical_parameters(model).items():
        if name in ticket.sets and ticket.sets[name].k:
            at = ticket.indices(name)
            at = at[torch.rand(len(at), generator=generator) < share]
            new = torch.randn(len(at), generator=generator).mul_(0.02).to(parameter.dtype)
            new[::3] = -0.0 if step % 2 else 0.0
            parameter.view(-1)[at] = new


@pytest.mark.parametrize("static", [True, False], ids=["ticket", "diff"])
def test_a_follower_has_the_bits_of_every_version(pair, tmp_path, static):
    model, served = pair
    ticket = ticket_of(model)
    publisher = Publisher(model, ticket if static else None, tmp_path)
    follower = Follower(served, tmp_path)
    assert follower.follow() is None and follower.version is None
    for step in range(6):
        before = weights(served)
        published = publisher.publish()
        version = follower.follow()
        assert (published.number, version.number, follower.version) == (step, step, step)
        assert_same(weights(served), weights(model))
        assert version.base == published.base == (step - 1 if step else None)
        for change in version.changes():
            flat, old = ls.canonical_parameters(served)[change.name].detach().view(-1), before[change.name].view(-1)
            assert torch.equal(bits(flat[change.indices]), bits(change.values))
            assert bool((bits(old[change.indices]) != bits(change.values)).all())
            old[change.indices] = change.values
        assert_same(before, weights(model))
        assert follower.follow() is None
        train(model, ticket, step)
    assert sum(name.startswith("ticket") for name in FolderStore(tmp_path).names()) == 1


def test_a_change_of_sign_of_zero_is_a_change(pair, tmp_path):
    model, served = pair
    with torch.no_grad():
        model.layers[0].bias.zero_(), served.layers[0].bias.zero_()
    publisher, follower = Publisher(model, None, tmp_path), Follower(served, tmp_path)
    publisher.publish(), follower.follow()
    with torch.no_grad():
        model.layers[0].bias[4] = -0.0
    (change,) = publisher.publish().changes()
    assert (change.name, change.indices.tolist()) == ("layers.0.bias", [4])
    follower.follow()
    assert bool(served.layers[0].bias[4].signbit())


def test_versions_without_a_change_are_small(pair, tmp_path):
    model, served = pair
    publisher, follower = Publisher(model, None, tmp_path), Follower(served, tmp_path)
    publisher.publish(), follower.follow()
    version = publisher.publish()
    assert version.nbytes < 2000 and not list(version.changes())
    assert follower.follow().number == 1


def test_newcomers_and_laggards_begin_at_anchors_and_old_versions_go(pair, tmp_path):
    model, served = pair
    late, ticket = copy.deepcopy(served), ticket_of(model)
    publisher = Publisher(model, ticket, tmp_path, anchor_every=4, keep=2)
    follower = Follower(served, tmp_path)
    publisher.publish(), follower.follow()
    for step in range(1, 20):
        train(model, ticket, step)
        publisher.publish()
    there = stores.FolderStore(tmp_path).names()
    assert sorted(name for name in there if name.endswith(".json")) == [f"v{v:012d}.json" for v in range(12, 20)]
    assert sorted(name for name in there if "anchor" in name) == [f"v{v:012d}-anchor-0.safetensors" for v in (12, 16)]
    assert len([name for name in there if "changes" in name]) == 8
    assert follower.follow().base == 0  # across versions that are gone
    Follower(late, tmp_path).follow()
    assert_same(weights(served), weights(model))
    assert_same(weights(late), weights(model))


def test_neither_side_grows(pair, tmp_path):
    model, served = pair
    ticket = ticket_of(model)
    publisher, follower = Publisher(model, ticket, tmp_path, anchor_every=3, keep=1), Follower(served, tmp_path)

    def run(steps):
        for step in steps:
            train(model, ticket, step)
            publisher.publish(), follower.follow()
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), len(FolderStore(tmp_path).names())

    assert run(range(12)) == run(range(12, 24))


def test_models_may_move(pair, tmp_path):
    """`.to` gives parameters new memory, and so do loaders that assign."""
    model, served = pair
    ticket = ticket_of(model)
    publisher, follower = Publisher(model, ticket, tmp_path), Follower(served, tmp_path)
    for step in range(4):
        assert publisher.publish().base == (0 if step == 1 else 2 if step == 3 else None)
        assert follower.follow() is not None
        assert_same(weights(served), weights(model))
        for moved, when in ((model, 1), (served, 2)):
            if step == when:
                for parameter in moved.parameters():
                    parameter.data = parameter.data.clone()
        train(model, ticket, step)


def test_numbers_are_integers_of_any_kind(pair, tmp_path):
    publisher = Publisher(pair[0], None, tmp_path)
    for number in (np.int64(0), True, torch.tensor(2)):
        publisher.publish(number)
    assert Follower(pair[1], tmp_path).follow().number == 2 and type(publisher.version) is int
    for wrong in ("3", 3.0):
        with pytest.raises(TypeError, match="integer"):
            publisher.publish(wrong)


def test_numbers_ascend(pair, tmp_path):
    publisher = Publisher(pair[0], None, tmp_path)
    publisher.publish(10)
    for number in (10, 3, -1, 10**12):
        with pytest.raises(ValueError, match="expected a version above 10"):
            publisher.publish(number)
    assert publisher.publish(17).base == 10 and publisher.publish().number == 18


def test_a_publisher_that_was_killed_continues_with_an_anchor(pair, tmp_path):
    model, served = pair
    ticket, follower = ticket_of(model), Follower(served, tmp_path)
    publisher = Publisher(model, ticket, tmp_path)
    publisher.publish(5), publisher.publish(6), follower.follow()
    train(model, ticket, 1)
    for name in ("v000000000007-changes-0.safetensors", "v000000000003-anchor-2.safetensors"):
        (tmp_path / name).write_bytes(b"cut")  # without a marker: what a kill leaves
    assert follower.follow() is None
    again = Publisher(model, ticket, tmp_path)
    assert again.version == 6 and not list(tmp_path.glob("v*[37]-*"))
    version = again.publish()
    assert (version.number, version.base) == (7, None)
    with pytest.raises(ValueError, match="another one has written to the store"):
        publisher.publish(8)
    assert follower.follow().base == 6
    assert_same(weights(served), weights(model))


def test_other_models_and_tickets_are_refused(pair, tmp_path):
    model, served = pair
    ticket = ticket_of(model)
    Publisher(model, ticket, tmp_path).publish()
    with pytest.raises(ValueError, match="has versions of another ticket"):
        Publisher(model, None, tmp_path)
    before = weights(served)
    frozen = copy.deepcopy(served)
    with torch.no_grad():
        frozen.norm.bias[3] += 1
    wrong = {"norm.bias": frozen, "layers.0.weight": copy.deepcopy(served).float()}
    for name, other in wrong.items():
        with pytest.raises(ValueError, match=name if name == "norm.bias" else "in its dtype"):
            Follower(other, tmp_path).follow()
    with pytest.raises(ValueError, match="no weight .*of shape"):
        Follower(nn.Linear(3, 3), tmp_path).follow()
    with pytest.raises(ValueError, match="has no weight 'norm.bias'"):
        Follower({n: p for n, p in before.items() if n != "norm.bias"}, tmp_path).follow()
    Follower(served, tmp_path).follow()
    assert_same(before, weights(served))


def test_changes_outside_the_ticket_are_found_at_anchors(pair, tmp_path):
    model, _ = pair
    publisher = Publisher(model, ticket_of(model), tmp_path, anchor_every=2)
    publisher.publish()
    with torch.no_grad():
        model.norm.bias[0] += 1
    publisher.publish()
    with pytest.raises(RuntimeError, match="'norm.bias' outside the ticket have changed"):
        publisher.publish()
    assert publisher.version == 1


def test_what_an_optimizer_trains_is_published(pair, tmp_path):
    model, served = pair
    ticket = ticket_of(model)
    opt = ls.MaskedAdamW(model, ticket, lr=0.01, dense=[model.norm.bias])
    with pytest.raises(ValueError, match="trains 'norm.bias' in full"):
        Publisher(opt, ticket, tmp_path)
    publisher = Publisher(opt, ticket | ls.Ticket.full(model, pool=r"norm\.bias"), tmp_path)
    publisher.publish()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    publisher.publish()
    Follower(served, tmp_path).follow()
    assert_same(weights(served), weights(model))


def test_an_optimizer_stands_for_all_of_its_model(pair, tmp_path):
    model, served = pair
    ticket = ls.Ticket.random(model, density=0.2, seed=1, pool="layers")
    publisher = Publisher(ls.MaskedAdamW(model, ticket, lr=0.01), ticket, tmp_path, anchor_every=1)
    publisher.publish()
    with torch.no_grad():
        served.embed.weight[0, 0] += 1  # in no tensor that the optimizer trains
        model.norm.bias[0] += 1
    with pytest.raises(ValueError, match=r"'embed.weight' differs"):
        Follower(served, tmp_path).follow()
    with pytest.raises(RuntimeError, match=r"'norm.bias' outside the ticket"):
        publisher.publish()


@pytest.mark.parametrize("named", [False, True], ids=["module", "mapping"])
def test_weights_that_were_replaced_are_refused(pair, tmp_path, named):
    sides = [dict(side.named_parameters()) if named else side for side in pair]
    publisher, follower = Publisher(sides[0], None, tmp_path), Follower(sides[1], tmp_path)
    publisher.publish(), follower.follow()
    train(pair[0], ls.Ticket.full(pair[0]), 0)
    publisher.publish()
    for side, model in zip(sides, pair, strict=True):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        side.update(state) if named else side.load_state_dict(state, assign=True)
    for act in (publisher.publish, follower.follow):
        with pytest.raises(ValueError, match="has been replaced in the model since"):
            act()


def test_models_of_another_dtype_are_refused(pair, tmp_path):
    publisher, follower = Publisher(pair[0], None, tmp_path), Follower(pair[1], tmp_path)
    publisher.publish(), follower.follow(), publisher.publish()
    for side, act, who in zip(pair, (publisher.publish, follower.follow), ("Publisher", "Follower"), strict=True):
        side.half()
        with pytest.raises(ValueError, match=rf"{who}: 'scale' was torch.float32 .* is torch.float16 now"):
            act()


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(pair, tmp_path):
    """Versions 0 to 3 of a model, a follower at version 1, and its bits."""
    model, served = pair
    ticket, follower = ticket_of(model), Follower(served, tmp_path / "s")
    publisher = Publisher(model, ticket, tmp_path / "s")
    for step in range(4):
        publisher.publish()
        if step == 1:
            follower.follow()
        train(model, ticket, step)
    return tmp_path / "s", follower, weights(served)


def refused(store, match):
    path, follower, before = store
    model = {name: follower._tensors[name] for name in before}
    with pytest.raises(FileFormatError, match=match):
        follower.follow()
    assert follower.version == 1
    assert_same(before, model)


CHANGES = "v000000000003-changes-0.safetensors"
MARKER = "v000000000003.json"


@pytest.mark.parametrize("name", [CHANGES, "v000000000002-changes-0.safetensors"])
def test_a_missing_part_is_refused(store, name):
    (store[0] / name).unlink()
    refused(store, f"{name}.*missing")


def test_a_gap_is_refused(store):
    (store[0] / "v000000000002.json").unlink()
    refused(store, "version 3 is based on version 2, which is missing")


@pytest.mark.parametrize("name", [CHANGES, MARKER])
@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_damage_is_refused(store, name, damage):
    path = store[0] / name
    content = bytearray(path.read_bytes())
    if damage == "other":
        content = bytearray((store[0] / name.replace("3", "2")).read_bytes())
    elif damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)
    refused(store, name)


def test_a_record_of_other_weights_is_refused(store, tmp_path):
    """Whole, with right checksums, and wrong: what a mistake of a program leaves."""
    other = Tiny()
    ticket = ticket_of(other)
    publisher = Publisher(other, ticket, tmp_path / "other")
    for step in range(4):
        publisher.publish()
        train(other, ticket, 10 + step)
    shutil.copy(tmp_path / "other" / CHANGES, store[0] / CHANGES)
    run = records.read_marker(FolderStore(store[0]), 3).run
    marker = records.read_marker(FolderStore(tmp_path / "other"), 3)
    records.write_marker(FolderStore(store[0]), replace(marker, run=run))
    refused(store, "damaged: the values of")


def test_a_model_that_others_changed_is_refused_and_a_new_follower_is_not(store):
    path, follower, before = store
    name = "layers.0.weight"
    at = int(ls.Ticket.load(next(path.glob("ticket*"))).indices(name)[0])
    with torch.no_grad():
        follower._tensors[name].view(-1)[at] += 1
    with pytest.raises(ValueError, match=f"entries of '{name}' are not those of version 1: other code has"):
        follower.follow()
    again = Follower(dict(follower._tensors), path)
    assert again.follow().number == 3


def test_a_store_that_was_replaced_is_refused(store, pair, tmp_path):
    path, follower, _ = store
    follower.follow()
    before, kept = weights(pair[1]), {file.name: file.read_bytes() for file in path.iterdir()}
    shutil.rmtree(path)
    assert follower.follow() is None
    publisher = Publisher(pair[0], ticket_of(pair[0]), path, keep=1, anchor_every=1)
    for number in (1, 3, 4):  # at 4 nothing is left of version 3
        publisher.publish(number)
        with pytest.raises(ValueError, match="of another run than this model's version 3: the store was replaced"):
            follower.follow()
    shutil.rmtree(path), path.mkdir()
    for name, content in kept.items():
        (path / name).write_bytes(content)
    (path / MARKER).unlink()
    with pytest.raises(ValueError, match="newest version in .* is 2, this model is at 3"):
        follower.follow()
    train(pair[0], ticket_of(pair[0]), 99)
    Publisher(pair[0], ticket_of(pair[0]), path).publish(3)
    with pytest.raises(ValueError, match="version 3 in .* is not the one that this model is at"):
        follower.follow()
    assert_same(before, weights(pair[1]))
    assert Follower(pair[1], path).follow().number == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_follow_leaves_the_old_bits(store, monkeypatch, error):
    from ltp_sparse.deltas import entries

    path, follower, before = store
    write, calls = entries.masked_scatter_, []

    def interrupted(*arguments):
        write(*arguments)
        calls.append(1)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(entries, "masked_scatter_", interrupted)
    with pytest.raises(error):
        follower.follow()
    assert_same(before, {name: follower._tensors[name].detach() for name in before})
    monkeypatch.undo()
    assert follower.version == 1 and follower.follow().number == 3


def test_an_interrupted_publication_is_none(pair, tmp_path, monkeypatch):
    model, served = pair
    publisher, follower = Publisher(model, None, tmp_path), Follower(served, tmp_path)
    publisher.publish(), follower.follow()
    write = FolderStore.write
    for suffix in (".safetensors", ".json"):

        def full(self, name, content, suffix=suffix):
            if name.endswith(suffix):
                raise OSError(28, "full")
            write(self, name, content)

        monkeypatch.setattr(FolderStore, "write", full)
        with pytest.raises(OSError, match="full"):
            publisher.publish()
        monkeypatch.undo()
        assert publisher.version == 0 and follower.follow() is None
    train(model, ls.Ticket.full(model), 1)
    publisher.publish(), follower.follow()
    assert_same(weights(served), weights(model))


def test_a_read_that_meets_a_removal_starts_again(pair, tmp_path, monkeypatch):
    model, served = pair
    publisher, follower = Publisher(model, None, tmp_path, anchor_every=2, keep=1), Follower(served, tmp_path)
    publisher.publish(), follower.follow(), publisher.publish()
    read, met = FolderStore.read, []

    def slow(self, name):
        if not met and "changes" in name:
            met.append(publisher.publish())  # an anchor: version 1 goes while it is read
        return read(self, name)

    monkeypatch.setattr(FolderStore, "read", slow)
    assert follower.follow().number == 2 and met


# --- stores -----------------------------------------------------------------------------------------------------------


def test_fsspec(pair, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    model, served = pair
    url = "memory://weights/run-1"
    publisher, follower = Publisher(model, None, url, anchor_every=2, keep=1), Follower(served, url)
    assert follower.follow() is None
    for step in range(5):
        train(model, ls.Ticket.full(model), step)
        publisher.publish(), follower.follow()
        assert_same(weights(served), weights(model))
    memory = fsspec.filesystem("memory")
    assert len(memory.ls("/weights/run-1")) == 4  # ticket, changes, anchor, marker
    assert Follower(copy.deepcopy(served), FsspecStore(memory, "/weights/run-1")).follow().number == 4
    assert isinstance(open_store(f"file://{tmp_path}"), FolderStore)
    assert open_store("~/run").folder.is_absolute()
    with pytest.raises(FileNotFoundError):
        open_store(url).read("nothing")
    open_store(url).remove("nothing")


def test_wrong_calls(pair, tmp_path):
    model, _ = pair
    with pytest.raises(TypeError, match="expected a folder, a URL or a store"):
        Publisher(model, None, 3)
    with pytest.raises(TypeError, match="expected a model, a mapping from names to tensors or a MaskedAdamW"):
        Publisher(torch.optim.SGD(model.parameters()), None, tmp_path)
    with pytest.raises(ValueError, match="anchor_every must be at least 1"):
        Publisher(model, None, tmp_path, anchor_every=0)
    with pytest.raises(ValueError, match="of the ticket is in the model|are not in the model"):
        Publisher(model, ls.Ticket.full({"x": [3]}), tmp_path)
    with pytest.raises(ValueError, match=r"'norm.bias' has shape \[20\] in the model, \[21\]"):
        Publisher(model, ls.Ticket.full({"norm.bias": [21]}), tmp_path)


def test_markers_are_json(pair, tmp_path):
    Publisher(pair[0], None, tmp_path).publish(12)
    marker = json.loads((tmp_path / "v000000000012.json").read_text())
    assert (marker["version"], marker["base"], marker["changes"]) == (12, None, [])
    assert [part["name"] for part in marker["anchor"]] == ["v000000000012-anchor-0.safetensors"]
