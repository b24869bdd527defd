"""`ltp-sparse train`: prompt-learning of one method, over seeds."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltp_sparse.cli.checks import CommandError, check_starts_anew, check_writable, given_of, need, refuse, values_of
from ltp_sparse.cli.kinds import expect, expect_model, expect_source
from ltp_sparse.cli.options import add_computing, add_data, add_model, add_report_to, at_least_one, quieten, share
from ltp_sparse.cli.own import SOURCE, add_columns, add_metric, given_columns, refuse_own, words_of
from ltp_sparse.cli.tables import MASKED_METHOD_NAMES, PROMPT_METHODS, TASK_NAMES, TEST_TASKS, TICKET_METHODS
from ltp_sparse.tasks import task
from ltp_sparse.tasks.own import UNDETERMINED, Columns, classes_of, read_own, split_dev
from ltp_sparse.tasks.pairs import CLASSES
from ltp_sparse.tasks.texts import few_shot
from ltp_sparse.tasks.xnli import LANGUAGES  # those with known words

if TYPE_CHECKING:
    from ltp_sparse.cli.runs import Run
    from ltp_sparse.methods import Method
    from ltp_sparse.prompting import Verbalizer

HELP = "train LTP or one of its controls on labelled texts or pairs, and keep the best epoch"
EXAMPLES = """\
  LTP on 4 English pairs per class, with the paper's five seeds; data/ holds the folders train/ and dev/ of the K-shot
  files (mprompting/xlmrprompt on GitHub, common_datasets)
    ltp-sparse train --model mini-xlmr --ticket en.safetensors --data data/ --shots 4 --output runs/ltp-4
  the controls
    ltp-sparse train --model mini-xlmr --method soft-prompt --data data/ --shots 4 --output runs/sp-4
    ltp-sparse train --model mini-xlmr --method random-ticket --ticket en.safetensors --data data/ --shots 4 \\
        --output runs/random-4
  in Swahili, with checkpoints; after an interruption, add --resume
    ltp-sparse train --model mini-xlmr --ticket en.safetensors --data data/ --language sw --shots 16 \\
        --output runs/sw --save-every 10
  a task of single texts, with your own words
    ltp-sparse train --model mini-xlmr --ticket en.safetensors --task smsa --data data/ --shots 16 \\
        --words positive=good neutral=okay negative=bad --output runs/smsa
  your own file
    ltp-sparse train --model mini-xlmr --ticket en.safetensors --train train.tsv --dev dev.tsv --test test.tsv \\
        --text-column text --label-column label --words positive=good negative=bad --language quy --output runs/quy"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser)
    add("--method", choices=MASKED_METHOD_NAMES, default="ltp", help="the method")
    add(
        "--match",
        choices=("pool", "layers"),
        help="for random-ticket: draw as many entries as the ticket has in the pool, or in each tensor (default: pool)",
    )
    add("--ticket", type=Path, help="the ticket of ltp-sparse select (needed for ltp and random-ticket)")
    add("--task", choices=TASK_NAMES, help="a known task to train on (default: xnli-fewshot)")
    add_data(parser)
    add("--train", metavar="FILE", help=f"instead of a task, your own data: {SOURCE}")
    add("--dev", metavar="FILE", help="your own dev data, which picks the epoch (default: a part of --train)")
    add("--dev-share", type=share, help="without --dev: the share of each class that becomes dev data (default: 0.1)")
    add("--test", metavar="FILE", help="your own test data, for ltp-sparse evaluate")
    add_columns(parser)
    add_metric(parser)
    add("--words", nargs="+", metavar="CLASS=WORD", help="the word of each class at the mask, e.g. positive=good")
    add("--verbalizer", help="language of the label words of inference (default: that of the examples)")
    add("--shots", type=at_least_one, help="examples per class (default: all; xnli-fewshot needs it)")
    add(
        "--language",
        help="language of the training examples (default: en, or the only one of the task; und for your own data)",
    )
    add("--seeds", nargs="+", type=int, help="seeds to train (default: those of the method; LTP: 1 2 3 4 5)")
    add("--epochs", type=at_least_one, help="epochs (default: those of the method; LTP: 70)")
    add("--learning-rate", type=float, help="learning rate (default: that of the method; LTP: 2e-5)")
    add("--batch-size", type=at_least_one, help="examples per update (default: 32)")
    add("--micro-batch-size", type=at_least_one, help="examples per forward pass, to save memory")
    add("--states", choices=("float32", "8bit"), default="float32", help="precision of the moments")
    add("--gradients", choices=("packed", "dense"), default="packed", help="dense keeps whole gradients")
    add(
        "--max-length",
        type=at_least_one,
        help="tokens of an input (default: that of the method, 256 or 128, or the longest input of the model)",
    )
    add("--n-prompt", type=at_least_one, help="prompt embeddings (default: 4)")
    add("--encoder", choices=("bilstm", "mlp", "none"), help="prompt encoder (default: bilstm)")
    add("--save-every", type=at_least_one, help="epochs between checkpoints of the whole training state")
    add("--resume", action="store_true", help="skip finished seeds, continue from the last checkpoint")
    add_report_to(parser)
    add("--output", type=Path, help="folder of the run")
    add_computing(parser)


