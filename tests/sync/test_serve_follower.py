"""examples/serve_follower.py: a server follows a trainer while it answers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_follower.py"


@pytest.mark.slow
def test_a_server_follows_while_it_answers():
    pytest.importorskip("transformers")
    command = [sys.executable, str(EXAMPLE), "--steps", "10", "--samples", "8"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    rewards = [float(reward) for reward in re.findall(r"reward (\d\.\d\d)", run.stdout)]
    assert len(rewards) == 3 and rewards[-1] > rewards[0] + 0.1
    assert "the server is at version 10, its weights are equal to the trainer's" in run.stdout
