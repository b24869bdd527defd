"""The progress bar of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

_TIMES = ("runtime", "per_second")


class LatestFigures(ProgressCallback):
    """The progress bars of transformers, which show the latest figures instead of printing a line per log."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items():
            if name == "loss" or (name.startswith("eval_") and not name.endswith(_TIMES)):
                self.figures[name.replace("eval_", "dev ")] = f"{value:.4g}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.figures)


def show_progress(trainer: Trainer, progress: bool) -> None:
    """Gives a trainer these bars, or removes both bars and logs from the screen."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.add_callback(LatestFigures())
