"""One training step of stage 2 (a prompt and a ticket) and of stage 1 (masked language modelling), in full size.

    python benchmarks/bench_train_step.py                              # CPU: XLM-R-base, 4 x 128 tokens
    python benchmarks/bench_train_step.py --batch 32 --length 256      # GPU
    python benchmarks/bench_train_step.py --model large --bf16

Random weights and tokens. Every setting runs in a separate process. Memory is the peak beyond the imports, weights
included: allocated bytes on a GPU, resident bytes on a CPU. Times are medians over the steps after the first;
"compaction" is part of backward if gradients are packed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, environment, peak_memory
from torch import Tensor, nn
from torch.nn import functional as F

from ltp_sparse.prompting.inputs import IGNORED_LABEL
from ltp_sparse.weights.files import atomic_path, check_writable
from ltp_sparse.weights.locating import SIZES as XLMR

SIZES = {"base": XLMR["xlm-roberta-base"], "large": XLMR["xlm-roberta-large"], "tiny": (32, 2, 4, 64)}
DENSITY = 0.2
WORDS = (7, 9, 11)
MASK = 4

Step = Callable[[], dict[str, float]]


def language_model(size: str, *, decoupled: bool) -> Any:
    """XLM-R with random weights; the tiny one is for tests."""
    from transformers import XLMRobertaConfig

    from ltp_sparse.models.backbone import backbone_from_config

    hidden, layers, heads, inner = SIZES[size]
    config = XLMRobertaConfig(
        vocab_size=250002 if size != "tiny" else 500, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=inner, max_position_embeddings=514, type_vocab_size=1,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return backbone_from_config(config, decoupled=decoupled)


class Bench:
    """Model, batch and clock of one setting."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)

    def batch(self, vocabulary: int) -> Tensor:
        return torch.randint(12, vocabulary - 1, (self.args.batch, self.args.length), device=self.device)

    def timed(self, forward: Callable[[], Tensor], update: Callable[[], None]) -> Step:
        def step() -> dict[str, float]:
            start = self.now()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.args.bf16):
                loss = forward()
            middle = self.now()
            loss.backward()
            after = self.now()
            update()
            return {"forward": middle - start, "backward": after - middle, "step": self.now() - after}

        return step

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def prompted(bench: Bench, *, decoupled: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """Model and batch of stage 2; decoupled: with a copy of the whole output embedding instead of the words' rows."""
    from ltp_sparse.models.masked_prompt import PromptedMaskedLM
    from ltp_sparse.models.prompt_encoder import PromptEncoder
    from ltp_sparse.prompting import Verbalizer

    model = language_model(bench.args.model, decoupled=decoupled)
    encoder, words = PromptEncoder(4, model.config.hidden_size), Verbalizer(tuple((word,) for word in WORDS))
    whole = PromptedMaskedLM(model, encoder, words, frozen_words=not decoupled).to(bench.device).train()
    ids, rows = bench.batch(model.config.vocab_size), bench.args.batch
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "prompt_positions": torch.arange(8, 12, device=bench.device).expand(rows, 4),
        "mask_positions": torch.full((rows,), 12, device=bench.device),
    }
    return whole, batch


def stage_2_ours(bench: Bench, **options: Any) -> Step:
    import ltp_sparse as ls
    from ltp_sparse.selection import pools

    model, batch = prompted(bench, decoupled=False)
    ticket = ls.Ticket.random(model, density=DENSITY, seed=0, pool=pools.maskable)
    opt = ls.MaskedAdamW(
        model, ticket, lr=2e-5, dense=model.prompt_encoder.parameters(), max_grad_norm=1.0, freeze=True, **options
    )
    labels = torch.arange(bench.args.batch, device=bench.device) % 3

    def update() -> None:
        opt.step()
        opt.zero_grad()

    return bench.timed(lambda: F.cross_entropy(model(**batch)["logits"], labels), update)


def stage_2_dense(bench: Bench, *, full_logits: bool, masked: bool = False) -> Step:
    """AdamW over all trainable weights; masked: gradients are multiplied by masks, as in LT-SFT."""
    import ltp_sparse as ls
    from ltp_sparse.selection import pools

    model, batch = prompted(bench)
    masks = {}
    if masked:
        ticket = ls.Ticket.random(model, density=DENSITY, seed=0, pool=pools.maskable)
        masks = {name: ticket.mask(name).to(bench.device) for name in ticket.names}
    parameters = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, fused=True)
    labels = torch.arange(bench.args.batch, device=bench.device) % 3
    names = ls.canonical_parameters(model)

    def forward() -> Tensor:
        if not full_logits:
            return F.cross_entropy(model(**batch)["logits"], labels)
        hidden = model.roberta(
            inputs_embeds=model._embed(batch["input_ids"], batch["prompt_positions"]),
            attention_mask=batch["attention_mask"],
        ).last_hidden_state
        logits = model.lm_head(hidden)[:, 12, list(WORDS)]
        return F.cross_entropy(logits.float(), labels)

    def update() -> None:
        for name, mask in masks.items():
            if names[name].grad is not None:
                names[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        opt.zero_grad()

    return bench.timed(forward, update)


def stage_2_lora(bench: Bench) -> Step:
    from peft import LoraConfig, inject_adapter_in_model

    model, batch = prompted(bench)
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["query", "value"]), model)
    model.prompt_encoder.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, fused=True)
    labels = torch.arange(bench.args.batch, device=bench.device) % 3

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        opt.zero_grad()

    return bench.timed(lambda: F.cross_entropy(model(**batch)["logits"], labels), update)


