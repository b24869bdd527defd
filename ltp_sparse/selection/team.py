"""Communication between the processes of a sharded selection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ltp_sparse.backends import Backend
from ltp_sparse.ops.ranks import Ranks
from ltp_sparse.ops.sources import Chunk, Source

T = TypeVar("T")


class Team:
    """The collectives of a selection or of other shared work. All ranks must make the same calls in the same order.

    Args:
        group: the process group; None: the default one.
        what: the caller, for messages.
        alone: the alternative without a process group, for messages.

    Raises:
        ValueError: there is no process group, or this process is not in it.
    """

    def __init__(
        self, group: distributed.ProcessGroup | None, what: str = "select_sharded", alone: str = ", or use select"
    ) -> None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise ValueError(f"{what}: expected a process group; call torch.distributed.init_process_group{alone}")
        self.what, self.group, self.rank = what, group, distributed.get_rank(group)
        if self.rank < 0:
            raise ValueError(f"{what}: this process is not in the group; only its ranks may call")
        self.size = distributed.get_world_size(group)
        nccl = distributed.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over the ranks."""
        total = counts.to(self.device)
        if total.numel():
            distributed.all_reduce(total, group=self.group)
        return total.to(counts.device)

    def stack(self, counts: Tensor) -> Tensor:
        """[P] on each of R ranks -> [P, R] on all."""
        counts = counts.to(self.device)
        columns = [torch.empty_like(counts) for _ in range(self.size)]
        distributed.all_gather(columns, counts, group=self.group)
        return torch.stack(columns, dim=1)

    def every(self, work: Callable[[], T], report: Callable[[T], Any] = lambda result: None) -> tuple[T, list[Any]]:
        """(result of `work` on this rank, reports of all ranks). An error on one rank is raised on all of them."""
        result: Any = None
        error, reported = None, None
        try:
            result = work()
            reported = report(result)
        except Exception as failure:  # any error: the other ranks must not wait for this one
            error = failure
        outcomes: list[Any] = [None] * self.size
        message = None if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(outcomes, (message, reported), group=self.group)
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(outcomes):
            if message is not None:
                raise ValueError(f"{self.what}: rank {rank} failed: {message}")
        return result, [reported for _, reported in outcomes]

    def send(self, tensor: Tensor, to: int) -> None:
        """Sends a tensor to a rank, which must call `receive`."""
        distributed.send(tensor.to(self.device), group=self.group, group_dst=to)

    def receive(self, nbytes: int, source: int) -> Tensor:
        """uint8 [nbytes], what the rank `source` sends."""
        received = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        distributed.recv(received, group=self.group, group_src=source)
        return received


class GuardedSource:
    """A source that defers errors to `check()`, so that all ranks fail together."""

    can_sample = False

    def __init__(self, source: Source) -> None:
        self.source, self.sizes, self.device = source, source.sizes, source.device
        self.error: Exception | None = None

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        try:
            yield from self.source.chunks(tensors)
        except Exception as error:
            self.error = error

    def sample(self, passes: Backend, tensors: Tensor, runs: Tensor, keys: Tensor) -> None:
        raise RuntimeError("several ranks select by the histogram route, which draws no samples")

    def check(self) -> None:
        """Raises the error of this rank, if there was one."""
        if self.error is not None:
            raise self.error


class TeamRanks(Ranks):
    """The ranks of a selection.

    Args:
        team: their collectives.
        starts: int64 [P, R], the start of each rank's piece of each tensor.
        source: this rank's tensors. An error in it is raised on all ranks by the next `sum`.
    """

    def __init__(self, team: Team, starts: Tensor, source: GuardedSource) -> None:
        self.team, self.source = team, source
        self.order = starts.argsort(dim=1, stable=True)

    def sum(self, counts: Tensor) -> Tensor:
        failed = counts.new_tensor([self.source.error is not None])
        total = self.team.sum(torch.cat([counts.reshape(-1), failed]))
        if int(total[-1]):
            self.team.every(self.source.check)
        return total[:-1].view(counts.shape)

    def in_order(self, counts: Tensor) -> Tensor:
        return self.team.stack(counts).cpu().gather(1, self.order)

    def places(self, tensors: int) -> Tensor:
        return self.order.argsort(dim=1)[:, self.team.rank]
