"""Callbacks that end a run before its end."""

from transformers import TrainerCallback


class StopAfter(TrainerCallback):
    """A kill at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
