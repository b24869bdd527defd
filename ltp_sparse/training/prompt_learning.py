"""Stage 2: prompt-learning of any method of `ltp_sparse.methods` on `transformers.Trainer` (METHODS.md 3, 4.2)."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from ltp_sparse.delta import SparseDelta, scatter_
from ltp_sparse.methods import PromptMethod, PromptSettings
from ltp_sparse.names import applied_deltas, canonical_parameters, tensor_digest
from ltp_sparse.prompting import (
    PromptedMaskedLM,
    PromptEncoder,
    Verbalizer,
    collator,
    soft_template,
    vocabulary_rows,
)
from ltp_sparse.prompting.templates import IGNORED_LABEL, Pair
from ltp_sparse.ticket import Ticket
from ltp_sparse.training.backbone import decouple, is_decoupled
from ltp_sparse.training.evaluation import Encode
from ltp_sparse.training.trainer import KeepBest, SparseTrainer, last_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

logger = logging.getLogger(__name__)

_ENCODER = "prompt_encoder."
_BAKED = "prompt_encoder.rows"

_trained: weakref.WeakKeyDictionary[nn.Module, PromptedMaskedLM] = weakref.WeakKeyDictionary()
"""Language model -> the prompted model of its latest run, which knows whether the result is still applied."""


@dataclass(frozen=True)
class PromptResult:
    """What a run of prompt-learning gives.

    model:           the prompted model with the best weights; `delta.revert(model)` takes the language model back to
                     its initial bits
    delta:           ticket entries and the prompt encoder at the best epoch, applied to `model`
    baked:           the same with the prompt [n, H] in place of its encoder: all that `load_prompted` needs
    dev_accuracy:    after each epoch, 0 to 1
    best_epoch:      counted from 1; the first of equally good ones
    seconds:         wall-clock time of training, dev evaluation included (of the last part if the run was resumed)
    optimizer_bytes: state of the optimizer: moments and index
    encode:          turns pairs into inputs of `model`
    """

    model: PromptedMaskedLM
    delta: SparseDelta
    baked: SparseDelta
    dev_accuracy: tuple[float, ...]
    best_epoch: int
    seconds: float
    optimizer_bytes: int
    encode: Encode


def train_prompt(
    method: PromptMethod,
    language_model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Pair],
    dev: Sequence[Pair],
    *,
    ticket: Ticket | None = None,
    verbalizer: Verbalizer | None = None,
    seed: int = 1,
    output_dir: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    resume: bool = False,
    micro_batch_size: int | None = None,
    bf16: bool = False,
    states: str = "float32",
    gradients: str = "packed",
    progress: bool = True,
    check_frozen: bool = True,
    arguments: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PromptResult:
    """Trains a prompt, and the method's share of the language model, on labelled pairs.

    Args:
        method: what trains, and its settings.
        language_model: at its initial weights. Its parameters are trained in place and end at the best epoch.
        tokenizer: that of the language model.
        train, dev: labelled pairs; accuracy on `dev` after each epoch picks the epoch to keep, the first of the best.
        ticket: of stage 1, for methods that need one. A ticket that was selected on other initial weights is an error.
        verbalizer: default: the English words.
        seed: of the prompt encoder's initial values, the order of pairs, dropout, and what the method draws.
        output_dir: keeps the best epoch so far (`best.safetensors`) and the checkpoints; None keeps nothing on disk.
        save_every: epochs between checkpoints, of which the latest is kept; None writes none.
        resume: continue from the latest checkpoint of `output_dir`, if there is one. The result has the bits of a run
            that was never interrupted.
        micro_batch_size: pairs per forward pass and device, to save memory; the update is that of the whole batch. With
            several processes (torchrun) an incomplete last batch is filled up with pairs from the beginning.
        bf16: compute in bfloat16 under autocast; weights stay float32.
        states: "float32" or "8bit" moments, see `MaskedAdamW`.
        gradients: "packed" keeps of every gradient the ticket's entries only, "dense" all of them.
        progress: show a progress bar.
        check_frozen: hash what must not train, before and after, and raise RuntimeError if a bit of it changed.
        arguments: further `transformers.TrainingArguments`, e.g. {"report_to": "tensorboard"}.
        callbacks: further callbacks of the Trainer.

    Raises:
        ValueError: pairs without a label, a ticket that is missing or does not fit, settings that do not fit the model.
    """
    settings = method.settings
    _check(settings, language_model, train, dev, output_dir, save_every, resume)
    method.prepare(language_model)
    active = method.ticket(language_model, ticket, seed=seed)
    verbalizer = verbalizer or Verbalizer.for_language(tokenizer, "en")
    encode = partial(
        soft_template(settings.n_prompt).encode,
        tokenizer,
        max_length=settings.max_length,
        truncation=settings.truncation,
    )
    model = PromptedMaskedLM(language_model, _prompt_encoder(settings, language_model, tokenizer, seed), verbalizer)
    frozen = _frozen_digests(model, active) if check_frozen else {}

    with nullcontext(output_dir) if output_dir is not None else tempfile.TemporaryDirectory() as folder:
        keep_best = KeepBest("accuracy", on_disk=output_dir is not None)
        trainer = SparseTrainer(
            model,
            _arguments(settings, folder, seed, save_every, micro_batch_size, bf16, progress, arguments or {}),
            active,
            dense=model.prompt_encoder,
            keep_best=keep_best,
            optimizer_options={"states": states, "gradients": gradients},
            train_dataset=encode(train),
            eval_dataset=encode(dev),
            data_collator=collator(language_model.config.pad_token_id),
            compute_metrics=_accuracy,
            compute_loss_func=_loss,
            callbacks=[*([_SaveEvery(save_every)] if save_every else []), *callbacks],
        )
        _check_base(ticket, trainer)
        if not progress:
            trainer.remove_callback(PrinterCallback)
        checkpoint = last_checkpoint(folder) if resume else None
        start = time.perf_counter()
        with _back_to_base_on_failure(trainer):
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            finally:
                trainer.release_model()
        seconds = time.perf_counter() - start
        best = keep_best.delta()

    changed = [name for name, digest in _frozen_digests(model, active).items() if frozen.get(name, digest) != digest]
    if check_frozen and changed:
        raise RuntimeError(f"train_prompt: entries of {changed[0]!r} that must not train have changed; this is a bug")
    history = tuple(log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log)
    best_epoch = round(best.metadata["epoch"])
    logger.info("%s: epoch %d of %d is kept, dev accuracy %.4f", method.name, best_epoch, len(history), max(history))
    metadata = {
        "method": method.name,
        "seed": seed,
        "settings": asdict(settings),
        "verbalizer": [list(tokens) for tokens in verbalizer.token_ids],
        "decoupled": is_decoupled(language_model),
        "epoch": best_epoch,
        "dev_accuracy": best.metadata["value"],
    }
    delta = SparseDelta(best.ticket, best.values, best.originals, best.dense, metadata)
    prompt = {_BAKED: model.prompt_encoder.bake().cpu()}
    # From the base the delta is applied as any other, so that the model knows it and can revert it.
    _to_base(trainer)
    delta.apply(model)
    _trained[language_model] = model
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return PromptResult(
        model=model.eval(),
        delta=delta,
        baked=SparseDelta(delta.ticket, delta.values, delta.originals, prompt, metadata),
        dev_accuracy=history,
        best_epoch=best_epoch,
        seconds=seconds,
        optimizer_bytes=optimizer.state_bytes(),
        encode=encode,
    )


def load_prompted(
    language_model: XLMRobertaForMaskedLM, tokenizer: PreTrainedTokenizerBase, delta: SparseDelta
) -> tuple[PromptedMaskedLM, Encode]:
    """The prompted model of a result of `train_prompt` (`delta` or `baked`), and what encodes pairs for it.

    language_model: at the initial weights of that run; the delta is applied to its parameters, `delta.revert(model)`
        takes it off again.
    """
    if missing := [key for key in ("settings", "verbalizer", "decoupled") if key not in delta.metadata]:
        raise ValueError(
            f"load_prompted: expected a delta made by train_prompt, this one has no {missing[0]!r}: {delta!r}"
        )
    if delta.metadata["decoupled"]:
        decouple(language_model)
    settings = PromptSettings(**{**delta.metadata["settings"], "seeds": tuple(delta.metadata["settings"]["seeds"])})
    rows = delta.dense[_BAKED]
    kind = "none" if set(delta.dense) == {_BAKED} else settings.encoder
    encoder = PromptEncoder(rows.shape[0], rows.shape[1], kind).to(language_model.device)
    verbalizer = Verbalizer(tuple(tuple(tokens) for tokens in delta.metadata["verbalizer"]))
    model = PromptedMaskedLM(language_model, encoder, verbalizer)
    delta.apply(model)
    encode = partial(
        soft_template(settings.n_prompt).encode,
        tokenizer,
        max_length=settings.max_length,
        truncation=settings.truncation,
    )
    return model.eval(), encode


class _SaveEvery(TrainerCallback):
    """Of the Trainer's checkpoints, one per epoch, lets one in `epochs` through, after the epoch's evaluation."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if round(state.epoch or 0) % self.epochs:
            control.should_save = False


