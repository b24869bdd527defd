"""Predicted bytes against those that a step really takes, counted tensor by tensor, and the bars of XLM-R-base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ltp_sparse as ls
from ltp_sparse.cli import main
from ltp_sparse.cli.memory import SIZES, table
from ltp_sparse.memory import LiveBytes
from ltp_sparse.selection import pools


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompted():
    """A small XLM-R with a prompt, whose activations, embeddings and layers all weigh something."""
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    from ltp_sparse.prompting import PromptedMaskedLM, PromptEncoder, Verbalizer

    config = XLMRobertaConfig(
        vocab_size=4000, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    encoder = PromptEncoder(4, 96, "mlp")
    return PromptedMaskedLM(XLMRobertaForMaskedLM(config), encoder, Verbalizer(((5,), (6,), (7,))), frozen_words=True)


def batch():
    ids = torch.randint(8, 4000, (8, 48))
    return ids, torch.ones_like(ids), torch.arange(4).expand(8, 4), torch.full((8,), 9), torch.arange(8) % 3


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
    assert predicted.states + predicted.index == pytest.approx(opt.state_bytes(), rel=0.02, abs=4000)
    assert predicted.weights == sum(p.nbytes for p in model.parameters())
    inputs = batch()
    for _ in range(2):  # the second step is as all later ones
        with LiveBytes() as live:
            model(*inputs)["loss"].backward()
            held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            opt.step()
        opt.zero_grad()
    packed = 4 * ticket.k if gradients == "packed" else 0
    assert held + packed == predicted.gradients
    counted = predicted.weights + opt.state_bytes() + packed + live.peak
    assert predicted.total == pytest.approx(counted, rel=0.05)


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


@pytest.mark.parametrize(
    ("density", "dtype", "most"),
    [(0.2, "float32", 1.9), (0.05, "float32", 1.4), (0.05, "bfloat16", 0.9), (0.01, "bfloat16", 0.7)],
)
def test_bars_of_xlmr_base(density, dtype, most):
    """Backbone weights, gradients, state and index; the prompt encoder's 11.2M parameters come on top."""
    from transformers import XLMRobertaConfig

    hidden, layers, heads, inner = SIZES["xlm-roberta-base"]
    config = XLMRobertaConfig(
        vocab_size=250002, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    rows = table(config, density, 2, 32, dtype)
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


def test_the_command_needs_no_download(capsys):
    assert main(["memory", "--model", "xlm-roberta-base", "--batch", "2", "--length", "16"]) == 0
    text = capsys.readouterr().out
    assert "LoRA, rank 8" in text and "FlashAdamW" in text and "full fine-tuning, AdamW, all logits" in text
    assert main(["memory", "--model", "xlm-roberta-base", "--density", "2"]) == 2
    assert "--density must be in (0, 1]" in capsys.readouterr().err
