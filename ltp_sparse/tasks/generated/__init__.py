"""The demo's generated inference task: no files, labels true by construction, parallel in eight languages."""

from __future__ import annotations

from pathlib import Path

from ltp_sparse.tasks.pairs import Pair

LANGUAGES = ("en", "de", "fr", "es", "ru", "tr", "sw", "id")

_SPLITS = ("train", "dev", "test")
_SHOTS = 32
_TEST_PER_CLASS = 100


def generated(split: str, language: str, data: Path | None, shots: int | None, seed: int) -> list[Pair]:
    """Generated pairs in one language.

    Args:
        split: "train", "dev" or "test". The test set is always the same.
        language: one of `LANGUAGES`.
        data: ignored, as nothing is read.
        shots: pairs per class of "train" and "dev"; None: 32.
        seed: seed of their draw.
    """
    from ltp_sparse.tasks.generated.inference import pairs

    if split not in _SPLITS:
        raise ValueError(f"generated: split must be one of {', '.join(_SPLITS)}, got {split!r}")
    if split == "test":
        return pairs(3 * _TEST_PER_CLASS, "test", language)
    return pairs(3 * (shots or _SHOTS), split, language, seed)
