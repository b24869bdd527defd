"""Tickets and deltas on the Hub, against a stand-in of its HTTP surface."""

from functools import partialmethod

import pytest
import torch
from helpers.hub_stand_in import here
from torch import nn

import ltp_sparse as ls


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with here(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))


@pytest.fixture
def ticket(model):
    return ls.Ticket.random(model, density=0.2, seed=0).fingerprinted(model)


@pytest.fixture
def delta(model, ticket):
    tuned = {name: p.detach() + 1 for name, p in model.named_parameters()}
    return ls.SparseDelta.between(model, tuned, ticket, metadata={"method": "ltp", "seed": 3, "epoch": 2.0})


def test_a_ticket_comes_back_with_its_commit(hub, ticket):
    pushed = ticket.push_to_hub("owner/en", base="xlm-roberta-base@abc", data="a | b", private=True)
    name, _, commit = pushed.partition("@")
    assert name == "owner/en" and list(hub.repositories["owner/en"].commits)[-1] == commit
    assert hub.repositories["owner/en"].private
    for found in (ls.Ticket.from_hub("owner/en"), ls.load("owner/en"), ls.load(pushed)):
        assert found == ticket and found.fingerprint == ticket.fingerprint
        assert found.metadata == {**ticket.metadata, "hub": pushed}


def test_the_card_says_base_density_method_data_scores_and_use(hub, delta, ticket):
    rows = [{"task": "mine", "metric": "accuracy", "scores": {"ace": 0.5}, "largest_class": {"ace": 0.25}}]
    delta.push_to_hub("owner/delta", base="a/b", data="a | b", scores=rows)
    ticket.push_to_hub("owner/ticket")
    card = hub.repositories["owner/delta"].commits[hub.repositories["owner/delta"].refs["main"]]["README.md"].decode()
    assert card.startswith('---\nlibrary_name: ltp_sparse\nbase_model: "a/b"\ntags: [ltp_sparse, delta]\n---\n')
    for line in (
        "| base model | a/b |",
        f"| active | {delta.ticket.k:,} of {delta.ticket.n:,} entries (0.2 of them) |",
        "| method | ltp |",
        "| data | a \\| b |",
        "| seed | 3 |",
        "| mine | accuracy | ace | 0.5000 | 0.2500 |",
        'delta = ls.load("owner/delta")',
    ):
        assert line in card
    card = hub.repositories["owner/ticket"].commits[hub.repositories["owner/ticket"].refs["main"]]["README.md"].decode()
    assert 'ticket = ls.load("owner/ticket")' in card and "base_model:" not in card and "| method | random |" in card


def test_a_delta_gives_the_tuned_bits_on_another_machine(hub, delta, model):
    pushed = delta.push_to_hub("owner/delta")
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    delta.apply(model)
    tuned = {name: p.detach().clone() for name, p in model.named_parameters()}
    delta.revert(model)
    found = ls.load("owner/delta")
    assert found.metadata["hub"] == pushed
    found.apply(model)
    assert all(torch.equal(p, tuned[name]) for name, p in model.named_parameters())
    found.revert(model)
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_shards_load_and_travel_as_one_file_does(hub, ticket, delta, tmp_path, monkeypatch):
    for held, name in ((ticket, "ticket.safetensors"), (delta, "delta.safetensors")):
        monkeypatch.setattr(type(held), "save", partialmethod(type(held).save, max_shard_size=1))
        held.save(tmp_path / name / name)
        held.push_to_hub(f"owner/{name}")
        index = tmp_path / name / f"{name}.index.json"
        for place in (tmp_path / name / name, index, tmp_path / name, f"owner/{name}"):
            found = ls.load(place)
            assert type(found) is type(held) and getattr(found, "ticket", found) == ticket
        (tmp_path / name / name).write_bytes(b"an older save")
        with pytest.raises(ls.FileFormatError, match="is there as well"):
            ls.load(tmp_path / name / name)


