"""Callbacks that end a run before its end."""

from transformers import TrainerCallback


class StopAfter(TrainerCallback):
    """Ends the run at the end of a step, like a kill."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
