"""DICOM through `read_image`: made-up files whose every transform is known."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from anatomaly.data.dicom_codecs import decoder_of
from anatomaly.data.readers import count_frames, read_image, read_mask, sniff_format
from anatomaly.errors import ReadError

pydicom = pytest.importorskip("pydicom")

from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402

RNG = np.random.default_rng(3)
TWELVE_BIT = RNG.integers(0, 4096, (24, 18)).astype(np.uint16)


def dataset(pixels, **elements):
    """An image object of (H, W) or (frames, H, W) grey or (H, W, 3) colour pixels."""
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = uid.SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid.generate_uid()
    ds.PatientName = "Secret^Person"
    ds.Rows, ds.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    if pixels.ndim == 3 and not colour:
        ds.NumberOfFrames = len(pixels)
    ds.SamplesPerPixel = 3 if colour else 1
    if colour:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.BitsStored = elements.pop("BitsStored", ds.BitsAllocated)
    ds.HighBit = ds.BitsStored - 1
    ds.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def save(path, ds):
    ds.save_as(path, enforce_file_format=True)
    return path


def lut(first, values, bits):
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(values), first, bits])
    item.add_new("LUTData", "US", values)
    return item


def test_stored_values_and_declared_range(tmp_path):
    path = save(tmp_path / "no_suffix", dataset(TWELVE_BIT, BitsStored=12, PixelSpacing=[0.5, 0.7]))
    assert sniff_format(path) == "dicom"
    assert count_frames(path) == 1
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels[0], TWELVE_BIT)
    assert image.value_range == (0, 4095)
    assert (image.spacing, image.invert, image.frame) == ((0.5, 0.7), False, None)


def test_hounsfield_units(tmp_path):
    stored = RNG.integers(-2000, 2000, (24, 18)).astype(np.int16)
    ds = dataset(stored, RescaleSlope=2, RescaleIntercept=-1024, ImagerPixelSpacing=[0.1, 0.2])
    image = read_image(save(tmp_path / "ct.dcm", ds))
    np.testing.assert_array_equal(image.pixels[0], stored * 2.0 - 1024)
    assert image.value_range == (-32768 * 2 - 1024, 32767 * 2 - 1024)
    assert image.spacing == (0.1, 0.2)


def test_a_negative_slope_keeps_the_range_in_order(tmp_path):
    ds = dataset(TWELVE_BIT, BitsStored=12, RescaleSlope=-1, RescaleIntercept=0, WindowCenter=-2000, WindowWidth=1000)
    path = save(tmp_path / "a.dcm", ds)
    assert read_image(path).value_range == (-4095, 0)
    shown = read_image(path, apply_voi=True).pixels[0]
    assert shown[TWELVE_BIT > 3000].max() == 0
    assert shown[TWELVE_BIT < 1000].min() == 1


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_modality_table(tmp_path, bits):
    table = np.linspace(0, 2**bits - 1, 1000).astype(int)
    ds = dataset(TWELVE_BIT, BitsStored=12, ModalityLUTSequence=[lut(500, table.tolist(), bits)])
    image = read_image(save(tmp_path / "a.dcm", ds))
    np.testing.assert_array_equal(image.pixels[0], table[np.clip(TWELVE_BIT.astype(int) - 500, 0, 999)])
    assert image.value_range == (0, 2**bits - 1)
    if bits == 16:  # the depth for which pydicom is an oracle
        np.testing.assert_array_equal(image.pixels[0], apply_modality_lut(TWELVE_BIT, ds))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("slope", [None, 2])
def test_window_agrees_with_pydicom(tmp_path, function, slope):
    ds = dataset(TWELVE_BIT, BitsStored=12, WindowCenter=[1900, 40], WindowWidth=[801, 80])
    if function:
        ds.VOILUTFunction = function
    if slope:
        ds.RescaleSlope, ds.RescaleIntercept = slope, -1000
    path = save(tmp_path / "a.dcm", ds)
    image = read_image(path, apply_voi=True)
    low, high = (-1000, 4095 * 2 - 1000) if slope else (0, 4095)
    expected = (apply_voi_lut(apply_modality_lut(TWELVE_BIT, ds), ds) - low) / (high - low)
    assert image.value_range == (0, 1)
    np.testing.assert_allclose(image.pixels[0], expected, atol=1e-6)
    assert image.pixels.std() > 0.05
    assert read_image(path).value_range == (low, high)  # without apply_voi the window is not looked at


def test_a_window_of_width_one_is_a_threshold(tmp_path):
    ds = dataset(TWELVE_BIT, BitsStored=12, WindowCenter=2000, WindowWidth=1)
    shown = read_image(save(tmp_path / "a.dcm", ds), apply_voi=True).pixels[0]
    np.testing.assert_array_equal(shown, TWELVE_BIT >= 2000)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_voi_table_wins_over_the_window(tmp_path, bits):
    table = np.linspace(0, 2**bits - 1, 4096).astype(int)[::-1]
    ds = dataset(
        TWELVE_BIT, BitsStored=12, VOILUTSequence=[lut(0, table.tolist(), bits)], WindowCenter=5, WindowWidth=5
    )
    image = read_image(save(tmp_path / "a.dcm", ds), apply_voi=True)
    np.testing.assert_allclose(image.pixels[0], table[TWELVE_BIT] / (2**bits - 1), rtol=1e-6)
    assert image.value_range == (0, 1)


@pytest.mark.parametrize("width", [8, 16])
def test_voi_table_of_packed_words_on_signed_input(tmp_path, width):
    stored = (TWELVE_BIT.astype(np.int32) - 1024).astype(np.int16)
    table = np.linspace(0, 2**width - 1, 4096).astype(f"uint{width}")
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 65536 - 1024, width])  # -1024 written as unsigned
    item.add_new("LUTData", "OW", table.tobytes())
    image = read_image(save(tmp_path / "a.dcm", dataset(stored, VOILUTSequence=[item])), apply_voi=True)
    np.testing.assert_allclose(image.pixels[0], table[TWELVE_BIT] / (2**width - 1), rtol=1e-6)


def test_without_a_voi_transform_the_declared_range_stays(tmp_path):
    image = read_image(save(tmp_path / "a.dcm", dataset(TWELVE_BIT, BitsStored=12)), apply_voi=True)
    assert image.value_range == (0, 4095)
    np.testing.assert_array_equal(image.pixels[0], TWELVE_BIT)


@pytest.mark.parametrize(("centre", "width"), [(0, 0), (5, -3), (5, 0.5), ([5, 6], [0, 0])])
def test_an_unusable_window_leaves_the_declared_range(tmp_path, centre, width):
    ds = dataset(TWELVE_BIT, BitsStored=12, WindowCenter=centre, WindowWidth=width, RescaleIntercept=-1024)
    path = save(tmp_path / "a.dcm", ds)
    image = read_image(path, apply_voi=True)
    np.testing.assert_array_equal(image.pixels[0], TWELVE_BIT - 1024.0)
    assert image.value_range == (-1024, 3071)
    assert image.note.startswith("its own window of width ")
    assert image.note.endswith(" cannot be used: shown in the range the file declares")
    assert read_image(path).note is None


def test_the_first_usable_window_is_taken(tmp_path):
    ds = dataset(TWELVE_BIT, BitsStored=12, WindowCenter=[0, 1000.5], WindowWidth=[0, 1001])
    image = read_image(save(tmp_path / "a.dcm", ds), apply_voi=True)
    np.testing.assert_allclose(image.pixels[0], np.clip(TWELVE_BIT / 1000 - 0.5, 0, 1), atol=1e-6)
    assert image.note is None


def test_an_unknown_window_shape_or_broken_table_leaves_the_declared_range(tmp_path):
    item = lut(0, [1, 2, 3], 12)
    item.LUTDescriptor = [3, 0]
    for elements, what in [
        ({"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "unknown shape"),
        ({"VOILUTSequence": [item]}, "display table"),
    ]:
        image = read_image(save(tmp_path / "a.dcm", dataset(TWELVE_BIT, BitsStored=12, **elements)), apply_voi=True)
        assert image.value_range == (0, 4095)
        assert what in image.note


@pytest.mark.parametrize(
    ("elements", "slope", "intercept"),
    [
        ({"RescaleIntercept": -1024}, 1, -1024),
        ({"RescaleSlope": 2}, 2, 0),
        ({"RescaleSlope": "", "RescaleIntercept": -3}, 1, -3),
        ({"RescaleSlope": 2, "RescaleIntercept": None}, 2, 0),
    ],
)
def test_half_a_rescale_takes_the_other_half_s_default(tmp_path, elements, slope, intercept):
    image = read_image(save(tmp_path / "a.dcm", dataset(TWELVE_BIT, BitsStored=12, **elements)))
    np.testing.assert_array_equal(image.pixels[0], TWELVE_BIT * float(slope) + intercept)
    assert image.value_range == (intercept, 4095 * slope + intercept)


@pytest.mark.parametrize(
    "missing",
    [
        ["PixelRepresentation", "HighBit"],
        ["BitsStored", "HighBit"],
        ["BitsAllocated", "HighBit"],
        ["BitsAllocated", "BitsStored", "HighBit"],
        ["SamplesPerPixel"],
        ["PhotometricInterpretation"],
        ["PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "PixelRepresentation"],
    ],
)
@pytest.mark.parametrize("implicit", [False, True])
def test_elements_that_follow_from_the_others_may_be_missing(tmp_path, missing, implicit):
    ds = dataset(TWELVE_BIT)
    ds["PixelData"].VR = "OW"
    for name in missing:
        if name in ds:
            delattr(ds, name)
    if implicit:
        ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    image = read_image(save(tmp_path / "a.dcm", ds))
    np.testing.assert_array_equal(image.pixels[0], TWELVE_BIT)
    assert image.value_range == (0, 65535)
    assert not image.invert


@pytest.mark.parametrize("missing", [["SamplesPerPixel"], ["PlanarConfiguration"], ["PhotometricInterpretation"]])
def test_colour_follows_from_what_is_left(tmp_path, missing):
    rgb = RNG.integers(0, 256, (24, 18, 3)).astype(np.uint8)
    ds = dataset(rgb)
    for name in missing:
        delattr(ds, name)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.dcm", ds)).pixels, rgb.transpose(2, 0, 1))


def test_channels_that_do_not_fit_the_photometric_interpretation(tmp_path):
    rgb = RNG.integers(0, 256, (24, 18, 3)).astype(np.uint8)
    with pytest.raises(ReadError, match="has 3 samples per pixel, which does not fit MONOCHROME2"):
        read_image(save(tmp_path / "a.dcm", dataset(rgb, PhotometricInterpretation="MONOCHROME2")))
    with pytest.raises(ReadError, match="has 1 samples per pixel, which does not fit RGB"):
        read_image(save(tmp_path / "b.dcm", dataset(TWELVE_BIT, PhotometricInterpretation="RGB")))


def replaced(path, old, new):
    raw = path.read_bytes()
    assert raw.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(raw.replace(old, new))
    return path


@pytest.mark.parametrize("text", [b"0,5\\0,5", b"abc\\0.5", b"0.5    ", b"0.0\\0.0", b"1e9\\1e9"])
def test_a_spacing_that_cannot_be_read_is_unknown(tmp_path, text):
    path = save(tmp_path / "a.dcm", dataset(TWELVE_BIT, BitsStored=12, PixelSpacing=["0.5", "0.5"]))
    image = read_image(replaced(path, b"0.5\\0.5", text))
    np.testing.assert_array_equal(image.pixels[0], TWELVE_BIT)
    assert image.spacing is None


def test_numbers_that_give_the_pixels_their_meaning_must_be_numbers(tmp_path):
    path = save(tmp_path / "a.dcm", dataset(TWELVE_BIT, BitsStored=12, RescaleSlope="1.7183"))
    with pytest.raises(ReadError, match="has a RescaleSlope that is not a number"):
        read_image(replaced(path, b"1.7183", b"1,7183"))
    with pytest.raises(ReadError, match="RescaleSlope 1e\\+300"):
        read_image(save(tmp_path / "b.dcm", dataset(TWELVE_BIT, BitsStored=12, RescaleSlope="1e300")))
    path = save(tmp_path / "c.dcm", dataset(TWELVE_BIT, BitsStored=12, WindowCenter="2000", WindowWidth="1000.5"))
    image = read_image(replaced(path, b"1000.5", b"1000,5"), apply_voi=True)
    assert image.value_range == (0, 4095)
    assert "cannot be used" in image.note


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
def test_without_a_transfer_syntax_the_encoding_is_inferred(tmp_path, implicit, frames):
    pixels = RNG.integers(0, 4096, (frames, 24, 18)).astype(np.uint16)
    ds = dataset(pixels, BitsStored=12, RescaleIntercept=-5)
    del ds.file_meta.TransferSyntaxUID
    ds.preamble = bytes(128)
    path = tmp_path / "a.dcm"
    pydicom.dcmwrite(path, ds, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert path.read_bytes()[128:132] == b"DICM"
    np.testing.assert_array_equal(read_image(path, frame=frames - 1).pixels[0], pixels[-1] - 5.0)


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("meta", [False, True])
def test_without_preamble(tmp_path, implicit, little, meta):
    ds = dataset(TWELVE_BIT if little else TWELVE_BIT.astype(">u2"), BitsStored=12)
    if not meta:
        del ds.file_meta
    elif little:
        ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
    else:
        ds.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    path = tmp_path / "IM0"
    pydicom.dcmwrite(path, ds, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
    raw = path.read_bytes()
    path.write_bytes(raw[132:] if raw[128:132] == b"DICM" else raw)
    assert sniff_format(path) == "dicom"
    np.testing.assert_array_equal(read_image(path).pixels[0], TWELVE_BIT)


@pytest.mark.parametrize(
    "head",
    [
        b"\x08\0" + bytes(400),
        b"\x08\0\0\0\4\0\0\0" + bytes(400),
        b"\x08\0\5\0\0\0\0\0" + bytes(400),
        b"\2\0\0\0UL\4\0" + bytes(400),
        b"\0\2" * 300,
        b"\x08\0" * 300,
        bytes(range(8, 256)) * 3,
    ],
)
def test_what_only_begins_like_an_element_is_not_dicom(tmp_path, head):
    (tmp_path / "a").write_bytes(head)
    assert sniff_format(tmp_path / "a") is None


@pytest.mark.parametrize(
    "elements", [{"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}]
)
def test_inversion_is_noted_and_not_done(tmp_path, elements):
    ds = dataset(TWELVE_BIT, BitsStored=12, WindowCenter=2000, WindowWidth=500, **elements)
    image = read_image(save(tmp_path / "a.dcm", ds))
    assert image.invert
    np.testing.assert_array_equal(image.pixels[0], TWELVE_BIT)
    assert read_image(tmp_path / "a.dcm", apply_voi=True).pixels[0][TWELVE_BIT > 3000].min() == 1


@pytest.mark.parametrize(("photometric", "padding", "fill"), [("MONOCHROME2", -2000, -100), ("MONOCHROME1", 3000, 900)])
@pytest.mark.parametrize("as_range", [False, True])
def test_padding_becomes_the_darkest_image_value(tmp_path, photometric, padding, fill, as_range):
    stored = np.linspace(-100, 900, 24 * 18).astype(np.int16).reshape(24, 18)
    body = stored.copy()
    stored[:3] = padding
    body[:3] = fill
    ds = dataset(stored, PhotometricInterpretation=photometric, RescaleSlope=1, RescaleIntercept=10)
    body = np.clip(body, stored[3:].min() if fill == -100 else None, None)
    if as_range:
        stored[0] = padding - 40
        ds.PixelData = stored.tobytes()
        ds.PixelPaddingRangeLimit = padding - 40
    ds.PixelPaddingValue = padding
    image = read_image(save(tmp_path / "a.dcm", ds))
    np.testing.assert_array_equal(image.pixels[0], body + 10.0)


def test_padding_written_as_unsigned(tmp_path):
    stored = np.full((24, 18), 50, np.int16)
    stored[:5] = -2000
    ds = dataset(stored)
    ds.add_new("PixelPaddingValue", "US", 65536 - 2000)
    assert read_image(save(tmp_path / "a.dcm", ds)).pixels.min() == 50


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422"])
def test_colour(tmp_path, photometric):
    rgb = np.broadcast_to(np.array([200, 90, 40], np.uint8), (24, 18, 3)).copy()
    rgb[:, :8] = 20, 200, 60
    ds = dataset(rgb)
    if photometric != "RGB":
        ybr = pydicom.pixels.convert_color_space(rgb, "RGB", "YBR_FULL")
        ds.PhotometricInterpretation = photometric
        ds.PixelData = ybr.tobytes()
        if photometric == "YBR_FULL_422":
            pairs = ybr.reshape(-1, 2, 3)
            ds.PixelData = np.stack([pairs[:, 0, 0], pairs[:, 1, 0], pairs[:, 0, 1], pairs[:, 0, 2]], -1).tobytes()
    image = read_image(save(tmp_path / "a.dcm", ds), apply_voi=True)
    np.testing.assert_allclose(image.pixels, rgb.transpose(2, 0, 1), atol=2)
    assert image.value_range == (0, 255)


def test_palette(tmp_path):
    indices = RNG.integers(0, 256, (24, 18)).astype(np.uint8)
    ds = dataset(indices, PhotometricInterpretation="PALETTE COLOR")
    tables = {}
    for colour in ("Red", "Green", "Blue"):
        tables[colour] = RNG.integers(0, 65536, 256).astype(np.uint16)
        ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        ds.add_new(f"{colour}PaletteColorLookupTableData", "OW", tables[colour].tobytes())
    image = read_image(save(tmp_path / "a.dcm", ds))
    np.testing.assert_array_equal(image.pixels, np.stack([table[indices] for table in tables.values()]))
    assert image.value_range == (0, 65535)


def test_a_palette_in_segments(tmp_path):
    indices = np.arange(24 * 18, dtype=np.uint16).reshape(24, 18).astype(np.uint8)
    ds = dataset(indices, PhotometricInterpretation="PALETTE COLOR")
    for number, colour in enumerate(("Red", "Green", "Blue")):
        ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        # one discrete value, then a line from it to the last one
        words = np.array([0, 1, 1000 * number, 1, 255, 65535 - number], "<u2")
        ds.add_new(f"Segmented{colour}PaletteColorLookupTableData", "OW", words.tobytes())
    image = read_image(save(tmp_path / "a.dcm", ds))
    for number, channel in enumerate(image.pixels):
        line = np.linspace(1000 * number, 65535 - number, 256)
        np.testing.assert_allclose(channel, line[indices], atol=1)
    assert image.value_range == (0, 65535)


def test_frames(tmp_path):
    frames = RNG.integers(0, 4096, (3, 24, 18)).astype(np.uint16)
    path = save(tmp_path / "a.dcm", dataset(frames, BitsStored=12))
    assert count_frames(path) == 3
    image = read_image(path, frame=2)
    assert image.frame == 2
    np.testing.assert_array_equal(image.pixels[0], frames[2])
    with pytest.raises(ReadError, match=r"holds 3 images, expected one. Pass frame=0\.\.2"):
        read_image(path)
    with pytest.raises(ReadError, match="has no frame 3"):
        read_image(path, frame=3)
    single = save(tmp_path / "b.dcm", dataset(frames[:1], BitsStored=12))
    assert read_image(single).frame is None


@pytest.mark.parametrize("name", ["native", "RLE", "JPEGLosslessProcess14_1"])
def test_the_header_is_parsed_once_for_all_frames(tmp_path, monkeypatch, decoding_here, name):
    frames = RNG.integers(0, 4096, (5, 24, 18)).astype(np.uint16)
    path = tmp_path / "a.dcm"
    save(path, dataset(frames, BitsStored=12)) if name == "native" else save_compressed(path, frames, name)
    parsed, read = [], pydicom.filereader.read_partial
    monkeypatch.setattr(pydicom.filereader, "read_partial", lambda *a, **k: parsed.append(1) or read(*a, **k))
    for k in range(count_frames(path)):
        np.testing.assert_array_equal(read_image(path, frame=k).pixels[0], frames[k])
    assert len(parsed) == 1


def test_a_rewritten_file_is_parsed_anew(tmp_path):
    import os

    for value in (1, 2):
        save(path := tmp_path / "a.dcm", dataset(TWELVE_BIT, BitsStored=12, RescaleIntercept=value))
        os.utime(path, ns=(value, value))
        np.testing.assert_array_equal(read_image(path).pixels[0], TWELVE_BIT + float(value))


def test_more_frames_than_a_file_can_hold(tmp_path):
    path = save(tmp_path / "a.dcm", dataset(TWELVE_BIT, NumberOfFrames=2**31 - 1))
    for function in (count_frames, read_image):
        with pytest.raises(ReadError, match="declares 2147483647 frames, which a file of"):
            function(path)


def test_enhanced_objects_keep_their_transforms_per_frame(tmp_path):
    def group(**sequences):
        item = Dataset()
        for name, elements in sequences.items():
            inner = Dataset()
            for keyword, value in elements.items():
                setattr(inner, keyword, value)
            setattr(item, name, [inner])
        return item

    frames = np.full((2, 24, 18), 100, np.uint16)
    ds = dataset(frames)
    ds.SharedFunctionalGroupsSequence = [group(PixelMeasuresSequence={"PixelSpacing": [0.3, 0.4]})]
    ds.PerFrameFunctionalGroupsSequence = [
        group(
            PixelValueTransformationSequence={"RescaleSlope": slope, "RescaleIntercept": -7},
            FrameVOILUTSequence={"WindowCenter": 100, "WindowWidth": 400},
        )
        for slope in (1, 2)
    ]
    path = save(tmp_path / "a.dcm", ds)
    assert [read_image(path, frame=k).pixels[0, 0, 0] for k in (0, 1)] == [93, 193]
    assert read_image(path, frame=1).spacing == (0.3, 0.4)
    assert read_image(path, frame=1, apply_voi=True).value_range == (0, 1)


def transcode(path, syntax):
    gdcm = pytest.importorskip("gdcm")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


COMPRESSED = {
    "RLE": uid.RLELossless,
    "JPEG2000Lossless": uid.JPEG2000Lossless,
    "JPEGLosslessProcess14_1": uid.JPEGLosslessSV1,
    "JPEGLosslessProcess14": uid.JPEGLossless,
    "JPEGLSLossless": uid.JPEGLSLossless,
}


def save_compressed(path, frames, name):
    ds = dataset(frames, BitsStored=12)
    if name in ("RLE", "JPEG2000Lossless"):
        if name == "JPEG2000Lossless":
            pytest.importorskip("openjpeg")
        ds.compress(COMPRESSED[name])
    save(path, ds)
    if name not in ("RLE", "JPEG2000Lossless"):
        transcode(path, name)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == COMPRESSED[name]
    return path


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_syntaxes_are_lossless(tmp_path, name):
    frames = RNG.integers(0, 4096, (2, 40, 50)).astype(np.uint16)
    path = save_compressed(tmp_path / "a.dcm", frames, name)
    np.testing.assert_array_equal(read_image(path, frame=1).pixels[0], frames[1])


@pytest.mark.parametrize("name", ["native", *COMPRESSED])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_pixel_data(tmp_path, capfd, name, kept):
    path = tmp_path / "a.dcm"
    frame = RNG.integers(0, 4096, (64, 64)).astype(np.uint16)
    if name == "native":
        save(path, dataset(frame, BitsStored=12))
    else:
        save_compressed(path, frame, name)
    syntax = pydicom.dcmread(path).file_meta.TransferSyntaxUID
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ReadError) as excinfo:
        read_image(path)
    message = str(excinfo.value)
    assert "corrupt or truncated" in message
    assert syntax.name in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_pydicoms_warnings_stay_inside(tmp_path, caplog):
    path = save(tmp_path / "a.dcm", dataset(TWELVE_BIT, NumberOfFrames=0))
    with pytest.warns(UserWarning, match="assuming 1 frame"):
        pydicom.pixels.pixel_array(path)
    assert caplog.records
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(path).pixels[0], TWELVE_BIT)
    assert not caplog.records


def bundled(name):
    """One of the files pydicom ships for its own tests."""
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this pydicom does not ship {name}")
    return Path(path)


@pytest.mark.parametrize(
    "name", ["image_dfl.dcm", "SC_rgb_jpeg.dcm", "MR_small_bigendian.dcm", "SC_rgb_rle_2frame.dcm", "CT_small.dcm"]
)
def test_files_from_the_wild(name):
    path = bundled(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
    frame = 1 if "2frame" in name else 0
    expected = ds.pixel_array[frame] if frame else apply_modality_lut(ds.pixel_array, ds)
    expected = np.moveaxis(expected, -1, 0) if expected.ndim == 3 else expected[None]
    np.testing.assert_array_equal(read_image(path, frame=frame).pixels, expected)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_12_bit_jpeg(name, capfd):
    gdcm = pytest.importorskip("gdcm")
    path = bundled(name)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    raw = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    capfd.readouterr()  # GDCM itself is chatty
    image = read_image(path)
    expected = np.frombuffer(raw, "<u2").reshape(image.size).astype(np.float64)
    assert expected.max() > 255
    ds = pydicom.dcmread(path)
    expected = expected * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
    np.testing.assert_allclose(image.pixels[0], expected, atol=1)
    assert capfd.readouterr() == ("", "")


def test_a_syntax_without_decoder_names_what_to_install(tmp_path, monkeypatch, decoding_here):
    path = save_compressed(tmp_path / "a.dcm", TWELVE_BIT, "RLE")
    decoder = decoder_of(uid.RLELossless)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(ReadError, match=r'RLE Lossless \(1.2.840.10008.1.2.5\), .*pip install "anatomaly\[dicom\]"'):
        read_image(path)


def test_a_video_syntax_is_refused_by_name(tmp_path):
    ds = dataset(TWELVE_BIT)
    ds.PixelData = pydicom.encaps.encapsulate([bytes(100)])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = uid.MPEG4HP41
    with pytest.raises(ReadError, match=r"MPEG-4 AVC/H\.264 High Profile"):
        read_image(save(tmp_path / "a.dcm", ds))


def test_objects_without_pixels(tmp_path):
    ds = dataset(TWELVE_BIT)
    del ds.Rows
    with pytest.raises(ReadError, match=r"without an image \(Secondary Capture Image Storage\)"):
        read_image(save(tmp_path / "a.dcm", ds))
    ds = dataset(TWELVE_BIT)
    del ds.PixelData
    with pytest.raises(ReadError, match="missing, corrupt or truncated"):
        read_image(save(tmp_path / "a.dcm", ds))


def test_sizes_are_checked_before_decoding(tmp_path):
    with pytest.raises(ReadError, match="is 30000x30000 pixels"):
        read_image(save(tmp_path / "a.dcm", dataset(TWELVE_BIT, Rows=30000, Columns=30000)))
    with pytest.raises(ReadError, match="is 1x1 pixels"):
        read_image(save(tmp_path / "a.dcm", dataset(np.zeros((1, 1), np.uint16))))


def test_no_message_or_header_holds_the_patient(tmp_path):
    from anatomaly.data.dicom_source import open_source

    path = save(tmp_path / "a.dcm", dataset(TWELVE_BIT))
    assert "PatientName" in pydicom.dcmread(path)
    assert "PatientName" not in open_source(path).header


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize("keyword", ["SOPClassUID", "PhotometricInterpretation", "NumberOfFrames"])
def test_a_value_that_spills_into_another_is_not_printed(tmp_path, keyword):
    ds = dataset(TWELVE_BIT)
    vr = "UI" if keyword == "SOPClassUID" else "LO"
    ds[keyword] = pydicom.DataElement(keyword, vr, "Secret^Person\nof ward 3", validation_mode=0)
    if keyword == "SOPClassUID":
        del ds.Rows
    path = save(tmp_path / "a.dcm", ds)
    with pytest.raises(ReadError) as excinfo:
        read_image(path)
    assert "Secret" not in str(excinfo.value)
    assert "\n" not in str(excinfo.value)


def test_a_dicom_mask(tmp_path):
    lesion = np.zeros((24, 18), np.uint8)
    lesion[4:9, 3:7] = 1
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.dcm", dataset(lesion))), lesion == 1)
