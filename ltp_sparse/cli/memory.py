"""`ltp-sparse memory`: the memory of either stage of LTP, or of a decoder on many GPUs, compared with other methods."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltp_sparse.cli.checks import CommandError, need, refuse
from ltp_sparse.cli.kinds import expect_model
from ltp_sparse.cli.memory_of_decoders import DTYPES, SHAPES, decoder_config, is_decoder, sharded_table
from ltp_sparse.cli.options import at_least_one, share
from ltp_sparse.weights.locating import SIZES

if TYPE_CHECKING:
    from ltp_sparse.optim.memory import MemoryReport

HELP = "predict the memory of training a ticket, compared with full fine-tuning, LT-SFT, LoRA, QLoRA and FlashAdamW"
EXAMPLES = """\
  prompt-learning with a ticket, on a GPU
    ltp-sparse memory --model xlm-roberta-base --density 0.2
    ltp-sparse memory --model xlm-roberta-large --density 0.05 --dtype bfloat16 --batch 32 --length 256
  the tuning before it that finds the ticket, on a CPU
    ltp-sparse memory --model xlm-roberta-base --stage 1 --device cpu
  a decoder, sharded over eight GPUs by FSDP2
    ltp-sparse memory --model llama-8b --ranks 8
    ltp-sparse memory --model llama-70b --ranks 8 --density 0.02 0.1 --states 8bit
    ltp-sparse memory --model path/to/config.json --ranks 4"""

_OF_XLMR = ("stage", "batch", "length", "device")
_OF_DECODERS = ("ranks", "states", "gradients", "no_master")
_KNOWN = ", ".join([*SIZES, *SHAPES])
_LORA_RANK = 8
_MASKED = 0.15  # share of the tokens that stage 1 predicts
_DESCRIPTIONS = {
    1: "masked-language-model tuning of all maskable weights",
    2: "prompt-learning with {density:.2%} of the maskable weights active",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help=f"{_KNOWN}, a folder with a config or its config.json, or a Hub name")
    add(
        "--density",
        type=share,
        nargs="+",
        help="share of active weights: one for stage 2 of an XLM-R (default: 0.2), one or several for a decoder "
        "(default: 0.01 0.05 0.2)",
    )
    add("--dtype", choices=DTYPES, help="dtype of the weights (default: float32 for an XLM-R, bfloat16 for a decoder)")
    add = parser.add_argument_group("for an XLM-R").add_argument
    add("--stage", type=int, choices=(1, 2), help="1: the tuning that finds the ticket; 2: prompt-learning (default)")
    add("--batch", type=at_least_one, help="examples per forward pass (default: 32)")
    add("--length", type=int, help="tokens per example (default: 256, or what the model has positions for)")
    add(
        "--device",
        choices=("cuda", "cpu"),
        help="where training will run; attention and dropout need less on a GPU (default: cuda; none is needed here)",
    )
    add = parser.add_argument_group("for a decoder").add_argument
    add("--ranks", type=at_least_one, help="number of GPUs over which FSDP2 shards it (default: 1)")
    add("--states", choices=("float32", "8bit"), help="precision of the ticket's moments (default: both)")
    add("--gradients", choices=("packed", "dense"), help="gradients of the ticket (default: packed)")
    add(
        "--no-master",
        action="store_true",
        help="stochastic rounding in place of a float32 master; 8-bit states always have it",
    )


def run(options: argparse.Namespace) -> None:
    need(options, "model")
    if options.model.rpartition("/")[2] not in {*SIZES, *SHAPES}:
        expect_model(options)
    config = _config(options.model)
    is_xlmr = config.model_type == "xlm-roberta"
    kind, others = ("an XLM-R", _OF_DECODERS) if is_xlmr else ("decoders", _OF_XLMR)
    refuse(options, *others, why=f"is not for {kind} such as {options.model}; leave it out")
    (_print_stage if is_xlmr else _print_sharded)(options, config)


def _print_sharded(options: argparse.Namespace, config: Any) -> None:
    densities, ranks = options.density or (0.01, 0.05, 0.2), options.ranks or 1
    rows = sharded_table(
        config,
        densities=densities,
        ranks=ranks,
        states=("float32", "8bit") if options.states is None else (options.states,),
        gradients=options.gradients or "packed",
        master=not options.no_master,
        dtype=options.dtype or "bfloat16",
    )
    where = "one GPU" if ranks == 1 else f"each of {ranks} GPUs, sharded by rows (FSDP2)"
    print(f"{options.model} on {where}; in GB\n")
    _print_rows(rows, ("weights", "gradients", "states", "index", "held"))
    print("\nheld: between backward and step, without activations and parameters that FSDP2 gathers for a pass.")
    if ranks > 1 and any("8bit" in name for name in rows):
        print("8bit: MaskedAdamW needs parameters that are not cut, or cut at multiples of 65,536 entries.")


def _print_stage(options: argparse.Namespace, config: Any) -> None:
    from ltp_sparse.models.backbone import longest_input

    longest = longest_input(config)
    length = min(256, longest) if options.length is None else options.length
    stage, batch = options.stage or 2, options.batch or 32
    device, dtype = options.device or "cuda", options.dtype or "float32"
    (density, *more) = options.density or (0.2,)
    if more:
        raise CommandError(f"expected one --density for an XLM-R, got {len(more) + 1}; several are for decoders")
    if not 1 <= length <= longest:
        raise CommandError(f"--length must be in [1, {longest}] for {options.model}, got {length}")
    rows = table(config, stage, density=density, batch=batch, length=length, dtype=dtype, device=device)
    print(f"{options.model}, {dtype} weights, on {'a CPU' if device == 'cpu' else 'a GPU'};")
    print(_DESCRIPTIONS[stage].format(density=density), end=" ")
    print(f"on batches of {batch} x {length} tokens; in GB\n")
    _print_rows(rows, ("weights", "gradients", "states", "index", "held", "peak"))
    print("\nheld: between backward and step. peak: with activations and logits, in forward and backward.")


def _print_rows(rows: dict[str, MemoryReport], columns: tuple[str, ...]) -> None:
    print(f"{'':<48}" + "".join(f"{column:>11}" for column in columns))
    for name, report in rows.items():
        parts = (report.total if column == "peak" else getattr(report, column) for column in columns)
        print(f"{name:<48}" + "".join(f"{part / 1e9:>11.3f}" for part in parts))


def table(
    config: Any, stage: int, *, density: float, batch: int, length: int, dtype: str, device: str
) -> dict[str, MemoryReport]:
    """Method -> its memory.

    Stage 1 tunes all maskable weights and the LM head on masked tokens, with a pull to the initial weights. Stage 2 is
    prompt-learning with four prompt embeddings and a BiLSTM encoder.

    Args:
        config: the configuration of an XLM-R.
        stage: 1 or 2.
        density: share of the maskable weights that is active, in stage 2.
        batch: examples per forward pass.
        length: tokens per example.
        dtype: dtype of the weights.
        device: "cuda" or "cpu", where training will run.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            if stage == 1:
                return _tuning(config, batch, length, device)
            return _prompt_learning(config, density, batch, length, device)
    finally:
        torch.set_default_dtype(before)


