"""A small tokenizer of our own with the layout of XLM-R's: a Unigram model over words that begin with a metaspace."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3, as in XLM-R; `<mask>` has the last id."""

_SPACE = "\u2581"
_FALLBACK = 10.0  # how much less likely, in nats, a single character is than the rarest word


def build_tokenizer(texts: Iterable[str], words: int = 2000) -> PreTrainedTokenizerFast:
    """A tokenizer whose pieces are the most frequent `words` words of the texts, and every character as a fallback.

    Text is lower-cased. Words keep their `▁`; punctuation is a word of its own and an apostrophe ends one, so that "."
    is the same piece after a word and alone, as a template uses it. With so few texts the usual training of a Unigram
    model splits most words; here each word is one piece whose score is its log frequency.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("[.,:?!¿]"), "isolated"),
            pre_tokenizers.Split(Regex("'"), "merged_with_previous"),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        ]
    )
    counts = Counter(
        word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
    )
    if not counts:
        raise ValueError(
            "build_tokenizer: expected texts with at least one word, got none; pass the texts of the model"
        )
    kept = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:words]
    scores = {word: math.log(count / counts.total()) for word, count in kept}
    characters = {_SPACE, *string.ascii_lowercase, *string.digits, *(c for word in counts for c in word)}
    rare = min(scores.values()) - _FALLBACK
    pieces = [(token, 0.0) for token in SPECIAL] + list(scores.items())
    pieces += [(character, rare) for character in sorted(characters - set(scores))]
    backend = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=SPECIAL.index("<unk>")))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Metaspace(prepend_scheme="always"),
            decoders.Fuse(),
            decoders.Replace(Regex(" (?=[.,:?!])"), ""),
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
