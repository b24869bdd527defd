"""Slots and their encoded forms."""

import numpy as np
import pytest
import torch
from helpers.bits import bits

from ltp_sparse.sync.encoding import CHANGES, VALUES, decode, encode

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float64]


def any_bits(n, dtype):
    return torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def flipped(slots, share):
    raw = slots.view(torch.uint8).clone()
    at = torch.rand(raw.numel()) < share
    raw[at] ^= torch.randint(1, 256, (int(at.sum()),), dtype=torch.uint8)
    return raw.view(slots.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("n", [0, 1, 300, 70_001])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.03, 0.4, 1.0])
def test_bits_come_back(dtype, n, share):
    earlier = any_bits(n, dtype)
    slots = flipped(earlier, share)
    for known in (earlier, None):
        planes, facts = encode(slots, known)
        out = any_bits(n, dtype)
        decode(planes, facts, known, out)
        assert torch.equal(bits(out), bits(slots))
    planes, facts = encode(slots, earlier)
    decode(planes, facts, earlier, earlier)  # in place
    assert torch.equal(bits(earlier), bits(slots))


def test_the_smallest_form_is_taken():
    values = (0.02 * torch.randn(50_000)).bfloat16()
    few, many, other = values.clone(), values.clone(), torch.full_like(values, 0.5)
    bits(few)[::40] ^= 1
    bits(many)[:] ^= 1 + (torch.rand(50_000) < 0.1).to(torch.int16)
    size = []
    for slots, form in ((few, CHANGES), (many, CHANGES), (other, VALUES)):
        planes, facts = encode(slots, values)
        assert facts["form"] == form
        size.append(sum(plane.numel() for plane in planes.values()))
    assert max(size[0], size[2]) < 100 < size[1] < 10_000


@pytest.mark.parametrize("n", [10, 70_000])
def test_what_does_not_fit_is_refused(n):
    earlier = any_bits(n, torch.int16)
    slots = earlier.clone()
    slots[3], slots[-1] = ~slots[3], ~slots[-1]
    planes, facts = encode(slots, earlier)
    out = torch.empty_like(slots)
    far = np.array([3, n - 4], "<u8").view(np.uint8).reshape(2, 8)
    for change in (
        {"form": "else"},
        {"counts": {"gap": 1, "flip": 2}},
        {"counts": {"gap": 2, "flip": 2**40}},
        {"counts": {"gap": 2.0, "flip": 2}},
        {"counts": {"gap": -1, "flip": -1}},
        {"form": VALUES, "counts": {"value": 2}},
    ):
        with pytest.raises((ValueError, KeyError)):
            decode(planes, {**facts, **change}, earlier, out)
    with pytest.raises(ValueError, match="a change of slot"):
        decode({**planes, **{f"gap.{i}": torch.from_numpy(far[:, i].copy()) for i in range(3)}}, facts, earlier, out)
    with pytest.raises(ValueError, match="without earlier"):
        decode(planes, facts, None, out)
    with pytest.raises(ValueError, match="plane"):
        decode({**planes, "flip.0": torch.zeros(7, dtype=torch.uint8)}, facts, earlier, out)
