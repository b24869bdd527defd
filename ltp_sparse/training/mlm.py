"""Stage 1 of LTP: masked-language-model tuning, and the winning ticket of what it moved (METHODS 4.1).

result = tune_mlm(model, tokenizer, texts, MLMSettings(strategy="decoupled"))
ticket = find_ticket(result.initial, result.model, density=0.2, metadata=result.metadata)
result.reset()                     # back to the initial weights, bit for bit, for stage 2
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from ltp_sparse.backends.reference import delta_keys
from ltp_sparse.models.backbone import is_decoupled, longest_input
from ltp_sparse.optim.snapshot import Snapshot
from ltp_sparse.selection import Weights, pools, select
from ltp_sparse.selection.budgets import Budget
from ltp_sparse.selection.sources import ScoreFunction, Sides, check_shape, names_in_pool
from ltp_sparse.tickets.counts import entries_for
from ltp_sparse.tickets.delta import SparseDelta
from ltp_sparse.tickets.ticket import Pool, Ticket
from ltp_sparse.training.bars import show_progress
from ltp_sparse.training.trainer import KeepBest, SparseTrainer, alone, begin
from ltp_sparse.weights.checkpoints import Readable, read_piece
from ltp_sparse.weights.names import canonical_parameters, layer_of, unwrapped
from ltp_sparse.weights.versions import Missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

IGNORED = -100
_TOKENIZER_BATCH = 1000
_LOGITS = 1 << 26  # logits that exist at a time
_LARGEST_KEY = 0x7F7FFFFF  # the bits of the largest finite float32

STRATEGIES: dict[str, Callable[[str], bool]] = {
    "vanilla": pools.maskable,
    "decoupled": pools.maskable,
    "frozen_embedding": pools.without_embeddings,
}
"""What may move in tuning and be selected. "vanilla" wants a tied LM head, "decoupled" a decoupled one."""


@dataclass(frozen=True)
class MLMSettings:
    """How stage 1 tunes. The defaults are the paper's, or where it is silent those of LT-SFT, whose settings it shares.

    strategy:      "vanilla", "decoupled" or "frozen_embedding"
    batch_size:    sequences per update, over all processes and accumulation steps
    accumulation:  micro-batches per update
    l1:            pull to the initial weights; divided by the number of all model parameters
    length:        tokens per sequence
    line_by_line:  one text per sequence, instead of texts joined and cut into full blocks
    validation:    share of the texts held out; evaluated every `eval_steps` updates and at the end
    max_steps:     if positive, updates, instead of epochs
    step_bounds:   least and most updates, whatever the epochs come to (LT-SFT: 10,000 and 100,000)
    bf16:          compute under bfloat16 autocast; weights stay float32
    states:        "float32" or "8bit" moments, see `MaskedAdamW`
    save_steps:    updates between resumable checkpoints, 0: none. All weights train here, so one of XLM-R-base is 6 GB
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
    """A tuned model and what it was before.

    model:    the model that was passed in, with the weights of the best validation loss
    base:     the model before: the ticket that was trained, the initial values of its entries and of the LM head
    metadata: strategy, steps, step and loss of the best evaluation, data hash and settings: for the ticket
    history:  the log of the run, as `TrainerState.log_history`
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
        """Canonical name -> initial values of all tensors that were trained whole, the LM head included; on the CPU."""
        shapes, sets = self.ticket.shapes, self.ticket.sets
        whole = {name: v.view(shapes[name]) for name, v in self.originals.items() if sets[name].k == sets[name].n}
        return {**whole, **self.base.dense}

    def delta(self) -> SparseDelta:
        """What training changed: the ticket's entries, and what trained in full."""
        return self.base.delta(self.metadata)

    def reset(self) -> XLMRobertaForMaskedLM:
        """Puts the initial weights back, bit for bit, those of the LM head included; returns the model.

        An interrupt comes through when all of them are.
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
    """Tunes `model` in place as a masked language model and leaves it at its best validation loss.

    Everything in the strategy's pool trains, and the LM head's dense, layer_norm and bias (never selected; `reset`
    takes them back); LayerNorms and a decoupled output embedding stay fixed. All of it is one `MaskedAdamW` with the L1
    pull fused in. The initial weights are held once, on the host, for the pull and for the result. Logits are made at
    masked positions only, some at a time.

    Args:
        model: tied for "vanilla", decoupled for "decoupled": `load_backbone(..., decoupled=...)`.
        texts: one sentence or paragraph each.
        ticket: the entries to train, instead of all in the strategy's pool.
        dense: a part of the model to train in full, instead of the LM head's dense, layer_norm and bias.
        output_dir: folder for checkpoints; None: a temporary one. Those of an earlier run are removed, unless this one
            resumes.
        resume: continue from the latest checkpoint in `output_dir`, if there is one. ValueError with other settings or
            texts than `settings.json` there tells of.
        progress: show bars and the log.
        source: where the texts are from, for messages.
        arguments: further `transformers.TrainingArguments`, e.g. logging_steps=10.

    Raises:
        ValueError: unknown strategy, a model tied where it must not be or the reverse, too little text, sequences
            longer than the model has positions.
    """
    settings = settings or MLMSettings()
    _check(model, settings, output_dir, resume)
    parameters = canonical_parameters(model)
    pull = settings.l1 / sum(parameter.numel() for parameter in parameters.values())
    if dense is None:
        is_head = lambda name: name.startswith("lm_head.") and name != "lm_head.decoder.weight"  # noqa: E731
        head = {name: parameter for name, parameter in parameters.items() if is_head(name)}
    else:
        members = {id(parameter) for parameter in dense.parameters()}
        head = {name: parameter for name, parameter in parameters.items() if id(parameter) in members}

    def dataset(part: Sequence[str], seed: int) -> MaskedTexts:
        return MaskedTexts(
            part,
            tokenizer,
            length=settings.length,
            packed=not settings.line_by_line,
            probability=settings.mask_probability,
            seed=seed,
            progress=progress,
        )

    try:
        training, validation = split_texts(texts, settings.validation, settings.seed)
        train_dataset, eval_dataset = dataset(training, settings.seed), dataset(validation, settings.seed + 1)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    room = longest_input(model.config)
    if (longest := max(train_dataset.longest, eval_dataset.longest)) > room:
        raise ValueError(
            f"tune_mlm: the model has positions for {room} tokens, got {longest}; pass length={room} or less"
        )
    device = next(model.parameters()).device
    with ExitStack() as stack:
        folder = os.fspath(output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="ltp_sparse-mlm-")))
        stack.enter_context(alone(folder))
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


def find_ticket(
    initial: Weights,
    tuned: Weights,
    *,
    strategy: str = "decoupled",
    density: float = 0.2,
    budget: Budget = "global",
    segment: str | None = None,
    intersect: bool = False,
    order: str = "most",
    allow_missing: Missing = False,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Ticket:
    """The winning ticket: the entries of the strategy's pool that tuning moved most.

    With the global budget, `density` counts against all maskable entries (277,414,656 of XLM-R-base) for every
    strategy, so that "20 %" is the same number of entries; in a segment, and for the other budgets, against the pool.

    Args:
        initial, tuned: modules, mappings from names to tensors, or safetensors checkpoints; at least one of them must
            hold the whole base model.
        strategy: that of the tuning.
        budget: "global" (across layers), "layer" (layer separate), "tensor", or shares, see `select`.
        segment: "lower", "middle" or "upper" third of the layers only.
        order: "most" changed, or "least" changed entries, a control.
        allow_missing: which parameters of the pool may be on one side only, see `select`.
        intersect: with `segment`: the part of the whole model's ticket that lies in the segment.
        metadata: added to the ticket's, e.g. `MLMResult.metadata`.

    Raises:
        ValueError: unknown strategy or segment, a parameter on one side only, or a budget above its pool.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"find_ticket: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if order not in ("most", "least"):
        raise ValueError(f"find_ticket: order must be most or least, got {order!r}")
    if intersect and segment is None:
        raise ValueError("find_ticket: intersect=True keeps the part inside a segment; pass segment=, too")
    sides = Sides.of(initial, tuned, None, what="find_ticket")
    sizes = [{name: tensor.numel() for name, tensor in side.items()} for side in (sides.base, sides.after)]
    maskable = max(sum(n for name, n in of.items() if pools.maskable(name)) for of in sizes)
    num_layers = len({layer_of(name) for of in sizes for name in of} - {"embeddings", "other"})
    in_segment = None if segment is None else pools.segment(segment, num_layers)
    pool = STRATEGIES[strategy] if in_segment is None or intersect else in_segment
    of_model = budget == "global" and pool is not in_segment
    ticket = select(
        sides.base if order == "most" else _common(sides, pool, allow_missing),
        sides.after if order == "most" else None,
        score=None if order == "most" else least_changed(sides.base, sides.after),
        k=entries_for(maskable, density=density, k=None) if of_model else None,
        density=None if of_model else density,
        budget=budget,
        pool=pool,
        allow_missing=allow_missing,
        method="ltp" if order == "most" else "ltp, least changed",
        metadata=metadata,
        progress=progress,
    )
    if intersect:
        ticket = ticket.restrict(in_segment)
    ticket.metadata |= {"strategy": strategy, "density": density, "maskable": maskable, "k": ticket.k}
    if segment is not None:
        ticket.metadata |= {"segment": segment, "intersect": intersect}
    return ticket


