"""LT-SFT's files, written here by hand in their layout."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from helpers.tiny_nli import tiny_language_model, tiny_tokenizer

import ltp_sparse as ls
from ltp_sparse.deltas.lt_sft import FILE, read_lt_sft, write_lt_sft
from ltp_sparse.selection import pools
from ltp_sparse.weights.names import canonical_parameters

QUERY = "roberta.encoder.layer.0.attention.self.query.weight"
BIAS = "roberta.encoder.layer.1.output.dense.bias"


@pytest.fixture
def model():
    return tiny_language_model(len(tiny_tokenizer()))


def source_diff(tensor: torch.Tensor, mask: torch.Tensor) -> dict:
    """As LT-SFT encodes a difference: indices of the transposed tensor, delta-coded."""
    transposed = tensor.permute(*reversed(range(tensor.dim()))).reshape(-1)
    flat = mask.permute(*reversed(range(mask.dim()))).reshape(-1)
    indices = flat.nonzero().view(-1)
    steps = indices - torch.cat([torch.zeros(1, dtype=torch.int64), indices[:-1]])
    return {"size": mask.shape, "index_steps": steps.to(torch.int32), "values": transposed[indices]}


def test_a_file_by_hand(tmp_path, model):
    """In a 32 x 32 matrix the entry (row 1, column 0) has number 1, (row 0, column 1) has number 32."""
    diff = {"size": torch.Size([32, 32]), "index_steps": torch.tensor([1, 31], dtype=torch.int32)}
    head = torch.arange(4.0)
    torch.save(
        {"diffs": {QUERY: {**diff, "values": torch.tensor([0.5, -0.25])}}, "abs": {"head": head}}, tmp_path / FILE
    )
    delta = read_lt_sft(tmp_path, model)
    query = canonical_parameters(model)[QUERY].detach()
    assert delta.ticket.mask(QUERY).nonzero().tolist() == [[0, 1], [1, 0]]
    assert torch.equal(delta.values[QUERY], torch.stack([query[0, 1] - 0.25, query[1, 0] + 0.5]))
    assert torch.equal(delta.dense["head"], head)


def test_reading_applying_and_writing_back(tmp_path, model):
    generator = torch.Generator().manual_seed(0)
    parameters = canonical_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    diffs, expected = {}, {}
    for name in (QUERY, BIAS, "roberta.embeddings.word_embeddings.weight"):
        moved = torch.randn(before[name].shape, generator=generator)
        mask = torch.rand(before[name].shape, generator=generator) < 0.1
        diffs[name] = source_diff(moved, mask)
        expected[name] = torch.where(mask, before[name] + moved, before[name])
    torch.save({"diffs": diffs, "abs": {}}, tmp_path / FILE)
    delta = read_lt_sft(tmp_path / FILE, model)
    delta.apply(model)
    for name, tensor in expected.items():
        assert torch.equal(parameters[name], tensor), name
    delta.revert(model)
    write_lt_sft(delta, tmp_path / "copy.bin")
    written = torch.load(tmp_path / "copy.bin", weights_only=True)["diffs"]
    for name, diff in diffs.items():
        assert torch.equal(written[name]["index_steps"], diff["index_steps"])
        torch.testing.assert_close(written[name]["values"], diff["values"], atol=1e-6, rtol=1e-5)
    again = read_lt_sft(tmp_path / "copy.bin", model)
    assert again.ticket == delta.ticket
    delta.save(tmp_path / "ours.safetensors")
    assert ls.SparseDelta.load(tmp_path / "ours.safetensors").ticket == delta.ticket


def test_entries_that_did_not_move_are_left_out(tmp_path, model):
    ticket = ls.Ticket.random(model, density=0.1, seed=0, pool=pools.maskable)
    delta = ls.SparseDelta.between(model, model, ticket)
    delta.values[QUERY] = delta.values[QUERY].clone()
    delta.values[QUERY][:2] += torch.tensor([1.0, 5e-8])
    write_lt_sft(delta, tmp_path)
    written = torch.load(tmp_path / FILE, weights_only=True)["diffs"]
    assert {name: len(diff["values"]) for name, diff in written.items() if len(diff["values"])} == {QUERY: 1}


def test_sizes_of_numpy_numbers(tmp_path, model):
    diff = source_diff(torch.ones(32, 32), torch.eye(32, dtype=torch.bool))
    diff["size"] = tuple(np.int64(n) for n in diff["size"])
    torch.save({"diffs": {QUERY: diff}, "abs": {}}, tmp_path / FILE)
    assert read_lt_sft(tmp_path, model).ticket.k == 32


def test_a_pickle_that_runs_code_is_refused(tmp_path, model):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    for content in ({"diffs": {QUERY: Evil()}}, Evil()):
        torch.save(content, tmp_path / FILE)
        with pytest.raises(ValueError, match="not a readable file of tensors and numbers"):
            read_lt_sft(tmp_path, model)
    (tmp_path / FILE).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a readable file"):
        read_lt_sft(tmp_path, model)
    assert not (tmp_path / "pwned").exists()


def good(**changes):
    return {**source_diff(torch.ones(32, 32), torch.eye(32, dtype=torch.bool)), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict with 'diffs' and 'abs' as LT-SFT writes it, got list"),
        ({"diffs": {"bert.query": good()}}, "read_lt_sft: no name of the ticket is in the model"),
        ({"diffs": {QUERY: good(size=torch.Size([16, 64]))}}, r"has shape \[16, 64\], in the model \[32, 32\]"),
        ({"diffs": {QUERY: good(values=torch.ones(31))}}, "32 indices and 31 values"),
        (
            {"diffs": {QUERY: good(index_steps=torch.tensor([-1, *[1] * 31]))}},
            "indices must ascend from 0 to below 1,024",
        ),
        ({"diffs": {QUERY: good(index_steps=torch.tensor([5, 0, *[1] * 30]))}}, "indices must ascend"),
        ({"diffs": {QUERY: good(index_steps=torch.full((32,), 33))}}, "indices must ascend"),
        ({"diffs": {QUERY: good(values=torch.full((32,), float("nan")))}}, "a value is NaN or infinite"),
        ({"diffs": {QUERY: {"size": torch.Size([2])}}}, "expected size, index_steps and values"),
    ],
)
def test_damaged_files(tmp_path, model, content, message):
    torch.save(content, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        read_lt_sft(tmp_path, model)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable file"):
        read_lt_sft(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="expected pytorch_diff.bin of LT-SFT"):
        read_lt_sft(tmp_path / "none", model)


def test_indices_above_int32():
    """A tensor of more than 2^31 entries has steps that add up to more than an int32 holds."""
    from ltp_sparse.deltas.lt_sft import _decoded

    size = torch.Size([70_000, 70_000])
    steps = torch.full((4,), 2**30, dtype=torch.int32)
    indices, deltas, _ = _decoded({"size": size, "index_steps": steps, "values": torch.arange(4.0)}, "x")
    columns = [2**30 * (i + 1) for i in range(4)]
    rows = sorted((c % 70_000 * 70_000 + c // 70_000, float(i)) for i, c in enumerate(columns))
    assert indices.tolist() == [index for index, _ in rows] and deltas.tolist() == [value for _, value in rows]
