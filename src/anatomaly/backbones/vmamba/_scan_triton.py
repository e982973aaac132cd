"""The selective scan on CUDA, in Triton.

A program takes one channel of one walk.  It treats `BLOCK` positions at once: every position's step (a, b), meaning
h -> a h + b, is joined with those before it by an associative scan; the state that enters the block is added to the
result and the last state is handed to the next block.  Images are read and written in place through their strides; only
the order of the positions differs from walk to walk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 64


@triton.jit
def _join(a_first, b_first, a_then, b_then):
    return a_first * a_then, a_then * b_first + b_then


@triton.jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log1p(e) = log(u) e / (u - 1) with the rounding of u undone (Higham); e itself where u is 1.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _scan(
    u,
    delta,
    a,
    b,
    c,
    skip,
    y,
    channels,
    groups,
    length,
    height,
    width,
    u_batch,
    u_group,
    u_channel,
    u_position,
    delta_batch,
    delta_group,
    delta_channel,
    delta_position,
    b_batch,
    b_group,
    b_state,
    b_position,
    y_batch,
    y_group,
    y_channel,
    y_position,
    states: tl.constexpr,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WALKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    channel = program % channels
    group = (program // channels) % groups
    batch = program // (channels * groups)
    n = tl.arange(0, STATES)
    row = group * channels + channel
    decay = tl.load(a + row * states + n, mask=n < states, other=0.0)
    direct = tl.load(skip + row)
    h = tl.zeros((STATES,), tl.float32)
    steps = tl.arange(0, BLOCK)
    for start in range(0, length, BLOCK):
        order = start + steps
        inside = order < length
        place = order.to(tl.int64)
        if WALKS:  # 0 by rows, 1 by columns, 2 and 3 the same backwards
            place = tl.where(group >= 2, length - 1 - place, place)
            place = tl.where(group % 2 == 1, (place % height) * width + place // height, place)
        x = tl.load(u + batch * u_batch + group * u_group + channel * u_channel + place * u_position, inside, 0.0)
        at = delta + batch * delta_batch + group * delta_group + channel * delta_channel + place * delta_position
        step = tl.load(at, inside, 0.0)
        if SOFTPLUS:
            step = _softplus(step)
        both = inside[None, :] & (n < states)[:, None]
        offset = batch * b_batch + group * b_group + n[:, None] * b_state + place[None, :] * b_position
        into = tl.load(b + offset, both, 0.0)  # (STATES, BLOCK)
        out = tl.load(c + offset, both, 0.0)
        share, state = tl.associative_scan(
            (tl.exp(step[None, :] * decay[:, None]), (step * x)[None, :] * into), 1, _join
        )
        state += share * h[:, None]
        h = tl.sum(tl.where((steps == BLOCK - 1)[None, :], state, 0.0), 1)
        result = tl.sum(state * out, 0) + direct * x
        tl.store(y + batch * y_batch + group * y_group + channel * y_channel + place * y_position, result, inside)


def scan_rows(
    u: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    *,
    delta_softplus: bool,
) -> torch.Tensor:
    """`selective_scan` of float32 tensors; shapes as in `_scan_numba.scan_rows`."""
    batch, rows, length = u.shape
    groups = b.shape[1]
    shape = (batch, groups, rows // groups, length)
    y = torch.empty(shape, device=u.device)
    _launch(u.reshape(shape), delta.reshape(shape), a, b, c, skip, y, delta_softplus=delta_softplus)
    return y.reshape(u.shape)


def scan_image(
    u: torch.Tensor,
    projected: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    a: torch.Tensor,
    skip: torch.Tensor,
) -> torch.Tensor:
    """`cross_selective_scan` of float32 tensors; shapes as in `_scan_numba.scan_image`."""
    batch, height, width, channels = u.shape
    ranks, states = weight.shape[2], a.shape[2]
    flat = projected.reshape(batch, height * width, 4, -1)
    delta = torch.einsum("blgr,gdr->blgd", flat[..., :ranks], weight) + bias  # (B, L, 4, D)
    walks = u.reshape(batch, 1, height * width, channels).expand(-1, 4, -1, -1)
    b, c = flat[..., ranks : ranks + states], flat[..., ranks + states :]
    y = torch.empty(batch, 4, height * width, channels, device=u.device)
    _launch(
        walks.mT,
        delta.permute(0, 2, 3, 1),
        a.reshape(-1, states),
        *(b.permute(0, 2, 3, 1), c.permute(0, 2, 3, 1)),
        skip.reshape(-1),
        y.mT,
        delta_softplus=True,
        size=(height, width),
    )
    return y.sum(1).reshape(u.shape)


def _launch(
    u: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    y: torch.Tensor,
    *,
    delta_softplus: bool,
    size: tuple[int, int] | None = None,
) -> None:
    """Fill y (B, G, D, L) from u and delta (B, G, D, L) and b, c (B, G, N, L) of equal strides; any strides."""
    batch, groups, channels, length = u.shape
    states = a.shape[1]
    if u.numel() == 0:
        return
    if b.stride() != c.stride():
        b, c = b.contiguous(), c.contiguous()
    height, width = size or (1, length)
    _scan[(batch * groups * channels,)](
        *(u, delta, a.contiguous(), b, c, skip.contiguous(), y),
        *(channels, groups, length, height, width),
        *(*u.stride(), *delta.stride(), *b.stride(), *y.stride()),
        states=states,
        STATES=triton.next_power_of_2(states),
        SOFTPLUS=delta_softplus,
        WALKS=size is not None,
        BLOCK=BLOCK,
    )
