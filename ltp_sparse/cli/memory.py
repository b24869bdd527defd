"""`ltp-sparse memory`: what prompt-learning takes, beside other ways to train."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltp_sparse.cli.options import CommandError, at_least_one, need, share

HELP = "predict the memory of training a ticket beside full fine-tuning, LT-SFT, LoRA and FlashAdamW; takes none"
EXAMPLES = """\
  ltp-sparse memory --model xlm-roberta-base --density 0.2
  ltp-sparse memory --model xlm-roberta-large --density 0.05 --dtype bfloat16 --batch 32 --length 256"""

SIZES = {"xlm-roberta-base": (768, 12, 12, 3072), "xlm-roberta-large": (1024, 24, 16, 4096)}
"""Hidden size, layers, heads and inner size of models that need no download."""

_LORA_RANK = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"{', '.join(SIZES)}, a folder with a config, or a Hub name")
    parser.add_argument("--density", type=share, default=0.2, help="share of the maskable weights (default: 0.2)")
    parser.add_argument("--batch", type=at_least_one, default=32, help="examples per forward pass (default: 32)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default: 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")


def run(options: argparse.Namespace) -> None:
    need(options, "model")
    from ltp_sparse.training.backbone import longest_input

    config = _config(options.model)
    longest = longest_input(config)
    if not 1 <= options.length <= longest:
        raise CommandError(f"memory: --length must be in [1, {longest}] for {options.model}, got {options.length}")
    rows = table(config, options.density, options.batch, options.length, options.dtype)
    print(f"{options.model}, {options.density:.2%} of the maskable weights active, {options.dtype} weights,")
    print(f"prompt-learning on batches of {options.batch} x {options.length} tokens; in GB\n")
    columns = ("weights", "gradients", "states", "index", "held", "peak")
    print(f"{'':<46}" + "".join(f"{column:>11}" for column in columns))
    for name, report in rows.items():
        parts = (report.weights, report.gradients, report.states, report.index, report.held, report.total)
        print(f"{name:<46}" + "".join(f"{part / 1e9:>11.3f}" for part in parts))
    print("\nheld: between backward and step. peak: with activations and logits, in forward and backward.")


def table(config: Any, density: float, batch: int, length: int, dtype: str) -> dict[str, Any]:
    """Way to train -> `MemoryReport`, for prompt-learning with four prompt embeddings and a BiLSTM encoder."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ltp_sparse.memory import MemoryReport, memory_report
    from ltp_sparse.names import canonical_parameters
    from ltp_sparse.selection import pools

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model, loss, all_logits = _prompted(config, batch, length)
            encoder = list(model.prompt_encoder.parameters())
            named = canonical_parameters(model)
            everything = [p for p in named.values() if p.is_floating_point()]
            n, size = sum(p.numel() for p in everything), everything[0].element_size()
            rows = {}
            for name, forward in (
                ("full fine-tuning, AdamW, all logits", all_logits),
                ("full fine-tuning, AdamW", loss),
            ):
                report = memory_report(model, 0.0, dense=everything, loss=forward, gradients="dense", master=False)
                # torch's AdamW keeps moments in the dtype of the weights
                rows[name] = adamw = replace(report, states=2 * size * n, index=0)
            rows["LT-SFT: dense gradients and states, a mask"] = MemoryReport(
                adamw.weights, adamw.states, n, adamw.gradients, adamw.passing
            )
            rows["FlashAdamW (7 bytes a parameter)"] = MemoryReport(
                2 * n, 3 * n, 0, 2 * n, adamw.passing - (size - 2) * n if size > 2 else adamw.passing
            )
            for name, parameter in named.items():
                parameter.requires_grad_(pools.maskable(name) or any(parameter is p for p in encoder))
            for states in ("float32", "8bit"):
                name = f"ticket, packed gradients, {states} states"
                rows[name] = memory_report(model, density, dense=encoder, loss=loss, states=states)
            adapters = _add_lora(model)
            rows[f"LoRA, rank {_LORA_RANK} on query and value"] = memory_report(
                model, 0.0, dense=[*encoder, *adapters], loss=loss, gradients="dense", master=False
            )
    finally:
        torch.set_default_dtype(before)
    return rows


def _prompted(config: Any, batch: int, length: int) -> tuple[Any, Any, Any]:
    """A prompted model of fake tensors; its loss from the label words alone, and from all logits of the vocabulary."""
    import torch
    from torch.nn import functional as F
    from transformers import XLMRobertaForMaskedLM

    from ltp_sparse.prompting import PromptedMaskedLM, PromptEncoder, Verbalizer

    words, n_prompt = (5, 6, 7), 4
    encoder = PromptEncoder(n_prompt, config.hidden_size)
    verbalizer = Verbalizer(tuple((word,) for word in words))
    model = PromptedMaskedLM(XLMRobertaForMaskedLM(config), encoder, verbalizer, frozen_words=True).train()
    ids = torch.zeros(batch, length, dtype=torch.long)
    mask, labels = torch.ones_like(ids), torch.zeros(batch, dtype=torch.long)
    positions, at = torch.zeros(batch, n_prompt, dtype=torch.long), torch.zeros(batch, dtype=torch.long)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(ids, mask, positions, at)["logits"], labels)

    def all_logits() -> torch.Tensor:
        hidden = model.roberta(inputs_embeds=model._embed(ids, positions), attention_mask=mask).last_hidden_state
        return F.cross_entropy(model.lm_head(hidden)[:, 0, list(words)].float(), labels)

    return model, loss, all_logits


def _add_lora(model: Any) -> list[Any]:
    """Low-rank updates beside the query and value projections; their parameters."""
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
    from transformers import AutoConfig, XLMRobertaConfig

    from ltp_sparse.training.backbone import locate

    size = SIZES.get(name.rpartition("/")[2])
    if size is not None and not Path(name).is_dir():
        hidden, layers, heads, inner = size
        return XLMRobertaConfig(
            vocab_size=250002, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=inner, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
        )  # fmt: skip
    try:
        source, local = locate(name)
        config = AutoConfig.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError) as error:
        known = ", ".join(SIZES)
        raise CommandError(
            f"memory: no config of an XLM-R model in {name!r}; give {known}, a folder with config.json, or a Hub name"
        ) from error
    if config.model_type != "xlm-roberta":
        raise CommandError(f"memory: expected a model of type 'xlm-roberta', {name!r} is of type {config.model_type!r}")
    return config
