"""Both stages of LTP on XLM-R-base in full size with random weights: counts, bytes, memory (about 14 GB), seconds.

    python examples/full_size.py --data DATA --output full-size.md

`--data` holds `tokenizers/xlm_roberta_base`, `wikipedia_en/wikitext-2` and `xnli_fewshot`.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from random_xlmr import random_xlmr
from transformers import AutoTokenizer

from ltp_sparse.methods import LTP, PromptSettings
from ltp_sparse.models.backbone import decouple
from ltp_sparse.selection import pools
from ltp_sparse.selection.ltp import find_ticket
from ltp_sparse.tasks import load_pairs, read_text
from ltp_sparse.training.method import train_method
from ltp_sparse.training.mlm import MLMSettings, tune_mlm
from ltp_sparse.weights.names import canonical_parameters


class Table:
    """Rows of observations, with the seconds since the last row and the peak of resident memory."""

    def __init__(self) -> None:
        self.lines = ["| what | seen | seconds | peak resident memory |", "| --- | ---: | ---: | ---: |"]
        self.at = time.perf_counter()

    def row(self, what: str, seen: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.lines.append(f"| {what} | {seen} | {time.perf_counter() - self.at:.1f} | {peak:.1f} GiB |")
        print(self.lines[-1], flush=True)
        self.at = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2, help="updates of each stage (default: 2)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    table = Table()
    tokenizer = AutoTokenizer.from_pretrained(options.data / "tokenizers" / "xlm_roberta_base")
    model = decouple(random_xlmr("base", len(tokenizer)))
    maskable = [p.numel() for name, p in canonical_parameters(model).items() if pools.maskable(name)]
    table.row("XLM-R-base, random weights: maskable entries", f"{sum(maskable):,} in {len(maskable)} tensors")

    text = read_text([options.data / "wikipedia_en" / "wikitext-2"], max_lines=400)
    settings = MLMSettings(max_steps=options.steps, batch_size=4, length=64, validation=0.02)
    with tempfile.TemporaryDirectory() as folder:
        tuned = tune_mlm(model, tokenizer, text, settings, output_dir=folder, progress=False)
    table.row(f"stage 1, {options.steps} updates of 4 x 64 tokens", f"loss {tuned.metadata['validation_loss']:.3f}")
    ticket = find_ticket(tuned.initial, tuned.model, density=0.2, metadata=tuned.metadata)
    table.row(
        "selection at 20 %: asked for, found",
        f"{ticket.metadata['requested_k']:,}, {ticket.k:,} ({ticket.nbytes:,} bytes)",
    )
    tuned.reset()
    del tuned

    train, dev = (load_pairs("xnli-fewshot", split, "en", shots=4, data=options.data) for split in ("train", "dev"))
    method = LTP(settings=PromptSettings(epochs=options.steps))
    result = train_method(method, model, tokenizer, train, dev, ticket=ticket, micro_batch_size=4, progress=False)
    dense = 8 * sum(p.numel() for p in model.roberta.parameters())
    table.row(
        f"stage 2, {options.steps} updates of 4-shot XNLI: optimizer state (dense AdamW)",
        f"{result.optimizer_bytes:,} ({dense:,}) bytes",
    )
    prompt = sum(p.numel() for p in result.model.prompt_encoder.parameters())
    table.row("of it prompt encoder", f"{8 * prompt:,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        result.delta.save(Path(folder) / "delta.safetensors")
        table.row("delta on disk", f"{(Path(folder) / 'delta.safetensors').stat().st_size:,} bytes")
    result.release()
    table.row("revert to the initial bits", "done")
    if options.output is not None:
        options.output.write_text("\n".join([*table.lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
