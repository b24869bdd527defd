"""`ltp-sparse select`: a ticket, from MLM tuning (stage 1 of LTP) or from two checkpoints."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ltp_sparse.cli.checks import CommandError, check_starts_anew, check_writable, need, refuse, values_of
from ltp_sparse.cli.kinds import expect, expect_model, kind_of
from ltp_sparse.cli.options import add_computing, add_model, add_report_to, at_least_one, quieten, share
from ltp_sparse.tasks.files import FileFormatError, suffix_of
from ltp_sparse.tasks.own import Columns, columns_of, read_own

if TYPE_CHECKING:
    from ltp_sparse.tickets.ticket import Ticket

HELP = "select a ticket: tune a masked language model on text, or compare two checkpoints"
EXAMPLES = """\
  LTP's ticket: tune a model on English text, keep the 20 % of its weights that moved most
    ltp-sparse select --model mini-xlmr --text wiki.en.txt --density 0.2 --output en.safetensors
  the same from a Hub data set, the middle third of the layers only
    ltp-sparse select --model mini-xlmr --hub-text wikimedia/wikipedia --hub-config 20231101.en \\
        --max-lines 300000 --segment middle --output en-middle.safetensors
  two versions of any model, streamed from disk
    ltp-sparse select --initial base/ --tuned tuned/ --density 0.05 --output ticket.safetensors"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser)
    add("--text", nargs="+", type=Path, help="text files (.txt, .tsv, .jsonl, also .gz) or folders of them")
    add("--text-column", metavar="NAME", help="take --text from this column of .tsv, .csv, .jsonl or .parquet files")
    add("--hub-text", help="Hub data set to take the text from")
    add("--hub-config", help="configuration of the Hub data set")
    add("--hub-column", default="text", help="its column (default: text)")
    add("--max-lines", type=at_least_one, help="take at most this many lines, drawn with --seed")
    add("--initial", type=Path, help="instead of tuning: checkpoint of the initial weights")
    add("--tuned", type=Path, help="checkpoint of the tuned weights")
    add(
        "--allow-missing",
        nargs="*",
        metavar="EXPRESSION",
        help="leave out parameters that are in one checkpoint only and match; without an expression: any",
    )
    add(
        "--compare-in",
        choices=("bfloat16", "float16"),
        help="round both checkpoints to this dtype first; if their dtypes differ, choose the coarser one",
    )
    add("--density", type=share, default=0.2, help="share of the maskable weights (default: 0.2)")
    add("--budget", choices=("global", "layer", "tensor"), default="global", help="how the entries are divided")
    add(
        "--strategy",
        choices=("decoupled", "vanilla", "frozen_embedding"),
        help="trained embeddings: the input embedding only (decoupled, the default), both tied ones, or none",
    )
    add("--segment", choices=("lower", "middle", "upper"), help="select in one third of the layers only")
    add("--intersect", action="store_true", help="with --segment: cut the global ticket instead")
    add("--epochs", type=float, default=3.0, help="passes over the text")
    add("--max-steps", type=int, default=-1, help="stop after this many updates (default: never)")
    add("--batch-size", type=at_least_one, default=32, help="blocks or lines per update")
    add("--learning-rate", type=float, default=5e-5, help="learning rate of tuning")
    add("--length", type=at_least_one, help="tokens of a block (default: 256, or the longest input of the model)")
    add("--line-by-line", action="store_true", help="one line per example instead of packed blocks")
    add("--eval-steps", type=at_least_one, default=1000, help="updates between evaluations (default: 1000)")
    add("--states", choices=("float32", "8bit"), default="float32", help="precision of the moments")
    add("--seed", type=int, default=42, help="seed of the order of examples, the masks and the drawn lines")
    add("--run-dir", type=Path, help="folder for checkpoints; needed for --save-every and --resume")
    add("--save-every", type=at_least_one, help="updates between checkpoints")
    add("--resume", action="store_true", help="continue from the latest checkpoint in --run-dir")
    add("--output", type=Path, help="the ticket, a .safetensors file")
    add_report_to(parser)
    add_computing(parser)


def run(options: argparse.Namespace) -> None:
    need(options, "output")
    if (options.initial is None) != (options.tuned is None):
        raise CommandError("--initial and --tuned go together")
    if options.initial is None:
        refuse(options, "allow_missing", "compare_in", why="goes with --initial and --tuned")
    if options.segment is None:
        refuse(options, "intersect", why="needs a --segment to cut the global ticket to")
    check_writable(options.output)
    if options.initial is not None:
        ticket = _from_checkpoints(options)
    else:
        ticket = _from_text(options)
        ticket.save(options.output)
    print(ticket)
    for what, count in ticket.metadata.get("left_out", {}).items():
        print(f"left out: {count} parameters, {what}")
    print(f"written to {options.output}; inspect it with: ltp-sparse inspect {options.output}")


def _from_checkpoints(options: argparse.Namespace) -> Ticket:
    why = "is for tuning and not for a comparison of --initial and --tuned, which selects from all parameters"
    of_tuning = ("text", "text_column", "hub_text", "model", "strategy", "segment", "run_dir")
    refuse(options, *of_tuning, why=f"{why}; leave it out")
    for name in ("initial", "tuned"):
        expect(options, name, "file of weights", "model")
    import torch

    import ltp_sparse as ls

    return ls.select(
        options.initial,
        options.tuned,
        allow_missing=False if options.allow_missing is None else options.allow_missing or True,
        compare_in=None if options.compare_in is None else getattr(torch, options.compare_in),
        progress=not options.quiet,
        **values_of(options, "density", "budget", "output"),
    )


