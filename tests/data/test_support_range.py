"""Supports that show next to nothing are told, with the rule that mends it."""

import logging

import numpy as np
import pytest
from PIL import Image as Pillow

from anatomaly.data import support_range
from anatomaly.data.support_range import find_fault, glance, tell_supports, tell_training
from anatomaly.data.transforms import load
from anatomaly.data.windows import parse_intensity
from anatomaly.errors import ConfigError
from anatomaly.types import Preprocessing, Sample

RNG = np.random.default_rng(2)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(support_range, "_said", set())


@pytest.fixture
def write(tmp_path):
    """Three images of a level of brightness, 16-bit unless they are DICOM."""

    def written(pixels, name="a"):
        samples = []
        for number in range(3):
            path = tmp_path / f"{name}{number}.png"
            Pillow.fromarray(np.roll(pixels, number, axis=1)).save(path)
            samples.append(Sample(path, "head"))
        return samples

    return written


@pytest.fixture
def write_dicom(tmp_path):
    pydicom = pytest.importorskip("pydicom")

    def written(pixels, **elements):
        from pydicom.dataset import Dataset, FileMetaDataset

        samples = []
        for number in range(2):
            ds = Dataset()
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
            ds.Rows, ds.Columns = pixels.shape
            ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
            ds.Modality, ds.RescaleSlope, ds.RescaleIntercept = "CT", 1, -1024
            ds.PixelData = np.roll(pixels, number, axis=1).astype("<u2").tobytes()
            for name, value in elements.items():
                setattr(ds, name, value)
            path = tmp_path / f"{number}.dcm"
            ds.save_as(path, enforce_file_format=True)
            samples.append(Sample(path, "head"))
        return samples

    return written


def look(samples, rule="auto"):
    intensity = parse_intensity(rule)
    return samples, [glance(load(each, Preprocessing(intensity=intensity))) for each in samples], intensity


def copied(fault):
    """The rule that the line gives, as a user copies it."""
    return fault.line.partition("--intensity ")[2].split()[0].rstrip(",.")


DEEP = RNG.integers(0, 4096, (40, 40)).astype(np.uint16)
HEAD = np.where(RNG.random((40, 40)) < 0.5, 24, 1024 + RNG.integers(0, 81, (40, 40)))  # air and brain


def test_images_with_contrast_are_not_told(write):
    assert find_fault(*look(write((DEEP >> 4).astype(np.uint8)))) is None
    assert find_fault(*look(write(DEEP), "range:0..4095")) is None


def test_twelve_bits_in_sixteen_are_told_and_the_rule_given_mends_it(write):
    samples = write(DEEP)
    fault = find_fault(*look(samples))
    assert not fault.blank
    assert "after intensity auto the images use 6 % of the input range" in fault.line
    assert copied(fault) == "range:0..4095"
    assert find_fault(*look(samples, copied(fault))) is None


def test_a_ct_without_a_window_is_told_and_the_rule_given_mends_it(write_dicom):
    samples = write_dicom(HEAD)
    fault = find_fault(*look(samples))
    assert "these CT files name no window" in fault.line
    assert copied(fault) == "brain"
    assert find_fault(*look(samples, copied(fault))) is None
    assert "a CT without a window of its own" in load(samples[0], Preprocessing()).image.note
    brain = Preprocessing(intensity=parse_intensity("brain"))
    assert load(samples[0], brain).image.note is None


def test_a_ct_with_a_window_or_another_modality_is_not_told(write_dicom):
    windowed = write_dicom(HEAD, WindowCenter=40, WindowWidth=80)
    assert find_fault(*look(windowed)) is None
    assert load(windowed[0], Preprocessing()).image.note is None
    other = write_dicom(DEEP, Modality="MR", RescaleIntercept=0)
    assert find_fault(*look(other)) is None
    assert "is a window for CT in Hounsfield units, these images are of modality MR" in (
        find_fault(*look(other, "mediastinum")).line
    )


def test_a_window_beside_all_values_is_blank(write_dicom):
    fault = find_fault(*look(write_dicom(HEAD), "window:1000/50"))
    assert fault.blank
    assert "intensity window:1000/50 leaves one value for all pixels of all 2 images" in fault.line
    assert copied(fault) == "brain"


def test_a_ct_window_on_pictures_is_told(write):
    fault = find_fault(*look(write((DEEP >> 4).astype(np.uint8)), "liver"))
    assert "intensity liver is a window for CT in Hounsfield units, these images are stored as 0 to 255" in fault.line
    assert copied(fault) == "range:0..255"


def test_saturated_images_are_told(write):
    fault = find_fault(*look(write(DEEP), "range:0..40"))
    assert "of 256 grey levels" in fault.line or "% of the input range" in fault.line
    assert copied(fault) == "range:0..4095"


def test_files_that_hold_no_more_are_told_so(write):
    binary = (DEEP > 2000).astype(np.uint8) * 255
    assert "The files hold no more: export them again" in find_fault(*look(write(binary))).line
    constant = find_fault(*look(write(np.full((9, 9), 7, np.uint8), "b")))
    assert constant.blank
    assert "The files hold nothing else" in constant.line


def test_supports_are_warned_of_once_and_blank_ones_refused(write, caplog):
    samples = write(DEEP)
    with caplog.at_level(logging.WARNING):
        tell_supports(*look(samples))
        tell_supports(*look(samples[:2]))
        tell_supports(*look(samples, "range:0..4095"))
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert caplog.text.count("Give --intensity range:0..4095, ") == 1
    with pytest.raises(ConfigError, match=r"support: intensity auto leaves one value"):
        tell_supports(*look(write(np.zeros((9, 9), np.uint8), "b")))


def test_one_blank_support_among_others_is_no_fault(write):
    samples = [*write((DEEP >> 4).astype(np.uint8)), write(np.zeros((9, 9), np.uint8), "b")[0]]
    assert find_fault(*look(samples)) is None


def test_training_images_are_warned_of_with_the_flag_of_fit(write, caplog, tmp_path):
    samples = [*write(DEEP), Sample(tmp_path / "absent.png", "head")]
    with caplog.at_level(logging.WARNING):
        tell_training(samples, Preprocessing(), "--task_intensity '{head: RULE}'")
        tell_training(samples[-1:], Preprocessing(), "--preprocessing.intensity RULE")
    assert len(caplog.records) == 1
    assert "head: after intensity auto" in caplog.text
    assert "Give --task_intensity '{head: range:0..4095}', " in caplog.text


def test_an_image_of_another_value_range_carries_a_note(write):
    note = "hardly any contrast after the intensity rule"
    deep = Preprocessing(intensity=parse_intensity("range:0..4095"))
    assert note in load(write((DEEP >> 4).astype(np.uint8))[0], deep).image.note
    assert load(write(DEEP)[0], deep).image.note is None
