"""The selective scan and its four walks over an image in plain float64 loops; independent of anatomaly and of torch."""

import numpy as np


def softplus(x):
    return np.logaddexp(0.0, x)


def recurrence(u, delta, A, B, C, D):
    """One sequence, position after position: u, delta (L, D); A (D, N); B, C (L, N); D (D,) -> y (L, D)."""
    state = np.zeros(A.shape)
    y = np.zeros(u.shape)
    for position in range(len(u)):
        step = delta[position][:, None]
        state = np.exp(step * A) * state + step * B[position][None, :] * u[position][:, None]
        y[position] = (state * C[position]).sum(axis=1) + D * u[position]
    return y


def selective_scan(u, delta, A, B, C, D=None, *, delta_bias=None, delta_softplus=False):
    """u, delta (B, G * D, L); A (G * D, N); B, C (B, G, N, L); D, delta_bias (G * D,) -> y (B, G * D, L)."""
    u, delta, A, B, C = (np.asarray(array, np.float64) for array in (u, delta, A, B, C))
    rows, groups = u.shape[1], B.shape[1]
    D = np.zeros(rows) if D is None else np.asarray(D, np.float64)
    bias = np.zeros(rows) if delta_bias is None else np.asarray(delta_bias, np.float64)
    delta = delta + bias[:, None]
    if delta_softplus:
        delta = softplus(delta)
    y = np.zeros(u.shape)
    for image in range(len(u)):
        for group in range(groups):
            own = slice(group * rows // groups, (group + 1) * rows // groups)
            y[image, own] = recurrence(
                *(u[image, own].T, delta[image, own].T, A[own]), *(B[image, group].T, C[image, group].T, D[own])
            ).T
    return y


def walks(height, width):
    """The pixels in the order of each walk: along the rows, down the columns, and both backwards."""
    rows = [(row, column) for row in range(height) for column in range(width)]
    columns = [(row, column) for column in range(width) for row in range(height)]
    return rows, columns, rows[::-1], columns[::-1]


def cross_selective_scan(u, projected, dt_weight, dt_bias, A, D):
    """u (B, H, W, D); projected (B, H, W, 4, R + 2N); dt_weight (4, D, R); dt_bias, D (4, D); A (4, D, N)."""
    u, projected, dt_weight, dt_bias, A, D = (
        np.asarray(array, np.float64) for array in (u, projected, dt_weight, dt_bias, A, D)
    )
    ranks, states = dt_weight.shape[2], A.shape[2]
    y = np.zeros(u.shape)
    for image in range(len(u)):
        for walk, pixels in enumerate(walks(*u.shape[1:3])):
            told = np.array([projected[image, row, column, walk] for row, column in pixels])
            x = np.array([u[image, row, column] for row, column in pixels])
            delta = softplus(told[:, :ranks] @ dt_weight[walk].T + dt_bias[walk])
            b, c = told[:, ranks : ranks + states], told[:, ranks + states :]
            for (row, column), value in zip(pixels, recurrence(x, delta, A[walk], b, c, D[walk]), strict=True):
                y[image, row, column] += value
    return y
