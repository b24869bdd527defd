"""The peers of the training step come with the extra `bench`, at a pinned version, and run."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_peer_is_in_the_extra_and_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "peft" in extras["bench"] and "scipy" in extras["train"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert {"peft", "scipy"} <= set(pins)


def test_lora_takes_a_step():
    pytest.importorskip("peft", reason="the peer LoRA needs peft")
    command = [sys.executable, ROOT / "benchmarks" / "bench_train_step.py", "--model", "tiny", "--steps", "1"]
    command += [
        "--batch",
        "2",
        "--length",
        "16",
        "--stage",
        "stage 2",
        "--setting",
        "LoRA (peft, r=8 on query and value)",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) == {"peak", "forward", "backward", "step"}
