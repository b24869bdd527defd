"""The prompt encoder: from n learned vectors to the n embeddings of the soft prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("bilstm", "mlp", "none")


class PromptEncoder(nn.Module):
    """P = MLP(BiLSTM(X)), P = MLP(X) or P = X for learned rows X [n, H].

    Args:
        n: rows.
        hidden: H of the model.
        kind: "bilstm", one layer with H units per direction, then an MLP 2H -> H -> H with ReLU (n=4, H=768: 11,223,552
            parameters); "mlp", H -> H -> H; or "none", the rows themselves.
        rows: initial X [n, H]; None: drawn from N(0, 1).
    """

    def __init__(self, n: int, hidden: int, kind: str = "bilstm", *, rows: Tensor | None = None) -> None:
        super().__init__()
        if n < 1 or hidden < 1:
            raise ValueError(f"PromptEncoder: n and hidden must be at least 1, got {n} and {hidden}")
        if kind not in KINDS:
            raise ValueError(f"PromptEncoder: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if rows is not None and rows.shape != (n, hidden):
            raise ValueError(f"PromptEncoder: expected initial rows of shape {(n, hidden)}, got {tuple(rows.shape)}")
        self.kind = kind
        self.rows = nn.Parameter(torch.randn(n, hidden) if rows is None else rows.detach().clone())
        if kind == "bilstm":
            self.lstm = nn.LSTM(hidden, hidden, bidirectional=True, batch_first=True)
        if kind != "none":
            width = 2 * hidden if kind == "bilstm" else hidden
            self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self) -> Tensor:
        """The prompt P [n, H].

        It is computed in the dtype of the weights also under autocast, so that a baked prompt has the bits of the one
        that was evaluated.
        """
        rows = self.rows
        with torch.autocast(rows.device.type, enabled=False):
            if self.kind == "bilstm":
                rows = self.lstm(rows.unsqueeze(0))[0].squeeze(0)
            return rows if self.kind == "none" else self.mlp(rows)

    @torch.no_grad()
    def bake(self) -> Tensor:
        """A copy of the prompt P [n, H], for inference with `PromptEncoder(n, H, "none", rows=P)`."""
        return self().detach().clone()


def vocabulary_rows(embedding: Tensor, n: int, seed: int, exclude: tuple[int, ...] = ()) -> Tensor:
    """Initial prompt rows [n, H]: n different rows of the word embedding [V, H].

    Args:
        embedding: the word embedding, of any floating dtype.
        n: number of rows to draw.
        seed: seed of the draw, which leaves torch's global generator alone.
        exclude: token ids that are never drawn (the special tokens).

    Returns:
        A float32 copy on the device of the embedding.

    Raises:
        ValueError: the vocabulary has fewer than n such rows.
    """
    allowed = torch.ones(embedding.shape[0], dtype=torch.bool, device="cpu")
    allowed[list(exclude)] = False
    candidates = allowed.nonzero().squeeze(1)
    if n > len(candidates):
        raise ValueError(f"vocabulary_rows: n must be in [1, {len(candidates)}] for this vocabulary, got {n}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(candidates), generator=generator, dtype=torch.int64, device="cpu")
    return embedding.detach()[candidates[order[:n]].to(embedding.device)].float().clone()
