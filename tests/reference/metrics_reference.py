"""Slow definitions of the metrics: every threshold in turn, every pixel looked at; independent of anatomaly."""

from itertools import pairwise

import numpy as np


def auroc(scores, labels):
    """Share of (anomalous, normal) pairs in the right order, ties one half."""
    anomalous = [s for s, label in zip(scores, labels, strict=True) if label]
    normal = [s for s, label in zip(scores, labels, strict=True) if not label]
    won = sum(1.0 if a > n else 0.5 if a == n else 0.0 for a in anomalous for n in normal)
    return won / (len(anomalous) * len(normal))


def _confusions(scores, labels):
    """(true positives, false positives, false negatives) of "score >= t" for every distinct t, from high to low."""
    for threshold in sorted(set(scores), reverse=True):
        called = [s >= threshold for s in scores]
        hits = sum(c and bool(label) for c, label in zip(called, labels, strict=True))
        yield hits, sum(called) - hits, sum(map(bool, labels)) - hits


def average_precision(scores, labels):
    area, last_recall = 0.0, 0.0
    for hits, false, missed in _confusions(scores, labels):
        recall = hits / (hits + missed)
        area += (recall - last_recall) * hits / (hits + false)
        last_recall = recall
    return area


def f1_max(scores, labels):
    """Also the best Dice when fed with pixels."""
    return max(2 * hits / (2 * hits + false + missed) for hits, false, missed in _confusions(scores, labels))


def regions(mask):
    """Lists of (row, column) of the 8-connected regions, by flood fill."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    found = []
    while left:
        region, front = [], [left.pop()]
        while front:
            row, column = front.pop()
            region.append((row, column))
            for neighbour in [(row + dr, column + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    front.append(neighbour)
        found.append(region)
    return found


def aupro(maps, masks, limit=0.3):
    """Walk down the thresholds, keep (FPR, PRO) points, join them by lines, cut at the limit, divide by it."""
    lesions = [(index, region) for index, mask in enumerate(masks) for region in regions(mask)]
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for m in maps for v in np.ravel(m)}, reverse=True):
        false = normal = 0
        for anomaly_map, mask in zip(maps, masks, strict=True):
            for score, lesion in zip(np.ravel(anomaly_map), np.ravel(mask), strict=True):
                if not lesion:
                    normal += 1
                    false += bool(score >= threshold)
        overlaps = [sum(bool(maps[i][pixel] >= threshold) for pixel in region) / len(region) for i, region in lesions]
        points.append((false / normal, sum(overlaps) / len(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit
