"""The selective scan on a CPU, compiled by numba on first use, cached on disk if it can be; no compiler is needed.

A task is one image and one block of `LANES` channels; it walks the sequence in tiles of `TILE` positions.  A tile holds
channels side by side, so one vector instruction updates one state of 8 or 16 channels: no sums across lanes, and B and
C are broadcast.  State and tile stay in the first-level cache.  exp and log1p are polynomials of our own, because a
library call per element would cost more than everything else together.

Plain Python threads share the tasks out (the kernels release the GIL): no second thread pool beside torch's, and safe
when several threads of a service score at once.
"""

from __future__ import annotations

import logging
from itertools import product
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float32]

logger = logging.getLogger(__name__)

LANES = 64
TILE = 32

_f, _i = np.float32, np.int32
_LOG2E = _f(1.4426950408889634)
_ROUND = _f(1.5 * 2**23)  # added to a float32 below 2^22, it leaves the nearest integer in the low bits
# "contract" allows fused multiply-adds; nothing may be reassociated, or adding and taking off _ROUND would cancel.
_FASTMATH = {"contract", "nsz"}


def _can_cache() -> bool:
    """Whether numba finds a folder for what it compiles: beside this file, in the home folder, or NUMBA_CACHE_DIR."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:  # numba looks for the folder when it decorates a function
        logger.info("selective_scan: no folder for compiled kernels can be written, they are compiled at every start.")
        return False
    return True


_kernel = njit(nogil=True, cache=_can_cache(), error_model="numpy", fastmath=_FASTMATH)
_inline = njit(inline="always", error_model="numpy", fastmath=_FASTMATH)


@_inline
def _exp2(x):
    """2^x, relative error 1e-7, for x clamped to [-126, 127.5]: exponent bits times a polynomial of the fraction."""
    x = min(max(x, _f(-126.0)), _f(127.5))
    shifted = x + _ROUND
    return _power(shifted, x - (shifted - _ROUND))


@_inline
def _power(shifted, r):
    """2^(k + r) for r in [-0.5, 0.5] and shifted = k + _ROUND."""
    p = _f(1.53533620e-4)  # minimax fit of (2^r - 1) / r
    p = p * r + _f(1.33988745e-3)
    p = p * r + _f(9.61843736e-3)
    p = p * r + _f(5.55033247e-2)
    p = p * r + _f(2.40226479e-1)
    p = p * r + _f(6.93147203e-1)
    p = p * r + _f(1.0)
    return _i(_f(p).view(_i) + _i(_i(_f(shifted).view(_i)) << _i(23))).view(_f)


@_inline
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), relative error 2e-7.

    A large |x| log2(e) cannot be rounded and stay exact, so the multiple of log(2) is taken off in two parts.
    """
    z = max(-abs(x), _f(-87.0))
    shifted = z * _LOG2E + _ROUND
    k = shifted - _ROUND
    e = _power(shifted, ((z - k * _f(0.693359375)) - k * _f(-2.12194440e-4)) * _LOG2E)
    p = _f(-3.24402562e-3)  # minimax fit of log1p(e) / e on [0, 1]
    p = p * e + _f(1.98514651e-2)
    p = p * e + _f(-5.69595412e-2)
    p = p * e + _f(1.06036558e-1)
    p = p * e + _f(-1.53055933e-1)
    p = p * e + _f(1.96759396e-1)
    p = p * e + _f(-2.49541337e-1)
    p = p * e + _f(3.33299624e-1)
    p = p * e + _f(-4.99999024e-1)
    p = p * e + _f(9.99999995e-1)
    return max(x, _f(0.0)) + p * e


@intrinsic
def _wide_vectors(typing_context):
    """Let LLVM use 512-bit registers in the calling function where the CPU has them, not 256: twice as fast here."""

    def generate(context, builder, signature, arguments):
        # llvmlite knows no string attributes, so its own check of the name is passed by.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@_kernel
