from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from anatomaly.data import transforms
from anatomaly.data.transforms import (
    apply_intensity,
    fit_to_input,
    load,
    mask_to_input,
    needs_voi,
    preprocess,
    resolve_intensity,
    restore_map,
)
from anatomaly.errors import ConfigError, ReadError, ShapeError
from anatomaly.types import Image, Intensity, Preprocessing, Sample

RNG = np.random.default_rng(5)
ODD_SIZES = [(33, 57), (200, 31), (128, 128), (9, 301), (511, 400)]


def image(pixels, value_range=None, invert=False):
    pixels = np.asarray(pixels, np.float32)
    return Image(pixels if pixels.ndim == 3 else pixels[None], value_range, Path("x.png"), "0" * 64, invert=invert)


RAMP = np.linspace(-1000, 3000, 80).reshape(8, 10)


@pytest.mark.parametrize(
    ("intensity", "low", "high"),
    [
        (Intensity("window", 40, 80), 0, 80),
        (Intensity("window", 40, 81), -0.5, 80.5),
        (Intensity("range", -500, 1500), -500, 1500),
        (Intensity("auto"), -1024, 3071),
    ],
)
@pytest.mark.parametrize("invert", [False, True])
def test_rules(intensity, low, high, invert):
    result = apply_intensity(image(RAMP, (-1024, 3071), invert), intensity)
    expected = np.clip((RAMP - low) / (high - low), 0, 1)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0], 1 - expected if invert else expected, atol=1e-6)


def test_the_rule_does_not_depend_on_the_picture():
    dark, bright = (apply_intensity(image(np.full((8, 8), v), (0, 65535)), Intensity()) for v in (1000, 4000))
    np.testing.assert_allclose(bright / dark, 4)  # no per-image stretch
    assert apply_intensity(image(np.full((8, 8), 65535), (0, 65535)), Intensity()).max() == 1


def test_the_input_is_left_alone():
    picture = image(RAMP, (0, 1), True)
    before = picture.pixels.copy()
    apply_intensity(picture, Intensity())
    np.testing.assert_array_equal(picture.pixels, before)


def test_rules_that_cannot_be_applied():
    with pytest.raises(ConfigError, match=r"not resolved\. Call transforms.resolve_intensity"):
        apply_intensity(image(RAMP), Intensity("percentile", 1, 99))
    with pytest.raises(ReadError, match=r"x.png: the file declares no value range.* --intensity brain .*--preproc"):
        apply_intensity(image(RAMP), Intensity())
    for rule, low, high in [("window", 40, 0), ("window", 40, -5), ("range", 5, 5), ("range", 5, float("nan"))]:
        with pytest.raises(ConfigError, match=f"{rule} .* spans no values"):
            apply_intensity(image(RAMP), Intensity(rule, low, high))


def test_only_auto_asks_for_the_files_own_window():
    assert [rule for rule in ("auto", "window", "range", "percentile") if needs_voi(Intensity(rule))] == ["auto"]


def test_percentiles_are_pooled_and_fixed():
    pictures = [image(RNG.normal(mean, 10, (300, 200))) for mean in (100, 100, 400)]
    pooled = np.concatenate([picture.pixels.ravel() for picture in pictures])
    resolved = resolve_intensity(Intensity("percentile", 5, 95), iter(pictures))
    assert resolved.rule == "range"
    np.testing.assert_allclose([resolved.low, resolved.high], np.percentile(pooled, [5, 95]), atol=2)
    assert resolved == resolve_intensity(Intensity("percentile", 5, 95), pictures)


def test_every_image_counts_alike_in_the_pool_however_large(monkeypatch):
    pictures = [image(np.zeros((1000, 1000))), image(np.ones((100, 100)))] * 3
    for limit in (transforms._POOLED_PIXELS, 15_000):
        monkeypatch.setattr(transforms, "_POOLED_PIXELS", limit)
        noisy = [image(p.pixels + RNG.normal(0, 0.01, p.pixels.shape)) for p in pictures]
        resolved = resolve_intensity(Intensity("percentile", 25, 75), noisy)
        np.testing.assert_allclose([resolved.low, resolved.high], [0, 1], atol=0.02)


