"""Faults from outside: full disks, read-only folders, low memory, two writers, kills at random moments.

A thin version runs always; `make faults` (`pytest -m faults`) runs the long one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny_nli import WORDS, tiny_language_model, tiny_tokenizer, toy_pairs

import ltp_sparse as ls
from ltp_sparse.recipes import results
from ltp_sparse.weights import files

pytest.importorskip("transformers")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip("no tmpfs can be mounted here" + ("" if shutil.which("mount") is None else f": {done.stderr}"))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _ticket(k):
    return ls.Ticket.random({"w": torch.Size([12_000_000])}, k=k)


def _lt_sft(path):
    from ltp_sparse.deltas.lt_sft import write_lt_sft

    ticket = _ticket(400_000)
    values = torch.ones(400_000)
    write_lt_sft(ls.SparseDelta(ticket, {"w": values}, {"w": 0 * values}), path)


def _rows(path):
    results.append(path, {"text": "x" * 3_000_000})


WRITERS = {
    "ticket": lambda path: _ticket(3_000_000).save(path),
    "tensors": lambda path: files.save(path, "tuned weights", {"w": torch.ones(1_000_000)}, {}),
    "selection": lambda path: ls.select(
        {"w": torch.zeros(12_000_000)}, {"w": torch.ones(12_000_000)}, k=4_000_000, output=path
    ),
    "LT-SFT": _lt_sft,
    "rows": _rows,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_what_was_there(writer, small_disk):
    path = small_disk / "kept"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match=r"(?i)no space left on device") as caught:
        WRITERS[writer](path)
    assert str(path) in str(caught.value) or str(small_disk) in str(caught.value)
    assert path.read_bytes() == b"before" and [p.name for p in small_disk.iterdir()] == ["kept"]
    path.unlink()
    _ticket(1000).save(path)  # there is room again
    assert ls.Ticket.load(path) == _ticket(1000)


def test_a_read_only_folder_is_refused_before_the_work(small_disk):
    path = small_disk / "t.safetensors"
    _ticket(1000).save(path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    from ltp_sparse.cli import main

    for write in (files.check_writable, _ticket(10).save, lambda path: results.append(path, {})):
        with pytest.raises(OSError, match=r"(?i)read-only file system"):
            write(path)
    arguments = ["--initial", "a", "--tuned", "b", "--output", str(path)]
    assert main(["select", *arguments]) == 2  # before it looks for a and b
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert ls.Ticket.load(path) == _ticket(1000)


LOW_MEMORY = """
import resource, sys, torch, ltp_sparse as ls
from ltp_sparse import files
path, model = sys.argv[1], torch.nn.Linear(3200, 3200, bias=False)  # 41 MB
tuned = torch.nn.Linear(3200, 3200, bias=False)
delta = ls.SparseDelta.between(model, tuned, ls.Ticket.full(model))
delta.save(path)
before, held = open(path, "rb").read(), model.weight.detach().clone()
kept = []
def limit(room):  # MB above what is in use, after what others have freed is in use, too
    kept.clear()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    for piece in (32 << 20, 2 << 20):
        try:
            while True:
                kept.append(torch.empty(piece, dtype=torch.uint8, device="cpu"))
        except RuntimeError:
            pass
    resource.setrlimit(resource.RLIMIT_AS, (size + (room << 20), resource.RLIM_INFINITY))
for room in range(0, 240, 20):
    limit(room)
    # not strict: Python itself hangs where memory fails while a thread starts, as those that hash the base do
    for step in (lambda: delta.apply(model, strict=False), lambda: delta.save(path)):
        try:
            step()
        except (MemoryError, RuntimeError, OSError) as error:
            failed = error
        else:
            continue
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if any(entry.delta is delta for entry in ls.names.applied_deltas(model)):
            delta.revert(model)
        assert torch.equal(model.weight, held), room
        assert open(path, "rb").read() == before, room
        print("held", flush=True)
        limit(room)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if ls.names.applied_deltas(model):
        delta.revert(model)
