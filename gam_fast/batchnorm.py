"""Running statistics move in one pass of a step only, as if it had been the only one."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of the buffers that hold running statistics, in torch's modules and in those written after them."""


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers of running statistics in ``model``: of BatchNorm, SyncBatchNorm, InstanceNorm and modules like them.

    >>> [tuple(t.shape) for t in running_statistics(nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3)))]
    [(3,), (3,), ()]
    """
    found: list[Tensor] = []
    seen: set[nn.Module] = set()
    rest: list[nn.Module | None] = [model]
    while rest:  # as model.modules(), whose nested generators take longer than all else here; overrides are not asked
        module = rest.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        rest.extend(reversed(module._modules.values()))
        own = module._buffers
        if own:
            # (a script module's are no dict, and have no get())
            found.extend(buffer for name in STATISTICS if name in own and (buffer := own[name]) is not None)
    return found


class FreezeRunningStatistics:
    """Keeps what the first pass made of the running statistics of ``model``, whatever the later passes do.

    As a context manager it spans one step: call :meth:`begin` at the start of each pass. On leaving, the statistics are
    those of the end of the first pass, bit for bit (or, with ``begin(keep_last=True)``, what the last pass made of
    those at entry); when the block raises, those at entry. Modules are not switched:
    their normalisation by the statistics of the batch, ``training`` and ``momentum`` stay as they are, and a compiled
    model is not compiled again.

    >>> model = nn.BatchNorm1d(2)
    >>> with FreezeRunningStatistics(model) as freeze:
    ...     for scale in (1.0, 100.0):
    ...         freeze.begin()
    ...         _ = model(scale * torch.ones(4, 2))
    >>> model.running_mean, int(model.num_batches_tracked)
    (tensor([0.1000, 0.1000]), 1)
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self._buffers: list[Tensor] = []
        self._entry: list[Tensor] = []
        self._start: list[Tensor] = []
        self._after_first: list[Tensor] | None = None
        self._keep_last = False

    def __enter__(self) -> FreezeRunningStatistics:
        self._buffers = running_statistics(self.model) if self.model is not None else []
        self._entry = self._start = [buffer.clone() for buffer in self._buffers]
        self._after_first = None
        self._begun = self._keep_last = False
        return self

    def start_anew(self) -> None:
        """Passes start from the statistics as they are now; a block that raises still goes back to those at entry."""
        self._start = [buffer.clone() for buffer in self._buffers]

    def begin(self, *, keep_last: bool = False) -> None:
        """Start a pass: note the statistics the first pass ended with, or go back to those at entry.

        Args:
            keep_last: whether it is the last pass that counts, as known by now; once true, it stays so.
        """
        self._keep_last = keep_last
        if self._begun and keep_last:
            self._put_back(self._start)
        elif self._begun and self._after_first is None:
            self._after_first = [buffer.clone() for buffer in self._buffers]
        self._begun = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        keep = self._entry if kind is not None else None if self._keep_last else self._after_first
        if keep:
            self._put_back(keep)
        self._buffers, self._entry, self._start, self._after_first = [], [], [], None

    def _put_back(self, values: list[Tensor]) -> None:
        if values:  # without any, not even the context is free
            with torch.set_grad_enabled(False):
                torch._foreach_copy_(self._buffers, values)
