"""SHiRA adapters: PEFT loads what is written, what PEFT writes is read, and the weights are equal bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ltp_sparse as ls
from ltp_sparse.deltas.shira import CONFIG, WEIGHTS, read_shira, write_shira

peft = pytest.importorskip("peft")

LINEAR = ("0.weight", "2.weight")


def base(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 32)).to(dtype)


def tuned(model: nn.Module) -> dict:
    return {name: p.detach() + 0.05 * torch.randn_like(p) for name, p in model.named_parameters()}


def delta_of(model, density=0.15):
    ticket = ls.Ticket.random(model, density=density, seed=1, pool=lambda name: name in LINEAR)
    return ls.SparseDelta.between(model, tuned(model), ticket)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_merges_what_is_written_to_the_bits_of_apply(dtype, tmp_path):
    delta = delta_of(base(dtype))
    assert write_shira(delta, tmp_path / "a", base="owner/base") == 0
    wrapped = peft.PeftModel.from_pretrained(base(dtype), tmp_path / "a")
    assert wrapped.peft_config["default"].peft_type == "SHIRA"
    merged = weights(wrapped.merge_and_unload())
    model = base(dtype)
    delta.apply(model)
    assert all(torch.equal(merged[name], value) for name, value in weights(model).items())
    assert any(not torch.equal(merged[name], value) for name, value in weights(base(dtype)).items())


def test_what_is_written_is_read_again(tmp_path):
    model = base()
    delta = delta_of(model)
    write_shira(delta, tmp_path / "a")
    found = ls.load(tmp_path / "a", model=model)
    assert found.ticket == delta.ticket and found.ticket.fingerprint.keys() == set(LINEAR)
    for name in LINEAR:
        assert torch.equal(found.values[name], delta.values[name])
        assert torch.equal(found.originals[name], delta.originals[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_writes_is_read_to_the_bits_of_its_merge(dtype, tmp_path):
    """And the LayerNorm that it saves as a whole, as it does with a classifier."""
    config = peft.ShiraConfig(r=2, target_modules=["0", "2"], modules_to_save=["1"], init_weights=False, random_seed=3)
    wrapped = peft.get_peft_model(base(dtype), config)
    with torch.no_grad():
        wrapped.base_model.model[1].modules_to_save["default"].bias.add_(1)
    wrapped.save_pretrained(tmp_path / "a")
    merged = weights(wrapped.merge_and_unload())
    model = base(dtype)
    delta = read_shira(tmp_path / "a", model)
    assert delta.ticket.k == 2 * (24 + 16 + 16 + 32)
    delta.apply(model)
    assert all(torch.equal(merged[name], value) for name, value in weights(model).items())
    delta.revert(model)
    assert all(torch.equal(value, weights(base(dtype))[name]) for name, value in weights(model).items())


def test_entries_that_no_difference_reaches_are_counted(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    after = {"0.weight": torch.full((8, 8), 1e-9)}
    ticket = ls.Ticket.random(model, k=5, seed=0)
    assert write_shira(ls.SparseDelta.between(model, after, ticket), tmp_path / "a") == 5


@pytest.mark.parametrize(
    ("pool", "density", "message"),
    [
        (("0.weight", "1.weight"), 0.5, "weights of linear layers only, not of '1.weight'"),
        (("0.weight", "0.bias"), 0.5, "weights of linear layers only, not of '0.bias'"),
        (LINEAR, 0.97, "needs r = .* is too small in PEFT; select at a lower density"),
    ],
)
def test_what_no_adapter_holds_is_refused(pool, density, message, tmp_path):
    model = base()
    ticket = ls.Ticket.random(model, density=density, seed=1, pool=lambda name: name in pool)
    with pytest.raises(ValueError, match=message):
        write_shira(ls.SparseDelta.between(model, tuned(model), ticket), tmp_path / "a")
    delta = ls.SparseDelta.between(model, tuned(model), delta_of(model).ticket, originals=False)
    with pytest.raises(ValueError, match="their originals"):
        write_shira(delta, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("harm", ["kind", "config", "outside", "sizes", "extra", "whole", "model", "cut", "gone"])
def test_foreign_and_damaged_adapters_are_one_error(harm, tmp_path):
    folder = tmp_path / "a"
    write_shira(delta_of(base()), folder)
    stored, model = load_file(folder / WEIGHTS), base()
    indices = "base_model.model.0.shira_indices"
    if harm in ("kind", "config"):
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA"}) if harm == "kind" else "{")
    elif harm == "model":
        model = nn.Sequential(nn.Linear(3, 3))
    elif harm == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    elif harm == "gone":
        (folder / WEIGHTS).unlink()
    else:
        if harm == "outside":
            stored[indices][0, 0] = 10_000
        elif harm == "sizes":
            stored[indices] = stored[indices][:, :-1].contiguous()
        elif harm == "whole":
            stored["base_model.model.1.weight"] = torch.zeros(2)
        else:
            stored["base_model.model.0.lora_A.weight"] = torch.zeros(2)
        save_file(stored, folder / WEIGHTS)
    with pytest.raises(FileNotFoundError if harm == "gone" else ls.FileFormatError) as error:
        read_shira(folder, model)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
