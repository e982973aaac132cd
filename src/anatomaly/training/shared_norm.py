"""Batch norm over the images of all processes, so that a batch that is shared out is normalised as one."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SharedBatchNorm(_BatchNorm):
    """A batch norm whose mean and variance are those of all processes' images; gradients flow through both.

    Attributes:
        alone: This process has the whole batch: the others have the same one.

    Note: torch's own `SyncBatchNorm` takes no tensors on CPUs; this one is the same computation on any device.
    """

    alone = False

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and type; B may differ from process to process."""
        if not self.training or self.alone or not dist.is_initialized():
            return super().forward(input)
        values = input.float()
        variance, mean = torch.var_mean(values, dim=[0, *range(2, values.ndim)], correction=0)
        count = mean.new_tensor([values[:, 0].numel()])
        rows = self._rows(torch.cat([mean, variance, count]))
        means, variances, counts = rows[:, : len(mean)], rows[:, len(mean) : -1], rows[:, -1:]
        total = counts.sum()
        share = counts / total
        mean = (share * means).sum(dim=0)
        variance = (share * (variances + (means - mean).square())).sum(dim=0)
        if self.track_running_stats:
            self._remember(mean.detach(), (variance * total / (total - 1).clamp(min=1)).detach())
        scale = torch.rsqrt(variance + self.eps) * (1.0 if self.weight is None else self.weight)
        shape = (1, -1, *[1] * (values.ndim - 2))
        # Centred first: where the mean is large, the gradient of a scaled and shifted tensor is a difference of others.
        found = (values - mean.view(shape)) * scale.view(shape)
        return (found if self.bias is None else found + self.bias.view(shape)).to(input.dtype)

    @staticmethod
    def _rows(mine: Tensor) -> Tensor:
        """A row of every process, in the order of their ranks: (n,) -> (processes, n)."""
        place = torch.zeros(dist.get_world_size(), device=mine.device)
        place[dist.get_rank()] = 1.0
        rows: Tensor = all_reduce(torch.outer(place, mine))  # type: ignore[no-untyped-call]
        return rows

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, which batches without gradients move too."""
        found = (self.num_batches_tracked, self.running_mean, self.running_var)
        count, running_mean, running_var = cast("tuple[Tensor, Tensor, Tensor]", found)
        count.add_(1)
        momentum = 1.0 / float(count) if self.momentum is None else self.momentum
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance, momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""


def share_norms(method: Any) -> list[SharedBatchNorm]:
    """Turn the batch norms of a method, a module, into shared ones; weights, statistics and names stay.

    Returns:
        Those that were turned.
    """
    norms = [module for module in method.modules() if type(module) in _KINDS]
    for norm in norms:
        norm.__class__ = SharedBatchNorm
    return norms
