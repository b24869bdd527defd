"""The whole job on generated data with mini-xlmr: select a ticket, train LTP and its controls, write a report."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

from ltp_sparse.backends import available_backends
from ltp_sparse.methods import LTP, PromptMethod, PromptOnly, PromptSettings, RandomTicket, SoftPrompt
from ltp_sparse.models.backbone import load_backbone
from ltp_sparse.prompting import CLASSES, Verbalizer
from ltp_sparse.recipes import results
from ltp_sparse.report.escaping import Sheet
from ltp_sparse.report.plots import plot_accuracy, plot_ticket
from ltp_sparse.report.tables import Table, make_table, markdown
from ltp_sparse.selection.ltp import find_ticket
from ltp_sparse.tasks.generated.inference import pairs, sentences
from ltp_sparse.tasks.generated.languages import LANGUAGES
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.evaluation import evaluate, largest_class, result_row
from ltp_sparse.training.method import Trained, train_method
from ltp_sparse.training.mlm import MLMSettings, tune_mlm
from ltp_sparse.weights.files import write_text
from ltp_sparse.weights.locating import MINI_XLMR
from ltp_sparse.weights.names import canonical_parameters
from ltp_sparse.weights.tensors import bits

WORDS = {"entailment": "yes", "contradiction": "no", "neutral": "perhaps"}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults take about two minutes on two cores.

    Attributes:
        sentences: sentences of text for stage 1.
        shots: English examples per class for training, and as many for dev.
        test: test examples per language.
        density: share of the maskable weights in the ticket.
        seeds: seeds of stage 2; the table has means over them.
        prompt: settings of all methods.
        prompt_only_learning_rate: its learning rate; a prompt alone needs a larger one.
    """

    sentences: int = 2000
    shots: int = 32
    test: int = 300
    density: float = 0.2
    seeds: tuple[int, ...] = (1, 2)
    prompt: PromptSettings = PromptSettings(learning_rate=1e-3, epochs=10, max_length=64, encoder="mlp")
    prompt_only_learning_rate: float = 5e-3


def demo(output: Path, settings: DemoSettings | None = None, *, progress: bool = True, report_to: str = "none") -> str:
    """Runs everything and writes the report.

    Args:
        output: the folder of the report.
        settings: sizes; default: those of two minutes.
        progress: bars on the screen.
        report_to: where training logs to, as in transformers; what it leaves on disk is in `output`/runs.

    Returns:
        The text of the report.
    """
    settings = settings or DemoSettings()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for such a small model threads cost more than they gain
    try:
        return _demo(output, settings, progress, report_to)
    finally:
        torch.set_num_threads(threads)


def _demo(output: Path, settings: DemoSettings, progress: bool, report_to: str) -> str:
    start = time.perf_counter()
    if hint := gpu_hint():
        print(hint)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.jsonl").unlink(missing_ok=True)

    logs = None if report_to == "none" else output / "runs"
    _say(f"1. Stage 1: tune mini-xlmr on English text, keep the {settings.density:.0%} of its weights that moved most")
    model, tokenizer = load_backbone(MINI_XLMR, decoupled=True)
    tuned = tune_mlm(
        model,
        tokenizer,
        sentences(settings.sentences, "en"),
        MLMSettings(epochs=1, learning_rate=5e-4, length=32, eval_steps=50),
        output_dir=None if logs is None else logs / "stage-1",
        progress=progress,
        report_to=report_to,
    )
    ticket = find_ticket(tuned.initial, tuned.model, density=settings.density, metadata=tuned.metadata)
    ticket.save(output / "ticket.safetensors")
    plot_ticket(ticket, output / "ticket.png")
    tuned.reset()
    print(ticket)

    _say(f"2. Stage 2: prompt-learning on {settings.shots} English examples per class, then all languages zero-shot")
    shared = settings.prompt
    methods: list[tuple[PromptMethod, Ticket | None]] = [
        (LTP(settings=shared), ticket),
        (RandomTicket(settings=shared, match="layers"), ticket),
        (SoftPrompt(settings=shared), None),
        (PromptOnly(settings=replace(shared, learning_rate=settings.prompt_only_learning_rate)), None),
    ]
    rows: list[dict[str, Any]] = []
    costs = {}
    options = {"progress": progress, "arguments": {"report_to": report_to}}
    for method, given in methods:
        of_method, costs[method.name] = _run_method(method, given, settings, logs, options)
        rows += of_method
    for row in rows:
        results.append(output / results.RESULTS, row)

    table = make_table(rows, ("method", "shots"))
    report = _report(table, costs, ticket, model, settings, time.perf_counter() - start)
    write_text(output / "report.md", report)
    plot_accuracy(
        table.means(),
        output / "accuracy.png",
        errors=table.deviations(),
        chance=1 / 3,
        title=f"zero-shot accuracy, {settings.shots} English examples per class; whiskers: standard deviation over "
        f"{len(settings.seeds)} seeds",
    )
    return report


