"""Predicted bytes against those that a step really takes, counted tensor by tensor, and the bars of XLM-R-base."""

from __future__ import annotations

import gc
import json
from types import FunctionType, MethodType, ModuleType

import pytest
import torch
from helpers.gradients import has_dense_gradient
from torch import nn
from torch.nn import functional as F

import ltp_sparse as ls
from ltp_sparse.backends.work_items import work_items
from ltp_sparse.cli import main
from ltp_sparse.cli.memory import SIZES, table
from ltp_sparse.models.backbone import decouple
from ltp_sparse.models.masked_losses import losses_at
from ltp_sparse.optim.memory import LiveBytes
from ltp_sparse.selection import pools


def language_model():
    """A small XLM-R, whose activations, embeddings and layers all weigh something; its LM head is decoupled."""
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    config = XLMRobertaConfig(
        vocab_size=4000, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    return decouple(XLMRobertaForMaskedLM(config))


def prompted():
    """The same with a prompt."""
    from ltp_sparse.models.masked_prompt import PromptedMaskedLM
    from ltp_sparse.models.prompt_encoder import PromptEncoder
    from ltp_sparse.prompting import Verbalizer

    encoder = PromptEncoder(4, 96, "mlp")
    return PromptedMaskedLM(language_model(), encoder, Verbalizer(((5,), (6,), (7,))), frozen_words=True)


def batch():
    ids = torch.randint(8, 4000, (8, 48))
    return ids, torch.ones_like(ids), torch.arange(4).expand(8, 4), torch.full((8,), 9), torch.arange(8) % 3


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["packed", "dense"])
@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("density", [0.03, 0.3])
def test_predictions_hold_within_five_percent(gradients, states, density):
    from torch._subclasses.fake_tensor import FakeTensorMode

    options = {"gradients": gradients, "states": states}
    model = prompted().train()
    ticket = ls.Ticket.random(model, density=density, seed=0, pool=pools.maskable)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = prompted().train()
        predicted = ls.memory_report(
            fake, ticket, dense=fake.prompt_encoder.parameters(), loss=lambda: fake(*batch())["loss"], **options
        )
    uniform = ls.memory_report(  # from the density alone, which counts LayerNorms and head as active
        model, density, dense=model.prompt_encoder.parameters(), **options
    )
    assert uniform.states == pytest.approx(predicted.states, rel=0.03)

    opt = ls.MaskedAdamW(model, ticket, dense=model.prompt_encoder.parameters(), freeze=True, **options)
    beside = predicted.states + predicted.index - opt.state_bytes()  # rows of parameters, and tables to pack gradients
    assert -0.005 * opt.state_bytes() < beside < 256 * len(list(model.parameters())) + 4000
    assert predicted.weights == sum(p.nbytes for p in model.parameters())
    inputs = batch()
    for _ in range(2):  # the second step is as all later ones
        with LiveBytes() as live:
            model(*inputs)["loss"].backward()
            held = sum(p.grad.nbytes for p in model.parameters() if has_dense_gradient(p))
            opt.step()
        opt.zero_grad()
    packed = 4 * ticket.k if gradients == "packed" else 0
    assert held + packed == predicted.gradients
    counted = predicted.weights + opt.state_bytes() + packed + live.peak
    assert predicted.total == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("pull_on", ["device", "host"])
def test_what_a_pull_holds_is_predicted(pull_on, states, monkeypatch):
    """On a GPU the host takes it off: there, room for a piece remains."""
    monkeypatch.setattr("ltp_sparse.optim.launch._is_host", lambda device: False)
    for module in ("ltp_sparse.optim.launch", "ltp_sparse.optim.memory"):
        monkeypatch.setattr(f"{module}.PIECE", 200_000)
    model = prompted()
    ticket = ls.Ticket.full(model, pool=pools.maskable)
    options = {"dense": list(model.prompt_encoder.parameters()), "states": states}
    predicted = ls.memory_report(model, ticket, gradients="dense", pull_on=pull_on, **options)
    opt = ls.MaskedAdamW(model, ticket, pull=0.1, pull_on=pull_on, **options)
    beside = predicted.states + predicted.index - opt.state_bytes()  # rows of parameters, and tables to pack gradients
    assert -0.005 * opt.state_bytes() < beside < 256 * len(list(model.parameters())) + 4000
    without = ls.memory_report(model, ticket, gradients="dense", **options)
    assert predicted.states - without.states == 4 * (opt.active_entries if pull_on == "device" else 200_000)
    with pytest.raises(ValueError, match='pull_on must be "device", "host" or None, got .disk.'):
        ls.memory_report(model, ticket, pull_on="disk")