def masked_batch(bench: Bench, vocabulary: int) -> tuple[Tensor, Tensor]:
    ids = bench.batch(vocabulary)
    chosen = torch.rand(ids.shape, device=bench.device) < 0.15
    return ids.masked_fill(chosen, vocabulary - 1), ids.masked_fill(~chosen, IGNORED_LABEL)


def stage_1_ours(bench: Bench) -> Step:
    """All weights but LayerNorms train, with the pull; logits at masked positions only, some at a time."""
    import ltp_sparse as ls
    from ltp_sparse.models.masked_losses import masked_token_loss, token_losses
    from ltp_sparse.selection import pools

    model = language_model(bench.args.model, decoupled=True).to(bench.device).train()
    ids, labels = masked_batch(bench, model.config.vocab_size)
    pull = 0.1 / sum(p.numel() for p in model.parameters())
    opt = ls.MaskedAdamW(
        model, ls.Ticket.full(model, pool=pools.maskable), lr=5e-5, max_grad_norm=1.0, pull=pull, freeze=True
    )

    def forward() -> Tensor:
        with token_losses(model, labels):
            return masked_token_loss(model(input_ids=ids, attention_mask=torch.ones_like(ids)), labels)

    def update() -> None:
        opt.step()
        opt.zero_grad()

    return bench.timed(forward, update)


def stage_1_dense(bench: Bench) -> Step:
    """Logits at every position, a copy of the initial weights, the L1 pull in the loss, AdamW over all weights."""
    model = language_model(bench.args.model, decoupled=True).to(bench.device).train()
    ids, labels = masked_batch(bench, model.config.vocab_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    initial = [p.detach().clone() for p in parameters]
    opt = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0, fused=True)
    count = sum(p.numel() for p in model.parameters())

    def forward() -> Tensor:
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        pull = torch.stack([(p - start).abs().sum() for p, start in zip(parameters, initial, strict=True)]).sum()
        return loss + 0.1 * pull / count

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        opt.zero_grad()

    return bench.timed(forward, update)


SETTINGS: dict[str, dict[str, Callable[[Bench], Step]]] = {
    "stage 2": {
        "ours, packed gradients": lambda bench: stage_2_ours(bench, gradients="packed"),
        "ours, packed gradients, 8-bit states": lambda bench: stage_2_ours(bench, gradients="packed", states="8bit"),
        "ours, dense gradients": lambda bench: stage_2_ours(bench),
        "full logits, dense gradients, fused AdamW": lambda bench: stage_2_dense(bench, full_logits=True),
        "small logits, dense gradients, fused AdamW": lambda bench: stage_2_dense(bench, full_logits=False),
        "LT-SFT: gradients times mask, fused AdamW": lambda b: stage_2_dense(b, full_logits=False, masked=True),
        "LoRA (peft, r=8 on query and value)": stage_2_lora,
    },
    "stage 1": {
        "ours": stage_1_ours,
        "full logits, second copy, fused AdamW": stage_1_dense,
    },
}


def measure(args: argparse.Namespace) -> None:
    """One setting, in this process: prints a JSON line."""
    import ltp_sparse.training.mlm  # noqa: F401  imported before memory is measured

    bench, seconds = Bench(args), []
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def run() -> Step:
        step = SETTINGS[args.stage][args.setting](bench)
        seconds.extend(step() for _ in range(args.steps + 1))
        return step

    resident = peak_memory(run)
    peak = torch.cuda.max_memory_allocated() if bench.device == "cuda" else resident
    medians = {part: statistics.median(s[part] for s in seconds[1:]) for part in seconds[0]}
    print(json.dumps({"peak": peak, **medians}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--length", type=int, default=256 if on_gpu else 128)
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / ("gpu" if on_gpu else "cpu") / "train_step.csv")
    parser.add_argument("--stage", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.setting:
        measure(args)
        return
    check_writable(args.out)
    rows: list[dict[str, Any]] = []
    for stage, settings in SETTINGS.items():
        print(f"\n{stage}: XLM-R-{args.model}, {args.batch} x {args.length} tokens, 20 % active", flush=True)
        for setting in settings:
            if "peft" in setting and importlib.util.find_spec("peft") is None:
                print(f"  {setting}: skipped, peft is not installed")
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, "--setting", setting]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"  {setting}: {done.stderr.strip().splitlines()[-1]}")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            total = found["forward"] + found["backward"] + found["step"]
            speed = args.batch * args.length / total
            rows.append({"stage": stage, "setting": setting, "model": args.model, "batch": args.batch,
                         "length": args.length, "bf16": args.bf16, **found, "tokens_per_second": speed})  # fmt: skip
            write(args.out, rows)
            print(
                f"  {setting:<46}{found['peak'] / 1e9:>7.2f} GB {speed:>9.0f} tokens/s   forward {found['forward']:.3f}"
                f"  backward {found['backward']:.3f}  step {found['step']:.3f} s",
                flush=True,
            )
    print(f"wrote {args.out}")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes all rows so far, to keep those of an interrupted run."""
    where = environment()
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**cells, **where})


if __name__ == "__main__":
    main()
