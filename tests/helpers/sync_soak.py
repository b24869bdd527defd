"""A trainer that publishes and a follower, both killed again and again; every version followed has the right SHA-256.

PYTHONPATH=tests python -m helpers.sync_soak --versions 1000 --kills 20 --folder SOMEWHERE

The expected digests come from the same training without publisher, follower and kills. A trainer that was killed
continues from its last checkpoint, which is up to seven steps old; a follower that was killed begins with the base
model. Both are forked, so that a new one is there at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import ltp_sparse as ls
from ltp_sparse.sync import FolderStore, Follower, Publisher, records
from ltp_sparse.weights.files import atomic_path

EVERY = 7  # steps from a checkpoint to the next


def base() -> nn.Module:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Embedding(300, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32))
    return model.bfloat16()


def sha256(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, parameter in ls.canonical_parameters(model).items():
        found.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Training:
    """Steps of MaskedAdamW whose gradients depend on the step alone."""

    def __init__(self) -> None:
        self.model, self.step = base(), 0
        self.ticket = ls.Ticket.random(self.model, density=0.1, seed=3, pool=r"weight")
        self.optimizer = ls.MaskedAdamW(self.model, self.ticket, lr=1e-4)

    def advance(self) -> None:
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        self.optimizer.step()

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            torch.save([self.step, self.model.state_dict(), self.optimizer.state_dict()], temporary)

    def load(self, path: Path) -> None:
        if path.exists():
            self.step, weights, state = torch.load(path, weights_only=True)
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(state)


def train(folder: Path, versions: int) -> None:
    training = Training()
    training.load(folder / "checkpoint.pt")
    publisher = Publisher(training.model, training.ticket, folder / "store", anchor_every=25, keep=2)
    while training.step < versions:
        training.advance()
        if publisher.version is None or training.step > publisher.version:
            publisher.publish(training.step)
        if training.step % EVERY == 0:
            training.save(folder / "checkpoint.pt")


def follow(folder: Path, versions: int) -> None:
    model = base()
    follower = Follower(model, folder / "store")
    while follower.version != versions:
        if (version := follower.follow()) is not None:
            report(folder, f"{version.number} {sha256(model)}")
        time.sleep(0.001)


def report(folder: Path, line: str) -> None:
    file = os.open(folder / "followed", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def forked(work: Callable[[Path, int], None], folder: Path, versions: int) -> int:
    if child := os.fork():
        return child
    try:
        work(folder, versions)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def newest(folder: Path) -> int:
    return max(records.versions(FolderStore(folder / "store").names()), default=0)


def soak(folder: Path, versions: int, kills: int, seed: int, seconds: float) -> str:
    """Runs it all; what to say of it. Raises RuntimeError at the first thing that is wrong."""
    training, expected = Training(), {}
    for _ in range(versions):
        training.advance()
        expected[training.step] = sha256(training.model)
    chance, end = random.Random(seed), time.monotonic() + seconds
    sides = (train, follow)
    running = [forked(side, folder, versions) for side in sides]
    killed = [0, 0]
    try:
        for number in range(2 * kills):
            while newest(folder) < versions * number // (2 * kills + 1):
                if time.monotonic() > end:
                    raise RuntimeError(f"version {newest(folder)} of {versions} after {seconds} s")
                for child in running:
                    if os.waitpid(child, os.WNOHANG)[0]:
                        raise RuntimeError("a side has ended by itself; see its traceback")
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.02))
            side = number % 2
            os.kill(running[side], signal.SIGKILL)
            killed[side] += os.WIFSIGNALED(os.waitpid(running[side], 0)[1])
            running[side] = forked(sides[side], folder, versions)
        ends = [os.waitstatus_to_exitcode(os.waitpid(running.pop(0), 0)[1]) for _ in sides]
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if ends != [0, 0] or killed != [kills, kills]:
        raise RuntimeError(f"ended with {ends}, killed {killed}")
    followed = [line.split() for line in (folder / "followed").read_text().splitlines()]
    if wrong := [version for version, digest in followed if expected[int(version)] != digest]:
        raise RuntimeError(f"other bits at versions {wrong}")
    if followed[-1] != [str(versions), expected[versions]]:
        raise RuntimeError(f"the last version followed is {followed[-1]}")
    files = len(FolderStore(folder / "store").names())
    if files > 2 + 2 * (2 * 25 + 2 * kills + 4):
        raise RuntimeError(f"{files} files in the store")
    seen = len({version for version, _ in followed})
    return f"{versions} versions, {kills} kills a side: {seen} versions followed, all equal; {files} files at the end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="limit for all of it")
    parser.add_argument("--folder", type=Path, help="an empty one; default: a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            print(soak(folder, options.versions, options.kills, options.seed, options.seconds))
        except RuntimeError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