@dataclass(frozen=True)
class _Data:
    """The data of a run."""

    train: Sequence[Any]
    dev: Sequence[Any]
    labels: tuple[str, ...]
    metric: str
    columns: Columns | None = None


def run(options: argparse.Namespace) -> None:
    need(options, "model", "output")
    words = words_of(options.words)
    _check_source(options)
    _check_method(options)
    expect_model(options)
    expect(options, "ticket", "ticket")
    for name in ("train", "dev", "test"):
        expect_source(options, name)
    from ltp_sparse.cli.runs import BAKED, TRAINED, check_same_training, record, seeds_to_train

    finished = _finished(options)
    language = options.language or _usual_language(options)
    data = _data(options, words, language)
    check_writable(options.output, folder=True)

    import ltp_sparse as ls
    from ltp_sparse.models.backbone import load_backbone
    from ltp_sparse.prompting import kind_of
    from ltp_sparse.prompting.templates import QUESTIONS
    from ltp_sparse.training.method import train_method

    quieten(options)
    method = _method(options)
    ticket = ls.Ticket.load(options.ticket) if options.ticket is not None else None
    seeds = options.seeds or list(method.settings.seeds)
    todo = [s for s in seeds if f"seed-{s}" not in finished]
    run = _run_of(options, method.name, words, language, data)
    run.check_continues(options.output)
    model, tokenizer = load_backbone(options.model, decoupled=False, tokenizer=options.tokenizer)
    if options.max_length is None:
        method = _fitted_to_positions(method, model.config)
    if len(todo) < len(seeds):
        done = next(seed for seed in seeds if seed not in todo)
        check_same_training(options.output / f"seed-{done}" / BAKED, method, ticket)
    verbalizer = _verbalizer(method, tokenizer, run)
    if options.method in ("discrete-prompt", "mixed-prompt") and language not in QUESTIONS:
        print(f"the words of the pattern are English, because none are known for {language!r}")
    run.save(options.output)
    what, languages = f"{kind_of(data.train[0])}s", ", ".join(dict.fromkeys(e.language for e in data.train))
    print(f"{method.name}: {len(data.train)} training and {len(data.dev)} dev {what} ({languages}), seeds {seeds}")
    for seed in seeds_to_train(options.output, todo):
        folder = options.output / f"seed-{seed}"
        result = train_method(
            method,
            model,
            tokenizer,
            data.train,
            data.dev,
            ticket=ticket,
            labels=data.labels,
            metric=data.metric,
            language=language if language in QUESTIONS else "en",
            verbalizer=verbalizer,
            seed=seed,
            output_dir=folder,
            progress=not options.quiet,
            arguments={"report_to": options.report_to},
            **values_of(options, "save_every", "resume", "micro_batch_size", "bf16", "states", "gradients"),
        )
        result.delta.save(folder / TRAINED, max_shard_size=None)  # the files that the manifest names
        result.baked.save(folder / BAKED, max_shard_size=None)
        record(options.output, [f"seed-{seed}/{name}" for name in (TRAINED, BAKED)])
        result.release()
        print(
            f"seed {seed}: best epoch {result.best_epoch} of {len(result.dev_scores)}, "
            f"dev score {max(result.dev_scores):.2%}, {result.seconds:.0f} s, "
            f"{result.optimizer_bytes:,} bytes of optimizer state, every other weight bitwise unchanged"
        )
    print(f"next: {_next(options)}")


