"""Ada-SFT's soft masks: what they compute, what they train, and what they leave behind."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bits import weights
from helpers.tiny_nli import tiny_language_model, toy_pairs
from torch import nn

from ltp_sparse.models import SequenceClassifier, SoftMasks, collator, encode_pairs
from ltp_sparse.weights.names import canonical_parameters


@pytest.fixture
def model(tokenizer):
    return SequenceClassifier(tiny_language_model(len(tokenizer)), 3).eval()


@pytest.fixture(scope="module")
def batch(tokenizer):
    return collator(tokenizer.pad_token_id)(encode_pairs(tokenizer, toy_pairs(4)))


def scattered(masks: SoftMasks) -> SoftMasks:
    """The masks with random scores."""
    with torch.no_grad():
        for score in masks.scores:
            score.normal_(std=2)
    return masks


def test_the_72_linear_weights_of_the_full_model():
    from transformers import XLMRobertaConfig

    from ltp_sparse.models.backbone import backbone_from_config

    config = XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    with torch.device("meta"):
        full = backbone_from_config(config)
    masks = SoftMasks(full)
    assert len(masks.names) == len(masks.scores) == 72
    assert sum(score.numel() for score in masks.scores) == 12 * 7_077_888
    shapes = {name: parameter.shape for name, parameter in canonical_parameters(full).items()}
    assert [shapes[name] for name in masks.names] == [score.shape for score in masks.scores]
    assert all(score.dtype == torch.float32 and score.is_meta for score in masks.scores)


def test_the_forward_pass_multiplies_weights_and_masks(model, batch):
    masks = scattered(SoftMasks(model))
    reference = copy.deepcopy(model)
    weights = canonical_parameters(reference)
    with torch.no_grad():
        for name, mask in zip(masks.names, masks.masks(), strict=True):
            weights[name].mul_(mask)
    expected = reference(**batch)["logits"]
    plain = model(**batch)["logits"]
    masks.attach(model)
    torch.testing.assert_close(model(**batch)["logits"], expected)
    assert not torch.allclose(plain, expected)


def test_attach_and_remove_leave_the_model_as_it_was(model, batch):
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(**batch)["logits"]
    masks = scattered(SoftMasks(model)).attach(model)
    assert set(model.state_dict()) == {*bits, *(f"soft_masks.scores.{i}" for i in range(12))}
    assert set(canonical_parameters(model)) - set(bits) == {f"soft_masks.scores.{i}" for i in range(12)}
    masks.remove()
    assert list(model.state_dict()) == list(bits)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**batch)["logits"], before)
    assert not any("forward" in module.__dict__ for module in model.modules())
    masks.attach(model)
    assert not torch.equal(model(**batch)["logits"], before)


def test_fold_leaves_the_same_function_in_plain_weights(model, batch):
    initial = weights(model)
    masks = scattered(SoftMasks(model)).attach(model)
    before = model(**batch)["logits"]
    masks.fold()
    assert torch.equal(model(**batch)["logits"], before)
    after = canonical_parameters(model)
    assert set(after) == set(initial)
    for name, mask in zip(masks.names, masks.masks(), strict=True):
        assert torch.equal(after[name], initial[name] * mask)
    others = set(after) - set(masks.names)
    assert all(torch.equal(after[name], initial[name]) for name in others)
    with pytest.raises(ValueError, match="attached masks; attach"):
        masks.fold()


def test_both_steps_train_what_they_should(model, batch):
    masks = SoftMasks(model).attach(model)
    parameters = canonical_parameters(model)
    scores = [name for name in parameters if name.startswith("soft_masks.")]
    head = [name for name in parameters if name.startswith("classifier.")]
    for trained in ([*scores, *head], [*masks.names, *head]):
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
            parameter.grad = None
        model(**batch)["loss"].backward()
        assert {name for name, p in parameters.items() if p.grad is not None} == set(trained)
        assert all(parameters[name].grad.abs().sum() > 0 for name in trained)
    mask = next(masks.masks())
    assert abs(mask.mean() - 0.982) < 1e-3


def test_gradients_are_those_of_the_product(model, batch):
    masks = scattered(SoftMasks(model)).attach(model)
    model(**batch)["loss"].backward()
    name = masks.names[5]
    weight, score, mask = canonical_parameters(model)[name], masks.scores[5], list(masks.masks())[5]
    of_product = weight.grad / mask
    torch.testing.assert_close(score.grad, of_product * weight * mask * (1 - mask), atol=1e-7, rtol=1e-4)


def test_statistics(model):
    masks = scattered(SoftMasks(model))
    every = torch.cat([mask.detach().flatten() for mask in masks.masks()])
    assert masks.mean() == pytest.approx(every.mean().item(), rel=1e-5)
    assert masks.share_below() == pytest.approx((every < 0.5).float().mean().item())
    assert masks.share_below(0.9) == pytest.approx((every < 0.9).float().mean().item())


def test_keep_is_an_exact_top_k_over_all_weights(model, batch):
    masks = scattered(SoftMasks(model))
    before = torch.cat([mask.detach().flatten() for mask in masks.masks()])
    masks.keep(1000)
    after = torch.cat([mask.detach().flatten() for mask in masks.masks()])
    kept = before.argsort(descending=True, stable=True)[:1000]
    assert int((after > 0).sum()) == 1000
    assert torch.equal(after[kept], before[kept])
    masks.attach(model)
    model(**batch)["loss"].backward()
    assert all(not score.grad[score == -torch.inf].any() for score in masks.scores)
    with pytest.raises(ValueError, match="k must be in"):
        masks.keep(10**9)


def test_keep_gives_ties_to_the_earliest(model):
    masks = SoftMasks(model)
    masks.keep(100)
    assert masks.scores[0].flatten().isfinite().nonzero().squeeze(1).tolist() == list(range(100))
    assert all((score == -torch.inf).all() for score in masks.scores[1:])


def test_scores_save_and_load(model):
    masks = scattered(SoftMasks(model))
    masks.keep(500)
    other = SoftMasks(model)
    other.load_state_dict(masks.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(masks.masks(), other.masks(), strict=True))


def test_a_copy_of_the_model_has_masks_of_its_own(model, batch):
    SoftMasks(model).attach(model)
    other = copy.deepcopy(model)
    before = model(**batch)["logits"]
    scattered(other.soft_masks)
    assert torch.equal(model(**batch)["logits"], before)
    assert not torch.allclose(other(**batch)["logits"], before)
    other.soft_masks.remove()
    assert hasattr(model, "soft_masks")
    assert torch.equal(model(**batch)["logits"], before)


def test_errors(model, tokenizer):
    masks = SoftMasks(model).attach(model)
    with pytest.raises(ValueError, match="without 'soft_masks', it has one; remove"):
        SoftMasks(model).attach(model)
    with pytest.raises(ValueError, match="another attachment changes the same modules"):
        SoftMasks(model).attach(model.roberta)
    masks.remove()
    other = tiny_language_model(len(tokenizer))
    other.roberta.encoder.layer = other.roberta.encoder.layer[:1]
    with pytest.raises(ValueError, match="with the 12 linear weights .* got one with 6"):
        masks.attach(other)
    with pytest.raises(TypeError, match="expected an XLM-R model.* got Linear"):
        SoftMasks(nn.Linear(2, 2))