def test_live_bytes_sees_what_dies():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100).t()  # no memory of its own
        torch.zeros(100)
        d = b * 2
    assert live.peak == 8000
    assert c.shape == (100, 10) and d.numel() == 1000


def test_any_module_and_bad_arguments():
    model = nn.Linear(300, 200)
    report = ls.memory_report(model, ls.Ticket.full(model, pool=["weight"]), gradients="dense")
    assert report.weights == 4 * 60_200 and report.gradients == 4 * 60_000 and report.states == 8 * 60_000
    assert report.held == report.total == report.weights + report.gradients + report.states + report.index
    assert "held 0.001 GB" in repr(report)
    with pytest.raises(ValueError, match='gradients must be "dense" or "packed", got .sparse.'):
        ls.memory_report(model, 0.1, gradients="sparse")
    with pytest.raises(ValueError, match='states must be "float32" or "8bit", got .4bit.'):
        ls.memory_report(model, 0.1, states="4bit")
    for density in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"the density must be in \[0, 1\], got"):
            ls.memory_report(model, density)
    with pytest.raises(
        ValueError, match=r"memory_report: 'weight' has shape \[200, 300\] in the model and \[200, 301\]"
    ):
        ls.memory_report(model, ls.Ticket.random(nn.Linear(301, 200), density=0.1))
    with pytest.raises(ValueError, match="memory_report: no name of the ticket is in the model"):
        ls.memory_report(model, ls.Ticket.random(nn.Sequential(nn.Linear(3, 3)), density=0.5))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 20, padding_idx=1)
        self.sparse = nn.Embedding(50, 20, sparse=True)
        self.head = nn.Linear(20, 3)

    def forward(self):
        ids = torch.arange(8)
        return self.head(self.embed(ids) + self.sparse(ids)).sum()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gradients", ["packed", "dense"])
def test_the_model_is_left_as_it_was(gradients, fails):
    """Also when the loss fails."""
    model = Words()
    model.head.bias.requires_grad_(False)
    pending = torch.randn_like(model.head.weight)
    model.head.weight.grad = pending
    value = pending.clone()
    ticket = ls.Ticket.random(model, density=0.3, pool=["embed", "sparse"])

    def loss():
        total = model()
        return total.backward() if fails else total  # a loss that is None

    options = {"dense": [model.head.weight], "gradients": gradients, "loss": loss}
    if fails:
        with pytest.raises(AttributeError):
            ls.memory_report(model, ticket, **options)
    else:
        assert ls.memory_report(model, ticket, **options).passing > 0
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert model.head.weight.grad is pending and torch.equal(pending, value)
    assert all(p.grad is None for p in (model.embed.weight, model.sparse.weight, model.head.bias))
    assert not model.embed.sparse and model.sparse.sparse
    assert model.embed.padding_idx == 1 and model.sparse.padding_idx is None
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_of_a_running_optimizer_are_not_mixed_with_the_trial():
    model = Words()
    ticket = ls.Ticket.random(model, density=0.3)
    opt = ls.MaskedAdamW(model, ticket, gradients="packed")
    with pytest.raises(ValueError, match=r"memory_report: an earlier .* already packs the gradient of 'embed.weight'"):
        ls.memory_report(model, ticket, loss=model)
    assert ls.memory_report(model, ticket).held  # counting alone is fine
    opt.remove()
    assert ls.memory_report(model, ticket, loss=model).passing


