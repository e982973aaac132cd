"""Where images come from: kept of every format, told where queries differ, silent where nothing is known."""

import io
from dataclasses import replace

import numpy as np
import pytest

from anatomaly.data.origin import MISLEAD, difference, note_beside, read_origins, scanner_digest
from anatomaly.data.readers import read_image
from anatomaly.errors import ConfigError
from anatomaly.types import Origin

CT = Origin("DICOM", 512**2, False, "CT", "a", 0.5, 5.0)
PICTURE = Origin("picture", 10_000)


@pytest.mark.parametrize(
    ("query", "supports", "told"),
    [
        (CT._replace(kind="NIfTI"), [CT], "of a NIfTI file where the support images are of DICOM files"),
        (CT._replace(modality="MR"), [CT], "modality MR where the support images are CT"),
        (
            CT._replace(modality="MR"),
            [CT, CT._replace(modality="PT")],
            "modality MR where the support images are CT and",
        ),
        (CT._replace(colour=True), [CT], "in colour where the support images are grey"),
        (CT._replace(scanner="b"), [CT, CT], "of another scanner than the support images"),
        (CT._replace(spacing=1.01), [CT], "pixel size in mm over 2 times that of any support image"),
        (CT._replace(thickness=2.4), [CT], "slice thickness under 1/2 of that of any support image"),
        (PICTURE._replace(pixels=40_001), [PICTURE], "number of pixels over 4 times that of any support image"),
    ],
)
def test_a_difference_is_one_line(query, supports, told):
    line = difference(query, supports)
    assert line.startswith(told)
    assert line.endswith(MISLEAD)
    assert ";" not in line  # notes are parted by it


@pytest.mark.parametrize(
    ("query", "supports"),
    [
        (CT, []),  # a bank of before
        (CT, [CT]),
        (CT._replace(modality=None), [CT]),
        (CT._replace(modality="MR"), [CT, CT._replace(modality=None)]),
        (CT._replace(scanner="b"), [CT, CT._replace(scanner="c")]),  # ready for any
        (CT._replace(scanner="b"), [CT, CT._replace(scanner=None)]),
        (CT._replace(colour=None), [CT]),
        (CT._replace(colour=True), [CT, CT._replace(colour=None)]),
        (CT._replace(pixels=100), [CT]),  # of the same size in mm
        (CT._replace(spacing=0.99), [CT]),
        (CT._replace(spacing=3.0), [CT, CT._replace(spacing=1.6)]),
        (PICTURE._replace(pixels=40_000), [PICTURE]),
    ],
)
def test_what_is_alike_or_unknown_is_not_told(query, supports):
    assert difference(query, supports) is None


def dicom(path, **elements):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID, made.PatientName = CTImageStorage, "1.2.3", "Mustermann"
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 16, 16, 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.PixelData = np.arange(256, dtype=np.uint16).tobytes()
    for name, value in elements.items():
        setattr(made, name, value)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.save_as(path, enforce_file_format=True)
    return path


def test_a_dicom_file_tells_its_scanner_as_a_digest(tmp_path):
    told = {"Modality": "CT", "PixelSpacing": [0.4, 0.9], "SliceThickness": 3}
    path = dicom(tmp_path / "a", Manufacturer="SIEMENS", ManufacturerModelName="Sensation  64", **told)
    found = read_image(path).origin
    assert found == Origin("DICOM", 256, False, "CT", scanner_digest("sensation 64"), pytest.approx(0.6), 3.0)
    assert len(found.scanner) == 12
    by_maker = dicom(tmp_path / "b", Manufacturer="SIEMENS", Modality="OT", SliceThickness=-1)
    assert read_image(by_maker).origin == Origin("DICOM", 256, scanner=scanner_digest("siemens"))
    assert read_image(dicom(tmp_path / "c", Modality="DX")).origin == Origin("DICOM", 256, modality="CR")


def test_a_volume_tells_its_geometry(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    made = nibabel.Nifti1Image(np.arange(1000, dtype=np.float32).reshape(10, 10, 10), np.diag([2.0, 8.0, 3.0, 1.0]))
    nibabel.save(made, tmp_path / "a.nii.gz")
    assert read_image(tmp_path / "a.nii.gz", frame=4).origin == Origin("NIfTI", 100, spacing=4.0, thickness=3.0)


@pytest.mark.parametrize(("red", "colour"), [(0, False), (1, False), (5, None), (60, True)])
def test_a_picture_is_in_colour_where_its_channels_differ(tmp_path, red, colour):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 190, (32, 32, 1), np.uint8).repeat(3, axis=2)
    pixels[..., 0] += np.uint8(red)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert read_image(tmp_path / "a.png").origin == Origin("picture", 1024, colour)


def test_a_saved_bank_keeps_it_and_what_was_changed_is_refused():
    assert read_origins([CT._asdict(), PICTURE._asdict()]) == (CT, PICTURE)
    for name, value in (("kind", 3), ("pixels", "9"), ("modality", "C\nT"), ("spacing", True), ("colour", 2)):
        with pytest.raises(ConfigError, match="origins"):
            read_origins([{**CT._asdict(), name: value}])


def test_the_note_of_an_image_stays_first(tmp_path):
    image = read_image(dicom(tmp_path / "a", Modality="MR"))
    assert note_beside(image, []) is None
    assert note_beside(replace(image, note="dark"), [image.origin]) == "dark"
    assert note_beside(replace(image, note="dark"), [CT]).startswith("dark; modality MR where")