def _advance(state, decay, skip, delta, u, b, c, y, steps, softplus):
    """Run the recurrence over a tile and leave <c, state> + skip * u in y.

    state, decay (N, LANES): h and A * log2(e);  skip (LANES,);  delta, u, y (TILE, LANES), the first two are used up;
    b, c (TILE, N).
    """
    _wide_vectors()
    for t in range(steps):
        if softplus:
            for lane in range(LANES):
                delta[t, lane] = _softplus(delta[t, lane])
        for lane in range(LANES):
            y[t, lane] = skip[lane] * u[t, lane]
            u[t, lane] *= delta[t, lane]
        for n in range(state.shape[0]):
            b_n, c_n = b[t, n], c[t, n]
            for lane in range(LANES):
                h = _exp2(delta[t, lane] * decay[n, lane]) * state[n, lane] + u[t, lane] * b_n
                state[n, lane] = h
                y[t, lane] += h * c_n


@_kernel
def _scan_rows(u, delta, decay, b, c, skip, softplus, y, image, group, block):
    """One task on sequences: `LANES` channels of one group.

    u, delta (the bias added), y (B, L, G, blocks, LANES); b, c (B, L, G, N); decay (G, blocks, N, LANES) = A * log2(e);
    skip (G, blocks, LANES).
    """
    _wide_vectors()
    length, states = u.shape[1], decay.shape[2]
    state = np.zeros((states, LANES), _f)
    step, x, out = np.empty((TILE, LANES), _f), np.empty((TILE, LANES), _f), np.empty((TILE, LANES), _f)
    tile_b, tile_c = np.empty((TILE, states), _f), np.empty((TILE, states), _f)
    for start in range(0, length, TILE):
        steps = min(TILE, length - start)
        for t in range(steps):
            position = start + t
            for lane in range(LANES):
                x[t, lane] = u[image, position, group, block, lane]
                step[t, lane] = delta[image, position, group, block, lane]
            for n in range(states):
                tile_b[t, n] = b[image, position, group, n]
                tile_c[t, n] = c[image, position, group, n]
        _advance(state, decay[group, block], skip[group, block], step, x, tile_b, tile_c, out, steps, softplus)
        for t in range(steps):
            for lane in range(LANES):
                y[image, start + t, group, block, lane] = out[t, lane]


@_kernel
def _scan_image(u, projected, weight, bias, decay, skip, y, height, width, image, half, block):
    """One task on an image: `LANES` channels along two of the four walks, read and summed in place.

    u (B, H * W, blocks, LANES); projected (B, H * W, 4, R + 2N) = time step, B and C of every walk; weight (4, blocks,
    R, LANES); bias, skip (4, blocks, LANES); decay (4, blocks, N, LANES) = A * log2(e); y (2, B, H * W, blocks, LANES),
    zero: half 0 takes the forward walks and half 1 the backward ones, so that no two tasks write to one place.
    """
    _wide_vectors()
    length, ranks, states = u.shape[1], weight.shape[2], decay.shape[2]
    state = np.empty((states, LANES), _f)
    step, x, out = np.empty((TILE, LANES), _f), np.empty((TILE, LANES), _f), np.empty((TILE, LANES), _f)
    tile_b, tile_c = np.empty((TILE, states), _f), np.empty((TILE, states), _f)
    pixel = np.empty(TILE, np.int64)
    for walk in range(2 * half, 2 * half + 2):
        state[:] = 0.0
        for start in range(0, length, TILE):
            steps = min(TILE, length - start)
            for t in range(steps):
                position = length - 1 - start - t if half else start + t
                if walk % 2:  # down the columns
                    position = (position % height) * width + position // height
                pixel[t] = position
                for lane in range(LANES):
                    x[t, lane] = u[image, position, block, lane]
                    step[t, lane] = bias[walk, block, lane]
                for r in range(ranks):
                    rank = projected[image, position, walk, r]
                    for lane in range(LANES):
                        step[t, lane] += rank * weight[walk, block, r, lane]
                for n in range(states):
                    tile_b[t, n] = projected[image, position, walk, ranks + n]
                    tile_c[t, n] = projected[image, position, walk, ranks + states + n]
            _advance(state, decay[walk, block], skip[walk, block], step, x, tile_b, tile_c, out, steps, True)
            for t in range(steps):
                for lane in range(LANES):
                    y[half, image, pixel[t], block, lane] += out[t, lane]