def _finished(options: argparse.Namespace) -> set[str]:
    """The folders of the seeds that are trained. Raises CommandError if the run would overwrite any."""
    from ltp_sparse.cli.runs import BAKED

    finished = {file.parent.name for file in options.output.glob(f"seed-*/{BAKED}")}
    wanted = finished if options.seeds is None else {f"seed-{seed}" for seed in options.seeds}
    if finished & wanted and not options.resume:
        raise CommandError(
            f"{options.output} already holds trained seeds; pass --resume to keep them, or another --output"
        )
    if not options.resume:
        for folder in [options.output] if options.seeds is None else [options.output / name for name in wanted]:
            check_starts_anew(folder, "--output")
    return finished


def _usual_language(options: argparse.Namespace) -> str:
    if options.train is not None:
        return UNDETERMINED
    known = task(options.task).languages
    return known[0] if len(known) == 1 else "en"


def _check_source(options: argparse.Namespace) -> None:
    """Raises CommandError for options that do not fit the source, a task or your own data, and sets its defaults."""
    if options.train is None:
        refuse_own(options, "dev_share", why="is for your own data; pass its file, --train")
        options.task = options.task or "xnli-fewshot"
        return
    refuse(options, "task", "data", why="is for a known task, --train for your own data; leave one of them out")
    if options.dev is not None:
        refuse(options, "dev_share", why="is for data without --dev; leave one of them out")
    elif options.dev_share is None:
        options.dev_share = 0.1


def _check_method(options: argparse.Namespace) -> None:
    """Raises CommandError for options that the method does not have, and for a missing ticket."""
    method = options.method
    if method in TICKET_METHODS and options.ticket is None:
        raise CommandError(f"--ticket is needed for {method}; make one with ltp-sparse select")
    unfit = f"not for {method}; leave it out"
    if method not in TICKET_METHODS:
        refuse(options, "ticket", why=f"is for {' and '.join(TICKET_METHODS)}, {unfit}")
    if method != "random-ticket":
        refuse(options, "match", why=f"is for random-ticket, {unfit}")
    if method not in PROMPT_METHODS:
        refuse(options, "n_prompt", "encoder", why=f"is for soft prompts, {unfit}")


def _check_words_are_known(options: argparse.Namespace, labels: tuple[str, ...], language: str) -> None:
    if labels != CLASSES:
        raise CommandError(
            f"{options.method} needs a word for each class: --words "
            + " ".join(f"{shlex.quote(label)}=WORD" for label in labels)
        )
    if language not in LANGUAGES:
        raise CommandError(
            f"no label words are known for {language!r}; pass --verbalizer, one of {', '.join(LANGUAGES)}, or "
            "your own words, --words"
        )


def _data(options: argparse.Namespace, words: dict[str, list[str]] | None, language: str) -> _Data:
    """The data of the run. Words are checked before a task is loaded, because that can be a download."""
    own = _own_data(options, words, language) if options.train else None
    labels = task(options.task).labels if own is None else own.labels
    if words is None and options.method in PROMPT_METHODS:
        _check_words_are_known(options, labels, options.verbalizer or language)
    if words is not None and set(words) != set(labels):
        raise CommandError(f"--words must be for the classes {', '.join(labels)}, got {', '.join(words)}")
    return own or _task_data(options, language)


