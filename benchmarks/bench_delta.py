"""Deltas in and out of a model, and the copies that they are made of, beside peers: `python benchmarks/bench_delta.py`.

The baseline of a copy is a plain copy of the cache lines that it touches; of `apply`, `revert` and a switch, a copy of
the whole model. Peers: `index_put_` and `index_select`, LT-SFT's sum with a dense difference, PEFT's merge of a SHiRA
adapter with as many entries, and `set_adapter` of PEFT's LoRA, with the forward pass of one request.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from harness import Provider, Row, WrongResult, argument_parser, parse, time_rows, value_row, write_csv
from torch import Tensor, nn

import ltp_sparse as ls
from ltp_sparse.deltas import entries
from ltp_sparse.deltas.delta import applied_deltas
from ltp_sparse.ops import masked_gather, masked_scatter_, masked_swap_
from ltp_sparse.tickets.tile_table import TileTable
from ltp_sparse.weights.tensors import DTYPES, bits

WIDTH, LINE, SECTOR, TOKENS, RANK = 1536, 64, 32, 16, 16
LAYERS = {"tiny": 2, "encoder": 36, "base": 65}
"""Square matrices of a model: 4.7, 85 and 153 million entries."""
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class Stack(nn.Module):
    """Matrices, one after the other."""

    def __init__(self, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def delta_of(model: nn.Module, density: float, seed: int) -> ls.SparseDelta:
    """A delta with random entries, all of which it changes."""
    parameters = {name: parameter.detach() for name, parameter in ls.canonical_parameters(model).items()}
    ticket = ls.Ticket.random(model, density=density, seed=seed)
    originals = entries.gather_all(parameters, ticket.sets)
    values = {name: held + 2.0 ** -(6 + seed) for name, held in originals.items()}
    return ls.SparseDelta(ticket.fingerprinted(model), values, originals)


def touched(model: nn.Module, ticket: ls.Ticket, size: int) -> int:
    """How many pieces of `size` bytes of the weights have an active entry."""
    item = next(model.parameters()).element_size()
    return sum(int(ticket.mask(name).view(-1, size // item).any(1).sum()) for name in ticket.names)


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise WrongResult(what)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def copies(model: nn.Module, delta: ls.SparseDelta) -> Iterator[list[Provider]]:
    """A gather, a scatter and a swap, each with its baseline first."""
    tensors = [parameter.detach() for parameter in ls.canonical_parameters(model).values()]
    table = TileTable.build(list(delta.ticket.sets.values()))
    indices = [index_set.indices() for index_set in delta.ticket.sets.values()]
    slots = masked_gather(tensors, table)
    k, item = table.k, slots.element_size()
    lines = touched(model, delta.ticket, LINE)
    source = torch.zeros(LINE * lines // item, dtype=slots.dtype)
    target, gathered = torch.zeros_like(source), torch.zeros_like(slots)
    index = 2 * k if delta.ticket.density < 1 / 16 else sum(table.sizes) // 8

    def provider(name: str, run: Callable[[], object], moved: int) -> Provider:
        def verify() -> None:
            run()
            expect(same(masked_gather(tensors, table), slots), name)

        return Provider(name, run, verify, moved, bytes_in_lines=moved)

    def put() -> None:
        for tensor, where, share in zip(tensors, indices, slots.split(table.counts), strict=True):
            tensor.view(-1).index_put_((where,), share)

    def select() -> None:
        for tensor, where, share in zip(tensors, indices, gathered.split(table.counts), strict=True):
            torch.index_select(tensor.view(-1), 0, where, out=share)

    plain = provider("copy of the touched lines", lambda: target.copy_(source), 2 * LINE * lines)
    read, written = LINE * lines + item * k + index, 2 * LINE * lines + item * k + index
    yield [
        plain,
        provider("masked_gather", lambda: masked_gather(tensors, table, out=gathered), read),
        provider("index_select", select, read),
    ]
    yield [
        plain,
        provider("masked_scatter_", lambda: masked_scatter_(tensors, slots, table), written),
        provider("index_put_", put, written),
    ]
    twin = slots.clone()
    yield [plain, provider("masked_swap_", lambda: masked_swap_(tensors, twin, table), written + item * k)]


class Application:
    """A delta and its model, with the weights that the model must have before and after `apply`.

    Peers write into `spare` instead of the model.
    """

    def __init__(self, model: nn.Module, delta: ls.SparseDelta) -> None:
        self.model, self.delta = model, delta
        self.parameters = dict(ls.canonical_parameters(model).items())
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.spare = {name: torch.empty_like(tensor) for name, tensor in self.base.items()}
        self.tuned = {name: tensor.clone() for name, tensor in self.base.items()}
        for name, tensor in self.tuned.items():
            tensor[delta.ticket.mask(name)] = delta.values[name]
        self.indices = {name: index_set.indices() for name, index_set in delta.ticket.sets.items()}
        self.moved = {name: delta.values[name] - delta.originals[name] for name in delta.values}
        self.nbytes = 2 * sum(tensor.nbytes for tensor in self.base.values())

    def apply(self, strict: bool = True) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.delta.apply(self.model, strict=strict)

    def revert(self) -> None:
        self.delta.revert(self.model)

    def ensure_applied(self) -> None:
        if not is_applied(self.model):
            self.apply()

    def ensure_reverted(self) -> None:
        if is_applied(self.model):
            self.revert()

    def expect_weights(self, wanted: dict[str, Tensor], what: str) -> None:
        expect(all(same(self.parameters[name], tensor) for name, tensor in wanted.items()), what)

    def copy_base(self) -> None:
        for name, tensor in self.base.items():
            self.spare[name].copy_(tensor)

    def sum_densely(self) -> None:
        for name, parameter in self.parameters.items():
            difference = torch.zeros_like(parameter)
            difference.view(-1).index_put_((self.indices[name],), self.moved[name])
            self.spare[name].copy_(parameter.detach()).add_(difference.detach())

    def put(self) -> None:
        for name, tensor in self.spare.items():
            tensor.view(-1).index_put_((self.indices[name],), self.delta.values[name])

    def apply_provider(self, name: str, *, strict: bool) -> Provider:
        """`apply` with or without a comparison of the base."""

        def verify() -> None:
            self.ensure_reverted()
            self.apply(strict)
            self.expect_weights(self.tuned, name)
            self.revert()
            self.expect_weights(self.base, f"{name}, reverted")

        return Provider(name, lambda: self.apply(strict), verify, self.nbytes, before=self.ensure_reverted)

    def revert_provider(self) -> Provider:
        """`revert`."""

        def verify() -> None:
            self.ensure_applied()
            self.revert()
            self.expect_weights(self.base, "revert")

        return Provider("revert", self.revert, verify, self.nbytes, before=self.ensure_applied)

    def peer(self, name: str, run: Callable[[], object], *, exact: bool) -> Provider:
        """Another way to the tuned weights, which must have their bits or, if it rounds, be close to them."""

        def verify() -> None:
            self.ensure_reverted()
            self.copy_base()
            run()
            for key, wanted in self.tuned.items():
                found = self.spare[key]
                expect(same(found, wanted) if exact else torch.allclose(found, wanted, rtol=1e-2, atol=1e-3), name)

        return Provider(name, run, verify, self.nbytes, before=self.ensure_reverted)


def apply_and_revert(model: nn.Module, delta: ls.SparseDelta) -> list[list[Provider]]:
    """`apply` with and without comparison of the base, and `revert`, beside a copy of the model and peers."""
    application = Application(model, delta)
    copied = Provider("copy of the model", application.copy_base, lambda: None, application.nbytes)
    return [
        [
            copied,
            application.apply_provider("apply", strict=True),
            application.apply_provider("apply, strict=False", strict=False),
            application.peer("index_put_, no check and no way back", application.put, exact=True),
            application.peer("sum with a dense difference (LT-SFT)", application.sum_densely, exact=False),
            shira(model, delta.ticket.density),
        ],
        [copied, application.revert_provider()],
    ]


def is_applied(model: nn.Module) -> bool:
    """Whether a delta is applied to the model."""
    return bool(applied_deltas(model))


def shira(model: nn.Module, density: float) -> Provider:
    """PEFT's merge of an adapter with as many entries, on a copy of the model."""
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(r=round(density * WIDTH / 2), target_modules=r"layers\.\d+", init_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)

    def back() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.base_model.unmerge_adapter()

    def verify() -> None:
        adapted.base_model.merge_adapter()

    return Provider("merge of SHiRA (PEFT)", lambda: adapted.base_model.merge_adapter(), verify, before=back)


