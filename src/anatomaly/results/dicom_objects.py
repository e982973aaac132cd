"""The DICOM objects of judged images: a picture of each, segmentations and a parametric map of a stack.

All are new series of the source's study, with its patient and its frame of reference, and refer to the images they were
made from.  Their UIDs come from what they hold, so that the same verdict is the same object, however often it is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anatomaly._version import __version__

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from anatomaly.results.dicom_planes import Plane

_MAKER = "anatomaly"
#: What is made of a series: name of its files, and where its SeriesNumber ends.
KINDS = {"overlay": 1, "marked": 2, "map01": 3, "map": 4}


#: What highdicom is told where a multi-frame source says no spacing, and what is then taken out again: no pixel is so.
_NO_SPACING = (99999.0, 99999.0)


@dataclass(frozen=True)
class Maker:
    """What made the verdicts.

    Attributes:
        model: Name of the model, such as "matching".
        model_hash: Digest of its weights.
        support: Digest of the supports.
    """

    model: str
    model_hash: str
    support: str


def uid_of(*facts: object) -> str:
    """A UID that follows from facts, below 2.25 as a UUID is."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:16], 'big')}"


def picture(plane: Plane, pixels: NDArray[np.uint8], maker: Maker, *, series: str, number: int, zoom: int) -> Dataset:
    """A Secondary Capture.

    Args:
        plane: The image that it shows.
        pixels: (H, W, 3) RGB.
        maker: What made the verdict.
        series: UID of the new series.
        number: InstanceNumber, from 1.
        zoom: Pixels of the picture a side of each pixel of the image.
    """
    from highdicom.sc import SCImage
    from pydicom.uid import ExplicitVRLittleEndian

    spacing = plane.row["spacing"]
    made = SCImage.from_ref_dataset(
        plane.header,
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        patient_orientation=("L", "P"),  # what highdicom must be given; the source's own follows
        pixel_spacing=None if spacing is None else tuple(side / zoom for side in spacing),
        sop_instance_uid=uid_of("overlay", plane.header.SOPInstanceUID, plane.frame, series, pixels.tobytes()),
        instance_number=number,
        series_description="Anomaly overlay - RESEARCH ONLY",
        **_series(plane.header, maker, "overlay", series),
    )
    made.copy_patient_and_study_information(plane.header)
    made.PatientOrientation = _orientation(plane)
    made.Laterality = plane.header.get("Laterality") or ""
    made.BurnedInAnnotation = "YES"  # text is burnt in; none of it says who the patient is
    made.DerivationDescription = "Anomaly map laid over the image on a fixed colour scale. Research only."
    made.ImageComments = caption(plane.row)
    made.SourceImageSequence = [_reference(plane)]
    made.LossyImageCompression = plane.header.get("LossyImageCompression") or "00"
    return made


def caption(row: dict[str, Any]) -> str:
    """Score and p-value of an image in a line."""
    p = "" if row["p_value"] is None else f", p {row['p_value']:.3g}"
    return f"score {row['score']:.4g}{p}"


def segmentation(
    stack: Sequence[Plane], pixels: NDArray[Any], maker: Maker, *, series: str, number: int, label: str, meaning: str
) -> Dataset:
    """A Segmentation with one frame a plane: BINARY of boolean pixels, FRACTIONAL of floating-point ones.

    Args:
        stack: Planes from `dicom_planes.stacks`, or a single plane without geometry.
        pixels: (planes, H, W), bool or float32 in [0, 1].
        maker: What made the verdicts.
        series: UID of the new series.
        number: InstanceNumber, from 1.
        label: SeriesDescription, at most 64 characters.
        meaning: What 1 means, in full.
    """
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    binary = pixels.dtype == np.bool_
    segment = SegmentDescription(
        segment_number=1,
        segment_label="Anomaly (research)",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.MorphologicallyAbnormalStructure,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=f"{_MAKER} {maker.model}", family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
    )
    segment.SegmentDescription = meaning
    kind = "marked" if binary else "map01"
    made = Segmentation(
        **_sources(stack),
        pixel_array=pixels,
        segmentation_type="BINARY" if binary else "FRACTIONAL",
        segment_descriptions=[segment],
        sop_instance_uid=_instance(kind, stack, series, pixels),
        instance_number=number,
        series_description=label,
        content_label="ANOMALY",
        content_description="Research only, not for diagnosis",
        omit_empty_frames=False,  # a plane that was judged and has nothing is not one that was not judged
        **_series(stack[0].header, maker, kind, series),
    )
    if stack[0].geometry is None:
        made.PatientOrientation = _orientation(stack[0])
    for groups in made.SharedFunctionalGroupsSequence:
        measures = groups.get("PixelMeasuresSequence")
        if measures and tuple(measures[0].PixelSpacing) == _NO_SPACING:
            del groups.PixelMeasuresSequence
    return made