def gpu_hint() -> str | None:
    """A note on missing kernels for this machine's GPU, with reasons; None without a GPU or if none is missing."""
    if not torch.cuda.is_available():
        return None
    missing = [
        f"{name}: {status}"
        for name, status in available_backends(torch.device("cuda")).items()
        if name != "reference" and status != "ok"
    ]
    return f"note: of the kernels for this GPU some are missing ({'; '.join(missing)})" if missing else None


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _run_method(
    method: PromptMethod, ticket: Ticket | None, settings: DemoSettings, logs: Path | None, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Result rows over seeds, and the costs of the last seed."""
    train, dev = (pairs(3 * settings.shots, split, "en") for split in ("train", "dev"))
    tests = {language: pairs(settings.test, "test", language) for language in LANGUAGES}
    rows = []
    for seed in settings.seeds:
        model, tokenizer = load_backbone(MINI_XLMR, decoupled=not isinstance(method, SoftPrompt))
        before = {name: p.detach().clone() for name, p in canonical_parameters(model).items()}
        result = train_method(
            method,
            model,
            tokenizer,
            train,
            dev,
            ticket=ticket,
            verbalizer=new_words(tokenizer),
            seed=seed,
            output_dir=None if logs is None else logs / f"{method.name}-{seed}",
            **options,
        )
        accuracies = evaluate(result, tests, labels=CLASSES, progress=False)
        facts = {"method": method.name, "shots": settings.shots, "seed": seed, "largest_class": largest_class(tests)}
        rows.append(result_row(accuracies, **facts))
        print(f"{method.name}, seed {seed}: {rows[-1]['mean']:.1%} over {len(tests)} languages", flush=True)
    return rows, _costs(result, model, before)


def new_words(tokenizer: PreTrainedTokenizerBase) -> Verbalizer:
    """The verbalizer of the demo: words that mini-xlmr knows from text but has never seen as answers."""
    return Verbalizer.from_words(tokenizer, WORDS, strict=True)


def _costs(result: Trained, model: XLMRobertaForMaskedLM, before: dict[str, torch.Tensor]) -> list[str]:
    """Cells of the report: trained weights, optimizer state, frozen weights, and those of them whose bits changed."""
    frozen = changed = trained = 0
    for name, parameter in canonical_parameters(model).items():
        moved = bits(parameter) != bits(before[name])
        if (index_set := result.delta.ticket.sets.get(name)) is not None:
            moved &= ~index_set.mask().view(parameter.shape)
            trained += index_set.k
        changed += int(moved.sum())
        frozen += parameter.numel()
    state, dense = result.optimizer_bytes, 8 * _encoder_size(model)
    return [f"{trained:,}", f"{state:,}", f"{state / dense:.1%}", f"{frozen - trained:,}", str(changed)]


def _encoder_size(model: XLMRobertaForMaskedLM) -> int:
    return sum(p.numel() for p in model.roberta.parameters())


def _report(
    table: Table,
    costs: dict[str, list[str]],
    ticket: Ticket,
    model: XLMRobertaForMaskedLM,
    settings: DemoSettings,
    seconds: float,
) -> str:
    size = _encoder_size(model)
    head = ("method", "weights trained", "optimizer state, bytes", "of dense AdamW's", "frozen weights")
    rows = [[*head, "of them changed"], *([name, *cells] for name, cells in costs.items())]
    parts = [[place, f"{k:,}", f"{n:,}", f"{k / n:.1%}"] for place, (k, n) in ticket.counts("layer").items()]
    lines = [
        "# ltp_sparse demo",
        "",
        f"mini-xlmr, {size:,} parameters (encoder); {settings.shots} "
        f"English training examples per class, {settings.test} test examples per language, "
        f"seeds {', '.join(map(str, settings.seeds))}, {seconds:.0f} s in all. Chance is 33.33 %.",
        "",
        "## Accuracy per language (zero-shot from English, %)",
        "",
        markdown(table, bold=False),
        "LTP trains the ticket and a prompt; `random ticket` as many random weights in each tensor; SP all weights;",
        "PT-frozen the prompt alone. In pre-training mini-xlmr answered such questions in all these languages, with",
        f"other words. The label words {', '.join(WORDS.values())} are new and seen with English examples only:",
        "the table shows how well they transfer to the other languages. (With the words of pre-training,",
        f"{', '.join(LANGUAGES['en'].answers.values())}, everything is near 100 % at once.) All seeds share one draw",
        "of examples, too little to rank methods: docs/evidence-small-models.md has five draws.",
        "",
        "## Cost and frozen weights",
        "",
        Sheet(rows, [False] + [True] * 5).markdown(),
        f"Dense AdamW over the encoder holds {8 * size:,} bytes. The states above include that of the prompt encoder "
        "(8 bytes per parameter). Frozen weights are compared bit for bit with their values before training.",
        "",
        "## Where the active entries are",
        "",
        f"{ticket}",
        "",
        Sheet([["part", "active", "of", "density"], *parts], [False] + [True] * 3).markdown(),
        "![accuracy per language](accuracy.png)",
        "![share of active entries per layer](ticket.png)",
        "",
    ]
    return "\n".join(lines)
