"""Slow definitions of the paired tests: every pair of images in turn; independent of anatomaly."""

import math


def kernel(anomalous, normal):
    return 1.0 if anomalous > normal else 0.5 if anomalous == normal else 0.0


def auroc(scores, labels):
    anomalous, normal = split(scores, labels)
    return sum(kernel(a, n) for a in anomalous for n in normal) / (len(anomalous) * len(normal))


def split(scores, labels):
    return [s for s, y in zip(scores, labels, strict=True) if y], [
        s for s, y in zip(scores, labels, strict=True) if not y
    ]


def mean_kernel(draws, i, j):
    return sum(kernel(scores[i], scores[j]) for scores in draws) / len(draws)


def components(draws, labels):
    """{anomalous image: V10}, {normal image: V01} of the kernel averaged over the draws."""
    anomalous = [i for i, y in enumerate(labels) if y]
    normal = [j for j, y in enumerate(labels) if not y]
    v10 = {i: sum(mean_kernel(draws, i, j) for j in normal) / len(normal) for i in anomalous}
    v01 = {j: sum(mean_kernel(draws, i, j) for i in anomalous) / len(anomalous) for j in normal}
    return v10, v01


def delong_variance(draws_a, draws_b, labels):
    """Variance of AUROC(a) - AUROC(b): L S L' of the 2 x 2 covariance matrix S = S10 / m + S01 / n."""
    total = 0.0
    for of_a, of_b in zip(components(draws_a, labels), components(draws_b, labels), strict=True):
        items = list(of_a)
        mean_a, mean_b = sum(of_a.values()) / len(items), sum(of_b.values()) / len(items)
        aa = sum((of_a[i] - mean_a) ** 2 for i in items) / (len(items) - 1)
        bb = sum((of_b[i] - mean_b) ** 2 for i in items) / (len(items) - 1)
        ab = sum((of_a[i] - mean_a) * (of_b[i] - mean_b) for i in items) / (len(items) - 1)
        total += (aa + bb - 2 * ab) / len(items)
    return total


def obuchowski_variance(draws_a, draws_b, labels, groups):
    """The same for clustered images: S10, S01 and S11 of the 1997 paper, entry by entry."""
    methods = [components(draws, labels) for draws in (draws_a, draws_b)]
    theta = [sum(v10.values()) / len(v10) for v10, _ in methods]
    m, n = len(methods[0][0]), len(methods[0][1])
    clusters = sorted(set(groups))
    of_cluster = {c: [i for i, g in enumerate(groups) if g == c] for c in clusters}
    with_anomalous = [c for c in clusters if any(labels[i] for i in of_cluster[c])]
    with_normal = [c for c in clusters if any(not labels[i] for i in of_cluster[c])]

    def deviation(method, kind, c):
        values = methods[method][kind]
        inside = [values[i] for i in of_cluster[c] if i in values]
        return sum(inside) - len(inside) * theta[method]

    def covariance(k, r):
        i10, i01, i = len(with_anomalous), len(with_normal), len(clusters)
        s10 = i10 / ((i10 - 1) * m) * sum(deviation(k, 0, c) * deviation(r, 0, c) for c in with_anomalous)
        s01 = i01 / ((i01 - 1) * n) * sum(deviation(k, 1, c) * deviation(r, 1, c) for c in with_normal)
        s11 = i / (i - 1) * sum(deviation(k, 0, c) * deviation(r, 1, c) for c in clusters)
        s11_back = i / (i - 1) * sum(deviation(r, 0, c) * deviation(k, 1, c) for c in clusters)
        return s10 / m + s01 / n + (s11 + s11_back) / (m * n)

    return covariance(0, 0) + covariance(1, 1) - 2 * covariance(0, 1)


def two_sided(difference, variance):
    return math.erfc(abs(difference) / math.sqrt(variance) / math.sqrt(2.0))


def holm(p_values):
    """Smallest level at which the step-down procedure rejects each hypothesis, found by running the procedure."""

    def rejected(level):
        left = sorted(range(len(p_values)), key=lambda i: p_values[i])
        found = set()
        while left and p_values[left[0]] * len(left) <= level:
            found.add(left.pop(0))
        return found

    levels = sorted({min(1.0, p * k) for p in p_values for k in range(1, len(p_values) + 1)} | {1.0})
    return [next((level for level in levels if i in rejected(level)), 1.0) for i in range(len(p_values))]