def _tuning(config: Any, batch: int, length: int, device: str) -> dict[str, MemoryReport]:
    import torch
    from transformers import XLMRobertaForMaskedLM

    from ltp_sparse.models.backbone import decouple
    from ltp_sparse.models.masked_losses import losses_at
    from ltp_sparse.optim.memory import memory_report
    from ltp_sparse.selection import pools
    from ltp_sparse.weights.names import canonical_parameters

    model = decouple(XLMRobertaForMaskedLM(config)).train()
    named = canonical_parameters(model)
    ids = torch.zeros(batch, length, dtype=torch.long, device="cpu")
    mask = torch.ones_like(ids)
    masked = torch.arange(max(1, int(_MASKED * ids.numel())), dtype=torch.int64, device="cpu")
    trained = [p for p in named.values() if p.requires_grad]
    n, size = sum(p.numel() for p in trained), trained[0].element_size()

    def loss() -> torch.Tensor:
        with losses_at(model, masked, ids.view(-1)[masked]):
            return model(input_ids=ids, attention_mask=mask).logits.sum()

    def pulled(forward: Any) -> Any:
        initial = [p.detach().clone() for p in trained]
        return lambda: forward() + sum((p - start).abs().sum() for p, start in zip(trained, initial, strict=True))

    def all_logits() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=ids).loss

    rows = {}
    for name, forward in (("all logits", all_logits), ("masked logits", loss)):
        report = memory_report(
            model, 0.0, dense=trained, loss=pulled(forward), gradients="dense", master=False, device=device
        )
        # moments in the dtype of the weights, as torch's AdamW keeps them, and the initial weights
        rows[f"AdamW, a copy of the weights, {name}"] = replace(report, states=3 * size * n, index=0)
    head = [p for name, p in named.items() if name.startswith("lm_head.") and p.requires_grad]
    for name, parameter in named.items():
        parameter.requires_grad_(pools.maskable(name) or any(parameter is p for p in head))
    where = "device" if device == "cpu" else "host"
    ours = partial(memory_report, model, 1.0, dense=head, gradients="dense", pull_on=where, device=device)
    rows["ours, float32 states"] = report = ours(loss=loss)
    rows["ours, 8bit states"] = replace(report, states=ours(states="8bit").states)
    return rows


