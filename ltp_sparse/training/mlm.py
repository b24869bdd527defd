"""Stage 1 of LTP: masked-language-model tuning, after which the winning ticket is selected (docs/papers.md).

result = tune_mlm(model, tokenizer, texts, MLMSettings(strategy="decoupled"))
ticket = find_ticket(result.initial, result.model, density=0.2, metadata=result.metadata)
result.reset()                     # back to the initial weights, bit for bit, for stage 2
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, XLMRobertaForMaskedLM
from transformers.trainer_callback import TrainerControl, TrainerState

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.models.backbone import is_decoupled, longest_input
from ltp_sparse.models.masked_losses import masked_token_loss, token_losses
from ltp_sparse.optim.snapshot import Snapshot
from ltp_sparse.prompting.templates import IGNORED_LABEL
from ltp_sparse.selection.ltp import STRATEGIES, find_ticket  # noqa: F401 (its name before it moved, until 0.3)
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.autocast import autocast
from ltp_sparse.training.bars import show_progress
from ltp_sparse.training.masked_texts import MaskedTexts, PadRight, split_texts, text_hash
from ltp_sparse.training.run_folder import begin, locked
from ltp_sparse.training.trainer import KeepBest, SparseTrainer, training_arguments
from ltp_sparse.weights.names import canonical_parameters


@dataclass(frozen=True)
class MLMSettings:
    """How stage 1 tunes. The defaults are those of the paper or, if it does not state them, of LT-SFT.

    Attributes:
        strategy: "vanilla", "decoupled" or "frozen_embedding".
        epochs: passes over the training texts.
        batch_size: sequences per update, over all processes and micro-batches.
        accumulation: micro-batches per update.
        learning_rate: decays linearly to 0.
        weight_decay: decoupled weight decay.
        max_grad_norm: norm to which the gradients are clipped.
        l1: pull to the initial weights, before it is divided by the number of all model parameters.
        length: tokens per sequence.
        line_by_line: one text per sequence, instead of texts joined and cut into full blocks.
        mask_probability: share of the tokens that are predicted.
        validation: share of the texts held out.
        eval_steps: updates between evaluations on these; there is one more at the end.
        max_steps: if positive, the number of updates, instead of epochs.
        step_bounds: the fewest and the most updates, which limit those of the epochs (LT-SFT: 10,000 and 100,000).
        seed: seed of the held-out texts, the masks, the order of the sequences and dropout.
        bf16: computes under bfloat16 autocast; weights stay float32.
        states: "float32" or "8bit" moments, see `MaskedAdamW`.
        save_steps: updates between checkpoints for resuming; 0 writes none. All weights train here: a checkpoint of
            XLM-R-base has 6 GB.
        save_total_limit: the number of checkpoints that are kept.
    """

    strategy: str = "decoupled"
    epochs: float = 3
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    l1: float = 0.1
    length: int = 256
    line_by_line: bool = False
    mask_probability: float = 0.15
    validation: float = 0.1
    eval_steps: int = 1000
    max_steps: int = -1
    step_bounds: tuple[int, int] | None = None
    seed: int = 42
    bf16: bool = False
    states: str = "float32"
    save_steps: int = 0
    save_total_limit: int = 1


@dataclass
class MLMResult:
    """A tuned model and its initial weights.

    Attributes:
        model: the given model, with the weights of the best validation loss.
        base: the ticket that was trained, and the initial values of its entries and of the LM head.
        metadata: metadata for the ticket: strategy, steps, step and loss of the best evaluation, data hash, settings.
        history: the log of the run, as `TrainerState.log_history`.
    """

    model: XLMRobertaForMaskedLM
    base: Snapshot
    metadata: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def ticket(self) -> Ticket:
        """The entries that were trained."""
        return self.base.ticket

    @property
    def originals(self) -> dict[str, Tensor]:
        """Canonical name -> [k] initial values of the ticket's entries; on the CPU."""
        return self.base.originals

    @property
    def initial(self) -> dict[str, Tensor]:
        """Canonical name -> initial values of all tensors that trained in full, with the LM head; on the CPU."""
        shapes, sets = self.ticket.shapes, self.ticket.sets
        whole = {name: v.view(shapes[name]) for name, v in self.originals.items() if sets[name].k == sets[name].n}
        return {**whole, **self.base.dense}

    def delta(self) -> SparseDelta:
        """The changes of the ticket's entries, and the tensors that trained in full."""
        return self.base.delta(self.metadata)

    def reset(self) -> XLMRobertaForMaskedLM:
        """Puts all initial weights back, bit for bit, and returns the model.

        An interrupt is raised after that.
        """
        self.base.put_back()
        return self.model