def _check(
    settings: PromptSettings,
    language_model: XLMRobertaForMaskedLM,
    train: Sequence[Pair],
    dev: Sequence[Pair],
    output_dir: str | os.PathLike[str] | None,
    save_every: int | None,
    resume: bool,
) -> None:
    for what, pairs in (("train", train), ("dev", dev)):
        if not pairs or any(pair.label is None for pair in pairs):
            raise ValueError(f"train_prompt: expected labelled pairs in {what}, got none or some without a label")
    if (earlier := _trained.get(language_model)) is not None and applied_deltas(earlier):
        raise ValueError(
            "train_prompt: expected a language model at its initial weights, this one has the result of an earlier run "
            "applied; call result.delta.revert(result.model), or load it again"
        )
    config = language_model.config
    if settings.max_length > (longest := config.max_position_embeddings - config.pad_token_id - 1):
        raise ValueError(
            f"train_prompt: max_length must be at most {longest}, the positions of the model, got {settings.max_length}"
        )
    if output_dir is None and (save_every or resume):
        raise ValueError("train_prompt: save_every and resume need an output_dir to write to and read from, got None")
    if save_every is not None and save_every < 1:
        raise ValueError(f"train_prompt: save_every must be at least 1 epoch or None, got {save_every}")


def _check_base(ticket: Ticket | None, trainer: SparseTrainer) -> None:
    """The ticket must have been selected on the weights that are trained: stage 2 starts from the initial ones."""
    digests = trainer.base.ticket.fingerprint
    wanted = ticket.fingerprint if ticket is not None else {}
    if differing := [name for name, digest in digests.items() if wanted.get(name, digest) != digest]:
        raise ValueError(
            f"train_prompt: the ticket was selected on other initial weights than these: {differing[0]!r} differs "
            f"({len(differing)} tensors in all); load the initial weights again, or revert the deltas applied to them"
        )


