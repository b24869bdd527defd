"""Trainer and follower under kills: the thin version always, the long one by `make soak`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("versions", "kills"),
    [
        pytest.param(80, 3, id="thin", marks=pytest.mark.slow),
        pytest.param(1000, 20, id="long", marks=[pytest.mark.faults, pytest.mark.timeout(900)]),
    ],
)
def test_followers_have_the_bits_of_every_version_they_report(versions, kills, tmp_path):
    """In a process of its own: it forks, which a pool of threads does not survive."""
    command = [sys.executable, "-m", "helpers.sync_soak", "--versions", str(versions), "--kills", str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--folder", str(tmp_path / "soak")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    print(run.stdout)