def scan_rows(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, *, delta_softplus: bool
) -> Tensor:
    """`selective_scan` of float32 CPU tensors; see there.

    Args:
        u: (B, G * D, L).
        delta: (B, G * D, L), the bias added.
        a: (G * D, N).
        b: (B, G, N, L).
        c: (B, G, N, L).
        skip: (G * D,).
        delta_softplus: Apply it to `delta`.

    Returns:
        (B, G * D, L).
    """
    groups, length = b.shape[1], u.shape[2]

    def by_lanes(rows: Tensor) -> Array:  # (B, G * D, L) -> (B, L, G, blocks, LANES)
        return _blocks(rows.reshape(len(rows), groups, -1, length).permute(0, 3, 1, 2))

    x = by_lanes(u)
    y = np.empty_like(x)
    arguments = (
        *(x, by_lanes(delta), _by_block(a.reshape(groups, -1, a.shape[1]).mT * _LOG2E.item())),
        *(b.permute(0, 3, 1, 2).contiguous().numpy(), c.permute(0, 3, 1, 2).contiguous().numpy()),
        *(_blocks(skip.reshape(groups, -1)), delta_softplus, y),
    )
    _share_out(_scan_rows, arguments, product(range(len(u)), range(groups), range(x.shape[3])))
    merged = torch.from_numpy(y).flatten(3)[..., : u.shape[1] // groups]  # (B, L, G, D)
    return merged.permute(0, 2, 3, 1).reshape(len(u), -1, length)


def scan_image(u: Tensor, projected: Tensor, weight: Tensor, bias: Tensor, a: Tensor, skip: Tensor) -> Tensor:
    """`cross_selective_scan` of float32 CPU tensors; see there.

    Args:
        u: (B, H, W, D).
        projected: (B, H, W, 4, R + 2N).
        weight: (4, D, R).
        bias: (4, D).
        a: (4, D, N).
        skip: (4, D).

    Returns:
        (B, H, W, D).
    """
    batch, height, width, channels = u.shape
    x = _blocks(u.flatten(1, 2))
    y = np.zeros((2, *x.shape), np.float32)
    arguments = (
        *(x, projected.flatten(1, 2).contiguous().numpy()),
        *(_by_block(weight.mT), _blocks(bias), _by_block(a.mT * _LOG2E.item()), _blocks(skip)),
        *(y, height, width),
    )
    _share_out(_scan_image, arguments, product(range(batch), range(2), range(x.shape[2])))
    merged = torch.from_numpy(y[0]).add_(torch.from_numpy(y[1]))
    return merged.flatten(2)[..., :channels].reshape(batch, height, width, channels)


def _blocks(channels_last: Tensor) -> Array:
    """(..., D) -> (..., blocks, LANES), contiguous, the last block filled up with zeros."""
    missing = -channels_last.shape[-1] % LANES
    if missing:
        channels_last = torch.nn.functional.pad(channels_last, (0, missing))
    blocks: Array = channels_last.reshape(*channels_last.shape[:-1], -1, LANES).contiguous().numpy()
    return blocks


def _by_block(rows: Tensor) -> Array:
    """(G, n, D) -> (G, blocks, n, LANES), contiguous."""
    return np.ascontiguousarray(_blocks(rows).swapaxes(1, 2))


def _share_out(kernel: Callable[..., None], arguments: tuple[object, ...], tasks: Iterator[tuple[int, ...]]) -> None:
    """Run the kernel on every task, in as many threads as torch uses; each takes the next task when it is free."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for task in tasks:
                kernel(*arguments, *task)
        except BaseException as failure:
            failures.append(failure)

    threads = [Thread(target=work, daemon=True) for _ in range(torch.get_num_threads() - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
