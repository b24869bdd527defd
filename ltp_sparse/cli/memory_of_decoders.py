"""The table of `ltp-sparse memory` for decoders whose weights FSDP2 shards: a ticket, dense AdamW, LoRA and QLoRA.

Counted from shapes, on a model without memory. The other ways to train are arithmetic: torch's AdamW keeps moments in
the dtype of the weights, peft keeps adapters in float32, bitsandbytes keeps linear layers in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ltp_sparse.optim.memory import MemoryReport

DTYPES = ("float32", "bfloat16")
SHAPES = {  # hidden, layers, heads, heads of keys and values, inner size
    "llama-8b": (4096, 32, 32, 8, 14336),
    "llama-70b": (8192, 80, 64, 8, 28672),
}
"""Decoders of the shape of Llama 3."""

_VOCABULARY = 128256
_LORA_RANK = 16

# Bytes of NF4 weights. Scales and tables are not parameters, so every process holds all of them.
_NF4 = 0.5  # per entry
_NF4_SCALES = 1 / 64 + 4 / (64 * 256)  # per entry: a byte per 64 entries, 4 bytes per 256 of those bytes
_NF4_TABLES = 4 * (16 + 256)  # per layer: float32 values of the codes of entries and of scales


def decoder_config(name: str) -> Any:
    """The configuration of one of `SHAPES`."""
    from transformers import LlamaConfig

    hidden, layers, heads, kv_heads, inner = SHAPES[name]
    return LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=inner, tie_word_embeddings=False,
    )  # fmt: skip


def is_decoder(config: Any) -> bool:
    """Whether transformers has a causal language model for a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def sharded_table(
    config: Any,
    *,
    densities: Iterable[float],
    ranks: int,
    states: Iterable[str],
    gradients: str,
    master: bool,
    dtype: str,
) -> dict[str, MemoryReport]:
    """Way to train -> the bytes on the process that holds most.

    Args:
        config: the configuration of a causal language model.
        densities: active shares of the tickets.
        ranks: number of processes over which FSDP2 shards the model.
        states: "float32" and "8bit", for the moments of the tickets.
        gradients: "packed" or "dense", for the tickets.
        master: keep float32 masters where the moments are float32 and the weights are not.
        dtype: dtype of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ltp_sparse.optim.memory import MemoryReport, memory_report

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    rows = {}
    for density in densities:
        for moments in states:
            keeps = master and moments == "float32" and dtype != "float32"
            how = "" if dtype == "float32" else ", master" if keeps else ", stochastic"
            rows[f"ticket {100 * density:.4g} %, {gradients}, {moments} states{how}"] = memory_report(
                model, density, states=moments, gradients=gradients, master=keeps, device="cuda", ranks=ranks
            )
    for name in ("float32", "bfloat16"):
        model.to(getattr(torch, name))
        held = memory_report(model, 0.0, dense=model.parameters(), gradients="dense", master=False, ranks=ranks)
        rows[f"AdamW, all {name}"] = MemoryReport(held.weights, 2 * held.weights, 0, held.gradients)
    model.to(getattr(torch, dtype))
    rows[f"LoRA, rank {_LORA_RANK}, {dtype} weights"] = _with_adapters(model, ranks)
    rows[f"QLoRA, rank {_LORA_RANK}, nf4 weights"] = _with_adapters(model.to(torch.bfloat16), ranks, quantized=True)
    return rows


def _with_adapters(model: nn.Module, ranks: int, *, quantized: bool = False) -> MemoryReport:
    """Low-rank adapters on all linear layers except the output; quantized: the weights of these are in 4 bits."""
    from ltp_sparse.optim.memory import MemoryReport, memory_report

    layers = adapted_layers(model)
    adapters = sum(_LORA_RANK * (layer.in_features + layer.out_features) for layer in layers) / ranks
    weights = float(memory_report(model, 0.0, gradients="dense", master=False, ranks=ranks).weights)
    if quantized:
        in_full = sum(layer.weight.nbytes for layer in layers)
        entries = sum(layer.weight.numel() for layer in layers)
        weights += (entries * _NF4 - in_full) / ranks + entries * _NF4_SCALES + len(layers) * _NF4_TABLES
    return MemoryReport(round(weights + 4 * adapters), round(8 * adapters), 0, round(4 * adapters))


def adapted_layers(model: Any) -> list[nn.Linear]:
    """The layers that get adapters: all linear ones except the output."""
    from torch import nn

    output = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not output]