def _prompt_encoder(
    settings: PromptSettings, language_model: XLMRobertaForMaskedLM, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PromptEncoder:
    embedding: Tensor = language_model.get_input_embeddings().weight
    rows = None
    if settings.init == "vocabulary":
        rows = vocabulary_rows(embedding, settings.n_prompt, seed, exclude=tuple(tokenizer.all_special_ids)).cpu()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = PromptEncoder(settings.n_prompt, embedding.shape[1], settings.encoder, rows=rows)
    return encoder.to(embedding.device)


def _arguments(
    settings: PromptSettings,
    folder: str | os.PathLike[str],
    seed: int,
    save_every: int | None,
    micro_batch_size: int | None,
    bf16: bool,
    progress: bool,
    extra: Mapping[str, Any],
) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = min(micro_batch_size or settings.batch_size // processes, settings.batch_size)
    if micro < 1 or settings.batch_size % (micro * processes):
        raise ValueError(
            f"train_prompt: the batch of {settings.batch_size} pairs must be a multiple of micro_batch_size x "
            f"processes, got {micro_batch_size} x {processes}"
        )
    values: dict[str, Any] = {
        "output_dir": os.fspath(folder),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // (micro * processes),
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_strategy": "epoch" if save_every else "no",
        "save_total_limit": 1,
        "seed": seed,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": not progress,
    }
    return TrainingArguments(**{**values, **extra})


def _loss(outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Cross-entropy over the classes, averaged over the pairs of the whole batch, of which `outputs` may be a part."""
    if num_items_in_batch is None:
        return F.cross_entropy(outputs["logits"], labels, ignore_index=IGNORED_LABEL)
    total = F.cross_entropy(outputs["logits"], labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / num_items_in_batch


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@torch.no_grad()
def _frozen_digests(model: nn.Module, ticket: Ticket) -> dict[str, str]:
    """Name -> digest of every parameter outside the prompt encoder, its active entries set to zero."""
    digests = {}
    for name, parameter in canonical_parameters(model).items():
        if name.startswith(_ENCODER):
            continue
        index_set = ticket.sets.get(name)
        if index_set is None or index_set.k == 0:
            digests[name] = tensor_digest(parameter)
        elif index_set.k < index_set.n:
            digests[name] = tensor_digest(parameter.masked_fill(ticket.mask(name).to(parameter.device), 0))
    return digests


@contextmanager
def _back_to_base_on_failure(trainer: SparseTrainer) -> Iterator[None]:
    """Whatever ends training early, an interrupt included, leaves the language model as it was."""
    flags = {parameter: parameter.requires_grad for parameter in trainer.model.parameters()}
    try:
        yield
    except BaseException:
        _to_base(trainer)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise


@torch.no_grad()
def _to_base(trainer: SparseTrainer) -> None:
    """Writes the initial values into the language model's trained entries."""
    parameters = canonical_parameters(trainer.model)
    for name, originals in trainer.base.originals.items():
        scatter_(parameters[name].detach(), trainer.base.ticket.sets[name], originals)