@pytest.mark.slow
@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_predictions_of_stage_1_hold_within_five_percent(states):
    """All maskable weights and the head, drawn to their initial values, which the host holds once."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def tuned(model):
        head = [p for name, p in model.named_parameters() if name.startswith("lm_head.") and p.requires_grad]
        masked, ids = torch.arange(50), torch.ones(8, 48, dtype=torch.long)

        def loss():
            with losses_at(model, masked, ids.view(-1)[masked]):
                return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum()

        return head, loss

    model = language_model().train()
    head, loss = tuned(model)
    ticket = ls.Ticket.full(model, pool=pools.maskable)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = language_model().train()
        fake_head, fake_loss = tuned(fake)
        predicted = ls.memory_report(
            fake, ticket, dense=fake_head, loss=fake_loss, states=states, gradients="dense", pull_on="device"
        )
    opt = ls.MaskedAdamW(model, ticket, dense=head, states=states, pull=0.1, pull_on="host", freeze=True)
    for _ in range(2):
        with LiveBytes() as live:
            loss().backward()
            opt.step()
        opt.zero_grad()
    counted = predicted.weights + opt.state_bytes() + live.peak
    assert predicted.total == pytest.approx(counted, rel=0.05)


def test_a_gpu_keeps_less_for_the_backward_pass():
    """Its attention keeps no probabilities, and its dropout a byte of each value instead of four."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, heads, length, width = 4, 4, 64, 8
    values = batch * heads * length * width

    def layer(x):
        return F.dropout(F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), 0.1, True)

    with FakeTensorMode():
        model = nn.ParameterDict({"x": torch.randn(batch, heads, length, width)})
        model["x"].requires_grad_()
        of = lambda device: ls.memory_report(  # noqa: E731
            model, 0.0, dense=model, loss=lambda: layer(model["x"]).sum(), gradients="dense", device=device
        )
        on_cpu, on_gpu = of("cpu").passing, of("cuda").passing
    probabilities = 4 * batch * heads * length**2
    assert on_gpu < 10 * 4 * values < 3 * probabilities < on_cpu
    with pytest.raises(ValueError, match='device must be "cpu" or "cuda", got .tpu.'):
        ls.memory_report(nn.Linear(2, 2), 0.5, device="tpu")