def least_changed(before: Mapping[str, Readable], after: Mapping[str, Readable]) -> ScoreFunction:
    """A score for `select` that is the larger the less an entry has moved.

    Its bits are those of the largest finite float32 minus those of |after - before|: exactly the reverse order.
    """

    def score(name: str, start: int, stop: int) -> Tensor:
        pieces = (read_piece(tensors[name], start, stop) for tensors in (before, after))
        return (_LARGEST_KEY - delta_keys(*pieces)).view(torch.float32)

    return score


def _common(sides: Sides, pool: Pool, allow_missing: Missing) -> dict[str, Any]:
    """The initial tensors of what both sides have, which `select` checks itself where it is given both."""
    names, _ = names_in_pool(sides.base, sides.after, pool, allow_missing, what="find_ticket", scored=False)
    for name in names:
        check_shape(name, sides.base[name].shape, sides.after[name].shape)
    return {name: sides.base[name] for name in names}


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
        raise ValueError(f"tune_mlm: epochs must be above 0 where max_steps is not, got {settings.epochs}")
    if (resume or settings.save_steps) and output_dir is None:
        raise ValueError("tune_mlm: checkpoints need a folder that stays; pass output_dir=")


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
        "output_dir": folder,
        "num_train_epochs": settings.epochs,
        "max_steps": max_steps,
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "lr_scheduler_type": "linear",
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps,
        "logging_steps": 50,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 1,
        "save_total_limit": settings.save_total_limit,
        "seed": settings.seed,
        "bf16": settings.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [],
        "disable_tqdm": not progress,
    }
    return TrainingArguments(**{**options, **more})


