"""Pre-training of a small masked language model. A run that resumes from a checkpoint ends with the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

from ltp_sparse.pretraining.sources import Batch, Sentences, Source
from ltp_sparse.training.autocast import autocast
from ltp_sparse.weights import files

_KIND = "pretraining"
_REPORT = 50


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of pre-training.

    Attributes:
        steps: number of updates.
        tokens: tokens per update, without padding.
        learning_rate: the highest learning rate.
        word_rate: learning rate of the word embeddings, relative to that of the other weights.
        warm_up: updates in which the learning rate rises from 0. After them it decays linearly to 0.
        weight_decay: decoupled weight decay of AdamW.
        max_grad_norm: norm to which the gradients are clipped.
        bf16: compute under bfloat16 autocast; weights stay float32.
        seed: seed of the batches.
        save_steps: updates between checkpoints.
    """

    steps: int
    tokens: int = 4096
    learning_rate: float = 1.5e-3
    word_rate: float = 1.0
    warm_up: int = 500
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = True
    seed: int = 0
    save_steps: int = 500


def pretrain(
    model: XLMRobertaForMaskedLM,
    sources: Sequence[tuple[float, Source]],
    settings: PretrainSettings,
    *,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> None:
    """Trains all parameters of a model that require a gradient, in place.

    A batch depends on (seed, step) only. So a run that resumes ends with the bits of an uninterrupted one.

    Args:
        model: the model.
        sources: (weight, source). Each update draws its batch from one source, chosen by weight.
        settings: settings of the run.
        checkpoint: a file to write, and to resume from if it exists. The caller removes it after the run.
        progress: show a progress bar.

    Raises:
        ValueError: the checkpoint has other settings.
    """
    words = model.get_input_embeddings().weight
    trained = list(_trained(model).values())
    others = [parameter for parameter in trained if parameter is not words]
    groups: list[dict[str, Any]] = [{"params": others, "share": 1.0}]
    if words.requires_grad:
        groups.append({"params": [words], "share": settings.word_rate})
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    device = next(model.parameters()).device
    weights = np.array([weight for weight, _ in sources])
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = _restore(checkpoint, model, optimizer, settings)
    model.train()
    losses: dict[str, float] = {}
    bar = tqdm(total=settings.steps, initial=first, desc="pre-train", unit="step", disable=not progress)
    for step in range(first, settings.steps):
        rng = np.random.Generator(np.random.Philox(key=settings.seed, counter=[0, 0, 0, step]))
        source = sources[rng.choice(len(sources), p=weights / weights.sum())][1]
        rate = min((step + 1) / settings.warm_up, (settings.steps - step) / max(1, settings.steps - settings.warm_up))
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * settings.learning_rate * min(1.0, rate)
        with autocast(device, torch.bfloat16 if settings.bf16 else None):
            loss = token_loss(model, source.draw(rng, settings.tokens)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if step % _REPORT < len(sources):
            losses[type(source).__name__.lower()] = loss.item()
            bar.set_postfix({name: f"{value:.2f}" for name, value in losses.items()})
        if checkpoint is not None and ((step + 1) % settings.save_steps == 0 or step + 1 == settings.steps):
            _save(checkpoint, model, optimizer, settings, step + 1)
    bar.close()
    model.eval()


def token_loss(model: XLMRobertaForMaskedLM, batch: Batch) -> Tensor:
    """Cross-entropy of each chosen token, float32 [chosen]. The LM head computes logits at these positions only."""
    device = next(model.parameters()).device
    tokens, seen, chosen = (t.to(device) for t in (batch.tokens, batch.seen, batch.chosen))
    attended = (tokens != model.config.pad_token_id).long()
    hidden = model.roberta(seen, attention_mask=attended).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[chosen]).float(), tokens[chosen], reduction="none")


@torch.no_grad()
def held_out_losses(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Sequence[str]],
    held_out: Mapping[str, Sequence[str]],
    *,
    length: int = 64,
    tokens: int = 1 << 15,
) -> dict[str, tuple[float, float]]:
    """Compares a model with unigram models on masked tokens of held-out text.

    The unigram model of a language has the frequencies of its training text, with add-one smoothing. Both predict the
    same tokens.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        training: language -> training sentences.
        held_out: language -> sentences to predict.
        length: tokens of a block.
        tokens: about how many tokens of each language are read.

    Returns:
        Language -> (mean loss of the model, mean loss of the unigram model), in nats.
    """
    was_training = model.training
    model.eval()
    losses = {}
    for language, sentences in held_out.items():
        counts = np.ones(len(tokenizer))
        for ids in tokenizer(list(training[language]), add_special_tokens=False, verbose=False)["input_ids"]:
            np.add.at(counts, ids, 1)
        unigram = -torch.from_numpy(np.log(counts / counts.sum()))
        source = Sentences({language: sentences}, tokenizer, length=length)
        rng = np.random.default_rng(0)
        batches = [source.draw(rng, 4096) for _ in range(max(1, tokens // 4096))]
        ours = torch.cat([token_loss(model, batch).cpu() for batch in batches])
        theirs = torch.cat([unigram[batch.tokens[batch.chosen]] for batch in batches])
        losses[language] = float(ours.mean()), float(theirs.mean())
    model.train(was_training)
    return losses


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: PretrainSettings, step: int
) -> None:
    tensors = {}
    for name, parameter in _trained(model).items():
        tensors[f"{name}:value"] = parameter.detach()
        tensors |= {f"{name}:{key}": optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq", "step")}
    files.save(path, _KIND, tensors, {"step": step, "settings": asdict(settings)})


@torch.no_grad()
def _restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: PretrainSettings) -> int:
    tensors, metadata = files.load(path, _KIND)
    if (theirs := metadata.get("settings")) != asdict(settings):
        raise ValueError(f"{path} has other settings, {theirs}; delete it, or use these")
    with files.understanding(path, _KIND):
        for name, parameter in _trained(model).items():
            parameter.copy_(tensors[f"{name}:value"])
            optimizer.state[parameter] = {
                key: tensors[f"{name}:{key}"].to(parameter.device if key != "step" else "cpu")
                for key in ("exp_avg", "exp_avg_sq", "step")
            }
        return int(metadata["step"])
