"""Damaged and forged files, tried on every reader.

    PYTHONPATH=tests python -m helpers.fuzz_readers --files 50000 --output docs/fuzzing.csv

A reader must give what the bytes say, or a `FileFormatError`, within a second of CPU time and 256 MB. The bytes say:

* of a format with checksums (`strict`), the content that was written, and nothing else;
* of a plain format, what a parser that shares no code with ours (json, yaml, csv, gzip, safetensors) makes of the same
  bytes: a flipped letter of a text file is another text, which no reader can know;
* of a file forged with right checksums, and of transformers' own files, any content: the bounds are checked alone.

Every file is read in a forked child whose address space is limited.
"""

from __future__ import annotations

import argparse
import base64
import copy
import csv
import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

import ltp_sparse as ls
from helpers.tiny_nli import tiny_language_model, tiny_tokenizer
from ltp_sparse.deltas.lt_sft import read_lt_sft
from ltp_sparse.deltas.shira import read_shira, write_shira
from ltp_sparse.models import Adapter
from ltp_sparse.recipes import load_recipe, results
from ltp_sparse.sync import FolderStore, records
from ltp_sparse.tasks import read_pairs, read_text
from ltp_sparse.tasks.files import read_columns, read_jsonl, read_lines, read_table
from ltp_sparse.tasks.own import Columns, read_own
from ltp_sparse.weights import files, manifest
from ltp_sparse.weights.checkpoints import open_checkpoint
from ltp_sparse.weights.digests import Hash
from ltp_sparse.weights.reading import FileFormatError, read_json, read_yaml

SECONDS, MEMORY = 1.0, 256 << 20
FAULTS = ("other", "slow", "memory", "crash")
OUTCOMES = ("same", "as the bytes say", "refused", *FAULTS)
ANYTHING = object()


@dataclass(frozen=True)
class Case:
    """A kind of file.

    reader: its name in `ltp_sparse.weights.reading.READERS`
    name:   of the file; readers go by its suffix
    made:   the bytes of a whole one
    read:   path -> content that can be compared
    says:   bytes -> their content by independent code; None: only `made` is right (checksums)
    forged: (a source of chance) -> bytes that were never damaged but make no sense, with right checksums
    bombs:  small files that ask for much
    share:  of the files, relative to the others
    """

    reader: str
    name: str
    made: bytes
    read: Callable[[Path], Any]
    says: Callable[[bytes], Any] | None = None
    forged: Callable[[random.Random], bytes] | None = None
    bombs: tuple[bytes, ...] = ()
    share: float = 1.0
    damage: tuple[str, ...] = field(default=("cut", "flip", "swap", "repeat", "insert", "zero"))


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, kind: str, chance: random.Random) -> bytes:
    size = max(len(content), 1)
    at, length = chance.randrange(size), chance.randrange(1, 65)
    data = bytearray(content)
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            place = chance.randrange(len(data))
            data[place] ^= 1 << chance.randrange(8)
    elif kind == "swap":
        other = chance.randrange(size)
        data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "insert":
        data[at:at] = chance.randbytes(length)
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