def _from_text(options: argparse.Namespace) -> Ticket:
    """The ticket of stage 1. All options are checked before the text is read, which can be a download."""
    _check_tuning(options)
    strategy = options.strategy or "decoupled"
    texts = _texts(options)
    from ltp_sparse.models.backbone import load_backbone, longest_input
    from ltp_sparse.selection.ltp import find_ticket
    from ltp_sparse.training.mlm import MLMSettings, tune_mlm

    quieten(options)
    model, tokenizer = load_backbone(options.model, decoupled=strategy == "decoupled", tokenizer=options.tokenizer)
    of_tuning = ("epochs", "max_steps", "batch_size", "learning_rate", "line_by_line", "eval_steps", "states", "seed")
    settings = MLMSettings(
        strategy=strategy,
        length=min(256, longest_input(model.config)) if options.length is None else options.length,
        save_steps=options.save_every or 0,
        **values_of(options, *of_tuning, "bf16"),
    )
    result = tune_mlm(
        model,
        tokenizer,
        texts,
        settings,
        output_dir=options.run_dir,
        progress=not options.quiet,
        source=options.hub_text or ", ".join(map(str, options.text)),
        **values_of(options, "resume", "report_to"),
    )
    print(
        f"tuned for {result.metadata['steps']} updates, best validation loss {result.metadata['validation_loss']:.4f}"
    )
    return find_ticket(
        result.initial,
        result.model,
        strategy=strategy,
        metadata=result.metadata,
        **values_of(options, "density", "budget", "segment", "intersect"),
    )


def _check_tuning(options: argparse.Namespace) -> None:
    """Raises CommandError for options of tuning that are missing, do not go together, or name nothing usable."""
    need(options, "model")
    if (options.text is None) == (options.hub_text is None):
        raise CommandError("pass either --text FILES or --hub-text NAME")
    if options.text is None:
        refuse(options, "text_column", why="is for --text; use --hub-column for a Hub data set")
    if (options.resume or options.save_every) and options.run_dir is None:
        raise CommandError("--save-every and --resume need a --run-dir")
    if options.report_to in ("tensorboard", "all") and options.run_dir is None:
        raise CommandError(f"--report-to {options.report_to} needs a --run-dir, where its logs are kept")
    if options.run_dir is not None and not options.resume:
        check_starts_anew(options.run_dir, "--run-dir")
    expect_model(options)
    expect(options, "text", "text", "table")


def _texts(options: argparse.Namespace) -> Sequence[str]:
    from ltp_sparse.tasks import read_hub_text, read_text
    from ltp_sparse.tasks.text import text_files

    drawn = values_of(options, "max_lines", "seed")
    if options.text is None:
        return read_hub_text(options.hub_text, options.hub_config, column=options.hub_column, **drawn)
    if options.text_column is not None:
        return _column(options, options.text, options.text_column)
    named = [path for path in options.text if not path.is_dir()]
    inside = [file for path in options.text if path.is_dir() for file in text_files(path)]
    if (column := _only_column(named, inside)) is not None:
        print(f"text: the column {column!r} of {', '.join(map(str, options.text))}")
        return _column(options, [*named, *inside], column)
    if any(suffix_of(path) == "tsv" for path in inside):
        print(f"text: the first column of every .tsv in {', '.join(str(p) for p in options.text if p.is_dir())}")
    return read_text(options.text, **drawn)


def _only_column(named: list[Path], inside: list[Path]) -> str | None:
    """The column with the text if none is named: "text", or the only one.

    It is None if `read_text` reads the files, i.e. if they are plain text, a .tsv of one column without a header, JSON
    lines with the key "text", or in a folder (`inside`) a .tsv that names no column "text".
    """
    found = {_usual_column(path) for path in named}
    for path in inside:
        is_table = False
        with suppress(FileFormatError):  # of its first line, which is no header then
            is_table = suffix_of(path) == "tsv" and "text" in columns_of(path)
        found.add("text" if is_table else None)
    if len(found) > 1:
        raise CommandError("the files of --text have different columns; name the one with the text, --text-column")
    return found.pop()


def _usual_column(path: Path) -> str | None:
    """`_only_column` of one file."""
    if kind_of(path) != "table":
        return None
    names = columns_of(path)
    if suffix_of(path) == "jsonl" and "text" in names:
        return None
    if suffix_of(path) == "tsv" and len(names) == 1 and names != ["text"]:
        return None
    if "text" not in names and len(names) != 1:
        raise CommandError(f"{path} has the columns {', '.join(names)}; name the one with the text, --text-column")
    return "text" if "text" in names else names[0]


def _column(options: argparse.Namespace, files: Sequence[Path], column: str) -> list[str]:
    """A column of labelled files, at most --max-lines of it."""
    columns = Columns(text=column)
    texts = [example.text for path in files for example in read_own(path, columns, labelled=False)]
    texts = [text for text in texts if text.strip()]
    if options.max_lines is None or options.max_lines >= len(texts):
        return texts
    chosen = random.Random(options.seed).sample(range(len(texts)), options.max_lines)
    return [texts[i] for i in sorted(chosen)]