def test_a_revision_of_what_is_here_is_refused(ticket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ticket.save(tmp_path / "owner" / "en" / "ticket.safetensors")
    assert ls.load("owner/en") == ticket
    with pytest.raises(ValueError, match="a local file or folder, which has no revision 'v1'"):
        ls.load("owner/en", revision="v1")


@pytest.mark.slow
def test_revisions(hub, model, ticket):
    first = ticket.push_to_hub("owner/en")
    other = ls.Ticket.random(model, density=0.1, seed=1)
    second = other.push_to_hub("owner/en")
    hub.repositories["owner/en"].refs["v1"] = first.partition("@")[2]
    assert ls.load("owner/en") == other and ls.load("owner/en").metadata["hub"] == second
    for asked in ("owner/en@v1", first):
        assert ls.load(asked) == ticket and ls.load(asked).metadata["hub"] == first
    assert ls.Ticket.from_hub("owner/en", revision="v1") == ticket
    with pytest.raises(FileNotFoundError, match="owner/en: it has no revision 'v2'"):
        ls.load("owner/en@v2")
    with pytest.raises(ValueError, match="two revisions: 'owner/en@v1' and 'main'; pass one of them"):
        ls.load("owner/en@v1", revision="main")


def test_without_a_network_the_cache_serves(hub, ticket, monkeypatch):
    pushed = ticket.push_to_hub("owner/en")
    ls.load("owner/en")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    for address in ("owner/en", pushed):
        assert ls.load(address) == ticket and ls.load(address).metadata["hub"] == pushed
    assert len(hub.requests) == asked
    with pytest.raises(FileNotFoundError, match="owner/other: not completely in the cache, and .*not answer"):
        ls.load("owner/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert ls.load("owner/en") == ticket
    with pytest.raises(OSError, match="owner/en: error of the Hub at http://127.0.0.1:9"):
        ticket.push_to_hub("owner/en")


def test_what_is_not_there_is_one_clear_error(hub, ticket, delta, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="owner/none: no such repository on .*, or your token cannot"):
        ls.load("owner/none")
    for wrong in ("./none", "none", "a/b/c.safetensors", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no such file or folder, and no repository of the Hub"):
            ls.load(wrong)
    with pytest.raises(ValueError, match="expected a repository of the Hub, owner/name or .*, got 'a b/c'"):
        ls.load("a b/c")
    hub.add("owner/foreign", {"config.json": b"{}", "model.safetensors": b"x" * 100})
    with pytest.raises(
        ls.FileFormatError, match=r"owner/foreign@\w{40}: expected one of ticket .* it holds config.json"
    ):
        ls.load("owner/foreign")
    assert not any("resolve" in request for request in hub.requests)  # nothing of it was downloaded
    with pytest.raises(ls.FileFormatError, match="owner/foreign: expected one of"):
        ticket.push_to_hub("owner/foreign")
    delta.push_to_hub("owner/delta")
    with pytest.raises(ls.FileFormatError, match="it holds a delta; push the ticket to a repository of its own"):
        ticket.push_to_hub("owner/delta")
    with pytest.raises(ls.FileFormatError, match="expected a ticket, but it holds a delta"):
        ls.Ticket.from_hub("owner/delta")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(OSError, match="owner/en: .*(401|token)"):
        ticket.push_to_hub("owner/en")


@pytest.mark.parametrize("harm", ["bits", "short", "foreign", "delta"])
def test_damaged_repositories_are_one_clear_error(harm, hub, ticket, tmp_path):
    ticket.save(tmp_path / "t")
    content = (tmp_path / "t").read_bytes()
    if harm == "short":
        hub.add("owner/en", {"ticket.safetensors": content})
        hub.damage = lambda path, body: body[:-7]
    else:
        wrong = {"bits": content[:-1] + b"\x55", "foreign": b"{}", "delta": content.replace(b"ticket", b"deltas")}
        hub.add("owner/en", {"ticket.safetensors": wrong[harm]})
    with pytest.raises((ls.FileFormatError, OSError)) as error:
        ls.load("owner/en")
    assert "ticket.safetensors" in str(error.value) or "owner/en: the Hub" in str(error.value)
    assert str(error.value).count("\n") == 0


def test_files_and_folders_load_by_what_they_hold(ticket, delta, model, tmp_path):
    from ltp_sparse.deltas.lt_sft import write_lt_sft

    ticket.save(tmp_path / "any-name")
    delta.save(tmp_path / "other")
    assert ls.load(tmp_path / "any-name") == ticket and isinstance(ls.load(str(tmp_path / "other")), ls.SparseDelta)
    (tmp_path / "both").mkdir()
    with pytest.raises(ls.FileFormatError, match="it holds nothing"):
        ls.load(tmp_path / "both")
    ticket.save(tmp_path / "both" / "ticket.safetensors")
    assert ls.load(tmp_path / "both") == ticket and "hub" not in ls.load(tmp_path / "both").metadata
    delta.save(tmp_path / "both" / "delta.safetensors")
    with pytest.raises(ls.FileFormatError, match="it holds ticket and delta; keep one"):
        ls.load(tmp_path / "both")
    (tmp_path / "lt-sft").mkdir()
    write_lt_sft(delta, tmp_path / "lt-sft")
    with pytest.raises(ValueError, match="this LT-SFT delta has differences only; pass its base model"):
        ls.load(tmp_path / "lt-sft")
    assert ls.load(tmp_path / "lt-sft", model=model).ticket == delta.ticket
    (tmp_path / "text").write_text("no")
    with pytest.raises(ls.FileFormatError):
        ls.load(tmp_path / "text")
