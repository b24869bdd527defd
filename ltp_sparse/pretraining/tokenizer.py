"""A Unigram tokenizer with the layout of XLM-R's, trained on texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""Tokens 0 to 3, as in XLM-R. `<mask>` is the last token."""

_PUNCTUATION = (
    '[.,:;?!¿¡"()\u00ab\u00bb\u201e\u201c\u201d\u2026\u2013\u2014\u3001\u3002\u300a\u300b'
    "\u060c\u061b\u061f\u06d4\u0964]"
)
_ARABIC_VOWELS = "[\u064b-\u0652\u0670\u0640]"
_WHOLE = 1e-4  # the least probability of a word that must be one piece
_RARE = 5  # characters that occur less often may become <unk>

_NORMALIZER = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(_ARABIC_VOWELS), "")]
)
_SPLITTER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(Regex(_PUNCTUATION), "isolated"),
        pre_tokenizers.Split(Regex("['\u2019]"), "merged_with_previous"),
        pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
    ]
)


def train_tokenizer(texts: Iterable[str], size: int, whole: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Trains a Unigram tokenizer. Byte-pair merges give its pieces; the score of a piece is its log frequency.

    Merges keep the frequent words of a language whole even if it has little text. A Unigram trainer would split them.

    Text is NFKC-normalised and lower-cased, and Arabic loses its vowel marks. Each word begins with `▁`. A punctuation
    mark is a word, and an apostrophe ends a word. So "." is the same piece after a word as alone in a template.

    Args:
        texts: training texts.
        size: the most pieces.
        whole: words that must be one piece, e.g. those of a verbalizer.

    Raises:
        ValueError: no text has a word.
    """
    lines = [_NORMALIZER.normalize_str(text) for text in texts]
    if not any(lines):
        raise ValueError(
            "train_tokenizer: expected texts with at least one word, got none; pass the texts of the model"
        )
    wanted = dict.fromkeys(
        piece for word in whole for piece, _ in _SPLITTER.pre_tokenize_str(_NORMALIZER.normalize_str(word))
    )
    counts = _merged_pieces(lines, size - len(SPECIAL) - len(wanted) - 1)
    pieces = {piece: math.log(count / counts.total()) for piece, count in counts.items()}
    for piece in wanted:
        pieces[piece] = max(pieces.get(piece, -math.inf), math.log(_WHOLE))
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += sorted(pieces.items(), key=lambda item: (-item[1], item[0]))
    backend = Tokenizer(models.Unigram([*vocabulary, ("<mask>", 0.0)], unk_id=SPECIAL.index("<unk>")))
    backend.normalizer, backend.pre_tokenizer = _NORMALIZER, _SPLITTER
    backend.decoder = decoders.Sequence(
        [
            decoders.Metaspace(prepend_scheme="always"),
            decoders.Fuse(),
            decoders.Replace(Regex(" (?=[.,:;?!])"), ""),
            decoders.Replace(Regex("(?<=['¿]) "), ""),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=512, padding_side="right",
    )  # fmt: skip


def _merged_pieces(lines: Sequence[str], size: int) -> Counter[str]:
    """Piece -> how often it occurs in the lines (plus 1), for at most `size` pieces by byte-pair merges."""
    characters = Counter(character for line in lines for character in line)
    frequent = sum(count >= _RARE for count in characters.values())
    merged = Tokenizer(models.BPE())
    merged.pre_tokenizer = _SPLITTER
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=frequent, show_progress=False)
    merged.train_from_iterator(lines, trainer, length=len(lines))
    counts = Counter(dict.fromkeys(merged.get_vocab(), 1))
    for encoding in merged.encode_batch(lines):
        counts.update(encoding.tokens)
    return counts