def switches(model: nn.Module, density: float) -> tuple[list[list[Provider]], ls.TicketSwitcher]:
    """A switch from one delta to another, beside LoRA; then the same with the forward pass of a request."""
    from peft import LoraConfig, get_peft_model

    deltas = {name: delta_of(model, density, seed) for seed, name in enumerate("ab")}
    spare = [torch.empty_like(parameter) for parameter in model.parameters()]
    config = LoraConfig(r=RANK, target_modules=r"layers\.\d+")
    lora = get_peft_model(copy.deepcopy(model), config, adapter_name="first")
    lora.add_adapter("second", config)
    plain = copy.deepcopy(model)
    switcher = ls.TicketSwitcher(model, deltas)
    request = torch.randn(TOKENS, WIDTH).to(spare[0].dtype)
    nbytes = 2 * sum(tensor.nbytes for tensor in spare)

    def model_copy() -> None:
        for target, parameter in zip(spare, model.parameters(), strict=True):
            target.copy_(parameter.detach())

    def switch() -> None:
        switcher.switch("b" if switcher.active == "a" else "a")

    def verify() -> None:
        switcher.switch("a")
        switcher.switch("b")
        deltas["b"].apply(plain)
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        expect(all(same(one, other) for one, other in pairs), "switch")
        deltas["b"].revert(plain)

    def nothing() -> None:
        pass

    def set_adapter() -> None:
        lora.set_adapter("second" if lora.active_adapter == "first" else "first")

    @torch.no_grad()
    def served(run: Callable[[], None], module: nn.Module) -> Tensor:
        run()
        return module(request)

    copied = Provider("copy of the model", model_copy, lambda: None, nbytes)
    return [
        [
            copied,
            Provider("TicketSwitcher.switch", switch, verify),
            Provider(f"set_adapter of LoRA, r={RANK} (PEFT)", set_adapter, nothing),
        ],
        [
            copied,
            Provider(f"switch and {TOKENS} tokens", lambda: served(switch, model), verify),
            Provider(f"set_adapter of LoRA and {TOKENS} tokens (PEFT)", lambda: served(set_adapter, lora), nothing),
            Provider(f"{TOKENS} tokens without an adapter", lambda: served(nothing, plain), nothing),
        ],
    ], switcher


