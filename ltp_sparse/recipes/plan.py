"""What a recipe takes, estimated before anything is trained: cells, trained entries, memory and time."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ltp_sparse.methods import LTP, LTSFT, AdaSFT, Method, RandSFT
from ltp_sparse.methods.fine_tuning import SCOPES, TaskSFT
from ltp_sparse.models.backbone import backbone_from_config, load_config
from ltp_sparse.recipes.artefacts import LINES, Artefact, needed
from ltp_sparse.recipes.checks import check_cell, method_of
from ltp_sparse.recipes.recipe import Cell, Recipe
from ltp_sparse.selection import pools
from ltp_sparse.selection.ltp import STRATEGIES
from ltp_sparse.tasks import task, tested
from ltp_sparse.tickets.counts import entries_for
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.language import ADAPTER_SETTINGS, LANGUAGE_SETTINGS
from ltp_sparse.training.mlm import MLMSettings
from ltp_sparse.weights.names import canonical_parameters, layer_of

_GPU_FLOPS = 1e14
"""Assumed for a data-centre GPU in bfloat16, a tenth to a quarter of its printed peak."""

_TRAINING = {"multinli": 392_702, "mnli-9k": 8_100, "smsa": 10_617, "smsa-full": 11_000}
_TEST = {
    "xnli": 5010,
    "americasnli": 749,
    "americasnli-first": 749,
    "nusax": 400,
    "sib200": 204,
    "smsa": 492,
    "generated": 300,
}
_TRAINED, _TESTED = 6, 2
"""Operations per token and weight: a product and a sum forward, and twice as many backward."""

_SENTENCE = 27
"""Tokens: 300,000 sentences of Wikipedia make about 1,000 updates of 32 x 256 tokens."""


@dataclass(frozen=True)
class Estimate:
    """What a cell takes.

    Attributes:
        active: active entries of the language model.
        state: bytes of their optimizer state.
        updates: updates of all phases.
        flops: floating-point operations of training and evaluation.
    """

    active: int
    state: int
    updates: int
    flops: float


def plan(recipe: Recipe) -> str:
    """A table of the recipe's cells by label, and the time they take here and on a GPU."""
    head = f"{'label':<36} {'method':<16} {'cells':>6} {'active entries':>15} {'state':>10} {'updates':>9}"
    lines = [f"{recipe.title}\n", head]
    model_of = cache(_meta_model)
    shared: dict[str, float] = {}
    total = 0.0
    groups: dict[tuple[str, str], list[Estimate]] = {}
    for cell in recipe.cells:
        check_cell(cell)
        if not isinstance(name := cell["model"], str):
            raise ValueError(f"{cell}: expected a model, got {name}; name a folder or one of the Hub by --model")
        model = model_of(name)
        of_cell = estimate(cell, model)
        total += of_cell.flops
        groups.setdefault((cell["label"], cell["method"]), []).append(of_cell)
        shared |= {artefact.id: _flops_to_make(artefact, model) for artefact in needed(cell)}
    for (label, method), members in groups.items():
        active, state, updates = (sorted({getattr(e, f) for e in members}) for f in ("active", "state", "updates"))
        lines.append(
            f"{label:<36} {method:<16} {len(members):>6} {_span(active, _count):>15} {_span(state, _bytes):>10} "
            f"{_span(updates, str):>9}"
        )
    total += sum(shared.values())
    here = _flops_here()
    hours, hours_here = total / _GPU_FLOPS / 3600, total / here / 3600
    lines += [
        "",
        f"{len(recipe.cells)} cells, and {len(shared)} artefacts that they share (tuned weights, language SFTs, ...).",
        f"About {total / 1e15:,.2f} PFLOP: {_time(hours)} on a GPU at {_GPU_FLOPS / 1e12:.0f} TFLOP/s, "
        f"{_time(hours_here)} on this machine's CPU",
        f"at {here / 1e12:.2f} TFLOP/s (matrix products, measured now). Inputs count at half of their greatest length.",
        "State is that of the active entries: 8 bytes each, and their index; prompts and heads come on top.",
    ]
    return "\n".join(lines)


def _time(hours: float) -> str:
    number, unit = (
        (hours, "hours") if hours >= 1 else (60 * hours, "minutes") if 60 * hours >= 1 else (3600 * hours, "seconds")
    )
    return f"{number:,.{0 if number >= 10 else 1}f} {unit}"


