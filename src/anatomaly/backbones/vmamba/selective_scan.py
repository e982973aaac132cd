"""The selective scan of Mamba (arXiv 2312.00752): the definition, a differentiable fast form, and the kernels' door.

Names: B batch, G groups that share `B` and `C`, D channels a group, N states a channel, L positions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F

from anatomaly.errors import NotReadyError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

logger = logging.getLogger(__name__)

Backend = Literal["auto", "ref", "chunked", "numba", "triton", "onnx"]

#: Pieces that `selective_scan_chunked` runs side by side, and positions in each: larger needs more memory, fewer steps.
CHUNK = 16


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Run the state-space recurrence of Mamba along the last axis.

    h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l with h_{-1} = 0;  y_l = <C_l, h_l> + D u_l.

    Args:
        u: Input, (B, G * D, L), any float dtype, any strides; the recurrence runs in float32.
        delta: Step size, same shape.
        A: (G * D, N), negative in every trained model; a positive entry lets the state grow without bound.
        B: (B, G, N, L).
        C: (B, G, N, L).
        D: Skip weight, (G * D,), or None.
        delta_bias: Added to `delta`, (G * D,), or None.
        delta_softplus: Apply softplus to `delta` after the bias.
        backend: "ref" (the definition), "chunked" (torch, differentiable, any device), "numba" (CPU, no gradients),
            "triton" (CUDA, no gradients); "auto" takes numba on a CPU and triton on CUDA where they are installed, and
            chunked otherwise or whenever a gradient is needed.

    Returns:
        y, shape and dtype of `u`.

    Raises:
        ShapeError: The shapes do not belong together.
        NotReadyError: The named backend is not installed, not for this device, or cannot give the gradient asked for.

    Note: `selective_scan_ref` is the definition; its test holds every backend to it.
    """
    _check_shapes(u, delta, A, B, C, D, delta_bias)
    tensors = tuple(tensor for tensor in (u, delta, A, B, C, D, delta_bias) if tensor is not None)
    chosen = choose_backend(backend, *tensors)
    if u.numel() == 0:
        return torch.zeros_like(u)
    if chosen == "ref":
        return selective_scan_ref(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus)
    if chosen == "chunked":
        return selective_scan_chunked(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus)
    step = delta.detach().float()
    if delta_bias is not None:
        step = step + delta_bias.detach().float()[:, None]
    skip = torch.zeros(len(A), device=u.device) if D is None else D.detach().float()
    x, a, b, c = (tensor.detach().float() for tensor in (u, A, B, C))
    y: Tensor = kernel(chosen).scan_rows(x, step, a, b, c, skip, delta_softplus=delta_softplus)
    return y.to(u.dtype)


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on the tensor's device, where it is on."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The definition of `selective_scan`, one step of Python a position; float64 input is computed in float64."""
    return _in_torch(_loop, u, delta, A, B, C, D, delta_bias, delta_softplus)


