"""The methods: one literal table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anatomaly.methods.d24fad import D24FAD
from anatomaly.methods.nearest import PatchNearestNeighbours

if TYPE_CHECKING:
    from collections.abc import Mapping

METHODS: Mapping[str, type[D24FAD] | type[PatchNearestNeighbours]] = {
    "d24fad": D24FAD,
    "nearest": PatchNearestNeighbours,
}
