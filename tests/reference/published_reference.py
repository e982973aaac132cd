"""The evaluations of the two releases in loops, from their descriptions; imports nothing of the package."""

import math

import numpy as np


def gaussian_matrix(length, sigma):
    """Weights (length, length) of a Gaussian cut off at 4 sigma, mirrored at both ends: d c b a | a b c d | d c b a."""
    radius = int(4 * sigma + 0.5)
    kernel = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-radius, radius + 1)]
    weights = np.zeros((length, length))
    for place in range(length):
        for step, weight in zip(range(-radius, radius + 1), kernel, strict=True):
            source = (place + step) % (2 * length)
            weights[place, source if source < length else 2 * length - 1 - source] += weight / sum(kernel)
    return weights


def blurred_alone(plane, sigma=4.0):
    return gaussian_matrix(plane.shape[0], sigma) @ plane @ gaussian_matrix(plane.shape[1], sigma).T


def sound(maps, sigma=4.0, pool=np.max):
    return [float(pool(blurred_alone(np.asarray(plane, float), sigma))) for plane in maps]


def published_d24fad(maps, sigma=4.0, batch=16):
    """Scores of all whole batches of maps in file order; the Gaussian runs along the batch, too."""
    scores = []
    across = gaussian_matrix(batch, sigma)
    for start in range(0, len(maps) - batch + 1, batch):
        planes = [blurred_alone(np.asarray(plane, float), sigma) for plane in maps[start : start + batch]]
        scores += [max(sum(w * p for w, p in zip(row, planes, strict=True)).ravel()) for row in across]
    return scores


def published_pdd(maps, labels, sigma=4.0, batch=10):
    """(scores, labels) of the first image of every batch, the last, incomplete one included."""
    scores, classes = [], []
    for start in range(0, len(maps), batch):
        scores.append(float(blurred_alone(np.asarray(maps[start], float), sigma).max()))
        classes.append(max(labels[start : start + batch]))
    return scores, classes


def auroc(scores, labels):
    wins = [
        1.0 if a > n else 0.5 if a == n else 0.0
        for a, la in zip(scores, labels, strict=True)
        if la
        for n, ln in zip(scores, labels, strict=True)
        if not ln
    ]
    return sum(wins) / len(wins)
