"""Large tickets and deltas in shards: read back the same, never mixed with those of another save."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.process_memory import anonymous_peak
from safetensors import safe_open

from ltp_sparse import FileFormatError, SparseDelta, Ticket
from ltp_sparse.cli import kinds
from ltp_sparse.weights import file_shards, files

SHAPES = {f"layer.{number}.weight": torch.Size([40, 100]) for number in range(9)}
LIMIT = 1500  # bytes: of the tickets below, three parameters a shard


def ticket(seed=0) -> Ticket:
    return Ticket.random(SHAPES, density=0.3, seed=seed)


def delta(seed=0) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    return SparseDelta.between(base, tuned, ticket(seed), dense={"head": torch.ones(3)}, metadata={"seed": seed})


def content(found):
    if isinstance(found, Ticket):
        return found.digest(), found.names, found.shapes, found.metadata, found.fingerprint
    parts = (found.values, found.originals, found.dense)
    return content(found.ticket), [{name: t.tolist() for name, t in part.items()} for part in parts], found.metadata


@pytest.mark.parametrize("make", [ticket, delta])
def test_shards_are_read_by_path_index_and_folder(make, tmp_path):
    made, path = make(), tmp_path / "a.safetensors"
    made.save(path, max_shard_size=LIMIT)
    index = tmp_path / "a.safetensors.index.json"
    shards = sorted(file for file in tmp_path.iterdir() if file != index)
    assert len(shards) >= 3 and not path.exists()
    for place in (path, index, tmp_path):
        assert content(type(made).load(place)) == content(made)
        assert place.is_dir() or kinds.kind_of(place) == type(made).__name__.lower().removeprefix("sparse")
    with pytest.raises(FileFormatError, match="pass their folder or index"):
        type(made).load(shards[0])
    with pytest.raises(FileFormatError, match=r"expected an? .*, got a"):
        (Ticket if make is delta else SparseDelta).load(index)
    # as the Hub has them, for readers that know nothing of this library
    described = json.loads(index.read_bytes())
    assert all(shard.name.endswith(f"-{n:05}-of-{len(shards):05}.safetensors") for n, shard in enumerate(shards, 1))
    held = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert sum(t.nbytes for t in tensors.values()) <= LIMIT or len(tensors) == 1
        held |= dict.fromkeys(tensors, shard.name)
    assert described["weight_map"] == held
    made.save(tmp_path / "whole" / "b")
    whole, _ = files.load(tmp_path / "whole" / "b", described[files.KEY]["kind"])
    assert described["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert held.keys() == whole.keys()


class Stop(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("before", [LIMIT, None], ids=["shards", "one file"])
@pytest.mark.parametrize("now", [LIMIT, None], ids=["to shards", "to one file"])
def test_an_interrupted_save_leaves_the_old_or_the_new(before, now, tmp_path, monkeypatch):
    """A save is stopped at every move and every removal of a file. Nothing is ever a mixture."""
    old, new, calls = ticket(1), ticket(2), [0]

    def stopping(function, at):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                raise Stop
            return function(*args, **kwargs)

        return call

    stops = 0
    while True:
        path = tmp_path / str(stops) / "t.safetensors"
        old.save(path, max_shard_size=before)
        calls[0] = 0
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, stopping(getattr(Path, name), stops + 1))
            try:
                new.save(path, max_shard_size=now)
                stopped = False
            except Stop:
                stopped = True
        if not stopped:
            assert Ticket.load(path) == Ticket.load(path.parent) == new
            break
        for place in (path, path.parent):
            try:
                assert Ticket.load(place) in (old, new)
            except FileFormatError as error:  # the file and the index, of the two saves
                assert "is there as well" in str(error) or "expected one ticket" in str(error)
        new.save(path, max_shard_size=now)
        assert Ticket.load(path) == Ticket.load(path.parent) == new
        stops += 1
    assert stops >= (1 if now is None else 4)
    names = os.listdir(path.parent)
    assert len(names) == 1 if now is None else len(names) >= 4
    whole = os.listdir(tmp_path / "0")
    assert sorted(whole) == sorted(names), "the next save removes what an interrupted one has left"


def spoiled(folder: Path, how: str) -> None:
    index = folder / "t.safetensors.index.json"
    shards = sorted(folder.glob("*-of-*"))
    described = json.loads(index.read_bytes())
    if how == "missing":
        shards[1].unlink()
    elif how == "damaged":
        content = bytearray(shards[1].read_bytes())
        content[-3] ^= 4
        shards[1].write_bytes(content)
    elif how == "swapped":
        shards[0].rename(folder / "x")
        shards[1].rename(shards[0])
        (folder / "x").rename(shards[1])
    elif how == "of another save":
        ticket(1).save(folder / "u.safetensors", max_shard_size=LIMIT)
        shutil.copy(sorted(folder.glob("u-*"))[0], shards[0])
        for file in folder.glob("u*"):
            file.unlink()
    elif how == "outside":
        shutil.copy(shards[0], folder.parent / "s")
        described[files.KEY]["shards"]["../s"] = described[files.KEY]["shards"].pop(shards[0].name)
        described["weight_map"] = {
            name: "../s" if shard == shards[0].name else shard for name, shard in described["weight_map"].items()
        }
        del described[files.KEY]["checksum"]
        described[files.KEY]["checksum"] = files.checksum_of(described)
        index.write_text(json.dumps(described))
    elif how == "empty":
        described["weight_map"], described[files.KEY]["shards"] = {}, {}
        del described[files.KEY]["checksum"]
        described[files.KEY]["checksum"] = files.checksum_of(described)
        index.write_text(json.dumps(described))
    else:
        described["weight_map"].popitem()
        index.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is missing"),
        ("damaged", "does not match its content"),
        ("swapped", "belongs to another save"),
        ("of another save", "belongs to another save"),
        ("outside", "outside the folder"),
        ("empty", "its content is not that of a ticket"),
        ("index", "does not match its content"),
    ],
)
def test_damage_of_shards_is_found(how, message, tmp_path):
    ticket().save(tmp_path / "f" / "t.safetensors", max_shard_size=LIMIT)
    spoiled(tmp_path / "f", how)
    with pytest.raises(FileFormatError, match=message):
        Ticket.load(tmp_path / "f")


def test_folders_with_none_or_several_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ticket in this folder"):
        Ticket.load(tmp_path)
    ticket().save(tmp_path / "a.safetensors")
    assert Ticket.load(tmp_path) == ticket()
    ticket(1).save(tmp_path / "b.safetensors", max_shard_size=LIMIT)
    with pytest.raises(FileFormatError, match=r"got a\.safetensors, b\.safetensors\.index\.json; pass one"):
        Ticket.load(tmp_path)


@pytest.mark.parametrize("size", [0, -1, "5", "500MB", "1.5 kb", "5GB", "five", "5TB", True, 3.5])
def test_sizes_are_bytes_or_said_in_units(size, tmp_path):
    if size in ("five", "5TB", 0, -1) or size is True:
        with pytest.raises(ValueError, match="max_shard_size must be bytes"):
            ticket().save(tmp_path / "t", max_shard_size=size)
        assert os.listdir(tmp_path) == []
    else:
        ticket().save(tmp_path / "t", max_shard_size=size)
        assert Ticket.load(tmp_path / "t") == ticket()


@pytest.mark.parametrize("max_shard_size", [None, "20MB"])
def test_loading_takes_one_copy(max_shard_size, tmp_path):
    tensors = {str(number): torch.randint(255, (1 << 24,), dtype=torch.uint8) for number in range(4)}
    file_shards.save(tmp_path / "t", "study", tensors, {}, max_shard_size)
    del tensors
    with anonymous_peak() as peak:
        loaded, _ = file_shards.load(tmp_path / "t", "study")
    size = sum(tensor.nbytes for tensor in loaded.values())
    assert peak[0] < 1.05 * size + (4 << 20)
