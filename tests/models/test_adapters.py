"""MAD-X: sizes, the formula, attaching and swapping, and files."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny_nli import tiny_language_model, toy_pairs
from torch import nn
from torch.nn import functional as F

from ltp_sparse.models import Adapter, AdapterStack, InvertibleAdapter, SequenceClassifier, collator, encode_pairs
from ltp_sparse.models.masked_losses import token_losses
from ltp_sparse.weights.names import canonical_parameters


@pytest.fixture
def language_model(tokenizer):
    return tiny_language_model(len(tokenizer)).eval()


@pytest.fixture(scope="module")
def batch(tokenizer):
    return collator(tokenizer.pad_token_id)(encode_pairs(tokenizer, toy_pairs(4)))


def scattered(adapter: Adapter) -> Adapter:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    return adapter


def encoded(batch) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def bottleneck(module: nn.Sequential, x):
    down, _, up = module
    return F.relu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias


def invert(adapter: InvertibleAdapter, e):
    """y1 = e1 + F(e2), y2 = e2 + G(y1)."""
    half = e.shape[-1] // 2
    y1 = e[..., :half] + bottleneck(adapter.f, e[..., half:])
    return torch.cat([y1, e[..., half:] + bottleneck(adapter.g, y1)], -1)


def reference(model, batch, adapters, drop_last) -> torch.Tensor:
    """The last hidden states, layer by layer, with x and r apart as the section writes it."""
    roberta = model.roberta
    hidden = roberta.embeddings(input_ids=batch["input_ids"])
    for adapter in adapters:
        if adapter.invertible is not None:
            hidden = invert(adapter.invertible, hidden)
    mask = batch["attention_mask"][:, None, None, :].bool().expand(-1, 1, hidden.shape[1], -1)
    layers = roberta.encoder.layer
    for index, layer in enumerate(layers):
        r = layer.attention(hidden, attention_mask=mask)[0]
        x, norm = layer.output.dense(layer.intermediate(r)), layer.output.LayerNorm
        if not (drop_last and index == len(layers) - 1):
            for adapter in adapters:
                x = bottleneck(adapter.layers[index], norm(x + r)) + x
        hidden = norm(x + r)
    return hidden


# --- sizes ------------------------------------------------------------------------------------------------------------


def size(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_of_the_full_model():
    from transformers import XLMRobertaConfig

    config = XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514)
    with torch.device("meta"):
        language = Adapter.for_language(config)
        task, whole = Adapter.for_task(config), Adapter.for_task(config, drop_last=False)
        wide, widest = Adapter.for_task(config, 1), Adapter.for_task(config, 1, drop_last=False)
    assert size(language.layers) == 7_091_712
    assert size(language.invertible) == 296_064
    assert size(language) == 7_387_776
    assert size(whole) == 894_528
    assert size(task) == 819_984 == 894_528 * 11 // 12
    assert (size(wide), size(widest)) == (12_993_024, 14_174_208)
    assert size(language.layers[-1]) == 590_976
    assert language.layers[0][0].weight.shape == (384, 768)
    assert language.invertible.f[0].weight.shape == (192, 384)


def test_initial_weights():
    adapter = Adapter(256, 3, 2, invertible=True)
    for name, parameter in adapter.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert abs(parameter.std() - 0.02) < 0.001


# --- what they compute ------------------------------------------------------------------------------------------------


def test_the_invertible_adapter_inverts():
    adapter = InvertibleAdapter(32).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    torch.testing.assert_close(adapter(x), invert(adapter, x))
    torch.testing.assert_close(adapter.inverse(adapter(x)), x)
    assert not torch.allclose(adapter(x), x)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("parts", ["language", "task", "both"])
def test_the_stack_is_the_formula(language_model, batch, parts, drop_last):
    language = scattered(Adapter.for_language(language_model.config)) if parts != "task" else None
    task = scattered(Adapter.for_task(language_model.config, 4, drop_last=drop_last)) if parts != "language" else None
    adapters = [adapter for adapter in (language, task) if adapter is not None]
    expected = reference(language_model, batch, adapters, drop_last)
    AdapterStack(language, task, drop_last=drop_last).attach(language_model)
    hidden = language_model.roberta(**encoded(batch)).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(hidden[real], expected[real])


def test_a_language_adapter_with_a_last_layer_serves_a_stack_without(language_model, batch):
    language = scattered(Adapter.for_language(language_model.config))
    stack = AdapterStack(language).attach(language_model)
    language_model.roberta(**encoded(batch)).last_hidden_state.sum().backward()
    assert all(parameter.grad is None for parameter in language.layers[-1].parameters())
    assert all(parameter.grad is not None for parameter in language.layers[0].parameters())
    assert stack.drop_last


def test_language_modelling_inverts_before_the_decoder(language_model, batch):
    language = scattered(Adapter.for_language(language_model.config))
    hidden = reference(language_model, batch, [language], False)
    head = language_model.lm_head
    features = head.layer_norm(F.gelu(head.dense(hidden)))
    expected = head.decoder(language.invertible.inverse(features))
    AdapterStack(language, drop_last=False).attach(language_model)
    positions = batch["attention_mask"].bool()
    torch.testing.assert_close(language_model(**encoded(batch)).logits[positions], expected[positions])
    labels = torch.where(positions, batch["input_ids"], -100)
    with token_losses(language_model, labels):
        losses = language_model(**encoded(batch)).logits
    wanted = F.cross_entropy(expected[positions], labels[positions], reduction="none")
    torch.testing.assert_close(losses, wanted)


def test_new_adapters_change_little(language_model, batch):
    before = language_model.roberta(**encoded(batch)).last_hidden_state
    config = language_model.config
    AdapterStack(Adapter.for_language(config), Adapter.for_task(config)).attach(language_model)
    after = language_model.roberta(**encoded(batch)).last_hidden_state
    assert 0 < (after - before).abs().max() < 0.1


# --- attaching, training, swapping ------------------------------------------------------------------------------------


def test_attach_and_remove_leave_the_model_as_it_was(language_model, batch):
    bits = {name: tensor.clone() for name, tensor in language_model.state_dict().items()}
    before = language_model(**encoded(batch)).logits
    stack = AdapterStack(scattered(Adapter.for_language(language_model.config))).attach(language_model)
    assert set(language_model.state_dict()) == {*bits, *(f"adapters.{name}" for name in stack.state_dict())}
    assert not torch.allclose(language_model(**encoded(batch)).logits, before)
    stack.remove()
    assert list(language_model.state_dict()) == list(bits)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in language_model.state_dict().items())
    assert torch.equal(language_model(**encoded(batch)).logits, before)
    hooks = [m for m in language_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_a_task_trains_its_adapter_and_the_head_only(language_model, batch):
    model = SequenceClassifier(language_model, 3)
    config = language_model.config
    stack = AdapterStack(Adapter.for_language(config), Adapter.for_task(config)).attach(model)
    trained = {*stack.task.parameters(), *model.classifier.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    model(**batch)["loss"].backward()
    assert {p for p in model.parameters() if p.grad is not None} == trained
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    names = canonical_parameters(model)
    assert [n for n in names if n.startswith("adapters.task.")] == [
        f"adapters.task.{name}" for name in canonical_parameters(stack.task)
    ]
    assert all(names[name] is p for name, p in canonical_parameters(language_model).items() if "roberta" in name)


def test_language_modelling_trains_bottlenecks_and_the_invertible_adapter(language_model, batch):
    stack = AdapterStack(Adapter.for_language(language_model.config), drop_last=False).attach(language_model)
    trained = set(stack.parameters())
    for parameter in language_model.parameters():
        parameter.requires_grad_(parameter in trained)
    language_model(**encoded(batch), labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)


def test_swapping_languages(language_model, batch):
    config = language_model.config
    model = SequenceClassifier(language_model, 3).eval()
    first, second = (scattered(Adapter.for_language(config)) for _ in range(2))
    task = scattered(Adapter.for_task(config))
    task_alone = reference(model, batch, [task], True)
    stack = AdapterStack(first, task).attach(model)
    with_first = model(**encoded(batch))["logits"]
    assert stack.swap(second) is first
    with_second = model(**encoded(batch))["logits"]
    assert not torch.allclose(with_first, with_second)
    stack.remove()
    AdapterStack(second, task).attach(model)
    assert torch.equal(model(**encoded(batch))["logits"], with_second)
    with pytest.raises(ValueError, match="hidden size 32 with 1 to 2 layers .* got 16 and 2"):
        model.adapters.swap(Adapter(16, 2, 2))
    assert model.adapters.language is second
    model.adapters.swap(None)
    torch.testing.assert_close(model(**encoded(batch))["logits"], model.classifier(task_alone[:, 0]))


def test_a_copy_of_the_model_has_adapters_of_its_own(language_model, batch):
    AdapterStack(Adapter.for_language(language_model.config)).attach(language_model)
    before = language_model(**encoded(batch)).logits
    other = copy.deepcopy(language_model)
    scattered(other.adapters.language)
    assert torch.equal(language_model(**encoded(batch)).logits, before)
    assert not torch.allclose(other(**encoded(batch)).logits, before)
    other.adapters.remove()
    assert torch.equal(language_model(**encoded(batch)).logits, before)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(language_model, batch):
    stack = AdapterStack(scattered(Adapter.for_language(language_model.config))).attach(language_model)

    def gradient():
        stack.zero_grad()
        language_model.train()(**encoded(batch), labels=batch["input_ids"]).loss.backward()
        return stack.language.layers[0][0].weight.grad.clone()

    plain = gradient()
    language_model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain)


# --- files and errors -------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    adapter = scattered(Adapter(32, 2, 4, invertible=True, metadata={"language": "quy", "steps": 30_000}))
    adapter.save(tmp_path / "quy.safetensors")
    loaded = Adapter.load(tmp_path / "quy.safetensors")
    assert loaded.metadata == {"language": "quy", "steps": 30_000}
    assert (loaded.hidden, loaded.reduction, len(loaded.layers)) == (32, 4, 2)
    state = adapter.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert Adapter(32, 2, 4).invertible is None


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    Adapter(32, 2, 4).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum does not match"):
        Adapter.load(path)
    with pytest.raises(FileNotFoundError, match="expected an adapter"):
        Adapter.load(tmp_path / "none.safetensors")


def test_errors(language_model):
    with pytest.raises(ValueError, match="got neither"):
        AdapterStack()
    with pytest.raises(ValueError, match=r"reduction in \[1, 32\], got 2 and 64"):
        Adapter(32, 2, 64)
    with pytest.raises(ValueError, match="must be even.* got 33"):
        InvertibleAdapter(33)
    short = Adapter.for_task(language_model.config)
    with pytest.raises(ValueError, match=r"with 2 to 2 layers \(drop_last=False\), got 32 and 1"):
        AdapterStack(task=short, drop_last=False).attach(language_model)
    stack = AdapterStack(task=short).attach(language_model)
    with pytest.raises(ValueError, match="without 'adapters', it has one"):
        AdapterStack(task=short).attach(language_model)
    with pytest.raises(ValueError, match="without 'adapters', it has one"):
        stack.attach(language_model.roberta)
    around = SequenceClassifier(language_model, 2)  # has no `adapters` of its own, but the same encoder
    with pytest.raises(ValueError, match="this one has another stack"):
        AdapterStack(task=short).attach(around)
    stack.remove()
    AdapterStack(task=short).attach(around).remove()
