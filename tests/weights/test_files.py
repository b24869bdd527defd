"""What is written is whole or not there, goes where it was asked to, and is found out when it is damaged."""

import errno
import json
import os
import random
import socket
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ltp_sparse as ls
from ltp_sparse import FileFormatError, SparseDelta, Ticket
from ltp_sparse.deltas.restoring import copies, put_back, restoring
from ltp_sparse.recipes import results
from ltp_sparse.weights import files, manifest


def ticket(k=3):
    return Ticket.random({"w": torch.Size([40])}, k=k)


def save(path):
    ticket().save(path)


# --- where it is written ---


def _folder(path):
    path.mkdir()


def _socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def _device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("needs the right to make a device")


def _link_to_device(path):
    path.symlink_to("/dev/null")


def _circle(path):
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


@pytest.mark.parametrize("make", [os.mkfifo, _folder, _socket, _device, _link_to_device, _circle])
def test_what_is_no_regular_file_is_refused_and_stays(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("out.safetensors")
    make(path)
    before = os.lstat(path)
    pair = {"w": torch.zeros(9)}, {"w": torch.ones(9)}
    for write in (save, files.check_writable, lambda path: ls.select(*pair, k=3, output=path)):
        with pytest.raises(OSError, match=r"out\.safetensors"):
            write(path)
    after = os.lstat(path)
    assert (after.st_mode, after.st_ino, after.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr", "/proc/self/fd/1", "/dev/null"])
def test_streams_and_devices_of_the_system_are_refused(name):
    before = os.lstat(name)
    with pytest.raises(OSError, match="expected a regular file to write to"):
        save(name)
    assert os.lstat(name).st_mode == before.st_mode


@pytest.mark.parametrize("there", [True, False], ids=["target", "dangling"])
def test_symlinks_stay_and_their_targets_are_replaced(there, tmp_path):
    target, link, second = tmp_path / "a" / "target", tmp_path / "link", tmp_path / "b"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
    second.symlink_to("a/target")
    link.symlink_to("b")
    save(link)
    assert link.is_symlink() and second.is_symlink() and not target.is_symlink()
    assert Ticket.load(target) == Ticket.load(link) == ticket()


@pytest.mark.parametrize("letter", ["a", "é"])
def test_the_longest_names_are_written(letter, tmp_path):
    """What a write puts around a name has room, and two long names that begin alike keep apart."""
    stem = letter * (240 // len(letter.encode()))
    paths = [tmp_path / f"{stem}{number}.safetensors" for number in (10, 11)]
    for number, path in enumerate(paths):
        files.check_writable(path)
        files.save(path, "ticket", {"w": torch.full((2,), float(number))}, {})
        with files.atomic_path(path.with_suffix("")) as temporary:
            torch.save(number, temporary)
    assert [files.load(path, "ticket")[0]["w"][0] for path in paths] == [0, 1]
    with files.atomic_folder(tmp_path / ("f" * 255)) as folder:
        (folder / "a").touch()
    assert litter(tmp_path) == [] and len(list(tmp_path.iterdir())) == 5


def test_a_long_name_sweeps_its_own_litter_only(tmp_path):
    one, other = tmp_path / ("a" * 250 + "1"), tmp_path / ("a" * 250 + "2")
    writer = start_writing(one)
    writer.kill()
    writer.wait()
    assert len(litter(tmp_path)) == 1
    with files.atomic_path(other) as temporary:
        temporary.touch()
    assert len(litter(tmp_path)) == 1
    with files.atomic_path(one) as temporary:
        temporary.touch()
    assert litter(tmp_path) == []


@pytest.mark.parametrize("length", [256, 300, 5000])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_name_that_does_not_fit_is_told_before_the_work(folder, length, tmp_path):
    path = tmp_path / ("a" * length)
    with pytest.raises(OSError, match="cannot be written: file name too long"):
        files.check_writable(path, folder=folder)
    writer = files.atomic_folder if folder else files.atomic_path
    with pytest.raises(OSError, match="cannot be written: file name too long"), writer(path):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_the_mode_of_a_file_that_is_there_is_kept(mode, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"")
    path.chmod(mode)
    save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    if os.geteuid() == 0:
        os.chown(path, 12345, 54321)
        save(path)
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


def test_folders_are_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise KeyboardInterrupt
    assert not list((tmp_path / "out").iterdir())
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert not list((tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "a").read_text() == "a" and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OSError, match="a new or empty folder"), files.atomic_folder(tmp_path / "out"):
        pass


# --- litter ---

WRITER = """
import sys, time
from ltp_sparse import files
with files.atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writing(path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


def litter(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.slow
def test_litter_of_killed_writes_is_swept_and_live_writers_are_let_be(tmp_path):
    path = tmp_path / "a.safetensors"
    old = tmp_path / ".a.safetensors.k3x_9zab.tmp"  # as earlier versions left it
    other = tmp_path / ".b.safetensors.k3x_9zab.tmp"
    old.write_bytes(b"x"), other.write_bytes(b"x")
    killed, alive = start_writing(path), start_writing(path)
    try:
        killed.kill(), killed.wait()
        assert len(litter(tmp_path)) == (1 + 1 + 1 + 1) - 1  # the second writer has swept the old file
        save(path)
        left = litter(tmp_path)
        assert len(left) == 2 and other in left
        assert Ticket.load(path) == ticket()
        files.sweep(tmp_path)
        assert len(litter(tmp_path)) == 1
    finally:
        alive.kill(), alive.wait()
    files.sweep(tmp_path)
    assert litter(tmp_path) == []


# --- why it could not be written ---


@pytest.mark.parametrize("failing", ["mkdir", "save_file", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_goes_wrong_is_told_with_the_path(failing, number, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save(path)
    before = path.read_bytes()

    def fail(*arguments, **_):
        if failing == "save_file":
            raise files.SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number))

    owner = {"mkdir": Path, "save_file": safetensors.torch, "fsync": os}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, fail)
        message = f"{os.strerror(number)[1:]}; an existing file is unchanged: '{path}'"
        with pytest.raises(OSError, match=message) as caught:
            ticket(5).save(path)
    assert caught.value.errno == number
    assert path.read_bytes() == before and litter(tmp_path) == []


# --- checksums ---


def test_a_damaged_file_of_ours_is_no_source_of_a_selection(tmp_path):
    initial, tuned = {"w": torch.zeros(1000), "b": torch.zeros(8)}, {"w": torch.arange(1000.0), "b": torch.ones(8)}
    path = tmp_path / "tuned.safetensors"
    files.save(path, "tuned weights", tuned, {"metadata": {}})
    assert ls.select(initial, path, density=0.01) == ls.select(initial, tuned, density=0.01)
    content = path.read_bytes()
    for at in range(len(content) - 4032, len(content), 101):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        with pytest.raises(FileFormatError, match=r"tuned\.safetensors: the checksum does not match"):
            ls.select(initial, path, density=0.01)


# --- rows ---


def rows(n=6):
    scores = [{"en": i / 7, "quy": 1e-9 * i} for i in range(n)]
    return [{"id": f"{i:04x}", "scores": of, "note": "ñandé \u2028", "n": i} for i, of in enumerate(scores)]


@pytest.mark.slow
def test_every_flipped_bit_of_a_results_file_is_found(tmp_path):
    path = tmp_path / "r.jsonl"
    for row in rows():
        results.append(path, row)
    assert results.read(path) == rows()
    content, random_ = path.read_bytes(), random.Random(0)
    for _ in range(1000):
        at, bit = random_.randrange(len(content)), random_.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = results.read(path)
            except FileFormatError as error:
                assert error.path == path and error.place.startswith("line ")
                continue
        if found != rows():
            assert any(f"{path}, line " in str(warning.message) for warning in told), (at, bit)
            assert all(row in rows() for row in found)


def test_rows_of_earlier_versions_are_read_and_counted(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    results.append(path, rows(3)[2])
    with pytest.warns(UserWarning, match=r"2 of 3 rows cannot be verified, the first in line 1"):
        assert results.read(path) == rows(3)


def test_a_row_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    results.append(path, rows(1)[0])
    before = path.read_bytes()
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"no row could be added: No space left on device: '{path}'"):
            results.append(path, rows(2)[1])
    assert path.read_bytes() == before and calls and os.fsync is real
    with pytest.raises(ValueError, match="without the key 'sha256'"):
        results.append(path, {"sha256": ""})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="this is a pipe"):
        results.append(tmp_path / "pipe", rows(1)[0])


def test_keys_that_are_no_text_are_read_as_text(tmp_path):
    results.append(tmp_path / "r", {"shots": {10: 1, 9: 2, 1: 3}})
    assert results.read(tmp_path / "r") == [{"shots": {"10": 1, "9": 2, "1": 3}}]


# --- manifests ---


def a_folder(folder):
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"a" * 100)
    (folder / "sub" / "b").write_bytes(b"b" * 100)
    return folder


def test_manifests(tmp_path):
    folder = a_folder(tmp_path / "f")
    with pytest.raises(FileFormatError, match=r"has no manifest\.json"):
        manifest.check(folder)
    manifest.start(folder)
    with pytest.raises(manifest.Unfinished, match="interrupted"):
        manifest.check(folder)
    manifest.finish(folder)
    manifest.check(folder)
    assert manifest.names(folder) == ["a", "sub/b"]
    (folder / "c").write_bytes(b"c")
    manifest.check(folder)
    manifest.add(folder, ["c"])
    (folder / "a").write_bytes(b"a" * 99 + b"A")
    manifest.check(folder, ("sub/", "c"))
    manifest.add(folder, ["c"])  # blesses nothing else
    with pytest.raises(FileFormatError, match=r"f/a: its content does not match"):
        manifest.check(folder)
    (folder / "a").write_bytes(b"a" * 101)
    with pytest.raises(FileFormatError, match=r"f/a: expected 100 bytes .* got 101"):
        manifest.check(folder, ("c",))
    (folder / "a").unlink()
    with pytest.raises(FileFormatError, match=r"f/a: is missing"):
        manifest.check(folder, ("c",))


@pytest.mark.slow
def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    folder = a_folder(tmp_path / "f")
    manifest.finish(folder)
    path = folder / manifest.MANIFEST
    content, random_ = path.read_bytes(), random.Random(0)
    facts = json.loads(content)
    for _ in range(300):
        at, bit = random_.randrange(len(content)), random_.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            manifest.check(folder)
        except FileFormatError as error:
            assert not isinstance(error, manifest.Unfinished)
        else:
            assert json.loads(path.read_bytes()) == facts


# --- all or nothing ---


class Model(torch.nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        sizes = {50: torch.float32, 60: torch.bfloat16, 7: torch.float32}  # a launch per dtype
        self.a, self.b, self.c = (torch.nn.Parameter(torch.full((n,), value, dtype=d)) for n, d in sizes.items())
        self.register_buffer("mean", torch.full((5,), value))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def delta():
    chosen = Ticket.random(Model(), density=0.5, seed=0, pool=lambda name: name in "ab")
    tuned = Model(1.0)
    dense = {"c": tuned.c.detach(), "mean": tuned.mean}
    return SparseDelta.between(Model(), tuned, chosen, dense=dense)


class Stops:
    """Writes to the model's tensors, of which the k-th and, if asked for, all later ones raise."""

    def __init__(self, at, error, monkeypatch, *, always=False):
        from ltp_sparse.deltas import entries

        self.calls, self.at, self.error, self.always = 0, at, error, always
        real, copy = entries.masked_swap_, torch.Tensor.copy_
        monkeypatch.setattr(entries, "masked_swap_", lambda *args: (self.count(), real(*args)))
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *args, **kw: (self.count(), copy(*args, **kw))[1])

    def count(self):
        self.calls += 1
        if self.calls == self.at or (self.always and self.calls > self.at):
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("lost")], ids=repr)
@pytest.mark.parametrize("step", ["apply", "revert"])
@pytest.mark.parametrize("at", range(1, 6))
def test_a_delta_is_applied_and_taken_back_whole_or_not_at_all(at, step, error, delta, monkeypatch):
    model = Model()
    base = bits(model)
    if step == "revert":
        delta.apply(model)
    before = bits(model)
    with monkeypatch.context() as patch:
        stops = Stops(at, error, patch)
        try:
            getattr(delta, step)(model)
        except BaseException as raised:
            assert raised is error
        else:
            assert at == 5 and stops.calls == 4  # a, b, c and the buffer
            return
    assert same(bits(model), before)
    if step == "apply":
        with pytest.raises(ValueError, match="not applied"):
            delta.revert(model)
        delta.apply(model)
        assert model.c.sum().item() == 7 and model.mean.sum().item() == 5
    delta.revert(model)
    assert same(bits(model), base)