def test_the_pool_stays_small(monkeypatch):
    monkeypatch.setattr(transforms, "_POOLED_PIXELS", 5000)
    sizes = []
    percentile = np.percentile
    monkeypatch.setattr(np, "percentile", lambda pool, q: (sizes.append(pool.size), percentile(pool, q))[1])
    resolve_intensity(Intensity("percentile", 1, 99), [image(RNG.normal(size=(90, 90))) for _ in range(9)])
    assert sizes[0] <= 5000


def test_other_rules_pass_unchanged_and_images_are_not_touched():
    def never():
        raise AssertionError
        yield

    for intensity in (Intensity(), Intensity("window", 1, 2), Intensity("range", 1, 2)):
        assert resolve_intensity(intensity, never()) is intensity


def test_percentiles_that_cannot_be_resolved():
    with pytest.raises(ConfigError, match="at least one training image"):
        resolve_intensity(Intensity("percentile", 1, 99), [])
    with pytest.raises(ConfigError, match="are both 7"):
        resolve_intensity(Intensity("percentile", 1, 99), [image(np.full((9, 9), 7))])
    for low, high in [(99, 1), (-1, 50), (50, 101)]:
        with pytest.raises(ConfigError, match="0 <= lower < upper <= 100"):
            resolve_intensity(Intensity("percentile", low, high), [image(RAMP)])


@pytest.mark.parametrize("interpolation", ["lanczos", "bilinear"])
def test_squash_is_pillows_resize(interpolation):
    rows, columns = np.mgrid[:50, :70]
    pixels = np.stack([0.5 + 0.4 * np.sin(rows / 9 + k) * np.cos(columns / 7) for k in range(3)]).astype(np.float32)
    fitted = fit_to_input(pixels, Preprocessing((32, 48), "squash", interpolation))
    assert fitted.shape == (3, 32, 48)
    assert fitted.dtype == np.float32
    for channel, result in zip(pixels, fitted, strict=True):
        eight_bit = Pillow.fromarray((channel * 255).round().astype(np.uint8))
        expected = np.asarray(eight_bit.resize((48, 32), Pillow.Resampling[interpolation.upper()])) / 255
        np.testing.assert_allclose(result, expected, atol=1.6 / 255)


def test_grey_is_repeated_and_overshoot_clipped():
    step = np.zeros((1, 40, 40), np.float32)
    step[:, :, 20:] = 1
    fitted = fit_to_input(step, Preprocessing((128, 128)))
    np.testing.assert_array_equal(fitted[0], fitted[2])
    assert (fitted.min(), fitted.max()) == (0, 1)


def test_pad_keeps_the_aspect_ratio_and_centres():
    fitted = fit_to_input(np.ones((1, 50, 100), np.float32), Preprocessing((64, 64), "pad"))
    assert fitted[0, 16:48].min() == pytest.approx(1)
    assert fitted[0, :16].max() == fitted[0, 48:].max() == 0


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_a_blob_comes_back_where_it_was(resize, size):
    rows, columns = np.mgrid[: size[0], : size[1]]
    for r, c in [(0.25, 0.75), (0.8, 0.1), (0.5, 0.5)]:
        at = (r * (size[0] - 1), c * (size[1] - 1))
        blob = np.exp(-(((rows - at[0]) / size[0] * 8) ** 2) - ((columns - at[1]) / size[1] * 8) ** 2)
        preprocessing = Preprocessing((128, 96), resize)
        prepared = preprocess(image(blob, (0, 1)), preprocessing)
        restored = restore_map(prepared.input[0], size, preprocessing)
        assert restored.shape == size
        assert restored.dtype == np.float32
        for axis, grid in enumerate((rows, columns)):
            before, after = (float((grid * weight).sum() / weight.sum()) for weight in (blob, restored))
            assert abs(after - before) < max(0.5, 0.006 * size[axis])
        if min(size) > 30:
            np.testing.assert_allclose(restored, blob, atol=0.08)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 300), st.integers(8, 300), st.sampled_from(["squash", "pad"]))