def selective_scan_chunked(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """`selective_scan` in torch operations, `CHUNK` x `CHUNK` positions at once; differentiable, any device.

    A section is cut into `CHUNK` pieces of `CHUNK` positions.  All pieces run side by side from a zero state; then the
    state at each piece's end is handed to the next one, and every position adds its share of it, the running product of
    exp(delta A).  Only products of these occur, so nothing overflows where the recurrence itself does not.
    """
    return _in_torch(_pieces, u, delta, A, B, C, D, delta_bias, delta_softplus)


def _in_torch(
    recurrence: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """All of `selective_scan` around y = <C, h>: float32 or better whatever autocast says, bias, softplus and skip."""
    with no_autocast(u):
        dtype = torch.promote_types(u.dtype, torch.float32)
        x, step, a, b, c = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
        if delta_bias is not None:
            step = step + delta_bias.to(dtype)[:, None]
        y = recurrence(x, F.softplus(step) if delta_softplus else step, a, b, c)
        if D is not None:
            y = y + D.to(dtype)[:, None] * x
        return y.to(u.dtype)


def _loop(x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence of `selective_scan_ref`: exp(delta A) of all positions, then position by position."""
    per_group = x.shape[1] // b.shape[1]
    b, c = b.repeat_interleave(per_group, dim=1), c.repeat_interleave(per_group, dim=1)  # (B, G * D, N, L)
    decay = torch.exp(torch.einsum("brl,rn->lbrn", step, a))
    drive = torch.einsum("brl,brnl,brl->lbrn", step, b, x)
    h = x.new_zeros(*x.shape[:2], a.shape[1])  # (B, G * D, N)
    outputs = []
    for position in range(x.shape[2]):
        h = decay[position] * h + drive[position]
        outputs.append(torch.einsum("brn,brn->br", h, c[..., position]))
    return torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(x)


def _pieces(x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence of `selective_scan_chunked`."""
    batch, rows, length = x.shape
    groups, states = b.shape[1], a.shape[1]
    section = CHUNK * CHUNK if length > CHUNK * CHUNK else -(-length // CHUNK) * CHUNK

    def pieces(tensor: Tensor, start: int) -> Tensor:  # (B, G, n, L) or (B, G * D, L) -> (T, B, G, n, 1 or n, M)
        part = tensor[..., start : start + section]
        part = F.pad(part, (0, section - part.shape[-1]))  # a step of 0 leaves the state as it is
        shape = (batch, groups, 1, states) if tensor.ndim == 4 else (batch, groups, rows // groups, 1)
        return part.reshape(*shape, section // CHUNK, CHUNK).permute(5, 0, 1, 2, 3, 4).contiguous()

    h = x.new_zeros(batch, groups, rows // groups, states)
    a = a.reshape(1, groups, rows // groups, states, 1)
    outputs = []
    for start in range(0, length, section or 1):
        d = pieces(step, start)  # (T, B, G, D, 1, M)
        decay = torch.exp(d * a)  # (T, B, G, D, N, M)
        drive = d * pieces(x, start) * pieces(b, start)
        local, share = [drive[0]], [decay[0]]  # state of a piece that starts at zero, and what is left of its start
        for t in range(1, CHUNK):
            local.append(torch.addcmul(drive[t], decay[t], local[-1]))
            share.append(decay[t] * share[-1])
        begins = []
        for piece in range(section // CHUNK):
            begins.append(h)
            h = torch.addcmul(local[-1][..., piece], share[-1][..., piece], h)
        state = torch.addcmul(torch.stack(local), torch.stack(share), torch.stack(begins, dim=-1))
        part = (state * pieces(c, start)).sum(-2)  # (T, B, G, D, M)
        outputs.append(part.permute(1, 2, 3, 4, 0).reshape(batch, rows, section))
    return torch.cat(outputs, dim=-1)[..., :length] if outputs else torch.zeros_like(x)


def choose_backend(backend: Backend, *tensors: Tensor) -> Backend:
    """Turn "auto" into a backend that fits the tensors, and refuse a named one that does not.

    Raises:
        NotReadyError: The named backend is not installed, not for this device, or cannot give the gradient asked for.
    """
    if backend not in get_args(Backend):
        raise NotReadyError(
            f"selective_scan: unknown backend {backend!r}, expected one of {', '.join(get_args(Backend))}."
        )
    device = tensors[0].device.type
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if backend == "auto":
        if gradient or device not in _DEVICES.values() or any(tensor.dtype == torch.float64 for tensor in tensors):
            return "chunked"
        return _fastest(device)
    if backend in _DEVICES:
        if device != _DEVICES[backend]:
            raise NotReadyError(
                f"selective_scan: backend {backend!r} runs on {_DEVICES[backend]}, the tensors are on {device}. "
                'Move them, or use backend="auto".'
            )
        if gradient:
            raise NotReadyError(
                f'selective_scan: backend {backend!r} has no gradients. Use backend="chunked", or torch.no_grad().'
            )
        kernel(backend)
    return backend


_DEVICES: dict[str, str] = {"numba": "cpu", "triton": "cuda", "onnx": "cpu"}


@functools.cache
def kernel(backend: Backend) -> Any:
    """The module of a compiled backend, imported on first use: `scan_rows` and `scan_image`.

    Raises:
        NotReadyError: The package it is written in is not installed.
    """
    try:
        return importlib.import_module(f"anatomaly.backbones.vmamba._scan_{backend}")
    except ImportError as err:
        raise NotReadyError(
            f"selective_scan: backend {backend!r} needs the package {backend}, which cannot be imported ({err}). "
            f'pip install {backend}, or use backend="chunked".'
        ) from err


@functools.cache
def _fastest(device: str) -> Backend:
    """The compiled backend of a device, or "chunked" where it is not installed; said once."""
    backend: Backend = "numba" if device == "cpu" else "triton"
    try:
        kernel(backend)
    except NotReadyError as err:
        logger.warning("%s The scan runs in plain torch, many times slower.", err)
        return "chunked"
    logger.info("selective_scan: using the %s kernel on %s.", backend, device)
    return backend


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    if u.ndim != 3 or A.ndim != 2 or B.ndim != 4:
        raise ShapeError(
            f"selective_scan: u is {tuple(u.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)}, expected "
            "(B, G * D, L), (G * D, N) and (B, G, N, L)."
        )
    batch, rows, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    if groups == 0 or rows % groups:
        raise ShapeError(f"selective_scan: u has {rows} rows for {groups} groups in B, expected a multiple.")
    wanted = (
        ("delta", delta, (batch, rows, length)),
        ("A", A, (rows, states)),
        ("B", B, (batch, groups, states, length)),
        ("C", C, (batch, groups, states, length)),
        ("D", D, (rows,)),
        ("delta_bias", delta_bias, (rows,)),
    )
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(f"selective_scan: {name} is {tuple(tensor.shape)}, expected {shape} to fit u and B.")
        if tensor is not None and tensor.device != u.device:
            raise ShapeError(f"selective_scan: {name} is on {tensor.device}, u on {u.device}; move them together.")
