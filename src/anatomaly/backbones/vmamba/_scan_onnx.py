"""The selective scan in standard ONNX operators; exists only while a model is being exported.

`scan_rows` leaves one node of our own domain in the exported graph, and `expand_scans` replaces it by ONNX operators.
Their body is the operator `Scan` with as little as possible inside, because onnxruntime needs some microseconds per
operator and iteration:

- several states a channel: L iterations.  One position has thousands of numbers, which outweighs that.
- one state a channel (VMamba s1l8): the walk is cut into M pieces of T positions, T near the root of L.  One `Scan`
  over T runs all pieces side by side from a zero state, a second one over M hands the state from piece to piece, and
  every position adds its share of it: T + M iterations instead of L.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from anatomaly.errors import NotReadyError

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

OPSET = 20
DOMAIN = "anatomaly"
_NAME = "SelectiveScan"


def scan_rows(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, *, delta_softplus: bool
) -> Tensor:
    """`selective_scan` of float32 tensors as one node of the graph; shapes as in `_scan_numba.scan_rows`.

    Raises:
        NotReadyError: Nothing is being exported, or torch is too old.
    """
    if not torch.compiler.is_exporting():
        raise NotReadyError('selective_scan: backend "onnx" computes nothing, it is for export_teacher. Use "auto".')
    if not hasattr(torch.onnx, "ops"):
        raise NotReadyError(f"export: torch {torch.__version__} cannot export the scan, 2.8 or newer is needed.")
    groups, states, length = b.shape[1:]
    softplus = int(delta_softplus)
    node: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{_NAME}_{groups}_{u.shape[1] // groups}_{states}_{length}_{softplus}",
        (u, delta, a, b, c, skip),
        dtype=torch.float32,
        shape=u.shape,
        version=1,
    )
    return node


def expand_scans(model: ModelProto) -> ModelProto:
    """Replace the nodes of `scan_rows` by standard operators.

    Args:
        model: Of opset `OPSET`; its graph is read, not changed.
    """
    import onnx.inliner
    import onnx.parser

    names = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    if not names:
        return model
    whole = type(model)()
    whole.CopyFrom(model)
    for name in sorted(names):
        whole.functions.append(onnx.parser.parse_function(_function(name)))
    inlined: ModelProto = onnx.inliner.inline_local_functions(whole)
    used = [entry for entry in inlined.opset_import if entry.domain != DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(used)
    return inlined


def _function(name: str) -> str:
    """The scan as a function in ONNX's text form, for the sizes in its name.

    Inside, positions are first: (T, B, M, ...) with M = 1 piece unless there is one state a channel.
    """
    groups, channels, states, length, softplus = map(int, name.split("_")[1:])
    pieces = length // _divisor_near_root(length) if states == 1 else 1
    rows, positions = groups * channels, length // pieces
    scan = _one_state(groups, channels, pieces) if states == 1 else _many_states(groups, channels, states)

    def to_front(out: str, tensor: str, own_rows: int, shape: str) -> str:  # (B, rows, L) -> (T, B, M, *shape)
        return f"""
        {out}_last = Transpose <perm = [0, 2, 1]> ({tensor})
        {out}_cut_shape = Constant <value_ints = [0, {pieces}, {positions}, {own_rows}]> ()
        {out}_cut = Reshape ({out}_last, {out}_cut_shape)
        {out}_front = Transpose <perm = [2, 0, 1, 3]> ({out}_cut)
        {out}_shape = Constant <value_ints = [0, 0, 0, {shape}]> ()
        {out} = Reshape ({out}_front, {out}_shape)"""

    return f"""
    <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
    {name} (u, delta, a, b, c, skip) => (y) {{
        step = {"Softplus" if softplus else "Identity"} (delta)
        scaled = Mul (step, u)
        flat = Constant <value_ints = [0, {groups * states}, {length}]> ()
        b_flat = Reshape (b, flat)
        c_flat = Reshape (c, flat)
        {to_front("d", "step", rows, f"{groups}, 1, {channels}")}
        {to_front("x", "scaled", rows, f"{groups}, 1, {channels}")}
        {to_front("b_n", "b_flat", groups * states, f"{groups}, {states}, 1")}
        {to_front("c_n", "c_flat", groups * states, f"{groups}, 1, {states}")}
        a_shape = Constant <value_ints = [{groups}, {channels}, {states}]> ()
        a_rows = Reshape (a, a_shape)
        a_n = Transpose <perm = [0, 2, 1]> (a_rows)
        batch = Shape <start = 0, end = 1> (u)
        state_shape = Constant <value_ints = [{pieces}, {groups}, {states}, {channels}]> ()
        whole_state_shape = Concat <axis = 0> (batch, state_shape)
        zero = ConstantOfShape (whole_state_shape)
        {scan}
        sum_shape = Constant <value_ints = [0, 0, 0, {rows}]> ()
        sum_front = Reshape (sum, sum_shape)
        sum_cut = Transpose <perm = [1, 2, 0, 3]> (sum_front)
        sum_last_shape = Constant <value_ints = [0, {length}, {rows}]> ()
        sum_last = Reshape (sum_cut, sum_last_shape)
        sum_rows = Transpose <perm = [0, 2, 1]> (sum_last)
        skip_shape = Constant <value_ints = [{rows}, 1]> ()
        skip_rows = Reshape (skip, skip_shape)
        skipped = Mul (u, skip_rows)
        y = Add (sum_rows, skipped)
    }}"""


def _many_states(groups: int, channels: int, states: int) -> str:
    """One Scan over all positions.

    From d, x = d * u (T, B, 1, G, 1, D), b_n (T, B, 1, G, N, 1), c_n (T, B, 1, G, 1, N), a_n (G, N, D) and zero
    (B, 1, G, N, D) to sum (T, B, 1, G, 1, D).  Sizes in the body are numbers: onnxruntime takes names for one size in
    the whole graph and reuses memory accordingly.
    """
    before = f"?, 1, {groups}"
    row, state = f"{before}, 1, {channels}", f"{before}, {states}, {channels}"
    return f"""
        end, sum = Scan <num_scan_inputs = 4, body = position (
            float[{state}] h, float[{row}] d_t, float[{row}] x_t,
            float[{before}, {states}, 1] b_t, float[{before}, 1, {states}] c_t
        ) => (float[{state}] h_next, float[{row}] y_t) {{
            exponent = Mul (d_t, a_n)
            decay = Exp (exponent)
            kept = Mul (decay, h)
            drive = Mul (x_t, b_t)
            h_next = Add (kept, drive)
            y_t = MatMul (c_t, h_next)
        }}> (zero, d, x, b_n, c_n)"""


def _one_state(groups: int, channels: int, pieces: int) -> str:
    """The same for N = 1 and M pieces: a Scan over the positions of all pieces, and one over the pieces.

    share is what is left of a piece's first state, begins those first states.
    """
    row, carried = f"?, {pieces}, {groups}, 1, {channels}", f"?, {groups}, 1, {channels}"
    return f"""
        exponent = Mul (d, a_n)
        decay = Exp (exponent)
        drive = Mul (x, b_n)
        one = Exp (zero)
        end, share_end, local, share = Scan <num_scan_inputs = 2, body = position (
            float[{row}] h, float[{row}] p, float[{row}] a_t, float[{row}] x_t
        ) => (
            float[{row}] h_next, float[{row}] p_next,
            float[{row}] h_t, float[{row}] p_t
        ) {{
            kept = Mul (a_t, h)
            h_next = Add (kept, x_t)
            p_next = Mul (a_t, p)
            h_t = Identity (h_next)
            p_t = Identity (p_next)
        }}> (zero, one, decay, drive)
        first = Constant <value_ints = [0]> ()
        after = Constant <value_ints = [1]> ()
        one_axis = Constant <value_ints = [1]> ()
        zero_piece = Slice (zero, first, after, one_axis)
        start = Squeeze (zero_piece, one_axis)
        last, begins = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1], body = piece (
            float[{carried}] carried, float[{carried}] p_end, float[{carried}] h_end
        ) => (float[{carried}] carried_next, float[{carried}] begin) {{
            left = Mul (p_end, carried)
            carried_next = Add (left, h_end)
            begin = Identity (carried)
        }}> (start, share_end, end)
        handed = Mul (share, begins)
        state = Add (local, handed)
        sum = Mul (state, c_n)"""


def _divisor_near_root(length: int) -> int:
    """The largest divisor of `length` that is not above its root."""
    return next(divisor for divisor in range(math.isqrt(length), 0, -1) if length % divisor == 0)
