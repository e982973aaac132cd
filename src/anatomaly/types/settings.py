"""How images are prepared and maps are scored: records of plain values, which the command line reads.

They stand apart from the records that hold arrays: jsonargparse runs what a file imports for its annotations, and
`--help` would wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Intensity:
    """How stored pixel values become [0, 1]; one fixed rule per data set, stored with the model and the bank.

    Attributes:
        rule: "auto" maps the range the file declares (bit depth, or the DICOM file's own VOI transform) to [0, 1] and
            refuses files that declare none; "window" is (centre, width), "range" is (lowest, highest), both in the
            stored unit; "percentile" is a pair of percentiles that must be *resolved* on training images with
            `transforms.resolve_intensity` into a fixed "range" before use.
        low: First number of the rule (centre, lowest or lower percentile); unused by "auto".
        high: Second number of the rule (width, highest or upper percentile); unused by "auto".
    """

    rule: Literal["auto", "window", "range", "percentile"] = "auto"
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Preprocessing:
    """Everything between a read image and the tensor a teacher sees, except the teacher's own normalisation.

    Attributes:
        size: (height, width) of the network input in pixels, multiples of the teacher's largest stride; at most 8192 a
            side and 2048 x 2048 pixels in all.
        resize: "squash" ignores the aspect ratio (both papers), "pad" keeps it and fills with 0, centred.
        interpolation: Resampling filter of the resize (D24FAD's release: "lanczos"; PDD's: "bilinear").
        intensity: The rule that maps stored values to [0, 1].
    """

    size: tuple[int, int] = (128, 128)
    resize: Literal["squash", "pad"] = "squash"
    interpolation: Literal["lanczos", "bilinear"] = "lanczos"
    intensity: Intensity = field(default_factory=Intensity)


@dataclass(frozen=True)
class Scoring:
    """How a map becomes a score.

    Attributes:
        blur: Standard deviation of the per-image Gaussian in input pixels, at most the map's diagonal; 0: none.
        pooling: "max" (D24FAD's release), "mean" (its paper), or "topk", the mean of the highest `top_fraction`.
        top_fraction: Share of the pixels that "topk" averages, in (0, 1].
        levels: "sum" pools the map, the levels' sum; "geometric" pools every level alone and takes their geometric
            mean, in which no level counts more for being larger.
    """

    blur: float = 4.0
    pooling: Literal["max", "mean", "topk"] = "max"
    top_fraction: float = 0.01
    levels: Literal["sum", "geometric"] = "sum"