def tune_mlm(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: MLMSettings | None = None,
    *,
    ticket: Ticket | None = None,
    dense: nn.Module | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    source: str = "tune_mlm",
    **arguments: Any,
) -> MLMResult:
    """Tunes `model` in place as a masked language model. It ends with the weights of the best validation loss.

    All parameters in the strategy's pool train. So do dense, layer_norm and bias of the LM head, which are never
    selected and which `reset` restores. LayerNorms and a decoupled output embedding are frozen. One `MaskedAdamW`
    trains all of them, with the L1 pull fused in. The initial weights are kept once, on the host, for the pull and for
    the result. Logits are computed at masked positions only, some at a time.

    Args:
        model: a model with a tied LM head for "vanilla", or a decoupled one for "decoupled":
            `load_backbone(..., decoupled=...)`.
        tokenizer: the model's tokenizer.
        texts: one sentence or paragraph each.
        settings: see `MLMSettings`.
        ticket: the entries to train, instead of all in the strategy's pool.
        dense: a part of the model to train in full, instead of dense, layer_norm and bias of the LM head.
        output_dir: folder for checkpoints; None: a temporary one. Checkpoints of an earlier run are removed unless this
            run resumes.
        resume: continues from the latest checkpoint in `output_dir`, if there is one.
        progress: shows progress bars with the latest figures.
        callbacks: further callbacks of the trainer.
        source: the source of the texts, for messages.
        arguments: further `transformers.TrainingArguments`, e.g. logging_steps=10.

    Raises:
        ValueError: the strategy is unknown or does not fit the LM head, there is too little text, sequences are longer
            than the model allows, or settings or texts differ from those of the run to resume.
    """
    settings = settings or MLMSettings()
    _check(model, settings, output_dir, resume)
    parameters = canonical_parameters(model)
    pull = settings.l1 / sum(parameter.numel() for parameter in parameters.values())
    if dense is None:
        head = {name: parameter for name, parameter in parameters.items() if name.startswith("lm_head.")}
        head.pop("lm_head.decoder.weight", None)  # a decoupled output embedding is frozen
    else:
        members = {id(parameter) for parameter in dense.parameters()}
        head = {name: parameter for name, parameter in parameters.items() if id(parameter) in members}
    try:
        training, validation = split_texts(texts, settings.validation, settings.seed)
        train_dataset = _masked(training, tokenizer, settings, settings.seed, progress)
        eval_dataset = _masked(validation, tokenizer, settings, settings.seed + 1, progress)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    room = longest_input(model.config)
    if (longest := max(train_dataset.longest, eval_dataset.longest)) > room:
        raise ValueError(
            f"tune_mlm: the model has positions for {room} tokens, got {longest}; pass length={room} or less"
        )
    device = next(model.parameters()).device
    with locked(output_dir) as folder:
        trainer = MLMTrainer(
            model,
            _training_arguments(settings, len(train_dataset), folder, progress, arguments),
            Ticket.full(model, pool=STRATEGIES[settings.strategy]) if ticket is None else ticket,
            dense=[{"params": list(head.values()), "pull": pull}],
            pull=pull,
            optimizer_options={"pull_on": "host", "states": settings.states},
            keep_best=(keep_best := KeepBest("loss", on_disk=False)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=PadRight(tokenizer.pad_token_id),
            callbacks=[_Epochs(train_dataset), _EvaluateAtEnd(), *callbacks],
        )
        show_progress(trainer, progress)
        facts = {key: value for key, value in asdict(settings).items() if not key.startswith("save_")}
        facts["data_hash"] = text_hash(texts)
        trainer.train(resume_from_checkpoint=begin(folder, facts, what="tune_mlm", resume=resume))
    model.to(device).eval()
    best = keep_best.delta().metadata
    metadata = {
        "stage": "mlm",
        "strategy": settings.strategy,
        "step": best["step"],
        "validation_loss": best["value"],
        "steps": trainer.state.global_step,
        "training_sequences": len(train_dataset),
        "data_hash": facts["data_hash"],
        "settings": asdict(settings),
    }
    return MLMResult(model, trainer.base, metadata, trainer.state.log_history)


def mlm_losses(
    model: XLMRobertaForMaskedLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: MLMSettings
) -> Iterator[Tensor]:
    """Yields the losses of the batches of the first epoch of `tune_mlm`, for `selection.scores`, without tuning.

    Call `backward` on a loss before you request the next one. Dropout is off.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        texts: the texts that `tune_mlm` would get.
        settings: the settings of `tune_mlm`; a positive `max_steps` is the largest number of batches.
    """
    training, _ = split_texts(texts, settings.validation, settings.seed)
    dataset = _masked(training, tokenizer, settings, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(dataset), generator=generator, dtype=torch.int64, device="cpu").tolist()
    if settings.max_steps > 0:
        order = order[: settings.max_steps * settings.batch_size]
    collate, device = PadRight(tokenizer.pad_token_id), next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), settings.batch_size):
            batch = collate([dataset[i] for i in order[start : start + settings.batch_size]])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            with token_losses(model, labels), autocast(device, torch.bfloat16 if settings.bf16 else None):
                yield masked_token_loss(model(**batch), labels)
    finally:
        model.train(was_training)


