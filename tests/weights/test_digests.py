"""Digests: one rule whatever reads the tensor, of bits, dtype and shape; those of earlier versions are compared."""

import hashlib
import struct

import pytest
import torch
import xxhash
from helpers.backends import SLOW_ON_TRITON, threads
from safetensors.torch import save_file
from torch import nn

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.ops import routes
from ltp_sparse.ops.routes import select_topk
from ltp_sparse.ops.sources import TensorSource
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.weights import digests
from ltp_sparse.weights.checkpoints import open_checkpoint


def defined(tensor: torch.Tensor) -> str:
    """The digest by its definition, from a copy of all bits."""
    bits = bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    step = TILE * tensor.element_size()
    tiles = b""
    for at in range(0, len(bits), step):
        tile = bits[at : at + step]
        high_first = xxhash.xxh3_128_digest(tile + bytes(-len(tile) % 1024))
        tiles += struct.pack("<QQ", *reversed(struct.unpack(">QQ", high_first)))
    header = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return "xxh3:" + xxhash.xxh3_128(header + tiles).hexdigest()


def digest_of(tensor):
    return digests.fingerprint({"w": tensor})["w"]


SHAPES = [(0,), (1,), (3, 2), (700, 300), (TILE,), (TILE + 1,), (3, TILE - 1), (40 * TILE + 7,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8], ids=str)
def test_is_that_of_the_definition(dtype):
    for shape in SHAPES:
        tensor = (100 * torch.randn(shape)).to(dtype)
        assert digest_of(tensor) == defined(tensor), shape
        assert digests.digest(tensor.dtype, tensor.shape, tensor.reshape(-1).split(12_345)) == defined(tensor), shape