def test_a_constant_map_restores_to_itself_at_any_size(height, width, resize):
    preprocessing = Preprocessing((64, 96), resize)
    fitted = fit_to_input(np.ones((1, height, width), np.float32), preprocessing)
    np.testing.assert_allclose(restore_map(fitted[0], (height, width), preprocessing), 1, atol=1e-5)


def test_what_lies_in_the_padding_never_reaches_the_source():
    preprocessing = Preprocessing((64, 64), "pad")
    anomaly_map = np.full((64, 64), 9, np.float32)
    anomaly_map[16:48] = 1
    np.testing.assert_allclose(restore_map(anomaly_map, (50, 100), preprocessing), 1)


def test_restore_refuses_a_map_of_another_size():
    with pytest.raises(ShapeError, match=r"the map is \(32, 32\), inputs are \(128, 128\)"):
        restore_map(np.zeros((32, 32), np.float32), (50, 50), Preprocessing())


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_a_mask_lands_where_its_image_does(resize):
    lesion = np.zeros((101, 203), bool)
    lesion[20:60, 30:90] = True
    preprocessing = Preprocessing((64, 64), resize)
    mask = mask_to_input(lesion, preprocessing)
    assert mask.dtype == np.bool_
    pictured = fit_to_input(lesion[None].astype(np.float32), preprocessing)[0] >= 0.5
    assert np.count_nonzero(mask ^ pictured) <= 0.1 * mask.sum()
    scale = mask.size / lesion.size if resize == "squash" else (64 / 203) ** 2
    assert mask.sum() == pytest.approx(lesion.sum() * scale, rel=0.1)


def test_a_mask_pixel_is_lesion_from_half_its_area_on():
    lesion = np.zeros((32, 32), bool)
    lesion[:2, 0] = True  # half of input pixel (0, 0)
    lesion[0, 2] = True  # a quarter of (0, 1)
    mask = mask_to_input(lesion, Preprocessing((16, 16)))
    assert mask[0, 0]
    assert mask.sum() == 1


def test_masks_at_the_input_size_are_untouched():
    lesion = RNG.random((64, 96)) > 0.5
    np.testing.assert_array_equal(mask_to_input(lesion, Preprocessing((64, 96))), lesion)


def test_load_reads_and_prepares(tmp_path):
    stored = RNG.integers(0, 65536, (40, 60)).astype(np.uint16)
    Pillow.fromarray(stored).save(tmp_path / "a.png")
    prepared = load(Sample(tmp_path / "a.png", "brain"), Preprocessing((32, 32)))
    assert prepared.input.shape == (3, 32, 32)
    np.testing.assert_allclose(prepared.display[0], stored / 65535, atol=1e-6)
    assert prepared.image.size == (40, 60)


def test_load_uses_a_dicom_files_own_window_under_auto_only(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset

    stored = np.full((20, 20), 1040, np.uint16)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = pydicom.uid.CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.Rows = ds.Columns = 20
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME1"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.VOILUTFunction = 1, -1000, "LINEAR_EXACT"
    ds.WindowCenter, ds.WindowWidth = 20, 80
    ds.PixelData = stored.tobytes()
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    sample = Sample(tmp_path / "a.dcm", "brain")
    for intensity, grey in [(Intensity(), 0.75), (Intensity("window", 0, 100), 0.9), (Intensity("range", 0, 200), 0.2)]:
        prepared = load(sample, Preprocessing((32, 32), intensity=intensity))
        np.testing.assert_allclose(prepared.input, 1 - grey, atol=1e-6)  # MONOCHROME1