def _masked(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, settings: MLMSettings, seed: int, progress: bool = False
) -> MaskedTexts:
    return MaskedTexts(
        texts,
        tokenizer,
        length=settings.length,
        packed=not settings.line_by_line,
        probability=settings.mask_probability,
        seed=seed,
        progress=progress,
    )


def _check(model: nn.Module, settings: MLMSettings, output_dir: str | os.PathLike[str] | None, resume: bool) -> None:
    strategy = settings.strategy
    if strategy not in STRATEGIES:
        raise ValueError(f"tune_mlm: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy != "frozen_embedding" and is_decoupled(model) != (strategy == "decoupled"):
        wanted, found = ("decoupled", "tied") if strategy == "decoupled" else ("tied", "decoupled")
        raise ValueError(
            f"tune_mlm: strategy {strategy!r} needs a {wanted} LM head, this model's is {found}; "
            f"load it with ltp_sparse.models.backbone.load_backbone(..., decoupled={strategy == 'decoupled'})"
        )
    if settings.length < 1:
        raise ValueError(f"tune_mlm: length must be at least 1 token, got {settings.length}")
    if settings.max_steps <= 0 and settings.step_bounds is None and not settings.epochs > 0:
        raise ValueError(f"tune_mlm: epochs must be above 0 unless max_steps is, got {settings.epochs}")
    if (resume or settings.save_steps) and output_dir is None:
        raise ValueError("tune_mlm: checkpoints need a folder; pass output_dir=")


def _training_arguments(
    settings: MLMSettings, sequences: int, folder: str, progress: bool, more: Mapping[str, Any]
) -> TrainingArguments:
    max_steps = settings.max_steps
    if max_steps <= 0 and settings.step_bounds is not None:
        least, most = settings.step_bounds
        max_steps = min(max(math.ceil(settings.epochs * sequences / settings.batch_size), least), most)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    per_device, rest = divmod(settings.batch_size, settings.accumulation * processes)
    if rest or not per_device:
        raise ValueError(
            f"tune_mlm: a batch of {settings.batch_size} sequences cannot be split into {settings.accumulation} "
            f"accumulation steps on {processes} processes; take a multiple of {settings.accumulation * processes}"
        )
    options: dict[str, Any] = {
        "max_steps": max_steps,
        "lr_scheduler_type": "linear",
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps,
        "logging_steps": 50,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 1,
        "save_total_limit": settings.save_total_limit,
        "seed": settings.seed,
        "bf16": settings.bf16,
        **more,
    }
    return training_arguments(settings, folder, per_device, settings.accumulation, progress, **options)


class MLMTrainer(SparseTrainer):
    """A `SparseTrainer` that computes the LM head at masked positions only, and the mean loss per masked token.

    The training loss is the mean over the masked tokens of an update, in all its micro-batches and processes.
    `eval_loss` is the mean over all masked tokens of the set, whatever the batch size. `PadRight` collates.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=masked_token_loss, compute_metrics=_token_mean, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`masked_token_loss` of a micro-batch."""
        with token_losses(model, inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """For each sequence, the sum of losses (float64 [B]) and the number of masked tokens (int64 [B])."""
        labels = inputs["labels"]
        masked = labels != IGNORED_LABEL
        with token_losses(model, labels):
            losses = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        return None, sums.index_add_(0, masked.nonzero()[:, 0], losses.double()), masked.sum(1)


def _token_mean(prediction: Any) -> dict[str, float]:
    loss = float(prediction.predictions.sum() / max(prediction.label_ids.sum(), 1))
    return {"loss": loss, "perplexity": float(np.exp(loss))}


class _Epochs(TrainerCallback):
    """Passes the epoch to a dataset. In a distributed run the dataloader passes it to its sampler only."""

    def __init__(self, dataset: MaskedTexts) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.dataset.begin_epoch(int(state.epoch or 0))


class _EvaluateAtEnd(TrainerCallback):
    """Evaluates after the last update, so that the last weights can be the best ones."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