def test_bitmaps_have_ranks_on_a_gpu():
    """Work items and a row for each parameter come on top."""
    model = nn.Linear(256, 256)
    for density, ranks in ((0.5, (256 * 256 + 256) // 32), (0.01, 0)):
        on_cpu, on_gpu = (ls.memory_report(model, density, device=device).index for device in ("cpu", "cuda"))
        items = 2 * 16 * sum(-(-int(density * n) // 2048) for n in (256 * 256, 256))
        assert on_gpu - on_cpu == ranks + items + 2 * 64


def storages_of(root) -> dict[int, int]:
    """Address -> bytes of all memory of tensors that can be reached, but not by way of modules and parameters."""
    others = (type, ModuleType, FunctionType, MethodType, nn.Module, nn.Parameter)
    found, seen, waiting = {}, {id(root)}, [root]
    while waiting:
        thing = waiting.pop()
        if type(thing) is torch.Tensor:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        new = [thing for thing in gc.get_referents(thing) if id(thing) not in seen and not isinstance(thing, others)]
        seen.update(map(id, new))
        waiting += new
    return found


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("density", [0.03, 0.3])
def test_all_that_the_optimizer_holds_is_predicted(states, density):
    """On a GPU, it has work items for the update and for packing, too."""
    model = nn.Sequential(nn.Embedding(4000, 95), nn.Linear(95, 384), nn.Linear(384, 700), nn.LayerNorm(700))
    ticket = ls.Ticket.random(model, density=density, seed=0)
    on_cpu, on_gpu = (ls.memory_report(model, ticket, states=states, device=device) for device in ("cpu", "cuda"))
    opt = ls.MaskedAdamW(model, ticket, states=states, gradients="packed", max_grad_norm=1.0)
    model(torch.randint(0, 4000, (4, 8))).square().sum().backward()
    opt.step()
    held = storages_of(opt)
    for parameter in model.parameters():
        held.pop(parameter.untyped_storage().data_ptr(), None)
    for index_set in ticket.sets.values():
        for tensor in (index_set.data, index_set.tile_counts):
            held.pop(tensor.untyped_storage().data_ptr(), None)
    assert on_cpu.held - on_cpu.weights == pytest.approx(sum(held.values()), rel=0.002)

    (launch,) = opt._launches
    tables = [launch.table, *(gradient.table for gradient in launch.packed.gradients)]
    items = sum(work_items(table).nbytes for table in tables)
    ranks = launch.table.with_ranks().ranks.nbytes
    assert on_gpu.held - on_cpu.held == pytest.approx(items + ranks + 64 * len(ticket.sets), rel=0.05)


@pytest.fixture(scope="module")
def xlmr_base():
    """Options -> the table of XLM-R-base."""
    from transformers import XLMRobertaConfig

    hidden, layers, heads, inner = SIZES["xlm-roberta-base"]
    config = XLMRobertaConfig(
        vocab_size=250002, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    options = {"density": 0.2, "batch": 32, "length": 256, "dtype": "float32", "device": "cuda"}
    return lambda stage, **given: table(config, stage, **(options | given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("density", "dtype", "most"),
    [(0.2, "float32", 1.9), (0.05, "float32", 1.4), (0.05, "bfloat16", 0.9), (0.01, "bfloat16", 0.7)],
)
def test_bars_of_xlmr_base(xlmr_base, density, dtype, most, monkeypatch):
    """Backbone weights, gradients, state and index; the prompt encoder's 11.2M parameters come on top."""
    monkeypatch.setattr("ltp_sparse.optim.memory.passing_bytes", lambda *_: 0)  # no bar is about them
    rows = xlmr_base(2, density=density, dtype=dtype, batch=2, length=32)
    encoder, size = 11_223_552, 4 if dtype == "float32" else 2
    master = 0 if dtype == "float32" else 4
    ours = rows["ticket, packed gradients, float32 states"]
    assert ours.held - encoder * (2 * size + 8 + master) < most * 1e9
    k = int(density * 277_414_656)
    largest = max(3072 * 768, 768 * 3072)
    assert ours.gradients - encoder * size <= 1.05 * (4 * k + 4 * largest)
    dense = rows["full fine-tuning, AdamW"]
    assert dense.held - encoder * 4 * size == pytest.approx(4 * size * 278_295_186, rel=0.001)
    assert ours.held < 0.45 * dense.held if dtype == "float32" else ours.held < 0.5 * dense.held


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_half_of_the_peak_at_32_by_256_tokens(xlmr_base, stage):
    """Against all logits, dense gradients and AdamW over all weights; in stage 1 with a second copy of these."""
    rows = xlmr_base(stage)
    *_, ours = (report for name, report in rows.items() if name.endswith("float32 states"))
    dense = next(report for name, report in rows.items() if name.endswith("all logits"))
    assert ours.total <= 0.5 * dense.total


@pytest.mark.slow
def test_the_command_needs_no_download(capsys):
    assert main(["memory", "--model", "xlm-roberta-base", "--batch", "2", "--length", "16"]) == 0
    text = capsys.readouterr().out
    assert "LoRA, rank 8" in text and "FlashAdamW" in text and "full fine-tuning, AdamW, all logits" in text
    options = ["--batch", "2", "--length", "16", "--stage", "1", "--device", "cpu"]
    assert main(["memory", "--model", "xlm-roberta-base", *options]) == 0
    text = capsys.readouterr().out
    assert "on a CPU;\nmasked-language-model tuning" in text and "AdamW, a copy of the weights, all logits" in text
    assert main(["memory", "--model", "xlm-roberta-base", "--density", "2"]) == 2
    assert "--density: must be in (0, 1]" in capsys.readouterr().err


@pytest.mark.slow
def test_inputs_are_as_long_as_the_model_takes(capsys):
    assert main(["memory", "--model", "mini-xlmr"]) == 0
    assert "on batches of 32 x 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch: must be at least 1, got 0"),
        (["--length", "513"], "--length must be in [1, 512] for xlm-roberta-base, got 513"),
        (["--length", "0"], "--length must be in [1, 512]"),
        (["--model", "no/such/folder"], "got 'no/such/folder', which does not exist; closest: 'mini-xlmr'"),
        (["--model", "{folder}/empty"], "no config in '{folder}/empty'; pass xlm-roberta-base"),
        (["--model", "{folder}/other"], "an XLM-R or a causal language model, but '{folder}/other' is of type 'vit'"),
        (["--ranks", "8"], "--ranks is not for an XLM-R such as xlm-roberta-base"),
        (["--density", "0.1", "0.2"], "one --density for an XLM-R, got 2"),
        (["--model", "llama-8b", "--batch", "8"], "--batch is not for decoders such as llama-8b"),
        (["--model", "llama-8b", "--ranks", "0"], "--ranks: must be at least 1, got 0"),
        (["--model", "{folder}/short", "--length", "31"], "--length must be in [1, 30] for {folder}/short, got 31"),
    ],
    ids=str,
)
def test_the_command_says_what_does_not_fit(options, message, tmp_path, capsys):
    short = {"model_type": "xlm-roberta", "max_position_embeddings": 32, "pad_token_id": 1}
    for name, config in (("empty", {}), ("other", {"model_type": "vit"}), ("short", short)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    options = [option.replace("{folder}", str(tmp_path)) for option in options]
    assert main(["memory", "--model", "xlm-roberta-base", *options]) == 2
    assert message.replace("{folder}", str(tmp_path)) in capsys.readouterr().err


# --- sharded ----------------------------------------------------------------------------------------------------------


def small_decoder(dtype=torch.bfloat16):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=301, hidden_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=257,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


class Part(nn.Module):
    """The rows that a rank holds of a model."""

    def __init__(self, model, rank, ranks):
        super().__init__()
        for name, parameter in model.named_parameters():
            place = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(place, step):
                    place.add_module(step, nn.Module())
                place = getattr(place, step)
            each = -(-len(parameter) // ranks)
            rows = parameter.detach()[rank * each : (rank + 1) * each].clone()
            place.register_parameter(last, nn.Parameter(rows))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("density", [0.03, 0.2])
def test_what_a_rank_holds_is_predicted_within_five_percent(density, states, ranks):
    model = small_decoder()
    ticket = ls.Ticket.random(model, density=density)
    options = {"states": states, "gradients": "packed", "master": states == "float32"}
    predicted = ls.memory_report(model, ticket, ranks=ranks, **options)
    uniform = ls.memory_report(model, density, ranks=ranks, **options)
    held = []
    for rank in range(ranks):
        part = Part(model, rank, ranks)
        sets = {}
        for name, parameter in part.named_parameters():
            first = rank * -(-ticket.shapes[name][0] // ranks)
            sets[name] = ticket.rows(name, first, first + len(parameter))
        local = ls.Ticket(sets, {name: p.shape for name, p in part.named_parameters()})
        rounding = {} if options["master"] else {"rounding": "stochastic"}
        opt = ls.MaskedAdamW(part, local, freeze=True, **options, **rounding)
        packed = sum(launch.packed.buffer.nbytes for launch in opt._launches)
        assert packed == 4 * local.k
        held.append(sum(p.nbytes for p in part.parameters()) + opt.state_bytes() + packed)
    assert max(held) == pytest.approx(predicted.held, rel=0.05)
    assert max(held) == pytest.approx(uniform.held, rel=0.05)


@pytest.mark.parametrize(("shape", "entries", "linear"), [("llama-8b", 8_030_261_248, 6_979_321_856)])
def test_bytes_of_decoders_by_hand(shape, entries, linear, capsys):
    """Of 8 GPUs, from the numbers of entries alone."""
    assert main(["memory", "--model", shape, "--ranks", "8"]) == 0
    held = {line[:48].strip(): 1e9 * float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[3:-3]}
    tiles = 64 / 65_536
    adapters = 16 * 32 * (2 * 4096 + 2 * (4096 + 1024) + 2 * 4096 + 3 * (4096 + 14336))
    by_hand = {
        "ticket 1 %, packed, float32 states, master": entries * (2 + 0.01 * (8 + 4 + 4 + 2) + tiles),
        "ticket 5 %, packed, float32 states, master": entries * (2 + 0.05 * (8 + 4 + 4 + 2) + tiles),
        "ticket 20 %, packed, float32 states, master": entries * (2 + 0.2 * (8 + 4 + 4) + (1 / 8 + 1 / 32) + tiles),
        "ticket 5 %, packed, 8bit states, stochastic": entries * (2 + 0.05 * (2 + 8 / 256 + 4 + 2) + tiles),
        "AdamW, all float32": entries * 16,
        "AdamW, all bfloat16": entries * 8,
        "LoRA, rank 16, bfloat16 weights": entries * 2 + adapters * 16,
        "QLoRA, rank 16, nf4 weights": (entries - linear) * 2 + linear * (0.5 + 8 / 64 + 8 / 4096) + adapters * 16,
    }
    for name, whole in by_hand.items():
        assert held[name] == pytest.approx(whole / 8, rel=2e-3), name
    assert len(held) == len(by_hand) + 2


def test_the_table_takes_any_decoder_and_its_options(tmp_path, capsys):
    small_decoder().config.save_pretrained(tmp_path)
    options = ["--density", "0.1", "--states", "float32", "--gradients", "dense", "--no-master", "--ranks", "2"]
    for model in (tmp_path, tmp_path / "config.json"):
        assert main(["memory", "--model", str(model), *options]) == 0
        text = capsys.readouterr().out
        assert "each of 2 GPUs" in text and "ticket 10 %, dense, float32 states, stochastic" in text
        assert "8bit" not in text and "master" not in text
    for wrong, message in ({"ranks": 0}, "at least 1"), ({"ranks": 2, "loss": lambda: None}, "leave loss= out"):
        with pytest.raises(ValueError, match=message):
            ls.memory_report(nn.Linear(2, 2), 0.5, **wrong)