def test_stays_as_it_is():
    """Files hold these: another value is another format."""
    assert digest_of(torch.arange(100.0).view(4, 25)) == "xxh3:25fa1bb6abbca12b978ffcc8b580a858"
    assert digest_of(torch.arange(3.0).bfloat16()) == "xxh3:8279e931404e0ba77889df3a9975d07c"
    assert ls.Ticket.full({"w": [3]}).sets["w"].digest() == "xxh3:58be61f85e47c3b5bea78b229c375ca1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_same_on_every_route(tmp_path, dtype):
    """In memory, strided, of a module, mapped from a file, and as each kind of selection finds it."""
    base = {"a.weight": torch.randn(700, 300), "b.weight": torch.randn(3 * TILE + 5), "c.weight": torch.randn(2, 3)}
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    tuned = {name: tensor + torch.randn(tensor.shape).to(dtype) for name, tensor in base.items()}
    expected = {name: defined(tensor) for name, tensor in base.items()}
    model = nn.ModuleDict({name[0]: nn.Module() for name in base})
    for name, tensor in base.items():
        model[name[0]].weight = nn.Parameter(tensor.clone())
    strided = {n: t.t().contiguous().t() if t.dim() > 1 else torch.stack([t, t], 1)[:, 0] for n, t in base.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    save_file(base, tmp_path / "base.safetensors")
    on_disk = open_checkpoint(tmp_path / "base.safetensors")

    for what in (base, strided, on_disk, dict(model.named_parameters())):
        assert digests.fingerprint(what) == expected
    assert ls.Ticket.full(base).fingerprinted(model).fingerprint == expected
    for what in (base, strided, model, tmp_path / "base.safetensors"):
        assert ls.select(what, tuned, density=0.5).fingerprint == expected
    assert ls.select(base, tuned, density=0.5, compare_in=torch.bfloat16).fingerprint == expected
    assert ls.select(base, score=tuned, density=0.5).fingerprint == expected
    function = ls.select(base, score=lambda name, start, stop: tuned[name].view(-1)[start:stop], density=0.5)
    assert function.fingerprint == expected


@pytest.mark.parametrize("ks", [[0, 0], [1, 0], [5_000, 5_000], [10**6, 10**6]], ids=str)
@pytest.mark.parametrize("route", ["sample", "histogram", "ties"])
def test_every_way_through_a_selection_finds_them(route, ks, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(n, generator=generator) for n in (3 * TILE + 5, 70_000, 3)]
    moved = [torch.randn(t.shape, generator=generator) for t in base]
    tuned = [b + (m.sign() if route == "ties" else m) for b, m in zip(base, moved, strict=True)]
    found = torch.full((7, 2), -1)
    source = TensorSource(base, tuned, found)
    if route == "ties":  # no room for candidates
        monkeypatch.setattr(routes, "room_for", lambda n: 16)
    passes = backends.resolve(source.device, "topk_delta")
    ks = [min(k, n) for k, n in zip(ks, (base[0].numel() + 3, base[1].numel()), strict=True)]
    select_topk(passes, source, [0, 1, 0], ks, route="histogram" if route == "ties" else route)
    named = dict(zip("abc", base, strict=True))
    assert digests.of_tiles(named, found) == {name: defined(tensor) for name, tensor in named.items()}


@pytest.mark.parametrize("name", SLOW_ON_TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_finds_them(name, dtype):
    base = [torch.randn(n).to(dtype) for n in (1, 255, 257, 511, 513, 4_097, TILE + 1, 0)]
    base.append(torch.randn(3_001).to(dtype)[1:])  # no address of a whole word
    found = torch.full((9, 2), -1)
    source = TensorSource(base, [tensor + 1 for tensor in base], found)
    passes = backends.named(name, source.device)
    select_topk(passes, source, [0] * len(base), [1_000], route="histogram")
    assert found.numpy().tobytes() == b"".join(map(digests.tile_digests, base))


def test_tells_bits_dtypes_and_shapes_apart():
    tensor = torch.randn(700, 300)
    flipped = tensor.clone()
    flipped.view(torch.int32)[-1, -1] ^= 1
    exchanged = tensor.view(-1).clone()
    exchanged[:TILE], exchanged[TILE : 2 * TILE] = tensor.view(-1)[TILE : 2 * TILE], tensor.view(-1)[:TILE]
    others = [flipped, tensor.view(300, 700), tensor.half(), tensor.view(torch.int32), -tensor]
    others += [exchanged.view(700, 300), torch.zeros(5), torch.zeros(6), torch.zeros(0), torch.zeros(1, 5)]
    assert len({digest_of(t) for t in [tensor, *others]}) == 11
    assert digest_of(torch.zeros(3)) != digest_of(-torch.zeros(3))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_on_any_number_of_threads(count):
    tensors = {f"p{i}": torch.randn(i * 700, 7) for i in range(20)} | {"large": torch.randn(70 * TILE + 1)}
    with threads(count):
        assert digests.fingerprint(tensors) == {name: defined(t) for name, t in tensors.items()}


def test_a_device_is_asked_once(monkeypatch):
    """For all its tensors together, none of which is copied to the host."""
    asked = []

    def on_cpu(tensors):
        asked.append(len(tensors))
        assert all(tensor.is_contiguous() for tensor in tensors)
        tiles = bytearray().join(digests.tile_digests(tensor) for tensor in tensors)
        return torch.frombuffer(tiles, dtype=torch.int64).view(-1, 2)

    monkeypatch.setitem(digests.on_device, "cpu", on_cpu)
    tensors = {"a": torch.randn(70_000), "b": torch.randn(30, 20).t(), "c": torch.randn(0)}
    assert digests.fingerprint(tensors) == {name: defined(t) for name, t in tensors.items()}
    assert asked == [3]


# --- of earlier versions ---


def sha256_of(tensor: torch.Tensor) -> str:
    bits = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + bits).hexdigest()[:32]


def test_like_one_of_an_earlier_version(tmp_path):
    tensors = {"a": torch.randn(700, 300), "b": torch.randn(3).half(), "c": torch.randn(40 * TILE + 3)}
    old = {name: sha256_of(tensor) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "f.safetensors")
    for what in (tensors, open_checkpoint(tmp_path / "f.safetensors")):
        assert digests.fingerprint(what, like=old) == old
        mixed = digests.fingerprint(what, like={"a": old["a"], "b": "xxh3:" + "0" * 32})
        assert mixed == {"a": old["a"], "b": defined(tensors["b"]), "c": defined(tensors["c"])}
    assert digests.digest(tensors["a"].dtype, tensors["a"].shape, tensors["a"].split(7), old["a"]) == old["a"]


@pytest.mark.parametrize("unknown", ["", "0" * 31, "0" * 65, "xxh4:" + "0" * 32, "xxh3:", "XXH3:" + "0" * 32, "z" * 32])
def test_unknown_kinds_are_refused(unknown):
    assert not digests.is_known(unknown)
    with pytest.raises(ValueError, match="is no digest that this version of ltp_sparse knows; update it"):
        digests.fingerprint({"a": torch.ones(3)}, like={"a": unknown})