def parametric_map(
    stack: Sequence[Plane], maps: NDArray[np.float32], maker: Maker, *, series: str, number: int, axis: str = ""
) -> Dataset:
    """A Parametric Map of the raw maps, (planes, H, W) float32; its window is the run's colour scale.

    Args:
        stack: As for `segmentation`.
        maps: One a plane.
        maker: As for `segmentation`.
        series: As for `segmentation`.
        number: As for `segmentation`.
        axis: What the volume was cut along, where that is not along these planes.
    """
    from highdicom import VOILUTTransformation
    from highdicom.pm import ParametricMap, RealWorldValueMapping
    from pydicom.sr.codedict import codes

    low, high = stack[0].row["scale"]
    largest = float(np.finfo(np.float32).max)
    mapping = RealWorldValueMapping(
        lut_label="ANOMALY",
        lut_explanation="Anomaly map, no unit, higher is more anomalous",
        unit=codes.UCUM.NoUnits,
        value_range=(-largest, largest),
        slope=1.0,
        intercept=0.0,
    )
    window = VOILUTTransformation(
        window_center=(low + high) / 2,
        window_width=high - low,
        window_explanation="Colour scale of the run",
        voi_lut_function="LINEAR_EXACT",
    )
    made = ParametricMap(
        **_sources(stack),
        pixel_array=maps,
        sop_instance_uid=_instance("map", stack, series, maps),
        instance_number=number,
        series_description=f"Anomaly map, {axis and f'{axis}, '}raw values - RESEARCH ONLY",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[window],
        content_label="ANOMALY",
        content_description="Research only, not for diagnosis",
        **_series(stack[0].header, maker, "map", series),
    )
    made.Laterality = stack[0].header.get("Laterality") or ""
    return made


def _series(header: Dataset, maker: Maker, kind: str, series: str) -> dict[str, Any]:
    """What all objects of a new series share."""
    try:
        number = max(0, int(header.get("SeriesNumber") or 0))
    except (TypeError, ValueError):
        number = 0
    return {
        "series_instance_uid": series,
        "series_number": number % 10**7 * 100 + 90 + KINDS[kind],
        "manufacturer": _MAKER,
        "manufacturer_model_name": maker.model[:64],
        "software_versions": __version__,
        "device_serial_number": maker.model_hash[:16],
    }


def _instance(kind: str, stack: Sequence[Plane], series: str, pixels: NDArray[Any]) -> str:
    sources = [(str(plane.header.SOPInstanceUID), plane.frame) for plane in stack]
    content = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
    return uid_of(kind, sources, series, content, stack[0].row["scale"])


def _sources(stack: Sequence[Plane]) -> dict[str, Any]:
    """The images an object is made from, and where its planes lie, as highdicom is told."""
    from highdicom import PlanePositionSequence
    from highdicom._standard_utils import is_multiframe_image

    first = stack[0]
    if not is_multiframe_image(first.header):
        return {"source_images": [_plain(plane) for plane in stack]}
    source = _with_shared_groups(first)
    if first.geometry is None:
        return {"source_images": [source]}
    positions = [PlanePositionSequence("PATIENT", each.geometry.position.tolist()) for each in stack if each.geometry]
    return {"source_images": [source], "plane_positions": positions}


def _plain(plane: Plane) -> Dataset:
    """A source of one frame, whose positions say how far slices are apart, not a writer's SpacingBetweenSlices."""
    source = plane.header.copy()
    source.pop("SpacingBetweenSlices", None)
    source.SliceThickness = source.get("SliceThickness") or None
    if plane.geometry is None:
        source.pop("ImagePositionPatient", None)
        source.pop("FrameOfReferenceUID", None)
    return source


def _with_shared_groups(plane: Plane) -> Dataset:
    """A multi-frame source whose shared groups say orientation and pixel spacing, wherever it says them itself."""
    from highdicom import PixelMeasuresSequence
    from pydicom.dataset import Dataset

    source = plane.header.copy()
    groups = Dataset()
    for shared in (source.get("SharedFunctionalGroupsSequence") or [])[:1]:
        groups.update(shared)
    own = (source.get("PerFrameFunctionalGroupsSequence") or [])[plane.frame : plane.frame + 1]
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        for each in own:
            if name not in groups and name in each:
                setattr(groups, name, each[name].value)
    if "PixelMeasuresSequence" not in groups:
        groups.PixelMeasuresSequence = PixelMeasuresSequence(_NO_SPACING, None)
    source.SharedFunctionalGroupsSequence = [groups]
    if plane.geometry is None:
        source.pop("FrameOfReferenceUID", None)
    return source


def _orientation(plane: Plane) -> list[str]:
    """PatientOrientation: the main directions of rows and columns, or what the source says, or nothing."""
    if plane.geometry is None:
        return list(plane.header.get("PatientOrientation") or [])
    letters = [("R", "L"), ("A", "P"), ("F", "H")]
    axes = (plane.geometry.axes[:3], plane.geometry.axes[3:])
    mains = [(axis, int(np.argmax(np.abs(axis)))) for axis in axes]
    return [letters[main][int(axis[main] > 0)] for axis, main in mains]


def _reference(plane: Plane) -> Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = plane.header.SOPClassUID
    item.ReferencedSOPInstanceUID = plane.header.SOPInstanceUID
    if plane.frames > 1:
        item.ReferencedFrameNumber = plane.frame + 1
    return item