class MLMTrainer(SparseTrainer):
    """A `SparseTrainer` on masked tokens: the LM head at masked positions only, and a loss per masked token.

    Datasets give what `PadRight` collates. The training loss is the mean over the masked tokens of an update, over all
    its micro-batches and processes; `eval_loss` is that over all masked tokens of the set, whatever the batch size.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=masked_token_loss, compute_metrics=_token_mean, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch, see `masked_token_loss`."""
        with token_losses(model, inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """Sum of losses (float64 [B]) and number of masked tokens (int64 [B]) of every sequence, for `_token_mean`."""
        labels = inputs["labels"]
        masked = labels != IGNORED
        with token_losses(model, labels):
            losses = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        return None, sums.index_add_(0, masked.nonzero()[:, 0], losses.double()), masked.sum(1)


def masked_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Sum of cross-entropies over the masked tokens, divided by their number in the whole update (or in this batch).

    outputs: made within `token_losses`; labels: int64 [B, L], -100 where not masked.
    """
    losses: Tensor = outputs.logits
    count = torch.as_tensor(len(losses) if num_items_in_batch is None else num_items_in_batch)
    return losses.sum() / count.clamp(min=1).to(losses.device)


@contextmanager
def token_losses(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Within this context `model(...).logits` is the cross-entropy of every masked token, float32 [masked tokens].

    model:  a masked-LM model, possibly wrapped (DDP): call the wrapper
    labels: int64 [B, L], -100 where not masked; losses come in row-major order

    The LM head runs at masked positions only, and its decoder on so many of them at a time that their logits stay
    below 256 MiB; backward makes them again. All logits of a 32 x 256 batch of XLM-R would be 8.2 GB, those of the
    masked positions 1.2 GB, and as much again for their gradients.
    """
    flat = labels.reshape(-1)
    positions = (flat != IGNORED).nonzero()[:, 0]
    with losses_at(model, positions, flat[positions]):
        yield


@contextmanager
def losses_at(model: nn.Module, positions: Tensor, targets: Tensor) -> Iterator[None]:
    """What `token_losses` does, of given positions in the flattened batch and the tokens there; both int64 [m]."""
    head: Any = unwrapped(model).lm_head
    decoder = head.decoder
    rows = max(1, _LOGITS // decoder.weight.shape[0])

    def losses_of(features: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(features, decoder.weight, decoder.bias)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def losses(features: Tensor) -> Tensor:
        if len(features) <= rows:
            return losses_of(features, targets)
        pieces = zip(features.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(losses_of, *piece, use_reentrant=False) for piece in pieces])

    handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].flatten(0, 1)[positions], *inputs[1:]))
    decoder.forward = losses  # of this instance only; its hooks still run
    try:
        yield
    finally:
        handle.remove()
        del decoder.forward