def _prompt_learning(config: Any, density: float, batch: int, length: int, device: str) -> dict[str, MemoryReport]:
    from ltp_sparse.optim.memory import MemoryReport, memory_report
    from ltp_sparse.selection import pools
    from ltp_sparse.weights.names import canonical_parameters

    model, loss, all_logits = _prompted(config, batch, length)
    encoder = list(model.prompt_encoder.parameters())
    named = canonical_parameters(model)
    everything = [p for p in named.values() if p.is_floating_point()]
    n, size = sum(p.numel() for p in everything), everything[0].element_size()
    dense = partial(memory_report, model, 0.0, gradients="dense", master=False, device=device)
    rows = {}
    for name, forward in (("full fine-tuning, AdamW, all logits", all_logits), ("full fine-tuning, AdamW", loss)):
        # torch's AdamW keeps moments in the dtype of the weights
        rows[name] = adamw = replace(dense(dense=everything, loss=forward), states=2 * size * n, index=0)
    rows["LT-SFT: dense gradients and states, a mask"] = replace(adamw, index=n)
    rows["FlashAdamW (7 bytes a parameter)"] = MemoryReport(2 * n, 3 * n, 0, 2 * n, adamw.passing - (size - 2) * n)
    for name, parameter in named.items():
        parameter.requires_grad_(pools.maskable(name) or any(parameter is p for p in encoder))
    ticket = partial(memory_report, model, density, dense=encoder, device=device)
    rows["ticket, packed gradients, float32 states"] = report = ticket(loss=loss)
    rows["ticket, packed gradients, 8bit states"] = replace(report, states=ticket(states="8bit").states)
    adapters = _add_lora(model)
    rows[f"LoRA, rank {_LORA_RANK} on query and value"] = dense(dense=[*encoder, *adapters], loss=loss)
    return rows


def _prompted(config: Any, batch: int, length: int) -> tuple[Any, Any, Any]:
    """(prompted model of fake tensors, loss from label words only, loss from the logits of the whole vocabulary)."""
    import torch
    from torch.nn import functional as F
    from transformers import XLMRobertaForMaskedLM

    from ltp_sparse.models.masked_prompt import PromptedMaskedLM
    from ltp_sparse.models.prompt_encoder import PromptEncoder
    from ltp_sparse.prompting import Verbalizer

    words, n_prompt = (5, 6, 7), 4
    encoder = PromptEncoder(n_prompt, config.hidden_size)
    verbalizer = Verbalizer(tuple((word,) for word in words))
    model = PromptedMaskedLM(XLMRobertaForMaskedLM(config), encoder, verbalizer, frozen_words=True).train()
    zeros = partial(torch.zeros, dtype=torch.long, device="cpu")
    ids, positions, at, labels = zeros(batch, length), zeros(batch, n_prompt), zeros(batch), zeros(batch)
    mask = torch.ones_like(ids)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(ids, mask, positions, at)["logits"], labels)

    def all_logits() -> torch.Tensor:
        hidden = model.roberta(inputs_embeds=model._embed(ids, positions), attention_mask=mask).last_hidden_state
        return F.cross_entropy(model.lm_head(hidden)[:, 0, list(words)].float(), labels)

    return model, loss, all_logits


def _add_lora(model: Any) -> list[Any]:
    """Adds low-rank updates to the query and value projections and returns their parameters."""
    from torch import nn

    parameters: list[Any] = []
    for name, module in list(model.named_modules()):
        if name.endswith((".query", ".value")):
            down = nn.Linear(module.in_features, _LORA_RANK, bias=False)
            module.lora = nn.Sequential(down, nn.Linear(_LORA_RANK, module.out_features, bias=False))
            module.register_forward_hook(lambda m, inputs, output: output + m.lora(inputs[0]))
            parameters += module.lora.parameters()
    return parameters


def _config(name: str) -> Any:
    from transformers import AutoConfig

    from ltp_sparse.models.backbone import load_config

    path = Path(name)
    if path.name in SHAPES and not path.exists():
        return decoder_config(path.name)
    try:
        config = AutoConfig.from_pretrained(name) if path.is_file() else load_config("memory", name)
    except (OSError, ValueError) as error:
        raise CommandError(f"no config in {name!r}; pass {_KNOWN}, a config.json, its folder, or a Hub name") from error
    if config.model_type != "xlm-roberta" and not is_decoder(config):
        raise CommandError(
            f"expected an XLM-R or a causal language model, but {name!r} is of type {config.model_type!r}"
        )
    return config
