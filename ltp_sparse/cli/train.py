"""`ltp-sparse train`: prompt-learning of one method, over seeds."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ltp_sparse.cli.options import (
    CommandError,
    add_computing,
    add_data,
    add_model,
    at_least_one,
    check_starts_anew,
    check_writable,
    need,
    quieten,
)

HELP = "train LTP or one of its controls on a few labelled pairs, and keep the best epoch"
EXAMPLES = """\
  LTP on 4 English examples per class, with the paper's five seeds
    ltp-sparse train --model xlm-roberta-base --ticket en.safetensors --shots 4 --output runs/ltp-4
  the controls
    ltp-sparse train --model xlm-roberta-base --method soft-prompt --shots 4 --output runs/sp-4
    ltp-sparse train --model xlm-roberta-base --method random-ticket --ticket en.safetensors --shots 4 \\
        --output runs/random-4
  from the original files, in Swahili, stopped and resumed
    ltp-sparse train --model xlm-roberta-base --ticket en.safetensors --data data/xnli_fewshot --language sw \\
        --shots 16 --output runs/sw --save-every 10 --resume"""


def add_options(parser: argparse.ArgumentParser) -> None:
    from ltp_sparse.cli.tables import PAIR_METHOD_NAMES

    add_model(parser)
    parser.add_argument("--method", choices=PAIR_METHOD_NAMES, default="ltp", help="default: ltp")
    parser.add_argument(
        "--match", choices=("pool", "layers"), help="random-ticket: what the draw keeps (default: pool)"
    )
    parser.add_argument("--ticket", type=Path, help="the ticket of ltp-sparse select (ltp and random-ticket need one)")
    parser.add_argument("--task", default="xnli-fewshot", help="labelled pairs to train on (default: xnli-fewshot)")
    parser.add_argument("--shots", type=at_least_one, help="examples per class")
    parser.add_argument("--language", default="en", help="language of the training pairs (default: en)")
    parser.add_argument("--verbalizer", help="language of the label words (default: that of the pairs)")
    add_data(parser)
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 1 2 3 4 5")
    parser.add_argument("--epochs", type=at_least_one, help="default: the method's (LTP: 70)")
    parser.add_argument("--learning-rate", type=float, help="default: the method's (LTP: 2e-5)")
    parser.add_argument("--batch-size", type=at_least_one, help="pairs per update (default: 32)")
    parser.add_argument("--micro-batch-size", type=at_least_one, help="pairs per forward pass, to save memory")
    parser.add_argument("--states", choices=("float32", "8bit"), default="float32", help="precision of the moments")
    parser.add_argument(
        "--gradients", choices=("packed", "dense"), default="packed", help="dense keeps all of every gradient"
    )
    parser.add_argument(
        "--max-length",
        type=at_least_one,
        help="tokens of an input (default: the method's, 256 or 128, as far as the model goes)",
    )
    parser.add_argument("--n-prompt", type=at_least_one, help="prompt embeddings (default: 4)")
    parser.add_argument("--encoder", choices=("bilstm", "mlp", "none"), help="prompt encoder (default: bilstm)")
    parser.add_argument(
        "--save-every", type=at_least_one, help="epochs between checkpoints of the whole training state"
    )
    parser.add_argument("--resume", action="store_true", help="skip finished seeds, go on from the latest checkpoint")
    parser.add_argument("--report-to", default="none", help="logging integration of transformers, e.g. tensorboard")
    parser.add_argument("--output", type=Path, help="folder of the run")
    add_computing(parser)


def run(options: argparse.Namespace) -> None:
    need(options, "model", "output")
    import ltp_sparse as ls
    from ltp_sparse.cli.runs import BAKED, TRAINED, Run, check_same_training, load_pairs, record, seeds_to_train
    from ltp_sparse.prompting import WORDS, Verbalizer
    from ltp_sparse.prompting.templates import QUESTIONS
    from ltp_sparse.training.backbone import load_backbone, longest_input
    from ltp_sparse.training.method import train_method

    quieten(options)
    method = _method(options)
    if method.needs_ticket and options.ticket is None:
        raise CommandError(f"train: --ticket is needed for {options.method}; make one with ltp-sparse select")
    ticket = ls.Ticket.load(options.ticket) if options.ticket is not None else None
    words = options.verbalizer or options.language
    if method.scores_words and words not in WORDS:
        raise CommandError(
            f"train: no label words are known for {words!r}; pass --verbalizer, one of {', '.join(WORDS)}"
        )
    train = load_pairs("train", options.task, "train", options.language, shots=options.shots, data=options.data)
    dev = load_pairs("train", options.task, "dev", options.language, shots=options.shots, data=options.data)

    seeds = options.seeds or list(method.settings.seeds)
    todo = [s for s in seeds if not (options.output / f"seed-{s}" / BAKED).is_file()]
    if len(todo) < len(seeds) and not options.resume:
        raise CommandError(
            f"train: {options.output} already holds trained seeds; pass --resume to keep them, or another --output"
        )
    if not options.resume:
        for seed in todo:
            check_starts_anew("train", options.output / f"seed-{seed}", "--output")
    run = Run(
        model=options.model,
        tokenizer=options.tokenizer,
        method=method.name,
        task=options.task,
        shots=options.shots,
        language=options.language,
        verbalizer=words,
    )
    run.check_continues(options.output)
    check_writable("train", options.output, folder=True)
    model, tokenizer = load_backbone(options.model, decoupled=False, tokenizer=options.tokenizer)
    if options.max_length is None and method.settings.max_length > (longest := longest_input(model.config)):
        print(f"inputs have at most {longest} tokens, for which the model has positions")
        method = replace(method, settings=replace(method.settings, max_length=longest))
    if len(todo) < len(seeds):
        done = next(seed for seed in seeds if seed not in todo)
        check_same_training(options.output / f"seed-{done}" / BAKED, method, ticket)
    verbalizer = Verbalizer.for_language(tokenizer, words) if method.scores_words else None
    run.save(options.output)
    print(f"{method.name}: {len(train)} training and {len(dev)} dev pairs ({options.language}), seeds {seeds}")
    for seed in seeds_to_train(options.output, todo):
        folder = options.output / f"seed-{seed}"
        result = train_method(
            method,
            model,
            tokenizer,
            train,
            dev,
            ticket=ticket,
            language=options.language if options.language in QUESTIONS else "en",
            verbalizer=verbalizer,
            seed=seed,
            output_dir=folder,
            save_every=options.save_every,
            resume=options.resume,
            micro_batch_size=options.micro_batch_size,
            bf16=options.bf16,
            states=options.states,
            gradients=options.gradients,
            progress=not options.quiet,
            arguments={"report_to": options.report_to},
        )
        result.delta.save(folder / TRAINED)
        result.baked.save(folder / BAKED)
        record(options.output, [f"seed-{seed}/{name}" for name in (TRAINED, BAKED)])
        result.release()
        print(
            f"seed {seed}: best epoch {result.best_epoch} of {len(result.dev_scores)}, "
            f"dev score {max(result.dev_scores):.2%}, {result.seconds:.0f} s, "
            f"{result.optimizer_bytes:,} bytes of optimizer state, every other weight bitwise unchanged"
        )
    print(f"next: ltp-sparse evaluate {options.output} --task xnli")


def _method(options: argparse.Namespace) -> Any:
    """The method with the settings that are given; a CommandError for those that it does not have."""
    from ltp_sparse.methods import METHODS

    kind: Any = METHODS[options.method]
    if options.match is not None and options.method != "random-ticket":
        raise CommandError(f"train: --match is of random-ticket, not of {options.method}; leave it out")
    method = kind(match=options.match or "pool") if options.method == "random-ticket" else kind()
    names = ("epochs", "learning_rate", "batch_size", "max_length", "n_prompt", "encoder")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    known = {field.name for field in fields(method.settings)}
    if foreign := [name for name in given if name not in known]:
        raise CommandError(
            f"train: --{foreign[0].replace('_', '-')} is of soft prompts and not of {options.method}; leave it out"
        )
    return replace(method, settings=replace(method.settings, **given))
