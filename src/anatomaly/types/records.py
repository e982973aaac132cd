"""What crosses layers with arrays in it, and the protocol every method follows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from anatomaly.types.cuts import Axis, Cut
from anatomaly.types.settings import Preprocessing, Scoring  # `errors.check_words` looks them up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher

Split = Literal["train", "val", "test"]


class Origin(NamedTuple):
    """Where an image comes from, as far as its file says; nothing that identifies anybody.  See `data.origin`.

    Attributes:
        kind: "picture", "DICOM" or "NIfTI".
        pixels: Height times width of the source grid.
        colour: Whether the channels differ; None where that cannot be said.
        modality: DICOM's word, such as "CT"; None where it says nothing.
        scanner: Digest of the name of the scanner's model, or of its maker, or None.
        spacing: Mean size of a pixel in mm, or None.
        thickness: Thickness of the slice in mm, or None.
    """

    kind: str
    pixels: int
    colour: bool | None = False
    modality: str | None = None
    scanner: str | None = None
    spacing: float | None = None
    thickness: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """One 2-D image as stored, before any intensity rule: see `data.readers.read_image`.

    Attributes:
        pixels: (C, H, W) float32 with C in {1, 3}, finite, in the stored unit (counts, Hounsfield units, ...).
        value_range: Lowest and highest value the stored format can express, such as (0, 255) for 8 bit or the output
            range of a DICOM file's own VOI transform; None where the file does not say (NIfTI, float TIFF).
        invert: True for DICOM MONOCHROME1: the presentation step turns x into 1 - x *after* the intensity rule.
        spacing: Pixel spacing in mm, (row, column), or None where unknown.
        path: The file.
        frame: 0-based frame of a multi-frame file or slice of a volume; None for a plain 2-D file.
        sha256: Hex digest of the whole file.
        note: What to know about the pixels, such as NaN ones that got a value, or None.
        modality: DICOM's word for the kind of scanner, such as "CT"; None where the file does not say.
        origin: Where it comes from, to be compared with other files.
    """

    pixels: NDArray[np.float32]
    value_range: tuple[float, float] | None
    path: Path
    sha256: str
    frame: int | None = None
    invert: bool = False
    spacing: tuple[float, float] | None = None
    note: str | None = None
    modality: str | None = None
    origin: Origin | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the source grid."""
        return self.pixels.shape[1], self.pixels.shape[2]


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a manifest.

    Attributes:
        path: The image file.
        task: Name of the organ/modality data set the image belongs to.
        split: "train", "val" or "test".
        label: 0 normal, 1 anomalous, None unknown.
        frame: 0-based frame or slice when `path` holds several images, else None.
        mask: File of the lesion mask (non-zero = lesion), or None.
        patient_id: Grouping key of the patient, or None where unknown.
        sha256: Hex digest of the file, or None until `manifest.with_hashes` computed it.
        cut: Where the image lies in the volume it is a slice of; None where it is judged for itself.
    """

    path: Path
    task: str
    split: Split = "test"
    label: Literal[0, 1] | None = None
    frame: int | None = None
    mask: Path | None = None
    patient_id: str | None = None
    sha256: str | None = None
    cut: Cut | None = None

    @property
    def name(self) -> str:
        """File name, with `#frame` where the file holds several images; used in tables and messages."""
        if self.frame is None:
            return self.path.name
        if self.cut is None or self.cut.own:
            return f"{self.path.name}#{self.frame}"
        file = self.path.parent if self.cut.series else self.path
        return f"{file.name}#{self.cut.axis} {self.frame}"

    def key(self, sha256: str) -> str:
        """What tells the image from all others, given the digest of its file: `digest#frame`, as banks keep it."""
        return f"{sha256}#{'' if self.cut is None or self.cut.own else self.cut.axis}{self.frame or 0}"


#: Frozen features of a batch: teacher name -> levels from shallow to deep, each (B, C, h, w).
Features = Mapping[str, "Sequence[Tensor]"]


class Comparison(NamedTuple):
    """One level of a method's verdict: what the student says next to what it should have said.

    Attributes:
        student: (B, C, h, w).
        target: (B, C, h, w).
        weights: (B, K) share of every support image in `target`, rows sum to 1, or None.
        scale: What the level counts in the map, and in a geometric mean of levels; at least 0.
        surround: Share of a place's surroundings that is subtracted from its distance, from 0 to 1: an image that is
            unlike the supports all over is no lesion.
    """

    student: Tensor
    target: Tensor
    weights: Tensor | None = None
    scale: float = 1.0
    surround: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class SupportBank:
    """K normal images of one task, encoded once; immutable, can be saved, refused by a detector it was not made with.

    Attributes:
        tensors: Method-specific tensors whose first axis is K, by name.
        task: Task the images belong to.
        names: K display names.
        sha256: K entries `digest#frame`: file digest and 0-based frame (0 for a plain file).
        preprocessing: How the images were prepared; queries are prepared the same way.
        model_hash: Digest of the teacher's and the student's weights that made the tensors.
        map_range: (low, high) of the fixed colour scale, from the supports' own leave-one-out maps.
        precision: "fp32" or "bf16" of the tensors, None where the bank's file is too old to say.
        normal_scores: K scores, each of a support judged by those of other patients: a rough yardstick for the scores
            of queries. Empty where there is one support, or the bank's file is too old to say.
        patients: K numbers, equal for images that are known to be of one patient. Empty where the bank's file is too
            old to say.
        attention_shares: K shares that sum to 1: how much of the matches of the other supports falls on this one.
            Empty like `normal_scores`, and where the method has no weights.
        origins: Where each of the K images comes from. Empty where the bank's file is too old to say.
        places: Where supports are slices of volumes: K axes and relative positions, see `Cut`. A query is compared with
            those of its own axis only.
        near: How far from a query's relative position supports may lie, as a share of the axis; None: anywhere.
    """

    tensors: Mapping[str, Tensor]
    task: str
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    preprocessing: Preprocessing
    model_hash: str
    map_range: tuple[float, float]
    precision: str | None = None
    normal_scores: tuple[float, ...] = ()
    patients: tuple[int, ...] = ()
    attention_shares: tuple[float, ...] = ()
    origins: tuple[Origin, ...] = ()
    places: tuple[tuple[Axis, float], ...] = ()
    near: float | None = None

    @property
    def shots(self) -> int:
        """K, the number of support images."""
        return len(self.names)

    @property
    def digest(self) -> str:
        """Which images it holds, in any order, and in which precision; model and preprocessing have their own."""
        images = sorted(zip(self.sha256, self.places, strict=True)) if self.places else sorted(self.sha256)
        facts = (images, self.precision, *([self.near] if self.places else []))
        return hashlib.sha256(repr(facts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores of images known to be normal, and everything those scores depend on; see docs/calibration.md.

    Attributes:
        task: Task the images belong to.
        kind: "held-out": scored like any query; "leave-one-out": the supports, each scored against the others.
        guarantee: What holds for P(p <= alpha) of a new normal unit: "exact" (at most alpha), "conservative" (at most
            alpha, usually well below), "approximate" (measured, not proven).
        unit: What is exchangeable with what: "patient", "scan" (a file of several slices) or "image".
        scores: One per unit, ascending: the highest score of its images.
        images: Number of images of each unit, in the order of `scores`.
        sha256: `digest#frame` of all images, sorted.
        model_hash: As in `SupportBank`.
        bank_digest: `SupportBank.digest` of the supports the images were compared with.
        preprocessing: How the images were prepared.
        scoring: How maps became scores.
        precision: "fp32" or "bf16" of the scores.
    """

    task: str
    kind: Literal["held-out", "leave-one-out"]
    guarantee: Literal["exact", "conservative", "approximate"]
    unit: Literal["patient", "scan", "image"]
    scores: tuple[float, ...]
    images: tuple[int, ...]
    sha256: tuple[str, ...]
    model_hash: str
    bank_digest: str
    preprocessing: Preprocessing
    scoring: Scoring
    precision: str

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.scores)


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The verdict on one image, or the reason there is none.

    Attributes:
        sample: The manifest row (or a row made from the path).
        score: Image score, raw and unbounded, higher = more anomalous; NaN with an error.
        anomaly_map: (H0, W0) float32 on the source pixel grid, or None with an error.
        image: (C, H0, W0) float32 in [0, 1] after the intensity rule, for display, or None with an error.
        support_weights: (levels, K) float32, how much every support image counted, or None.
        spacing: mm per pixel of the source, (row, column), or None.
        seconds: Wall time this image cost (its share of the batch).
        error: One line saying why there is no score, or None.
        p_value: Conformal p-value of the image, in (0, 1], low = anomalous; None without a calibration that fits.
        note: One line saying what to know about this verdict, such as that the image is one of the supports, or None.
        sha256: `digest#frame` as in `SupportBank`, or None with an error.
    """

    sample: Sample
    score: float
    anomaly_map: NDArray[np.float32] | None = None
    image: NDArray[np.float32] | None = None
    support_weights: NDArray[np.float32] | None = None
    spacing: tuple[float, float] | None = None
    seconds: float = 0.0
    error: str | None = None
    p_value: float | None = None
    note: str | None = None
    sha256: str | None = None


class Method(Protocol):
    """Everything a method must offer; training, prediction, benchmarks and the command line ask for nothing else.

    It is a `torch.nn.Module`, built as ``Class(*teachers, settings=settings)``: its own parameters and buffers are the
    trained part, which bundles store.  Its teachers are frozen and no submodules.  Its record (`methods.MethodRecord`)
    says how it is trained.
    """

    #: Queries are compared with K support images; False for one-class methods, whose supports are empty.
    needs_support: bool

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """The frozen backbones under the names `extract` uses, the one that is always there first.

        Methods that learn from lesions have one, and call it "teacher".
        """
        ...

    def extract(self, images: Tensor) -> Features:
        """Frozen teacher features of (B, 3, H, W) images in [0, 1]; cacheable, never trained."""
        ...

    def extract_support(self, images: Tensor) -> Features:
        """The same of K support images; may hold more than `extract`, such as mirrored views."""
        ...

    def encode(self, features: Features) -> Sequence[Tensor]:
        """The trainable per-image part: what `compare` needs to know of an image, each tensor (B, C, h, w)."""
        ...

    def embed_support(self, features: Features) -> dict[str, Tensor]:
        """All about K support images that does not depend on the query; first axis K, each row from its image alone."""
        ...

    def compare(self, encoded: Sequence[Tensor], support: Mapping[str, Tensor]) -> list[Comparison]:
        """One comparison per level between encoded queries and an embedded support."""
        ...

    def training_loss(self, query: Features, support: Features) -> dict[str, Tensor]:
        """{"total": scalar, ...named parts} of B episodes; never called for a method that learns from nothing.

        Args:
            query: What `extract` returned of B images.  A method that learns from lesions also gets "pasted", the same
                images with a lesion, and "mask", one (B, H, W) tensor, non-zero on the lesions.
            support: Levels (B, K, C, h, w) of K other images of the same task for each of them; empty for one-class
                methods.
        """
        ...

    # What every torch.nn.Module brings.
    def state_dict(self) -> dict[str, Any]:
        """The trained part by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:
        """Take the trained part up."""
        ...

    def parameters(self) -> Iterator[Any]:
        """What the optimiser moves."""
        ...

    def to(self, device: Any, /) -> Any:
        """Move the trained part; teachers are moved by whoever holds the method."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch to training and back."""
        ...

    def eval(self) -> Any:
        """Switch to prediction."""
        ...