def test_an_interrupt_while_putting_back_waits(monkeypatch):
    a, b = torch.zeros(3), torch.zeros(3)
    copy, calls = torch.Tensor.copy_, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put_back(copies({"a": torch.ones(3), "b": torch.ones(3)}, {"a": a, "b": b}))
    assert a.sum() == b.sum() == 3

    names = ["x"]
    with pytest.raises(ZeroDivisionError), restoring(copies({"a": a.clone()}, {"a": a}), names):
        a.zero_()
        names.append("y")
        1 / 0  # noqa: B018
    assert a.sum() == 3 and names == ["x"]


def test_a_tensor_that_cannot_be_put_back_is_told(monkeypatch):
    a = torch.zeros(3)

    def broken(*_):
        raise RuntimeError("lost device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", broken)
        with pytest.raises(RuntimeError, match="could not be restored; load the model again"):
            put_back(copies({"a": torch.ones(3)}, {"a": a}))


# --- processes ---


@pytest.mark.slow
def test_one_run_at_a_time_works_in_a_folder(tmp_path):
    pytest.importorskip("transformers")
    from ltp_sparse.training.run_folder import alone

    script = (
        "import sys, time; from ltp_sparse.training.run_folder import alone\n"
        "with alone(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(ValueError, match="another run is using"), alone(tmp_path):
            pass
    finally:
        other.kill(), other.wait()
    with alone(tmp_path):  # the lock of the dead is free
        pass
    assert not list(tmp_path.iterdir())