def _token_mean(prediction: Any) -> dict[str, float]:
    loss = float(prediction.predictions.sum() / max(prediction.label_ids.sum(), 1))
    return {"loss": loss, "perplexity": float(np.exp(loss))}


class _Epochs(TrainerCallback):
    """Tells a dataset the epoch; the dataloader of a distributed run would tell its sampler only."""

    def __init__(self, dataset: MaskedTexts) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.begin_epoch(int(state.epoch or 0))


class _EvaluateAtEnd(TrainerCallback):
    """Makes the last weights a candidate, too."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def split_texts(texts: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation texts: a random `share`, at least one text, is held out; the order of texts is kept."""
    if not 0 < share < 1:
        raise ValueError(f"expected a share of texts to validate on in (0, 1), got {share}")
    if len(texts) < 2:
        raise ValueError(f"expected at least 2 texts, one of them to validate on, got {len(texts)}")
    held_out = max(1, round(share * len(texts)))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator, dtype=torch.int64, device="cpu")
    chosen = set(order[:held_out].tolist())
    return (
        [text for i, text in enumerate(texts) if i not in chosen],
        [text for i, text in enumerate(texts) if i in chosen],
    )


def text_hash(texts: Iterable[str]) -> str:
    """What a ticket records of its data: SHA-256 (128 bits kept) of the texts in order."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\n")
    return sha.hexdigest()[:32]


class MaskedTexts(Dataset):
    """Token sequences that are masked anew in every epoch.

    packed: all texts, each between `<s>` and `</s>`, joined and cut into blocks of `length` tokens; the last,
            incomplete block is dropped. Otherwise one text, cut to `length`, per example.
    Each token but `<s>`, `</s>` and padding is chosen with `probability`; of the chosen 80 % become `<mask>`, 10 % a
    random token of the whole vocabulary, 10 % stay. Items are {"input_ids", "labels"}, int64 [tokens], labels -100
    where nothing was chosen.

    The choice is a counter-based function of (seed, epoch, example), so it does not depend on batches, workers, ranks
    or on what else draws random numbers: a resumed run sees the masks of the uninterrupted one. `begin_epoch` changes
    it; without it the masks are the same every time, which is what evaluation wants.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int = 256,
        packed: bool = True,
        probability: float = 0.15,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.tokens, self.offsets = _tokenize(texts, tokenizer, None if packed else length, progress)
        if packed:
            blocks = len(self.tokens) // length
            self.offsets = np.arange(blocks + 1, dtype=np.int64) * length
        if len(self) == 0:
            raise ValueError(
                f"{len(self.tokens)} tokens give no example"
                + (
                    f" of {length} tokens; give more text or line_by_line=True (--line-by-line)"
                    if packed
                    else "; give texts that are not empty"
                )
            )
        self.probability, self.seed = probability, seed
        self.vocabulary, self.mask_id = len(tokenizer), tokenizer.mask_token_id
        self.special = np.unique(
            [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id,
                         tokenizer.pad_token_id) if i is not None]
        )  # fmt: skip
        # seen by running dataloader workers
        self.epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self.offsets).max())

    def begin_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)
        counter = np.array([0, 0, index, int(self.epoch)], dtype=np.uint64)
        draws = np.random.Philox(key=self.seed, counter=counter).random_raw(2 * len(tokens)).reshape(2, -1)
        uniform = (draws[0] >> np.uint64(11)) * 2.0**-53  # [0, 1): chosen below `probability`, then split 80 : 10 : 10
        chosen = (uniform < self.probability) & ~np.isin(tokens, self.special)
        kind = uniform / self.probability
        random_tokens = (draws[1] % np.uint64(self.vocabulary)).astype(np.int64)
        masked = np.where(kind < 0.8, self.mask_id, np.where(kind < 0.9, random_tokens, tokens))
        return {
            "input_ids": torch.from_numpy(np.where(chosen, masked, tokens)),
            "labels": torch.from_numpy(np.where(chosen, tokens, IGNORED)),
        }


def _tokenize(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int | None, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """All tokens, int32 [T], and where each non-empty text starts, int64 [texts + 1]."""
    lines = [text for text in (raw.strip() for raw in texts) if text]
    pieces, lengths = [], [0]
    for start in tqdm(range(0, len(lines), _TOKENIZER_BATCH), "tokenize", disable=not progress, unit="k lines"):
        batch = tokenizer(
            lines[start : start + _TOKENIZER_BATCH],
            truncation=length is not None,
            max_length=length,
            return_attention_mask=False,
            verbose=False,  # the model never sees a sequence longer than `length`, packed lines may well be
        )["input_ids"]
        pieces += [np.asarray(ids, dtype=np.int32) for ids in batch]
        lengths += [len(ids) for ids in batch]
    return np.concatenate([np.empty(0, np.int32), *pieces]), np.cumsum(lengths, dtype=np.int64)


class PadRight:
    """Collates examples of `MaskedTexts`: pads to the longest; adds the attention mask. All int64 [batch, longest]."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        def padded(key: str, value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence([e[key] for e in examples], batch_first=True, padding_value=value)

        input_ids = padded("input_ids", self.pad_id)
        lengths = torch.tensor([len(e["input_ids"]) for e in examples], dtype=torch.int64, device="cpu")
        attention_mask = (torch.arange(input_ids.shape[1], dtype=torch.int64, device="cpu") < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": padded("labels", IGNORED)}