"""


@pytest.mark.slow
def test_low_memory_leaves_models_and_files_as_they_were(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOW_MEMORY, str(tmp_path / "d")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "held" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


# --- kills ---


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, text, pairs, and a recipe of four cells."""
    root = tmp_path_factory.mktemp("faults")
    tokenizer = tiny_tokenizer()
    tiny_language_model(len(tokenizer), decoupled=False).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    lines = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(12)) for i in range(60)]
    (root / "text.txt").write_text("\n".join(lines))
    for split, seed in (("train", 0), ("dev", 1)):
        folder = root / "data" / "xnli_fewshot" / split / "en"
        folder.mkdir(parents=True)
        rows = [
            {"lang": "en", "sentence1": p.premise, "sentence2": p.hypothesis, "gold": p.label, "file_idx": 0}
            for p in toy_pairs(6, seed=seed)
        ]
        (folder / f"{split}_split,2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "data" / "xnli" / "test").mkdir(parents=True)
    test = toy_pairs(5010, seed=2)
    (root / "data" / "xnli" / "test" / "test-en.tsv").write_text(
        "".join(f"{p.premise}\t{p.hypothesis}\n" for p in test)
    )
    (root / "data" / "xnli" / "test-labels.tsv").write_text("label\tgenre\n" + "".join(f"{p.label}\tg\n" for p in test))
    (root / "recipe.yaml").write_text(
        f"""
title: Four cells
by: [label]
defaults:
  model: {root / "model"}
  shots: 2
  settings: {{epochs: 3, max_length: 40}}
  train: {{task: xnli-fewshot, language: en}}
  test: {{task: xnli, languages: [en], limit: 20}}
grid: {{seed: [1, 2, 3, 4]}}
cells:
  - {{label: SP, method: soft-prompt}}
"""
    )
    return root


def select(world, folder):
    arguments = ["--model", world / "model", "--text", world / "text.txt", "--batch-size", 4, "--length", 16]
    arguments += ["--epochs", 2, "--density", 0.05, "--save-every", 2, "--run-dir", folder / "run"]
    return ["select", *arguments, "--output", folder / "ticket.safetensors", "--quiet", "--resume"], {
        "ticket": folder / "ticket.safetensors"
    }


def train(world, folder):
    data = world / "data" / "xnli_fewshot"
    arguments = ["--model", world / "model", "--method", "soft-prompt", "--data", data, "--shots", 2, "--seeds", 1]
    arguments += ["--epochs", 4, "--max-length", 40, "--save-every", 1, "--output", folder / "out", "--quiet"]
    return ["train", *arguments, "--resume"], {
        name: folder / "out" / "seed-1" / f"{name}.safetensors" for name in ("trained", "baked")
    }


def run(world, folder):
    arguments = [world / "recipe.yaml", "--data", world / "data", "--cache", folder / "cache", "--save-every", 1]
    return ["run", *arguments, "--output", folder / "out", "--quiet"], {"rows": folder / "out" / results.RESULTS}


JOBS = {"select": select, "train": train, "run": run}


def content(made):
    """What a job leaves, without what differs between two runs of it anyway."""
    found = {}
    for name, path in made.items():
        if name == "rows":
            found[name] = sorted((row["id"], json.dumps(row["scores"])) for row in results.read(path))
        else:
            found[name] = path.read_bytes()
    return found


def start(command):
    line = [sys.executable, "-m", "ltp_sparse.cli", *map(str, command)]
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(command):
    process = start(command)
    out, error = process.communicate(timeout=250)
    assert process.returncode == 0, out + error
    return out + error


def killed_until_it_ends(command, moments, random_):
    """Starts a command again and again; each time but the last a signal ends it at a random moment of its work."""
    kills = 0
    for moment in moments:
        process = start(command)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(random_.choice([signal.SIGKILL, signal.SIGINT]))
            kills += 1
        process.communicate()
    finish(command)
    return kills


@pytest.mark.faults
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_is_killed_at_random_moments_ends_with_the_same_bits(job, world, tmp_path):
    whole, made = JOBS[job](world, tmp_path / "whole")
    begun = time.monotonic()
    finish(whole)
    took = time.monotonic() - begun
    killed, remade = JOBS[job](world, tmp_path / "killed")
    random_ = random.Random(0)
    kills = killed_until_it_ends(killed, [random_.uniform(0.3, 1.1) * took for _ in range(8)], random_)
    assert kills >= 3
    assert content(remade) == content(made)
    litter = [path for path in (tmp_path / "killed").rglob("*.tmp") if "cells" not in path.parts]
    for path in {path.parent for path in litter}:
        files.sweep(path)
    assert not [path for path in litter if path.exists()]


# --- the same in small, within one process ---


def test_artefacts_of_the_cache_are_found_out_when_damaged(tmp_path):
    from ltp_sparse.recipes.cache import Cache

    cache, made = Cache(tmp_path), []

    def make(path):
        made.append(path)
        files.save(path, "tuned weights", {"w": torch.arange(100.0)}, {})

    path = cache.get("tuned", {"base": "x"}, make)
    described = path.with_suffix(".json")
    assert cache.get("tuned", {"base": "x"}, make) == path and len(made) == 1
    for each, at in ((path, -7), (described, described.read_bytes().index(b'"checksum"') + 20)):
        content_ = each.read_bytes()
        flipped = bytearray(content_)
        flipped[at] ^= 1
        each.write_bytes(flipped)
        with pytest.raises(ls.FileFormatError, match="delete"):
            cache.get("tuned", {"base": "x"}, make)
        each.write_bytes(content_)
    cache.get("tuned", {"base": "y"}, make)
    second = made[-1]
    swapped = second.read_bytes()
    second.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ls.FileFormatError, match="checksum does not match"):
        cache.get("tuned", {"base": "y"}, make)
    files.save(second, "tuned weights", {"w": torch.zeros(3)}, {})  # sound, but another one
    with pytest.raises(ls.FileFormatError, match=r"not the artefact that .*\.json describes"):
        cache.get("tuned", {"base": "y"}, make)
    second.write_bytes(swapped)
    second.with_suffix(".json").unlink()
    with pytest.warns(UserWarning, match="has no description next to it; it is made again"):
        cache.get("tuned", {"base": "y"}, make)
    assert len(made) == 3
    cache.clear()
    assert not list(Path(tmp_path).iterdir())