_NASTY: tuple[Any, ...] = (
    None, -1, 0, 1, 3, 2**31, 2**40, 2**63, 2**70, -(2**63), 1e308, 0.5, float("nan"), "", "x", "\0", "\ud800", "full",
    [], {}, [[]], True, [2**40], [2**20, 2**20], ["a"], {"a": 1}, "w" * 5000,
)  # fmt: skip


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mutated(value: Any, chance: random.Random) -> Any:
    """A JSON value with one part replaced, left out, renamed, or swapped with another."""
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict | list):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            places += [(one, key) for key in keys]
            pending += [one[key] for key in keys]
    if not places:
        return chance.choice(_NASTY)
    holder, key = chance.choice(places)
    how = chance.choice(("replace", "replace", "replace", "drop", "rename", "swap", "deep"))
    if how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[str(key) + chance.choice((".", "x", "\0", "/"))] = holder.pop(key)
    elif how == "swap":
        other, at = chance.choice(places)
        holder[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(holder[key])  # copies: nothing holds itself
    else:
        holder[key] = _deep(chance.choice((50, 150, 900))) if how == "deep" else chance.choice(_NASTY)
    return value


def sealed(kind: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    """A file of this library with valid checksums and any content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        try:
            files.save(path, kind, tensors, metadata)
        except (TypeError, ValueError, RecursionError):  # no JSON
            files.save(path, kind, tensors, {})
        return path.read_bytes()


def forged_sealed(kind: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Callable[[random.Random], bytes]:
    def forge(chance: random.Random) -> bytes:
        described, held = json.loads(json.dumps(metadata)), dict(tensors)
        if held and chance.random() < 0.3:
            name = chance.choice(sorted(held))
            tensor = held.pop(name)
            bits = (
                tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor
            )  # which torch computes nothing in
            new = chance.choice((bits[:-1], bits.double(), bits.flip(0), bits.roll(1), bits * 0 - 1, None))
            if new is not None:
                held[name] = new.clone().view(tensor.dtype) if new.dtype == bits.dtype else new.clone()
        else:
            described = mutated(described, chance)
        return sealed(kind, held, described if isinstance(described, dict) else {})

    return forge


def saved(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


# --- what the bytes say, by other code --------------------------------------------------------------------------------


def unpacked(content: bytes, packed: bool) -> str:
    text = (gzip.decompress(content) if packed else content).decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("NUL")
    return text


def lines_of(content: bytes, packed: bool = False) -> list[str]:
    lines = unpacked(content, packed).split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def rows_of(content: bytes, *, quoted: bool = False, header: bool = True, columns: tuple[str, ...] = ()) -> list[Any]:
    if quoted:
        text = "\n".join(lines_of(content)) + "\n"
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=",", strict=True))
    else:
        rows = [line.split("\t") for line in lines_of(content)]
    rows = [row for row in rows if row and (len(row) > 1 or row[0].strip(" "))]
    names = list(columns) if not header else rows.pop(0) if rows else []
    return [dict(zip(names, row, strict=True)) for row in rows]


def objects_of(content: bytes) -> list[Any]:
    return [json.loads(line) for line in lines_of(content) if line.strip()]


def yaml_of(content: bytes) -> Any:
    import yaml

    return yaml.safe_load(unpacked(content, False)) or {}


def tensors_of(content: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return {name: tensor for name, tensor in load(content).items() if tensor.is_floating_point()}


def config_of(content: bytes) -> Any:
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(**json.loads(content)).to_dict()


# --- cases ------------------------------------------------------------------------------------------------------------

_TEXT = 'Ein Satz über Gewässer.\nA sentence with "quotes" and, commas.\n\n中文的句子\u2028 hier\n' * 4
_DEEP = 100_000
_LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
)
_RECIPE = b"""title: Small
by: [label, shots]
model: mini-xlmr
defaults: {train: {task: generated, language: en}, test: {task: generated}, settings: {epochs: 2}}
grid: {shots: [1, 2], seed: [1, 2]}
cells:
  - {label: SP, method: soft-prompt}
  - {label: LTP, method: ltp, ticket: {density: 0.2, text: generated, lines: 200}}
"""


def _packed(lines: bytes) -> bytes:
    return gzip.compress(lines, 9, mtime=0)


def lt_sft(model: Any) -> tuple[dict[str, Any], str]:
    """A file's content in the layout of LT-SFT: steps are a list whose first item is a number of numpy."""
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    size = dict(model.named_parameters())[name].shape
    positions = np.sort(np.random.default_rng(0).choice(size.numel(), 40, replace=False)).astype(np.int64)
    steps = [positions[0], *(positions[1:] - positions[:-1]).tolist()]
    generator = torch.Generator().manual_seed(0)
    diff = {"size": size, "index_steps": steps, "values": torch.randn(40, generator=generator)}
    return {"diffs": {name: diff}, "abs": {"classifier.bias": torch.ones(3)}}, name


def lt_sft_bombs(name: str) -> tuple[bytes, ...]:
    class Huge:
        def __reduce__(self) -> Any:
            return bytearray, (10**11,)

    wide = torch.zeros(1).expand(2**36)
    far = saved({"diffs": {}, "abs": {"a": torch.zeros(4)}})
    out = io.BytesIO()  # a storage that claims more numbers than its record has
    with zipfile.ZipFile(io.BytesIO(far)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                data = data.replace(b"K\x04tq", b"J\xff\xff\xff\x7ftq", 1)
            target.writestr(info.filename, data)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", pickle.dumps({"abs": {}}, 2))
        target.writestr("archive/version", "3")
        target.writestr("archive/data/0", bytes(1 << 28))
    steps = {"size": [2**31, 2**31], "index_steps": [1], "values": torch.ones(1)}
    return (
        saved({"diffs": {}, "abs": {"a": wide}}),
        saved({"diffs": {name: {"size": [32, 32], "index_steps": wide, "values": wide}}, "abs": {}}),
        saved({"diffs": {name: steps}, "abs": {}}),
        saved({"abs": Huge()}),
        saved({"abs": _deep(200)}),
        out.getvalue(),
        packed.getvalue(),
    )


def cases(folder: Path) -> list[Case]:
    """All cases; `folder`: for temporary files."""
    from transformers import BloomConfig, BloomForCausalLM

    from ltp_sparse.models import backbone

    tokenizer = tiny_tokenizer()
    model = tiny_language_model(len(tokenizer), decoupled=False)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    bloom = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(bloom).save_pretrained(folder / "causal")
    tokenizer.save_pretrained(folder / "causal")

    ticket = ls.Ticket.random(model, density=0.1, seed=0, pool=lambda name: "layer.0" in name)
    delta = ls.SparseDelta.between(model, model, ticket, dense={"head": torch.ones(3)}, metadata={"steps": 3})
    in_linear = ls.Ticket.random(model, density=0.1, seed=0, pool=r"layer\.0\.attention.*(query|key)\.weight")
    write_shira(ls.SparseDelta.between(model, model, in_linear), folder / "shira")
    adapter = Adapter(32, 2, 4, metadata={"language": "en"})
    ticket.save(folder / "ticket")
    delta.save(folder / "delta")
    adapter.save(folder / "adapter")
    (folder / "sharded").mkdir(exist_ok=True)
    ticket.save(folder / "sharded" / "t.safetensors", max_shard_size=500)
    index = json.loads((folder / "sharded" / "t.safetensors.index.json").read_bytes())
    results.append(folder / "results", {"id": "a", "mean": 0.5, "scores": {"en": 0.5}})
    results.append(folder / "results", {"id": "b", "mean": 0.25, "scores": {"en": 0.25}})
    lt, name = lt_sft(model)
    huge = {f"w{i}": {"shape": [2**40], "encoding": "full", "k": 2**40} for i in range(16)}
    many = {f"w{i}": {"shape": [2**36], "encoding": "list16", "k": 0} for i in range(16)}

    def of_sets(parameters: dict[str, Any], k: int) -> bytes:
        n = sum(np.prod([float(s) for s in p["shape"]]) for p in parameters.values())
        facts = {"parameters": parameters, "fingerprint": {}, "metadata": {}, "k": k, "n": int(n)}
        return sealed("ticket", {}, facts)

    def of_delta(parameters: dict[str, Any]) -> bytes:
        return sealed("delta", {}, {"parameters": parameters, "fingerprint": {}, "ticket": {}, "metadata": {}})

    def forged(path: Path, kind: str) -> Callable[[random.Random], bytes]:
        tensors, metadata = files.load(path, kind)
        return forged_sealed(kind, tensors, {k: v for k, v in metadata.items() if k not in ("kind", "format")})

    def forged_lt(chance: random.Random) -> bytes:
        try:
            return saved(mutated(copy.deepcopy(lt), chance))
        except (TypeError, RecursionError, UnicodeEncodeError):
            return saved({"diffs": None})

    def forged_json(value: Any) -> Callable[[random.Random], bytes]:
        return lambda chance: json.dumps(mutated(json.loads(json.dumps(value)), chance)).encode()

    def forged_recipe(chance: random.Random) -> bytes:
        import yaml

        try:
            return yaml.safe_dump(mutated(yaml.safe_load(_RECIPE), chance), allow_unicode=True).encode()
        except (UnicodeEncodeError, RecursionError):
            return b"cells: 3"

    def pieces(path: Path) -> dict[str, Tensor]:
        return {name: tensor.piece(0, tensor.numel()).clone().view(tensor.shape)
                for name, tensor in open_checkpoint(path).items()}  # fmt: skip

    def lt_content(path: Path) -> Any:
        found = read_lt_sft(path, model)
        return found.ticket.digest(), found.values, found.dense

    def shira_content(path: Path) -> Any:
        found = read_shira(path, model)
        return found.ticket.digest(), found.values

    def ticket_content(found: ls.Ticket) -> Any:
        return found.digest(), found.names, found.shapes, found.metadata, found.fingerprint

    def sharded_content(path: Path) -> Any:
        for shard in (folder / "sharded").glob("*.safetensors"):
            if not (path.parent / shard.name).exists():
                (path.parent / shard.name).symlink_to(shard)
        return ticket_content(ls.Ticket.load(path))

    def forged_index(chance: random.Random) -> bytes:
        content = mutated(copy.deepcopy(index), chance)
        try:
            content[files.KEY].pop("checksum", None)
            content[files.KEY]["checksum"] = files.checksum_of(content)
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        return json.dumps(content).encode()

    def delta_content(path: Path) -> Any:
        found = ls.SparseDelta.load(path)
        return ticket_content(found.ticket), found.values, found.originals, found.dense, found.metadata

    def adapter_content(path: Path) -> Any:
        found = Adapter.load(path)
        return found.metadata, dict(found.state_dict())

    def recipe_content(path: Path) -> Any:
        recipe = load_recipe(str(path))
        return recipe.title, recipe.by, [cell.facts for cell in recipe.cells]

    def beside(file: str, load: Callable[[Path], Any], kind: str = "model") -> Callable[[Path], Any]:
        """Reads a model's folder with one of its files replaced."""

        def read(path: Path) -> Any:
            place = path.parent / f"folder-{kind}"  # transformers reads an adapter that lies beside a model
            place.mkdir(exist_ok=True)
            for one in (folder / kind).iterdir():
                (place / one.name).unlink(missing_ok=True)
                (place / one.name).symlink_to(path if one.name == file else one)
            return load(place)

        return read

    tsv = "premise\thypothesis\tlabel\n" + 'Er "sagt" ja.\tÜber allem.\tneutral\n\nb\tc\tentailment\n' * 3
    table = 'premise,hypothesis,label\n"a, ""b""\nc",Über,neutral\nx,y,entailment\n\n' * 1 + 'p,"q r",neutral\n' * 6
    rows = [{"text": "Über allem", "label": 1, "inner": {"a": [1, 2.5, None]}}, {"text": "b\nc"}, {"text": "d"}]
    jsonl = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 3)
    pairs = "".join(json.dumps({"premise": f"p{i}", "hypothesis": "ü", "label": "neutral"}) + "\n" for i in range(6))
    state = {"global_step": 7, "log_history": [{"loss": 0.5, "epoch": i} for i in range(5)], "best": None}
    long = b"x" * (1 << 20)
    brackets = b"[" * _DEEP
    read = lambda path: read_json(path, "an object")  # noqa: E731

    def pair_says(content: bytes) -> Any:
        return [(r["premise"], r["hypothesis"], r.get("label") or None) for r in objects_of(content)]

    def rows_without_a_word(path: Path) -> Any:
        """Rows that are left out or cannot be verified give a warning, which counts as refused here."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                return results.read(path)
            except UserWarning as warning:
                raise FileFormatError(path, str(warning)) from warning

    def own(path: Path) -> Any:
        columns = Columns(text="premise", pair="hypothesis", label="label")
        return [(pair.premise, pair.hypothesis, pair.label) for pair in read_own(path, columns)]

    def own_says(rows: list[dict[str, Any]]) -> Any:
        return [(row["premise"], row["hypothesis"], row["label"].strip()) for row in rows]

    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "a").write_bytes(b"a")
    manifest.finish(folder / "run", ["a"])
    pyarrow.parquet.write_table(
        pyarrow.table({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": ["x", "y"]}), folder / "parquet"
    )
    parquet = (folder / "parquet").read_bytes()

    def model_file(file: str, kind: str = "model") -> bytes:
        return (folder / kind / file).read_bytes()

    weights = {name: parameter.detach().clone() for name, parameter in ls.canonical_parameters(model).items()}
    publisher = ls.sync.Publisher(weights, ticket, folder / "store")
    publisher.publish(0)
    for name in ticket.active_names:
        weights[name].mul_(1 + ticket.mask(name))
    publisher.publish(1)
    of_ticket = records.ticket_name(ticket.digest())
    of_version = {kind: records.part_name(number, kind, 0) for kind, number in (("anchor", 0), ("changes", 1))}
    slots = {name: parameter[ticket.mask(name)] for name, parameter in ls.canonical_parameters(model).items()
             if name in ticket.active_names}  # fmt: skip

    def part_content(path: Path) -> Any:
        """As a follower reads it, if the marker names these very bytes."""
        content, found = path.read_bytes(), {name: values.detach().clone() for name, values in slots.items()}
        file = records.PartFile(path.name, len(content), Hash().update(content).digest())
        part = records.read_part(FolderStore(path.parent), file, ticket)
        try:
            part.fill(found, dict(zip(found, found, strict=True)))
        except records.WrongBase as error:
            raise FileFormatError(path, f"other slots of {error}") from error
        return found, part.base, part.base_digests, part.ranges

    def marker_content(path: Path) -> Any:
        return records.read_marker(FolderStore(path.parent), 1)

    def of_store(name: str) -> bytes:
        return (folder / "store" / name).read_bytes()

    def forged_marker(chance: random.Random) -> bytes:
        try:
            facts = mutated(json.loads(of_store(records.marker_name(1))), chance)
            facts.pop("checksum", None)
            return json.dumps({**facts, "checksum": files.checksum_of(facts)}).encode()
        except (AttributeError, TypeError, UnicodeEncodeError, ValueError, RecursionError):
            return b"[]"

    return [
        Case("JSON", "state.json", json.dumps(state, indent=1).encode(), read,
             lambda b: json.loads(unpacked(b, False)), forged_json(state),
             (brackets, b'{"a":' * _DEEP, b'{"a": %s}' % (b"9" * 100_000), b"[" + b"[]," * 300_000 + b"[]]")),
        Case("YAML", "config.yaml", _RECIPE, lambda p: read_yaml(p, "a mapping"), yaml_of, forged_recipe,
             (brackets, b"{a: " * _DEEP, _LAUGHS, b"a: &a [*a]", b"- " * 20_000, b"a: !!python/object:os.system x",
              b"a: 2001-99-99", b"a: !!int ''", b"? [a]\n: b", b"a: " + b"9" * 10_000, b"a: |\n " + long)),
        Case("text", "lines.txt", _TEXT.encode(), lambda p: list(read_lines(p)), lines_of, None, (long * 17,)),
        Case("text", "lines.txt.gz", _packed(_TEXT.encode()), lambda p: list(read_lines(p)),
             lambda b: lines_of(b, True), None,
             (_packed(bytes(1 << 27)), _packed(b"ab\n" * (1 << 25)), _packed(b"x" * (1 << 26)))),
        Case("text", "corpus.jsonl", jsonl.encode(), lambda p: read_text([p]),
             lambda b: [t.strip() for r in objects_of(b) for t in ([] if r["text"] is None else r["text"].split("\n"))
                        if t.strip()]),
        Case("table", "rows.csv", table.encode(), lambda p: [r for _, r in read_table(p, quoted=True, comma=True)],
             lambda b: rows_of(b, quoted=True), None, (b'a,b\n"' + b"x\n" * 1_000_000, b'a,b\n"' + b'""' * 1_000_000)),
        Case("table", "rows.tsv", tsv.encode(), lambda p: [r for _, r in read_table(p, ("premise",))], rows_of),
        Case("table", "rows.tsv.gz", _packed(tsv.encode()), lambda p: [r for _, r in read_table(p, ("premise",))],
             lambda b: rows_of(gzip.decompress(b)), None, (_packed(b"premise\n" + b"a\n" * (1 << 25)),)),
        Case("table without header", "cells.tsv", tsv.replace("\n\n", "\n").encode(),
             lambda p: [r for _, r in read_columns(p, ("a", "b", "c"))],
             lambda b: rows_of(b, header=False, columns=("a", "b", "c"))),
        Case("JSON lines", "rows.jsonl", jsonl.encode(), lambda p: [r for _, r in read_jsonl(p, ("text",))],
             objects_of, forged_json(rows[0]), (brackets, b'{"text":' * _DEEP)),
        Case("labelled pairs", "pairs.jsonl", pairs.encode(),
             lambda p: [(q.premise, q.hypothesis, q.label) for q in read_pairs(p)], pair_says,
             forged_json({"premise": "a", "hypothesis": "b", "label": "neutral"}), (brackets,)),
        Case("safetensors of ltp_sparse", "any.safetensors", sealed("study", {"a": torch.arange(9.0)}, {"x": [1, 2]}),
             lambda p: files.load(p, "study"), None, None,
             (b"\xff\xff\xff\xff\0\0\0\0" + b"{" * 1000, (1 << 40).to_bytes(8, "little") + b"{}")),
        Case("ticket", "ticket.safetensors", (folder / "ticket").read_bytes(),
             lambda p: ticket_content(ls.Ticket.load(p)), None, forged(folder / "ticket", "ticket"),
             (of_sets(huge, 16 * 2**40), of_sets(many, 0), of_sets({"w": {"shape": [2**40], "encoding": "full",
                                                                         "k": 2**40}}, 2**40),
              of_sets({"w": {"shape": [2**39, 2**39], "encoding": "list16", "k": 0}}, 0))),
        Case("delta", "delta.safetensors", (folder / "delta").read_bytes(), delta_content, None,
             forged(folder / "delta", "delta"), (of_delta(huge), of_delta(many))),
        Case("index of shards", "t.safetensors.index.json", json.dumps(index).encode(), sharded_content, None,
             forged_index, (brackets, b'{"metadata": {}, "weight_map": {}, "ltp_sparse": {}}')),
        Case("adapter", "adapter.safetensors", (folder / "adapter").read_bytes(), adapter_content, None,
             forged(folder / "adapter", "adapter"),
             tuple(sealed("adapter", dict(adapter.state_dict()), {**sizes, "invertible": True, "metadata": {}})
                   for sizes in ({"hidden": 10**6, "layers": 2, "reduction": 1},
                                 {"hidden": 32, "layers": 10**9, "reduction": 4}))),
        Case("LT-SFT", "pytorch_diff.bin", saved(lt), lt_content, None, forged_lt, lt_sft_bombs(name)),
        Case("SHiRA", "adapter_model.safetensors", model_file("adapter_model.safetensors", "shira"),
             beside("adapter_model.safetensors", shira_content, "shira"), lambda b: ANYTHING, share=0.5),
        Case("SHiRA", "adapter_config.json", model_file("adapter_config.json", "shira"),
             beside("adapter_config.json", shira_content, "shira"), lambda b: ANYTHING, share=0.1),
        Case("recipe", "small.yaml", _RECIPE, recipe_content, lambda b: ANYTHING, forged_recipe,
             (_LAUGHS, _RECIPE.replace(b"[1, 2], seed: [1, 2]", b"%s, seed: %s, train.limit: %s" % (
                 (str(list(range(1, 1001))).encode(),) * 3)), b"cells: [" + b"{}, " * 20_000 + b"]")),
        Case("checkpoint", "model.safetensors", model_file("model.safetensors")[:], pieces, tensors_of, share=0.5),
        Case("results", "results.jsonl", (folder / "results").read_bytes(), rows_without_a_word),
        Case("manifest", "manifest.json", (folder / "run" / "manifest.json").read_bytes(),
             lambda p: manifest.names(p.parent)),
        Case("marker of a version", records.marker_name(1), of_store(records.marker_name(1)), marker_content, None,
             forged_marker, (brackets,), share=0.5),
        *(Case("part of a version", name, of_store(name), part_content, None,
               forged(folder / "store" / name, "part of a version"), share=0.5) for name in of_version.values()),
        Case("ticket of a store", of_ticket, of_store(of_ticket),
             lambda p: ticket_content(records.read_ticket(FolderStore(p.parent), ticket.digest())), None,
             forged(folder / "ticket", "ticket"), share=0.3),
        Case("own data", "own.csv", table.encode(), own, lambda b: own_says(rows_of(b, quoted=True))),
        Case("own data", "own.jsonl", pairs.encode(), own, lambda b: own_says(objects_of(b))),
        Case("own data", "own.parquet", parquet, own, lambda b: ANYTHING, share=0.1),
        Case("config.json", "config.json", model_file("config.json"),
             beside("config.json", lambda p: backbone.load_config("fuzz", p).to_dict()), lambda b: ANYTHING,
             forged_json(json.loads(model_file("config.json"))), (brackets,), share=0.3),
        Case("tokenizer", "tokenizer.json", model_file("tokenizer.json"),
             beside("tokenizer.json", lambda p: len(backbone._load_tokenizer("fuzz", p))), lambda b: ANYTHING,
             None, (brackets, b'{"a":' * _DEEP), share=0.1),
        Case("tokenizer", "tokenizer_config.json", model_file("tokenizer_config.json"),
             beside("tokenizer_config.json", lambda p: len(backbone._load_tokenizer("fuzz", p))), lambda b: ANYTHING,
             forged_json(json.loads(model_file("tokenizer_config.json"))), (brackets,), share=0.1),
        Case("model", "model.safetensors", model_file("model.safetensors"),
             beside("model.safetensors", lambda p: len(backbone.load_backbone(p)[0].state_dict())),
             lambda b: ANYTHING, None, (), share=0.03),
        Case("causal model", "config.json", model_file("config.json", "causal"),
             beside("config.json", lambda p: len(backbone.load_causal(p)[0].state_dict()), "causal"),
             lambda b: ANYTHING, None, (), share=0.03),
    ]  # fmt: skip


# --- trying -----------------------------------------------------------------------------------------------------------


def equal(a: Any, b: Any) -> bool:
    """Bits of tensors, and NaN as itself."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
            and a.detach().numpy(force=True).tobytes() == b.detach().numpy(force=True).tobytes()
            if a.dtype != torch.bfloat16
            else equal(a.view(torch.int16), b.view(torch.int16))
        )  # fmt: skip
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def attempt(case: Case, content: bytes, path: Path, forged: bool) -> tuple[str, str]:
    """(outcome, what was found) of one file, in this process."""
    path.write_bytes(content)
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = case.read(path)
        outcome, detail = "same", ""
    except FileFormatError as error:
        outcome, detail = ("memory", repr(error)) if out_of_memory(error) else ("refused", "")
        if path.name not in str(error) and path.parent.name not in str(error):
            outcome, detail = "crash", f"a message without the file: {error}"
    except (Exception, RecursionError) as error:
        outcome, detail = "memory" if out_of_memory(error) else "crash", repr(error)[:300]
    if (seconds := time.process_time() - start) > SECONDS and outcome in ("same", "refused"):
        return "slow", f"{seconds:.2f} s"
    if outcome != "same" or content == case.made:
        return outcome, detail
    original = ORIGINALS[case.name, case.reader]
    if equal(found, original):
        return "same", ""
    if forged:
        return "as the bytes say", ""
    if case.says is None:
        # rows of results that a kill left unfinished are left out, with a warning
        subset = case.reader == "results" and all(any(equal(r, o) for o in original) for r in found)
        return ("as the bytes say", "") if subset else ("other", f"{found!r:.300}")
    try:
        said = case.says(content)
    except Exception as error:
        return "other", f"read, but other code says {error!r:.200}"
    return ("as the bytes say", "") if said is ANYTHING or equal(found, said) else ("other", f"{found!r:.200}")


ORIGINALS: dict[tuple[str, str], Any] = {}


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _child(case: Case, jobs: list[tuple[str, bytes]], folder: Path, pipe: int) -> None:
    sys.stderr = open(os.devnull, "w")
    _limit()
    signal.setitimer(signal.ITIMER_PROF, 30 * len(jobs))
    with os.fdopen(pipe, "w") as out:
        for number, (kind, content) in enumerate(jobs):
            print(json.dumps(["start", number, "", ""]), file=out, flush=True)
            signal.setitimer(signal.ITIMER_PROF, 20)  # ends this process, which counts as a crash
            outcome, detail = attempt(case, content, folder / case.name, kind in ("forged", "bomb"))
            print(json.dumps(["done", number, outcome, detail]), file=out, flush=True)


def tried(case: Case, jobs: list[tuple[str, bytes]]) -> Iterator[tuple[str, bytes, str, str]]:
    """(kind of damage, bytes, outcome, what was found) of every job; if a child dies, the next one continues."""
    while jobs:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            ours, theirs = os.pipe()
            if (pid := os.fork()) == 0:
                try:
                    os.close(ours)
                    _child(case, jobs, Path(folder), theirs)
                finally:
                    os._exit(0)
            os.close(theirs)
            begun = finished = 0
            with os.fdopen(ours) as lines:
                for line in lines:
                    what, number, outcome, detail = json.loads(line)
                    if what == "start":
                        begun = number + 1
                    else:
                        finished = number + 1
                        yield *jobs[number], outcome, detail
            _, status = os.waitpid(pid, 0)
        if begun > finished:
            yield *jobs[finished], "crash", f"the process ended with status {status}"
        elif not begun:
            raise RuntimeError(f"{case.reader}: no file could be tried, status {status}")
        jobs = jobs[begun:]


def jobs_of(case: Case, count: int, seed: int) -> list[tuple[str, bytes]]:
    jobs: list[tuple[str, bytes]] = [("none", case.made), *(("bomb", bomb) for bomb in case.bombs)]
    kinds = [*case.damage, *(["forged", "forged"] if case.forged else [])]
    for number in range(max(0, count - len(jobs))):
        kind = kinds[number % len(kinds)]
        chance = random.Random(f"{seed} {case.reader} {case.name} {number}")
        made = case.forged(chance) if kind == "forged" and case.forged else damaged(case.made, kind, chance)
        jobs.append((kind, made))
    return jobs


def walk(
    count: int, seed: int = 0, progress: bool = False, only: Sequence[str] = ()
) -> tuple[Counter[tuple[str, str, str, str]], list[Any]]:
    """Counts by (reader, file, damage, outcome), and the faults with their bytes.

    count: files in all
    only:  readers to try, with the same files as in a run of all; empty: all
    """
    counts: Counter[tuple[str, str, str, str]] = Counter()
    faults = []
    with tempfile.TemporaryDirectory(prefix="fuzz-made-") as folder:
        everything = cases(Path(folder))
        total = sum(case.share for case in everything)
        for case in everything:
            if only and case.reader not in only:
                continue
            whole = Path(folder) / "whole"
            whole.mkdir(exist_ok=True)
            (whole / case.name).write_bytes(case.made)
            ORIGINALS[case.name, case.reader] = case.read(whole / case.name)
            start = time.time()
            for kind, content, outcome, detail in tried(case, jobs_of(case, int(count * case.share / total), seed)):
                counts[case.reader, case.name, kind, outcome] += 1
                if outcome in FAULTS or (kind == "none" and outcome != "same"):
                    shown = base64.b64encode(content[:3000]).decode()
                    faults.append((case.reader, case.name, kind, outcome, detail, shown))
            if progress:
                found = {o: sum(n for k, n in counts.items() if k[:2] == (case.reader, case.name) and k[3] == o)
                         for o in OUTCOMES}  # fmt: skip
                print(f"{case.reader:<28} {case.name:<24} {found} {time.time() - start:.0f} s", flush=True)
    return counts, faults


def main() -> int:
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a .csv of the counts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of CPU time that a file may take")
    parser.add_argument("--readers", nargs="+", default=[], metavar="NAME", help="only these, e.g. ticket results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    SECONDS = options.seconds
    counts, faults = walk(options.files, options.seed, progress=True, only=options.readers)
    for fault in faults[:50]:
        print(*fault, sep="\n  ")
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["reader", "file", "damage", *OUTCOMES])
            for key in dict.fromkeys(key[:3] for key in sorted(counts)):
                writer.writerow([*key, *(counts[*key, outcome] for outcome in OUTCOMES)])
    print(f"{sum(counts.values()):,} files, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
