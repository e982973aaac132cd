"""Conformal p-values and false discovery control as the definitions say, in exact fractions and loops."""

from fractions import Fraction
from math import comb


def p_value(score, normals):
    """Rank of the score among the normals and itself, from above, ties counted against it."""
    rank = 1
    for normal in normals:
        if normal >= score:
            rank += 1
    return Fraction(rank, len(normals) + 1)


def smallest_n(alpha):
    """The first n for which 1 / (n + 1) reaches alpha, given as a decimal text."""
    n = 1
    while Fraction(1, n + 1) > Fraction(alpha):
        n += 1
    return n


def threshold(normals, alpha):
    """The lowest of the scores above which nothing but p-values up to alpha lies."""
    for candidate in sorted(normals):
        above = p_value(candidate + 1e-9, normals)
        if above <= Fraction(alpha):
            return candidate
    raise ValueError("no such score")


def rejected(p_values, q, dependent=False):
    """Indices that the step-up procedure rejects."""
    m = len(p_values)
    penalty = sum((Fraction(1, i) for i in range(1, m + 1)), Fraction(0)) if dependent else Fraction(1)
    order = sorted(range(m), key=lambda i: p_values[i])
    last = 0
    for rank, index in enumerate(order, 1):
        if p_values[index] * m * penalty <= rank * Fraction(q):
            last = rank
    return set(order[:last])


def rate_below(x, n, j):
    """P(Beta(j, n + 1 - j) <= x) = P(at least j of n uniforms are <= x), a sum over binomials."""
    x = Fraction(x)
    return float(sum(comb(n, i) * x**i * (1 - x) ** (n - i) for i in range(j, n + 1)))
