"""The 2-D selective scan of VMamba (arXiv 2401.10166, SS2D): an image is read along four walks and summed back.

The walks: row by row, column by column, and both backwards.  A walk changes the order of the pixels only, so everything
that is computed pixel by pixel (projections, gates) can stay on the image; the kernels read and sum it in place.
Names: B batch, H W size, D channels, N states a channel, R rank of the time step, 4 walks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from anatomaly.backbones.vmamba.selective_scan import Backend, choose_backend, kernel, no_autocast, selective_scan
from anatomaly.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor


def cross_scan(x: Tensor) -> Tensor:
    """Unroll an image along the four walks.

    Args:
        x: (B, D, H, W).

    Returns:
        (B, 4, D, H * W): row-major, column-major, and the two reversed.
    """
    forward = torch.stack([x.flatten(2), x.mT.flatten(2)], dim=1)  # (B, 2, D, L)
    return torch.cat([forward, forward.flip(-1)], dim=1)


def cross_merge(y: Tensor, size: tuple[int, int]) -> Tensor:
    """Put four walks back at their pixels and add them up; the transpose of `cross_scan`.

    Args:
        y: (B, 4, D, H * W).
        size: (H, W).

    Returns:
        (B, D, H, W).
    """
    height, width = size
    both = y[:, :2] + y[:, 2:].flip(-1)  # (B, 2, D, L)
    rows = both[:, 0].reshape(*both.shape[:3:2], height, width)
    columns = both[:, 1].reshape(*both.shape[:3:2], width, height)
    merged: Tensor = rows + columns.mT
    return merged


def cross_selective_scan(
    u: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Scan an image along the four walks with softplus on the time step, and sum the results at their pixels.

    Per walk g and pixel: delta = softplus(dt_weight[g] r + dt_bias[g]) with (r, B, C) = projected[..., g, :], then
    `selective_scan` along the walk.

    Args:
        u: (B, H, W, D), channels last.
        projected: (B, H, W, 4, R + 2N), what every pixel says about its time step, B and C in every walk.
        dt_weight: (4, D, R).
        dt_bias: (4, D).
        A: (4, D, N), negative.
        D: Skip weight, (4, D).
        backend: See `selective_scan`; "numba" and "triton" read the image in place, the others copy it four times.

    Returns:
        (B, H, W, D), dtype of `u`; computed in float32.

    Raises:
        ShapeError: The shapes do not belong together.
        NotReadyError: See `selective_scan`.
    """
    for name, tensor, axes in (("u", u, "B, H, W, D"), ("dt_weight", dt_weight, "4, D, R"), ("A", A, "4, D, N")):
        if tensor.ndim != axes.count(",") + 1:
            raise ShapeError(f"cross_selective_scan: {name} is {tuple(tensor.shape)}, expected ({axes}).")
    batch, height, width, channels = u.shape
    ranks, states = dt_weight.shape[2], A.shape[2]
    wanted = (
        ("projected", projected, (batch, height, width, 4, ranks + 2 * states)),
        ("dt_weight", dt_weight, (4, channels, ranks)),
        ("dt_bias", dt_bias, (4, channels)),
        ("A", A, (4, channels, states)),
        ("D", D, (4, channels)),
    )
    for name, tensor, shape in wanted:
        if tensor.shape != shape:
            raise ShapeError(f"cross_selective_scan: {name} is {tuple(tensor.shape)}, expected {shape}.")
        if tensor.device != u.device:
            raise ShapeError(f"cross_selective_scan: {name} is on {tensor.device}, u on {u.device}; move one.")
    chosen = choose_backend(backend, u, projected, dt_weight, dt_bias, A, D)
    if u.numel() == 0:
        return torch.zeros_like(u)
    if chosen in ("numba", "triton"):
        arguments = (tensor.detach().float() for tensor in (u, projected, dt_weight, dt_bias, A, D))
        with no_autocast(u):
            merged: Tensor = kernel(chosen).scan_image(*arguments)
        return merged.to(u.dtype)
    walks = [cross_scan(projected[..., g, :].permute(0, 3, 1, 2))[:, g] for g in range(4)]
    own = torch.stack(walks, dim=1)  # (B, 4, R + 2N, L), every walk's own part in its own order
    rank, b, c = own[:, :, :ranks], own[:, :, ranks : ranks + states], own[:, :, ranks + states :]
    dtype = torch.promote_types(u.dtype, torch.float32)
    with no_autocast(u):
        delta = torch.einsum("bgrl,gdr->bgdl", rank.to(dtype), dt_weight.to(dtype))  # (B, 4, D, L)
    y = selective_scan(
        cross_scan(u.permute(0, 3, 1, 2).to(dtype)).flatten(1, 2),
        delta.flatten(1, 2),
        A.flatten(0, 1),
        b,
        c,
        D.flatten(),
        delta_bias=dt_bias.flatten(),
        delta_softplus=True,
        backend=chosen,
    )
    merged = cross_merge(y.reshape(batch, 4, channels, -1), (height, width))
    return merged.permute(0, 2, 3, 1).to(u.dtype)