def _task_data(options: argparse.Namespace, language: str) -> _Data:
    of = task(options.task)
    train, dev = (of.load(split, language, shots=options.shots, data=options.data) for split in ("train", "dev"))
    if of.kind == "text" and options.shots is not None:
        print(f"the {options.shots} examples per class are one draw, the same for all seeds")
    return _Data(train, dev, of.labels, of.metric)


def _own_data(options: argparse.Namespace, words: dict[str, list[str]] | None, language: str) -> _Data:
    columns = given_columns(options)

    def read(source: str, split: str) -> list[Any]:
        return read_own(source, columns, language=language, split=split, config=options.hub_config)

    train = read(options.train, "train")
    dev = [] if options.dev is None else read(options.dev, "validation")
    test = [] if options.test is None else read(options.test, "test")  # to fail before training
    labels = classes_of([*train, *dev], words)
    if foreign := sorted({example.label for example in test} - set(labels)):
        raise CommandError(
            f"--test {options.test} has the class {foreign[0]!r}, which no training example has; classes: "
            f"{', '.join(labels)}"
        )
    if words is None and set(labels) == set(CLASSES):
        labels = CLASSES  # inference, for which words are known
    if options.dev is None:
        train, dev = split_dev(train, options.dev_share)
        print(f"dev: {len(dev)} of the examples of {options.train}, {options.dev_share:.4g} of each class; one draw")
    if options.shots is not None:
        train = few_shot(train, "train", labels, options.shots, 0)
        print(f"the {options.shots} examples per class are one draw, the same for all seeds")
    return _Data(train, dev, labels, options.metric or "accuracy", columns)


def _run_of(
    options: argparse.Namespace, method: str, words: dict[str, list[str]] | None, language: str, data: _Data
) -> Run:
    """What the folder of the run says about it."""
    from ltp_sparse.cli.runs import Run

    as_given = ("model", "tokenizer", "task", "shots", "train", "dev", "dev_share", "test", "hub_config")
    return Run(
        method=method,
        language=language,
        verbalizer=options.verbalizer or language,
        words=words,
        labels=data.labels,
        metric=data.metric,
        columns=data.columns,
        **values_of(options, *as_given),
    )


def _verbalizer(method: Method, tokenizer: Any, run: Run) -> Verbalizer | None:
    """The words of the run, or those that are known for its language; None for a method with a head."""
    from ltp_sparse.prompting import Verbalizer

    if not method.scores_words:
        if run.words is not None:
            print(f"--words has no effect: {method.key} scores classes by a head")
        return None
    if run.words is not None:
        return Verbalizer.from_words(tokenizer, run.words, run.labels)
    return Verbalizer.for_language(tokenizer, run.verbalizer)


def _next(options: argparse.Namespace) -> str:
    """The command that evaluates the run."""
    command = ["ltp-sparse", "evaluate", str(options.output)]
    if options.train is None:
        command += ["--task", TEST_TASKS.get(options.task, options.task)]
        command += [] if options.data is None else ["--data", str(options.data)]
        return shlex.join(command)
    return shlex.join(command) + ("" if options.test is not None else " --test FILE")


def _fitted_to_positions(method: Method, config: Any) -> Method:
    """The method with inputs that are no longer than the model has positions."""
    from ltp_sparse.models.backbone import longest_input

    longest = longest_input(config)
    if method.settings.max_length <= longest:
        return method
    print(f"inputs have at most {longest} tokens, the number of positions of the model")
    return replace(method, settings=replace(method.settings, max_length=longest))


def _method(options: argparse.Namespace) -> Method:
    """The method with the given settings."""
    from ltp_sparse.methods import METHODS

    kind: Any = METHODS[options.method]
    method = kind(match=options.match or "pool") if options.method == "random-ticket" else kind()
    given = given_of(options, "epochs", "learning_rate", "batch_size", "max_length", "n_prompt", "encoder")
    return replace(method, settings=replace(method.settings, **given))
