"""Supports that are slices of volumes: which of them a query slice is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from anatomaly.errors import ConfigError
from anatomaly.scoring import Scored, compare_tensor

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from anatomaly.types import Axis, Method, Sample, Scoring, SupportBank

#: How far apart the same anatomy may lie in two people, as a share of the volume, for `--support_match position`: their
#: fields of view begin and end at other places.
NEAR = 0.1
#: Supports that a query is compared with at least; where fewer are that near, the nearest.
FEWEST = 4

Place = tuple["Axis", float]


def nearby(places: Sequence[Place], query: Place, near: float | None) -> NDArray[np.intp]:
    """Which supports a query is compared with, ascending.

    Args:
        places: Axis and relative position of the K supports.
        query: Of the query.
        near: The farthest relative position; None: anywhere along the same axis.

    Example:
        >>> places = [("axial", 0.0), ("axial", 0.5), ("axial", 0.55), ("coronal", 0.5)]
        >>> nearby(places, ("axial", 0.5), None).tolist()
        [0, 1, 2]
    """
    axis, position = query
    same = np.array([k for k, (other, _) in enumerate(places) if other == axis], np.intp)
    if near is None:
        return same
    apart = np.abs(np.array([places[k][1] for k in same]) - position)
    kept = apart <= near + 1e-9
    if kept.sum() < FEWEST:
        kept = np.isin(np.arange(len(same)), np.argsort(apart, kind="stable")[:FEWEST])
    return same[kept]


def places_of(samples: Sequence[Sample]) -> tuple[Place, ...]:
    """Axis and relative position of supports; empty where they are no slices of volumes.

    Raises:
        ConfigError: Some are and some are not.
    """
    cuts = [sample.cut for sample in samples if sample.cut is not None]
    if len(cuts) not in (0, len(samples)):
        raise ConfigError("support: holds slices of volumes and other images, expected one of both. Separate them.")
    return tuple((cut.axis, cut.position) for cut in cuts)


def supports_of(samples: Sequence[Sample], bank: SupportBank) -> list[NDArray[np.intp]]:
    """What `nearby` says of every query.

    Raises:
        ConfigError: A query is no slice of a volume, or the bank has none of its axis.
    """
    held = " and ".join(sorted({axis for axis, _ in bank.places}))
    found = []
    for sample in samples:
        if sample.cut is None or not any(axis == sample.cut.axis for axis, _ in bank.places):
            got = "an image of no volume" if sample.cut is None else f"a {sample.cut.axis} slice"
            raise ConfigError(
                f"{sample.name}: is {got}, the support holds {held} slices of volumes. "
                "Give --axis as it was given when the support was made."
            )
        found.append(nearby(bank.places, (sample.cut.axis, sample.cut.position), bank.near))
    return found


def compare_placed(
    method: Method,
    encoded: Sequence[Tensor],
    support: Mapping[str, Tensor],
    *,
    supports: Sequence[NDArray[np.intp]],
    size: tuple[int, int],
    scoring: Scoring,
) -> Scored:
    """`scoring.compare_tensor`, every query with supports of its own.

    Args:
        method: In eval mode.
        encoded: Of B queries.
        support: Of K supports.
        supports: B selections of them, from `nearby`.
        size: (H, W) of the maps.
        scoring: Blur and pooling.

    Returns:
        As `compare_tensor`; supports that a query was not compared with have the weight 0.
    """
    shots = len(next(iter(support.values())))
    queries: dict[bytes, list[int]] = {}
    for number, chosen in enumerate(supports):
        queries.setdefault(chosen.tobytes(), []).append(number)
    rows: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    for numbers in queries.values():
        chosen = supports[numbers[0]]
        bank = support if len(chosen) == shots else {name: tensor[chosen] for name, tensor in support.items()}
        scored = compare_tensor(method, [level[numbers] for level in encoded], bank, size=size, scoring=scoring)
        weights = scored.weights
        if weights is not None:
            spread = weights.new_zeros(*weights.shape[:2], shots)
            spread[:, :, torch.from_numpy(chosen).to(weights.device)] = weights
            weights = spread
        for place, number in enumerate(numbers):
            rows[number] = scored.maps[place], scored.scores[place], None if weights is None else weights[place]
    maps, scores, weights_of = zip(*(rows[number] for number in range(len(supports))), strict=True)
    known = [each for each in weights_of if each is not None]
    return Scored(torch.stack(maps), torch.stack(scores), torch.stack(known) if known else None)


def judge_supports(
    method: Method,
    encoded: Sequence[Tensor],
    support: Mapping[str, Tensor],
    *,
    places: Sequence[Place],
    volumes: Sequence[Hashable],
    near: float | None,
    judged: Sequence[int],
    size: tuple[int, int],
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Maps and scores of K supports, each judged against those of other volumes, as a new volume would be.

    Args:
        method: In eval mode.
        encoded: `method.encode` of the supports.
        support: `method.embed_support` of the supports.
        places: Of each.
        volumes: The volume of each; where there is one only, a slice is judged by all others of it.
        near: As for `nearby`.
        judged: Which of them are judged, J of K.
        size: (H, W) of the maps.
        scoring: Blur and pooling.

    Returns:
        (J, H, W) and (J,), float32; NaN where nothing is left to compare a support with.
    """
    alone = len(set(volumes)) == 1
    maps = torch.full((len(judged), *size), torch.nan)
    scores = torch.full((len(judged),), torch.nan)
    for number, k in enumerate(judged):
        others = np.array([j for j, of in enumerate(volumes) if j != k if alone or of != volumes[k]], np.intp)
        chosen = others[nearby([places[j] for j in others], places[k], near)] if len(others) else others
        if len(chosen):
            query = [level[k : k + 1] for level in encoded]
            found = compare_placed(method, query, support, supports=[chosen], size=size, scoring=scoring)
            maps[number], scores[number] = found.maps[0].cpu(), found.scores[0].cpu()
    return maps, scores
