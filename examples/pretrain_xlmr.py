"""Pre-trains a small multilingual XLM-R from scratch: tokenizer, model, loss per language.

python examples/pretrain_xlmr.py --data DATA --output mini_xlmr                  # the model that the package ships
python examples/pretrain_xlmr.py --data DATA --output study_xlmr --corpus study  # one that saw all text of DATA
python examples/pretrain_xlmr.py --data DATA --output random_xlmr --steps 0      # its control: random weights

DATA holds `multilingual_text/` (the CC0 sentences of Common Voice in 14 languages, and the Swahili New Testament) and,
for the study, the data sets of the tasks. Of these only texts are read, and no test sets. The same command resumes an
interrupted run.
"""

from __future__ import annotations

import argparse
import gzip
import html
import itertools
import json
import math
import random
import re
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ltp_sparse.pretraining import (
    Documents,
    PretrainSettings,
    Sentences,
    Source,
    Translations,
    held_out_losses,
    mini_xlmr,
    parallel_embeddings,
    pretrain,
    start_from,
    train_tokenizer,
)
from ltp_sparse.tasks import TASKS, read_text
from ltp_sparse.tasks.generated.inference import documents
from ltp_sparse.tasks.generated.languages import LANGUAGES
from ltp_sparse.tasks.own import texts_of
from ltp_sparse.tasks.xnli import LANGUAGES as CODES

