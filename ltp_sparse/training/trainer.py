"""`SparseTrainer`: a `transformers.Trainer` that trains a ticket, with checkpoints of the ticket's entries only.

Every file of a run is O(k): a checkpoint holds a `SparseDelta`, the packed optimizer state and the random states
instead of the model, and the best evaluation is a `SparseDelta`.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import warnings
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import TrainerState

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.optim import MaskedAdamW
from ltp_sparse.optim.adam_l2 import AdamL2
from ltp_sparse.optim.members import dense_groups
from ltp_sparse.optim.snapshot import Snapshot
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.autocast import check_speed
from ltp_sparse.training.run_folder import DELTA_FILE, checkpoints, last_checkpoint
from ltp_sparse.weights import manifest
from ltp_sparse.weights.files import atomic_path
from ltp_sparse.weights.sharding import reshard

BEST_FILE = "best.safetensors"

Dense = nn.Module | nn.Parameter | Iterable[nn.Parameter] | Iterable[Mapping[str, Any]]
"""Parameters that train in full besides the ticket: a module, parameters, or optimizer parameter groups."""


class SparseTrainer(Trainer):
    """A Trainer whose optimizer is `MaskedAdamW` over a ticket.

    Args:
        model: the base model, which is trained in place. Deltas are relative to its weights at construction.
        args: training arguments with learning rate, betas, eps, weight decay, clipping and schedule. `max_grad_norm`
            clips the norm over active and dense entries inside the optimizer; that norm is logged as `grad_norm`.
        ticket: the entries to train.
        dense: parameters of the model to train in full: a module, parameters or parameter groups.
        pull: factor of the L1 pull of the ticket's entries to the base weights, see `MaskedAdamW`.
        keep_best: a `KeepBest`, to end with the weights of the best evaluation.
        l2: if positive, trains with `AdamL2` and this factor instead of `MaskedAdamW`. The ticket must then be full in
            each of its parameters.
        base: a `Snapshot` of the model with this ticket and these dense parameters, if the caller has one.
        optimizer_options: further arguments of `MaskedAdamW`.
        kwargs: further arguments of `transformers.Trainer`.

    During `train`, parameters without an active entry have `requires_grad` off. Checkpoints (`save_strategy`,
    `save_steps`, `save_total_limit` of `args`) take O(k) bytes and resume bit for bit on the same base model;
    `train(resume_from_checkpoint=True)` takes the latest complete one. A checkpoint is complete with its manifest,
    which is written last; only then are older ones removed. `save_model(folder)` writes the whole model.

    With `fsdp` set, FSDP2 shards the model when training begins. Checkpoints then have the optimizer's state in shards
    (torch.distributed.checkpoint), regardless of `state_dict_type`. All processes must call `delta` and `save_model`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        ticket: Ticket,
        *,
        dense: Dense = (),
        pull: float = 0.0,
        keep_best: KeepBest | None = None,
        l2: float = 0.0,
        base: Snapshot | None = None,
        optimizer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer: Any = None
        if args.load_best_model_at_end:
            raise ValueError(
                "SparseTrainer: load_best_model_at_end needs checkpoints of the whole model; "
                "pass keep_best=KeepBest(metric) instead"
            )
        args, self.l2 = copy.copy(args), l2
        self.clip = args.max_grad_norm or None
        args.max_grad_norm = 0.0  # the Trainer would clip over all gradients, also of inactive entries
        # The Trainer would remove the previous checkpoint before the manifest of the new one is written.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        if args.data_seed is None:
            args.data_seed = args.seed  # else the order of examples depends on the last seed of torch
        super().__init__(model=model, args=args, **kwargs)
        check_speed(args.device, torch.bfloat16 if args.bf16 else None)
        self._prepare_engine()
        # Even without clipping the Trainer multiplies all gradients by a factor of their norm, which would spread a NaN
        # of an inactive entry. Our norm is known after the step only; `log` adds it.
        self.accelerator.clip_grad_norm_ = lambda *args, **kwargs: None
        dense = dense_groups(dense, what="SparseTrainer")  # a list, since iterators can be read only once
        if base is None:
            base = Snapshot(self.model, ticket, dense, what="SparseTrainer")
            if moved := base.selected_elsewhere:
                warnings.warn(
                    f"SparseTrainer: the ticket was selected on another base model than this one ({moved[0]!r} "
                    f"differs, {len(moved)} tensors in all); load the initial weights unless this is intended",
                    stacklevel=2,
                )
        ticket = base.ticket
        if l2 and (partly := [name for name in ticket.active_names if ticket.sets[name].k < ticket.sets[name].n]):
            raise ValueError(
                f"SparseTrainer: l2={l2} is coupled and changes whole tensors, but the ticket has a part of "
                f"{partly[0]!r}; use weight_decay, which is decoupled"
            )
        self.ticket, self.pull, self.optimizer_options = ticket, pull, dict(optimizer_options or {})
        self.dense, self.base = dense, base
        self._check_dtypes()
        self.resumed_from: Path | None = None
        self.keep_best = keep_best
        if keep_best is not None:
            keep_best.trainer = self
            self.add_callback(keep_best)
        self.add_callback(_Complete(self))

    def _prepare_engine(self) -> None:
        """Raises ValueError for engines of several devices that are not supported."""
        if self.is_deepspeed_enabled or self.is_fsdp_xla_enabled or self.args.n_gpu > 1:
            raise ValueError(
                "SparseTrainer: DeepSpeed, FSDP on XLA and nn.DataParallel are not supported; run one process per "
                "device (torchrun), or make one device visible. A model that does not fit on one device trains with "
                "fsdp=True"
            )
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError('SparseTrainer: FSDP1 flattens parameters; pass fsdp_config={"version": 2}')
        if self.l2:
            raise ValueError(f"SparseTrainer: l2={self.l2} is for models that are not sharded; use weight_decay")
        # else configurations of another type would remain
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("SHARDED_STATE_DICT")  # as the optimizer's state is

    def _check_dtypes(self) -> None:
        """Raises ValueError where accelerate would turn trained parameters into float32 when it shards the model."""
        if not self.is_fsdp_enabled or self.accelerator.mixed_precision == "no":
            return
        for name in (*self.base.originals, *self.base.dense):
            if (dtype := self.base.parameters[name].dtype) != torch.float32:
                raise ValueError(
                    f"SparseTrainer: with fsdp and bf16=True or fp16=True, expected trained parameters in float32, "
                    f"{name!r} has {dtype}; load the model in float32, or leave out bf16=True to train it as it is"
                )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes `MaskedAdamW` over the ticket and, when resuming, writes the checkpoint's weights into the model.

        The order matters: the optimizer first copies its anchor from the base weights, and its state is loaded last.
        """
        args = self.args
        adam: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        adam |= {"lr": args.learning_rate, "max_grad_norm": self.clip}
        if self.optimizer is None and self.l2:
            self.optimizer = self._adam_l2(adam)
        elif self.optimizer is None:
            self.optimizer = MaskedAdamW(
                self.model,
                self.ticket,
                **adam,
                weight_decay=args.weight_decay,
                dense=self.dense,
                pull=self.pull,
                freeze=True,
                **self.optimizer_options,
            )
            self.base.share(self.optimizer.initial_values())
        if self.resumed_from is not None:
            self.base.restore(SparseDelta.load(self.resumed_from / DELTA_FILE))
        return self.optimizer

    def _adam_l2(self, adam: Mapping[str, Any]) -> AdamL2:
        base = self.base
        parameters = {name: p for name, p in base.parameters.items() if name in base.originals or name in base.dense}
        for parameter in self.model.parameters():
            parameter.requires_grad_(any(parameter is other for other in parameters.values()))
        return AdamL2(parameters, l2=self.l2, **adam)

    def _unwrapped_optimizer(self) -> MaskedAdamW | AdamL2 | None:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    def release_model(self) -> None:
        """Removes the hooks of packed gradients from the model, which ends training."""
        optimizer = self._unwrapped_optimizer()
        if isinstance(optimizer, MaskedAdamW):
            optimizer.remove()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the norm that clipping used to the training logs."""
        optimizer = self._unwrapped_optimizer()
        if "loss" in logs and optimizer is not None and optimizer.grad_norm is not None:
            logs["grad_norm"] = float(optimizer.grad_norm)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **kwargs: Any) -> Any:
        """Trains as `Trainer.train`. With True it resumes from the latest complete checkpoint of the output folder."""
        self.resumed_from = self._checkpoint(resume_from_checkpoint)
        flags = [parameter.requires_grad for parameter in self.model.parameters()]
        try:
            return super().train(
                resume_from_checkpoint=None if self.resumed_from is None else str(self.resumed_from), **kwargs
            )
        finally:
            reshard(self.model)
            for parameter, flag in zip(self.model.parameters(), flags, strict=True):  # may be sharded by now
                parameter.requires_grad_(flag)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Trains an epoch, unless the resumed run had ended in it: the Trainer would then take one more step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _checkpoint(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None) -> Path | None:
        if not resume_from_checkpoint:
            return None
        if resume_from_checkpoint is True:
            if (latest := last_checkpoint(self.args.output_dir)) is None:
                raise ValueError(f"SparseTrainer: no complete checkpoint in {self.args.output_dir!r} to resume from")
            folder = latest
        else:
            folder = Path(resume_from_checkpoint)
            if not folder.is_dir() or DELTA_FILE not in manifest.names(folder):
                raise ValueError(
                    f"SparseTrainer: {str(folder)!r} is not one of its checkpoints: it has no {DELTA_FILE}"
                )
            manifest.check(folder)
        of_another, how = (OPTIMIZER_NAME, "without") if self.is_fsdp_enabled else ("optimizer_*", "with")
        if any(folder.glob(of_another)):
            raise ValueError(f"SparseTrainer: {str(folder)!r} was written {how} fsdp; resume it {how} fsdp, too")
        return folder

    def delta(self, metadata: Mapping[str, Any] | None = None) -> SparseDelta:
        """The changes by training so far."""
        return self.base.delta(metadata)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the whole model, as `Trainer.save_model`; checkpoints of the Trainer get the changes only."""
        if _internal_call:
            self._save_changes(Path(str(output_dir)))
        elif self.is_fsdp_enabled:  # the Trainer would write nothing, because the state is in shards
            state = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=state)
        else:
            super().save_model(output_dir)

    def _save_changes(self, folder: Path) -> None:
        changes = self.base.delta(originals=False)  # resuming starts from the base
        if self.args.should_save:
            manifest.start(folder)
            changes.save(folder / DELTA_FILE, max_shard_size=None)  # one file, which the manifest names
            if self.keep_best is not None:
                self.keep_best.save_into(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves both as the Trainer does, which under FSDP2 would also write all weights."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing, because `create_optimizer` writes the weights of a checkpoint into the model."""


