"""How well anomaly maps find the lesion pixels: in one pass over any number of maps, or exactly over a few.

`PixelCounts` is what `evaluate` uses: each map is counted and forgotten, and every figure comes with a bound on how far
it can be from the exact one.  `pixel_metrics` is the definition: exact, ties included, with all maps at hand.
Scores are raw and unbounded; only their order counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

#: AUPRO is the area under the per-region overlap up to this false positive rate (the convention since MVTec AD).
AUPRO_LIMIT = 0.3
#: Names of the figures.
PIXEL_METRICS = ("pixel_auroc", "aupro", "dice_max", "dice_floor")

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

_LOW_BITS = 8  # of a score's 32 are not told apart; 15 of the 23 behind the leading one of its fraction remain
_PAGE_BITS = 8  # 256 neighbouring bins are held together, or not at all
_PAGE = 1 << _PAGE_BITS
_SEVERAL = (1 << _LOW_BITS) + 1  # see `PixelCounts._only`


_Number = TypeVar("_Number", np.int16, np.int64, np.float64)


class _Curve(NamedTuple):
    """The thresholds that find lesion pixels, by ascending score; each (T,)."""

    pixels: Integers  # lesion pixels of just this score
    shares: Floats  # what they make up of their regions, summed
    hits: Integers  # lesion pixels that score at least as high
    false_alarms: Integers  # normal pixels that score at least as high
    outright: Integers  # of these, the ones that score strictly higher; the rest are ties
    normals: int  # normal pixels in all


class PixelCounts:
    """Lesion and normal pixels counted by score, one map at a time, and the metrics that follow from the counts.

    Scores fall into bins by the first 24 bits of their float32, at most 3e-5 of the score wide; pixels of one bin count
    as ties.  Only bins near a score that occurred are held: the memory depends on the range of the scores (0.85 MB for
    every factor of two, 436 MB for all float32 numbers there are) and not on the number of maps.

    Attributes:
        lesion_pixels: Lesion pixels counted so far.
        normal_pixels: Normal pixels counted so far.

    Example:
        >>> counts, mask = PixelCounts(), np.zeros((4, 4), bool)
        >>> mask[1, 1] = True
        >>> counts.add(mask.astype(np.float32), mask)
        >>> counts.metrics()["aupro"], counts.bounds()["aupro"]
        (1.0, 0.0)
    """

    def __init__(self) -> None:
        self.lesion_pixels = self.normal_pixels = 0
        self._place = np.full(1 << (32 - _LOW_BITS - _PAGE_BITS), -1, np.int32)  # where a page is held; -1: nowhere
        self._held = 0  # pages held
        self._normals = np.zeros(0, np.int64)  # by place, then by bin within the page, as all below
        self._lesions = np.zeros(0, np.int64)
        self._shares = np.zeros(0)
        self._only = np.zeros(0, np.int16)  # 1 + low bits of a bin's only score; 0: no score yet; or _SEVERAL

    def add(self, anomaly_map: NDArray[np.float32], mask: Mask, *, shares: Floats | None = None) -> None:
        """Count the pixels of one map.

        Args:
            anomaly_map: (H, W), float32, finite, any range; sizes may differ from map to map.
            mask: (H, W) bool, True = lesion, all False for a normal image.
            shares: `region_shares(mask)`, where one mask meets several maps; found here if not given.

        Raises:
            ValueError: The shapes differ, the mask is not bool, or the map is not finite.
        """
        anomaly_map, mask = _checked(anomaly_map, mask, "PixelCounts.add: the map")
        index, low = self._bins(anomaly_map)
        self._note(index, low)
        lesion = mask.ravel()
        found = int(np.count_nonzero(lesion))
        if found:
            np.add.at(self._lesions, index[lesion], 1)
            np.add.at(self._shares, index[lesion], region_shares(mask) if shares is None else shares)
            index = index[~lesion]
        np.add.at(self._normals, index, 1)
        self.lesion_pixels += found
        self.normal_pixels += len(index)

    def metrics(self) -> dict[str, float]:
        """The figures of `pixel_metrics` for all maps added so far, within `bounds` of them.

        Raises:
            ValueError: No lesion or no normal pixel was added.
        """
        return _figures(self._curve()[0])

    def bounds(self) -> dict[str, float]:
        """How far each of `metrics` can be from its exact value, whatever the order of the scores within the bins.

        A bin whose scores are all the same adds nothing, so the figures of quantised maps are exact.  In any other bin
        the exact curve runs somewhere in the rectangle whose diagonal is drawn instead: the area is off by half the
        rectangle at most (more where AUPRO's limit cuts it).  "dice_max" is reached by a threshold between two bins;
        the bound is what one within a bin could add if all lesion pixels of the bin scored higher than its normal ones.
        Rounding of the sums, 1e-12 and less, is not included.

        Returns:
            By name of the metric, >= 0.

        Raises:
            ValueError: No lesion or no normal pixel was added.
        """
        curve, several = self._curve()
        best = 2.0 * curve.hits / (curve.hits[0] + curve.hits + curve.outright)
        return {
            "pixel_auroc": _slack(curve, several * curve.pixels, limit=1.0) / float(curve.pixels.sum()),
            "aupro": _slack(curve, several * curve.shares, limit=AUPRO_LIMIT) / float(curve.shares.sum()),
            "dice_max": max(0.0, float(np.max(best[several], initial=0.0)) - _dice_max(curve)),
            "dice_floor": 0.0,
        }

    def _bins(self, anomaly_map: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.int16]]:
        """Where each pixel's bin is held, and 1 + the low bits of its score."""
        bits = (anomaly_map.ravel() + np.float32(0)).view(np.int32)  # -0 + 0 is 0: the two are equal
        ordered = (bits ^ (bits >> 31 | np.int32(-(2**31)))).view(np.uint32)  # as integers, in the order of the scores
        low = (ordered & ((1 << _LOW_BITS) - 1)).astype(np.int16) + np.int16(1)
        return self._index((ordered >> _LOW_BITS).astype(np.intp)), low

    def _index(self, bins: NDArray[np.intp]) -> NDArray[np.intp]:
        """Where bins are held, from now on."""
        pages = bins >> _PAGE_BITS
        places = self._place[pages]
        if (places < 0).any():
            self._hold(np.unique(pages[places < 0]))
            places = self._place[pages]
        index: NDArray[np.intp] = places.astype(np.intp) * _PAGE + (bins & (_PAGE - 1))
        return index

    def _hold(self, pages: NDArray[np.intp]) -> None:
        """Make place for pages that are not held yet."""
        self._place[pages] = np.arange(self._held, self._held + len(pages))
        self._held += len(pages)
        if self._held * _PAGE > len(self._normals):
            room = max(self._held, len(self._normals) // _PAGE * 3 // 2) * _PAGE  # untouched zeros take no memory
            self._normals, self._lesions = _lengthened(self._normals, room), _lengthened(self._lesions, room)
            self._shares, self._only = _lengthened(self._shares, room), _lengthened(self._only, room)

    def _note(self, index: NDArray[np.intp], low: NDArray[np.int16]) -> None:
        """Remember the scores that bins hold: the only one, or that there are several."""
        noted = self._only[index]
        if not noted.all():
            self._only[index[noted == 0]] = low[noted == 0]  # of several new ones in a bin the last one stays ...
            noted = self._only[index]
        self._only[index[(noted != low) & (noted != _SEVERAL)]] = _SEVERAL  # ... and the others differ from it

    def _curve(self) -> tuple[_Curve, Mask]:
        """The curve of the bins that hold lesion pixels, and which of these hold several different scores."""
        _require_both_classes("PixelCounts", self.normal_pixels, self.lesion_pixels)
        places = self._place[self._place >= 0]  # in the order of the scores
        ascending = _bins_of(places)
        normals, lesions = self._normals[ascending], self._lesions[ascending]
        false_alarms, hits = np.cumsum(normals[::-1])[::-1], np.cumsum(lesions[::-1])[::-1]
        found = lesions > 0
        curve = _Curve(
            pixels=lesions[found],
            shares=self._shares[ascending[found]],
            hits=hits[found],
            false_alarms=false_alarms[found],
            outright=false_alarms[found] - normals[found],
            normals=self.normal_pixels,
        )
        return curve, self._only[ascending[found]] == _SEVERAL


def _bins_of(pages: NDArray[np.integer]) -> NDArray[np.intp]:
    """The numbers of all bins in some pages."""
    return (pages.astype(np.intp)[:, None] * _PAGE + np.arange(_PAGE)).ravel()


def _lengthened(counts: NDArray[_Number], length: int) -> NDArray[_Number]:
    longer = np.zeros(length, counts.dtype)
    longer[: len(counts)] = counts
    return longer


def region_shares(mask: Mask) -> Floats:
    """The share that each lesion pixel makes up of its region (8-connected): small lesions count as much as large ones.

    Args:
        mask: (H, W) bool.

    Returns:
        (lesion pixels,) in the order of `anomaly_map[mask]`, each in (0, 1]; they sum to the number of regions.

    Example:
        >>> region_shares(np.array([[True, True, False, True]]))
        array([0.5, 0.5, 1. ])
    """
    from scipy import ndimage

    regions, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    region = regions[mask]
    return 1.0 / np.bincount(region)[region]


def pixel_metrics(maps: Sequence[NDArray[np.float32]], masks: Sequence[Mask]) -> dict[str, float]:
    """Measure how well anomaly maps find the lesion pixels, all images pooled; exact, for sets that fit in memory.

    No histogram, no subsampling.  Maps and masks are walked through twice, one at a time, so with sequences that load
    their items on demand the memory peaks near 100 bytes per lesion pixel; normal pixels cost none.

    Args:
        maps: (H, W) each, float32, finite, any range; sizes may differ from image to image.
        masks: (H, W) bool each, True = lesion, all False for a normal image.  Images that are anomalous but have no
            mask must be left out by the caller.

    Returns:
        "pixel_auroc"; "aupro", the overlap averaged over lesions (8-connected regions, so that small ones count as
        much as large ones) integrated over false positive rates 0 to 0.3 and divided by 0.3; "dice_max", the best
        Dice over all thresholds: the threshold is chosen on these very masks, so it is an upper bound for any fixed
        one; "dice_floor", the Dice of calling every pixel a lesion.  All in [0, 1].

    Raises:
        ValueError: No lesion or no normal pixel, shapes or lengths differ, a mask is not bool, a map is not finite.

    Example:
        >>> mask = np.zeros((4, 4), bool)
        >>> mask[1, 1] = True
        >>> pixel_metrics([mask.astype(np.float32)], [mask])["aupro"]
        1.0
    """
    scores, shares = [np.empty(0, np.float32)], [np.empty(0)]
    for anomaly_map, mask in _pairs(maps, masks):
        scores.append(anomaly_map[mask])
        shares.append(region_shares(mask))
    pooled = np.concatenate(scores)
    order = np.argsort(pooled)
    normal = (anomaly_map[~mask] for anomaly_map, mask in _pairs(maps, masks))
    return _figures(_exact_curve(pooled[order], np.concatenate(shares)[order], normal))


def _pairs(maps: Sequence[NDArray[np.float32]], masks: Sequence[Mask]) -> Iterator[tuple[NDArray[np.float32], Mask]]:
    if len(maps) != len(masks):
        raise ValueError(f"pixel_metrics: got {len(maps)} maps and {len(masks)} masks, expected one mask per map.")
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        yield _checked(anomaly_map, mask, f"pixel_metrics: map {index}")


def _checked(item: NDArray[np.float32], mask: Mask, which: str) -> tuple[NDArray[np.float32], Mask]:
    anomaly_map, mask = np.asarray(item, np.float32), np.asarray(mask)
    if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
        raise ValueError(f"{which} is {anomaly_map.shape} and its mask {mask.shape}, expected (H, W) twice.")
    if mask.dtype != np.bool_:  # 0.5 after resampling, 255, class numbers: what counts as lesion is not guessed
        raise ValueError(f"{which} has a mask of {mask.dtype}, expected bool. Pass e.g. mask > 0.")
    if not np.isfinite(anomaly_map).all():
        raise ValueError(f"{which} holds NaN or infinite values, expected finite scores.")
    return anomaly_map, mask


def _exact_curve(lesions: NDArray[np.float32], shares: Floats, normals: Iterable[NDArray[np.float32]]) -> _Curve:
    """One threshold per lesion pixel (given by ascending score); normal scores come in any number of chunks."""
    false_alarms, outright = np.zeros((2, len(lesions) + 1), np.int64)
    total = 0
    for chunk in normals:
        ascending = np.sort(chunk)  # look-ups in order stay in the cache
        np.add.at(outright, np.searchsorted(lesions, ascending, "left"), 1)
        np.add.at(false_alarms, np.searchsorted(lesions, ascending, "right"), 1)
        total += len(chunk)
    _require_both_classes("pixel_metrics", total, len(lesions))
    for histogram in (false_alarms, outright):  # a normal pixel at place i passes the thresholds 0 .. i - 1
        np.cumsum(histogram[::-1], out=histogram[::-1])
    hits = len(lesions) - np.searchsorted(lesions, lesions, "left")
    return _Curve(np.ones(len(lesions), np.int64), shares, hits, false_alarms[1:], outright[1:], total)


def _require_both_classes(where: str, normal: int, lesion: int) -> None:
    if not normal or not lesion:
        raise ValueError(f"{where}: needs both classes, got {normal} normal and {lesion} lesion pixels.")


def _figures(curve: _Curve) -> dict[str, float]:
    lesion_pixels = int(curve.pixels.sum())
    return {
        "pixel_auroc": _area(curve, curve.pixels, limit=1.0),
        "aupro": _area(curve, curve.shares, limit=AUPRO_LIMIT),
        "dice_max": _dice_max(curve),
        "dice_floor": 2.0 * lesion_pixels / (2.0 * lesion_pixels + curve.normals),
    }


def _rises(curve: _Curve, limit: float) -> tuple[Floats, Floats, Floats]:
    """False positive rates between which the curve rises at each threshold, cut at the limit, and how far it gets.

    The rate passes from `start` (normal pixels strictly above) to `stop` (ties included), the curve rises linearly in
    between; what lies beyond the limit is cut off at the limit exactly.
    """
    start, stop = curve.outright / curve.normals, curve.false_alarms / curve.normals
    ties = np.maximum(stop - start, np.finfo(np.float64).tiny)
    start, stop = np.minimum(start, limit), np.minimum(stop, limit)
    return start, stop, (stop - start) / ties  # 0 without ties


def _area(curve: _Curve, weights: Integers | Floats, *, limit: float) -> float:
    """Area under the curve of found weights over false positive rates 0 to `limit`, divided by `limit`."""
    start, stop, risen = _rises(curve, limit)
    beyond = limit - stop + (stop - start) * risen / 2.0  # area that a rise of 1 leaves to its right, up to the limit
    return float(np.average(beyond / limit, weights=weights))


def _slack(curve: _Curve, weights: Integers | Floats, *, limit: float) -> float:
    """How much area at most lies between straight rises and any others, divided by `limit`; not by the weights' sum."""
    start, stop, risen = _rises(curve, limit)
    return float((weights * (stop - start) * (1.0 - risen / 2.0)).sum() / limit)


def _dice_max(curve: _Curve) -> float:
    """The best Dice over all thresholds; thresholds just below no lesion pixel cannot be the best."""
    return float(np.max(2.0 * curve.hits / (curve.hits[0] + curve.hits + curve.false_alarms)))