def counted(op: str, model: nn.Module, switcher: ls.TicketSwitcher, **cell: object) -> list[Row]:
    """What a switch would cost a GPU: launches, and bytes of the sectors, slots and indices that it moves."""
    launches: list[str] = []
    functions = {name: getattr(entries, name) for name in ("masked_gather", "masked_scatter_", "masked_swap_")}
    for name, function in functions.items():
        setattr(entries, name, lambda *args, of=name, run=function, **out: (launches.append(of), run(*args, **out))[1])
    try:
        switcher.switch("b" if switcher.active == "a" else "a")
    finally:
        for name, function in functions.items():
            setattr(entries, name, function)
    a, b = (switcher._versions[name].sets for name in "ab")
    union = ls.Ticket(
        {n: a[n].combine(b[n], "|") for n in a}, {n: p.shape for n, p in ls.canonical_parameters(model).items()}
    )
    item = next(model.parameters()).element_size()
    moved = 2 * SECTOR * touched(model, union, SECTOR) + union.nbytes
    slots = item * (2 * union.k + union.k + 2 * sum(index_set.k for index_set in b.values()))
    return [
        value_row(op, "TicketSwitcher.switch", metric="launches", unit="launches", value=len(launches), **cell),
        value_row(op, "TicketSwitcher.switch", metric="bytes on a GPU", unit="MB", value=(moved + slots) / 1e6, **cell),
    ]


def measure(model_name: str, dtype: str, density: float, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    model = Stack(LAYERS[model_name], NAMED[dtype])
    delta = delta_of(model, density, 0)
    n, k = sum(parameter.numel() for parameter in model.parameters()), delta.ticket.k
    cell = {"n": n, "k": k, "dtype": dtype}
    print(f"{n:,} entries, {dtype}, {density:g} active")
    rows: list[Row] = []
    for providers in copies(model, delta):
        rows += time_rows(providers[1].name, providers, rounds=rounds, baseline=providers[0].name, **cell)
    for op, providers in zip(("apply", "revert"), apply_and_revert(model, delta), strict=True):
        rows += time_rows(op, providers, rounds=rounds, baseline="copy of the model", **cell)
    if is_applied(model):
        delta.revert(model)
    timed, switcher = switches(model, density)
    for op, providers in zip(("switch", "request"), timed, strict=True):
        rows += time_rows(op, providers, rounds=rounds, baseline="copy of the model", **cell)
    return rows + counted("switch", model, switcher, **cell)


def main() -> None:
    parser = argument_parser(__doc__, "delta.csv", [0.01, 0.05, 0.128, 0.2], dtypes=tuple(NAMED))
    parser.set_defaults(models=["base"], dtypes=["bfloat16"])
    args = parse(parser)
    for model in args.models:
        for dtype in args.dtypes:
            for density in args.densities:
                write_csv(args.out, measure(model, dtype, density, args.rounds))


if __name__ == "__main__":
    main()