def training_arguments(
    settings: Any, folder: str, per_device: int, accumulation: int, progress: bool, /, **others: Any
) -> TrainingArguments:
    """Arguments of the Trainer with what all settings have.

    Args:
        settings: `Settings` of a method, or `MLMSettings`.
        folder: the output folder.
        per_device: examples per forward pass and device.
        accumulation: forward passes per update.
        progress: show a progress bar.
        others: further arguments, which count if they are also among these.
    """
    values: dict[str, Any] = {
        "output_dir": folder,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": not progress,
    }
    return TrainingArguments(**{**values, **others})


class _Complete(TrainerCallback):
    """Writes the manifest of a checkpoint after all processes have written their files, then removes older ones."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self.trainer = weakref.proxy(trainer)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        latest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        manifest.finish(latest)
        if limit := self.trainer.save_total_limit:
            others = [path for path in checkpoints(latest.parent) if path != latest]
            others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in others[limit - 1 :]:
                shutil.rmtree(path)


class KeepBest(TrainerCallback):
    """Keeps the delta of the best evaluation (the first one, if several are equal), and applies it after training.

    Args:
        metric: name of an evaluation metric, with or without "eval_".
        greater_is_better: None: True except for losses.
        on_disk: keep the delta as `best.safetensors` in the output folder, so that it survives a kill (one process
            writes it, all read it). Otherwise it is kept in memory and in every checkpoint.
        last: also keep the delta of the last update, in memory.

    Attributes:
        best: {"metric", "value", "step", "epoch"} of the best evaluation so far, or None; also its delta's metadata.
        last: the delta at the end of training, if it is kept. Its metadata has "step" and "epoch".
    """

    trainer: SparseTrainer

    def __init__(
        self, metric: str = "loss", *, greater_is_better: bool | None = None, on_disk: bool = True, last: bool = False
    ) -> None:
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.greater_is_better = not metric.endswith("loss") if greater_is_better is None else greater_is_better
        self.on_disk = on_disk
        self.last: SparseDelta | None = None
        self._keeps_last = last
        self.best: dict[str, Any] | None = None
        self._delta: SparseDelta | None = None
        self._training = False
        self._seen: set[str] = set()

    @property
    def path(self) -> Path:
        """The file of the best delta if it is kept on disk."""
        return Path(self.trainer.args.output_dir) / BEST_FILE

    def delta(self) -> SparseDelta:
        """The best delta.

        Raises:
            ValueError: there was no evaluation yet.
        """
        if self.best is None:
            raise ValueError(
                f"KeepBest: no evaluation has given a number for {self.metric!r}; metrics seen: {sorted(self._seen)}. "
                "Set eval_strategy in the training arguments and check the name"
            )
        return self._delta if self._delta is not None else SparseDelta.load(self.path)

    def save_into(self, folder: Path) -> None:
        """Puts the best delta so far into a checkpoint folder, as a hard link if possible."""
        if self._delta is not None:
            self._delta.save(folder / BEST_FILE, max_shard_size=None)
        elif self.best is not None:
            _link(self.path, folder / BEST_FILE)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # The best of an earlier run, or of steps that are trained again, must not count.
        self.best, self._delta, self._training = None, None, True
        saved = None if self.trainer.resumed_from is None else self.trainer.resumed_from / BEST_FILE
        if saved is not None and saved.is_file():
            delta = SparseDelta.load(saved)
            self.best = delta.metadata
            if not self.on_disk:
                self._delta = delta
            elif state.is_world_process_zero:
                _link(saved, self.path)
        elif self.on_disk and state.is_world_process_zero:
            self.path.unlink(missing_ok=True)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        metrics = metrics or {}
        self._seen |= set(metrics)
        if not self._training or self.metric not in metrics:
            return
        value = float(metrics[self.metric])
        sign = 1 if self.greater_is_better else -1
        if math.isnan(value) or (self.best is not None and not sign * value > sign * self.best["value"]):
            return
        self.best = {"metric": self.metric, "value": value, "step": state.global_step, "epoch": state.epoch}
        delta = self.trainer.delta(self.best)  # by all processes, as each may have a part of the model
        if not self.on_disk:
            self._delta = delta
        elif state.is_world_process_zero:
            delta.save(self.path, max_shard_size=None)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._training = False
        if self._keeps_last:
            self.last = self.trainer.delta({"step": state.global_step, "epoch": state.epoch})
        self.trainer.accelerator.wait_for_everyone()  # one process writes the file, all read it
        self.trainer.base.restore(self.delta())


def _link(source: Path, target: Path) -> None:
    """Makes a hard link, or a copy if the file system has none, atomically."""
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