def estimate(cell: Cell, model: Any) -> Estimate:
    """What a cell takes, given its base model without weights."""
    method = method_of(cell)
    active, n = _active(cell, method, model)
    examples = _TRAINING.get(cell["train.task"], len(task(cell["train.task"]).labels) * (cell["shots"] or 1))
    settings = method.settings
    phases = 1 + (isinstance(method, LTSFT | AdaSFT) or (isinstance(method, RandSFT) and method.match == "layers"))
    updates = math.ceil(examples / settings.batch_size) * settings.epochs
    updates = phases * int(min(updates, settings.max_steps) if settings.max_steps else updates)
    length = settings.max_length / 2
    languages = tested(cell["test.task"], cell["test.languages"], cell["train.language"])
    most = min(cell["test.limit"] or 10**9, _TEST.get(cell["test.task"], 5000))
    tests = len(languages) * most
    trained, tested_tokens = updates * settings.batch_size * length, tests * length
    flops = (_TRAINED * trained + _TESTED * tested_tokens) * _body(model)
    index = min(n / 8, 2 * active) if 0 < active < n else 0
    return Estimate(active, int(8 * active + index), updates, flops)


def _active(cell: Cell, method: Method, model: Any) -> tuple[int, int]:
    """(active entries of the language model, entries of its pool)"""
    if isinstance(method, LTP) and method.needs_ticket:
        named = canonical_parameters(model)
        pool: Callable[[str], bool] = pools.maskable
        if cell["ticket.of"] == "pool":
            pool = STRATEGIES[cell["ticket.strategy"] or "decoupled"]
        elif cell["ticket.segment"] is not None:
            layers = len({layer_of(name) for name in named} - {"embeddings", "other"})
            pool = pools.segment(cell["ticket.segment"], layers)
        n = sum(p.numel() for name, p in named.items() if pool(name))
        return entries_for(n, density=cell["ticket.density"] or 0.2), n
    if isinstance(method, TaskSFT):  # random entries are not drawn to be counted
        return method.budget(model), Ticket.full(model, SCOPES[method.scope]).n
    ticket = method.ticket(model)
    return ticket.k, max(ticket.n, 1)


def _flops_to_make(artefact: Artefact, model: Any) -> float:
    """Operations that make an artefact: each of its phases tunes a masked language model."""
    cell, stage = artefact.cell, artefact.stage
    settings = {"ticket": MLMSettings(), "language_sft": LANGUAGE_SETTINGS, "adapters": ADAPTER_SETTINGS}[stage]
    phases = 2 if stage == "language_sft" and cell[f"{stage}.kind"] in (None, "lt-sft", "sc-sft") else 1
    settings = replace(settings, **(cell[f"{stage}.mlm"] or {}))
    lines, updates = cell[f"{stage}.lines"] or LINES[stage], settings.max_steps
    if updates <= 0:
        updates = math.ceil(settings.epochs * lines * _SENTENCE / (settings.batch_size * settings.length))
        if settings.step_bounds is not None:
            updates = min(max(updates, settings.step_bounds[0]), settings.step_bounds[1])
    decoder = settings.mask_probability * model.get_input_embeddings().weight.numel()
    return _TRAINED * phases * (_body(model) + decoder) * updates * settings.batch_size * settings.length


@cache
def _body(model: Any) -> int:
    """Entries of the layers, which every token passes."""
    named = canonical_parameters(model)
    return sum(p.numel() for name, p in named.items() if layer_of(name) not in ("embeddings", "other"))


def _meta_model(name: str) -> Any:
    """The base model without weights."""
    from transformers import AutoModelForCausalLM

    config = load_config("run", name)
    with torch.device("meta"):
        if config.model_type == "xlm-roberta":
            return backbone_from_config(config, decoupled=False)
        return AutoModelForCausalLM.from_config(config)


def _flops_here() -> float:
    """Operations per second of this CPU: in the fastest of some matrix products, as other programs can slow them."""
    size = 1024
    matrix = torch.randn(size, size, dtype=torch.float32, device="cpu")
    return 2 * size**3 / min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=16))


def _span(values: list[Any], text: Callable[[Any], str]) -> str:
    return text(values[0]) if len(values) == 1 else f"{text(values[0])}-{text(values[-1])}"


def _count(value: int) -> str:
    return f"{value / 1e6:.2f}M" if value >= 10_000 else str(value)


def _bytes(value: int) -> str:
    return f"{value / 1e6:.0f} MB"