FLORES = {
    "arb_Arab": "ar", "bul_Cyrl": "bg", "deu_Latn": "de", "ell_Grek": "el", "eng_Latn": "en", "spa_Latn": "es",
    "fra_Latn": "fr", "hin_Deva": "hi", "rus_Cyrl": "ru", "swh_Latn": "sw", "tha_Thai": "th", "tur_Latn": "tr",
    "urd_Arab": "ur", "vie_Latn": "vi", "zho_Hans": "zh",
}  # fmt: skip
ISLANDS = {f"{code}_Latn": code for code in ("ace", "ban", "bjn", "bug", "jav", "min", "sun")} | {"ind_Latn": "id"}
PARALLEL = [("xnli", "dev"), ("sib200", "train"), ("mnli-9k", "train"), ("nusax", "train")]
HELD_OUT = 300  # sentences a language
SHORTEST = 12  # characters
GENERATED = 0.25  # of the updates
TRANSLATED = 0.4  # of the updates, where there are translations
WORD_RATE = 0.1  # of the learning rate, where words start beside their translations, so that they stay there
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds multilingual_text/")
    parser.add_argument("--output", type=Path, required=True, help="folder for model, tokenizer and losses.json")
    parser.add_argument("--corpus", choices=("mini", "study"), default="mini", help="CC0 text alone, or all text")
    parser.add_argument("--steps", type=int, default=10_000, help="updates of 4096 tokens (default: 10,000)")
    parser.add_argument("--pieces", type=int, default=24_000, help="most pieces of the vocabulary (default: 24,000)")
    parser.add_argument("--hidden", type=int, default=192, help="hidden size, in heads of 32 (default: 192)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--documents", type=int, default=150_000, help="generated documents (default: 150,000)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="at its highest (default: 1.5e-3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--float32", action="store_true", help="not bfloat16, which few processors are fast at")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    texts = {language: plain_text(options.data, language) for language in CODES}
    for lines in texts.values():
        random.Random(SEED).shuffle(lines)
    held_out = {language: lines[:HELD_OUT] for language, lines in texts.items()}
    training = {language: lines[HELD_OUT:] for language, lines in texts.items()}
    study = options.corpus == "study"
    rows = translations(options.data) if study else []
    if study:
        training["en"] += wikipedia(options.data)
    for row in rows:
        for language, text in row.items():
            training.setdefault(language, []).append(text)
    generated = list(documents(options.documents))

    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(options.output, options.pieces, training, [d.text for d in generated])
    sentences = Sentences(training, tokenizer, summarise=study)
    plain = 1 - GENERATED - (TRANSLATED if rows else 0)
    sources: list[tuple[float, Source]] = [(plain, sentences), (GENERATED, Documents(generated, tokenizer))]
    model = mini_xlmr(len(tokenizer), hidden=options.hidden, layers=options.layers, seed=SEED).to(options.device)
    if rows and options.steps:
        start_from(model, parallel_embeddings(rows, tokenizer, options.hidden))
        sources.append((TRANSLATED, Translations(rows, tokenizer, summarise=study)))
    shares = ", ".join(f"{language} {share:.1%}" for language, share in sentences.shares.items())
    print(f"{model.num_parameters():,} parameters; {len(tokenizer):,} pieces; text: {shares}")

    rate, word_rate = options.learning_rate, WORD_RATE if rows else 1.0
    settings = PretrainSettings(
        options.steps, learning_rate=rate, word_rate=word_rate, seed=SEED, bf16=not options.float32
    )
    checkpoint = options.output / "checkpoint.safetensors"
    pretrain(model, sources, settings, checkpoint=checkpoint)
    losses = held_out_losses(model, tokenizer, training, held_out)
    model.to(torch.bfloat16).save_pretrained(options.output)
    (options.output / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    print("| language | sentences | loss | unigram | perplexity / unigram's |\n| --- | ---: | ---: | ---: | ---: |")
    for language, (ours, unigram) in losses.items():
        ratio = math.exp(ours - unigram)
        print(f"| {language} | {len(training[language]):,} | {ours:.2f} | {unigram:.2f} | {ratio:.3f} |")


def plain_text(data: Path, language: str) -> list[str]:
    """CC0 sentences of a language, each once."""
    folder = data / "multilingual_text"
    if language == "sw":
        with gzip.open(folder / "bible-corpus" / "Swahili-NT.xml.gz", "rt", encoding="utf-8") as file:
            verses = re.findall(r'<seg[^>]*type="verse"[^>]*>(.*?)</seg>', file.read(), re.DOTALL)
        lines = [html.unescape(verse).strip() for verse in verses]
    else:
        lines = read_text([folder / "common_voice" / {"zh": "zh-CN"}.get(language, language)])
    shortest = SHORTEST // 3 if language == "zh" else SHORTEST
    return [line for line in dict.fromkeys(lines) if len(line) >= shortest]


def wikipedia(data: Path) -> list[str]:
    """Sentences of the English Wikipedia, each once."""
    lines = read_text([data / "wikipedia_en" / "wiki-split"])
    for paragraph in read_text([data / "wikipedia_en" / "wikitext-2"]):
        lines += paragraph.replace(" @-@ ", "-").replace(" @.@ ", ".").replace(" @,@ ", ",").split(" . ")
    return [line for line in dict.fromkeys(lines) if len(line) >= SHORTEST and "= =" not in line]


def translations(data: Path) -> list[dict[str, str]]:
    """Translations of a sentence, language -> text, from the parallel data of the tasks; labels are not read.

    Of the 205 languages of SIB-200, only those of XNLI and NusaX are read.
    """
    rows = []
    for name, split in PARALLEL:
        codes_of = FLORES | ISLANDS if name == "sib200" else {"ind": "id", "eng": "en"}
        languages = list(codes_of) if name == "sib200" else TASKS[name].languages
        examples = (TASKS[name].load(split, language, data=data) for language in languages)
        columns = [[text for example in of_language for text in texts_of(example)] for of_language in examples]
        codes = [codes_of.get(language, language) for language in languages]
        rows += [dict(zip(codes, texts, strict=True)) for texts in zip(*columns, strict=True)]
    return rows


def make_tokenizer(
    folder: Path, pieces: int, training: dict[str, list[str]], generated: list[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder, or a new one, trained on generated text and on text of each language.

    The share of a language grows with the square root of its characters, as in the training of the model. Lines of
    small languages are repeated.
    """
    if (folder / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    characters = {language: sum(map(len, lines)) for language, lines in training.items()}
    most = max(characters.values())
    sample = generated[:20_000]
    for language, lines in training.items():
        wanted, used = int((characters[language] * most) ** 0.5), 0
        for line in itertools.cycle(lines):
            if used >= wanted:
                break
            sample.append(line)
            used += len(line)
    answers = [word for language in LANGUAGES.values() for word in language.answers.values()]
    tokenizer = train_tokenizer(sample, pieces, answers)
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    main()
