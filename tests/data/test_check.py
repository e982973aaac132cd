from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from anatomaly.data.check import NEAR_SIMILARITY, check_manifest, edge_signature
from anatomaly.data.findings import format_report
from anatomaly.data.manifest import Manifest, load_manifest
from anatomaly.errors import ReadError
from anatomaly.types import Image, Intensity, Sample


def smooth(seed, size=(96, 80)):
    """A smooth random picture, uint8, as different from the next seed as two scans are."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (9, 8)).astype(np.float32)
    return np.asarray(PIL.Image.fromarray(coarse).resize(size[::-1], PIL.Image.Resampling.BICUBIC)).clip(0, 255)


def save(path, pixels):
    PIL.Image.fromarray(np.asarray(pixels).round().astype(np.uint8)).save(path)
    return path


def as_image(pixels, **fields):
    pixels = np.asarray(pixels, np.float32)
    return Image(pixels if pixels.ndim == 3 else pixels[None], None, Path("x"), "0", **fields)


@pytest.fixture
def rows(tmp_path):
    """Six different images of one task: 3 train normals, 1 test normal, 2 test anomalies; one patient each."""
    kinds = [("train", 0), ("train", 0), ("train", 0), ("test", 0), ("test", 1), ("test", 1)]
    return [
        Sample(save(tmp_path / f"{i}.png", smooth(i)), "brain", split, label, patient_id=f"Doe^{i}")
        for i, (split, label) in enumerate(kinds)
    ]


def changed(sample, **fields):
    names = ("path", "task", "split", "label", "frame", "mask", "patient_id", "sha256")
    return Sample(**({name: getattr(sample, name) for name in names} | fields))


def check(rows, **options):
    return check_manifest(Manifest(tuple(rows), Path("source")), **options)


def test_a_sound_data_set_has_counts_and_no_findings(rows):
    steps = []
    report = check(rows, on_progress=lambda done, total: steps.append((done, total)))
    assert report.ok
    assert report.errors == report.warnings == []
    assert [(c.task, c.split, c.label, c.images, c.with_patient) for c in report.counts] == [
        ("brain", "train", 0, 3, 3),
        ("brain", "test", 0, 1, 1),
        ("brain", "test", 1, 2, 2),
    ]
    assert steps == [(i, 6) for i in range(1, 7)]
    assert format_report(report).splitlines()[0] == "task   split  label      images  masks  patients given"
    assert format_report(report).splitlines()[-1] == "ok"


def test_a_window_that_cannot_be_used_is_reported_as_predict_reports_it(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    source = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm", download=False))

    paths = [tmp_path / f"{i}.dcm" for i in range(2)]
    for width, path in zip((0, 1600), paths, strict=True):
        source.WindowWidth = width
        source.save_as(path)
    report = check([Sample(path, "brain", "test", 0) for path in paths])
    note = "its own window of width 0 cannot be used: shown in the range the file declares"
    assert report.ok
    assert [(row, words.split("; ")[0]) for row, words in report.notes] == [("brain/test/0.dcm", note)]
    assert f"1 images: {note}" in report.warnings
    assert f"warning: 1 images: {note}" in format_report(report)


def test_huge_pixels_have_edges_too():
    picture = smooth(1)
    plain, huge = edge_signature(as_image(picture)), edge_signature(as_image(picture * 1e36))
    np.testing.assert_allclose(huge, plain, atol=1e-5)


def test_a_patient_in_two_splits_is_an_error_and_is_never_named(rows):
    rows[3] = changed(rows[3], patient_id="Doe^0")
    report = check(rows)
    (leak,) = report.patients_in_two_splits
    assert leak.rows == (("train", 1), ("test", 1))
    assert not report.ok
    text = format_report(report)
    assert f"patient #{leak.key}: 1 in train, 1 in test" in text
    assert "Doe" not in text + repr(report.patients_in_two_splits)


def test_equal_patient_keys_of_two_tasks_are_two_patients(rows):
    rows[3] = changed(rows[3], patient_id="Doe^0", task="liver")
    assert check(rows).ok


def test_a_file_in_two_splits_is_an_error_but_no_near_duplicate(rows, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(rows[0].path.read_bytes())
    rows[3] = changed(rows[3], path=copy)
    report = check(rows)
    (group,) = report.duplicates
    assert {s.name for s in group.samples} == {"0.png", "copy.png"}
    assert group.crosses_splits
    assert not group.labels_conflict
    assert report.near_duplicates == ()
    assert report.errors == ["1 images appear in two splits of one task"]


def test_a_file_listed_as_normal_and_anomalous_is_an_error(rows, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(rows[3].path.read_bytes())
    rows[4] = changed(rows[4], path=copy)
    report = check(rows)
    assert report.duplicates[0].labels_conflict
    assert report.errors == ["1 images are listed both as normal and as anomalous"]


@pytest.mark.parametrize("fields", [{}, {"task": "liver", "split": "test", "label": 1}])
def test_repeats_within_a_split_or_across_tasks_are_a_warning(rows, tmp_path, fields):
    copy = tmp_path / "copy.png"
    copy.write_bytes(rows[0].path.read_bytes())
    report = check([*rows, changed(rows[0], path=copy, **fields)])
    assert report.ok
    assert report.warnings[0] == "1 images are repeated within a split or across tasks"


def test_unreadable_files_are_listed_with_the_reason_and_the_rest_is_checked(rows, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(rows[0].path.read_bytes()[:60])
    report = check([*rows, Sample(broken, "brain", "test", 0, patient_id="p")])
    ((row, reason),) = report.unreadable
    assert row == "brain/test/broken.png"
    assert "truncated" in reason
    assert str(tmp_path) not in reason
    assert report.ok
    assert report.warnings == ["1 files are unreadable"]
    assert "no file is readable" in check([Sample(broken, "brain")]).errors


def test_masks_that_cannot_be_used_are_listed(rows, tmp_path):
    save(tmp_path / "fits.png", np.zeros((96, 80)))
    save(tmp_path / "small.png", np.zeros((80, 96)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert check([*rows[:5], changed(rows[5], mask=tmp_path / "fits.png")]).bad_masks == ()
    rows[3] = changed(rows[3], mask=tmp_path / "small.png")
    rows[4] = changed(rows[4], mask=tmp_path / "broken.png")
    report = check(rows)
    assert [row for row, _ in report.bad_masks] == ["brain/test/3.png", "brain/test/4.png"]
    assert report.bad_masks[0][1] == "small.png has 80 x 96 pixels, the image 96 x 80"
    assert report.ok
    assert "2 masks are unreadable or do not fit their image" in report.warnings


def test_a_mask_volume_is_read_at_the_frame_of_its_image(rows, tmp_path):
    pages = [PIL.Image.fromarray(np.full(size, 9, np.uint8)) for size in ((20, 30), (96, 80))]
    pages[0].save(tmp_path / "masks.tif", save_all=True, append_images=pages[1:])
    scans = [PIL.Image.fromarray(smooth(i).astype(np.uint8)) for i in (8, 9)]
    scans[0].save(tmp_path / "scans.tif", save_all=True, append_images=scans[1:])
    samples = [Sample(tmp_path / "scans.tif", "t", frame=f, label=1, mask=tmp_path / "masks.tif") for f in (0, 1)]
    assert [row for row, _ in check(samples).bad_masks] == ["t/test/scans.tif#0"]


def test_a_file_that_changed_since_the_manifest_is_an_error(rows):
    rows = list(Manifest(tuple(rows), Path()).with_hashes())
    assert check(rows).ok
    save(rows[2].path, smooth(77))
    report = check(rows)
    assert report.altered == ("brain/train/2.png",)
    assert not report.ok


def reencoded(pixels):
    """Resize by 0.8, dim, and compress as JPEG."""
    small = PIL.Image.fromarray((0.7 * pixels + 10).astype(np.uint8)).resize((64, 77), PIL.Image.Resampling.BICUBIC)
    stream = BytesIO()
    small.save(stream, "JPEG", quality=60)
    return np.asarray(PIL.Image.open(stream))


def test_a_reencoded_copy_across_splits_is_a_near_duplicate(rows, tmp_path):
    rows[4] = changed(rows[4], path=save(tmp_path / "copy.png", reencoded(smooth(1))))
    rows[1] = changed(rows[1], patient_id=None)
    (pair,) = check(rows).near_duplicates
    assert (pair.first.name, pair.second.name) == ("1.png", "copy.png")
    assert NEAR_SIMILARITY <= pair.similarity <= 1
    assert "brain/train/1.png = brain/test/copy.png" in format_report(check(rows))
    assert check(rows, near=False).near_duplicates == ()
    assert check([changed(row, split="test") for row in rows]).near_duplicates == ()
    assert check([changed(row, task=row.split) for row in rows]).near_duplicates == ()


def test_the_similarity_of_all_pairs_does_not_depend_on_the_chunk(rows, tmp_path, monkeypatch):
    rows[4] = changed(rows[4], path=save(tmp_path / "copy.png", reencoded(smooth(2))))
    monkeypatch.setattr("anatomaly.data.check._CHUNK", 2)
    assert [(n.first.name, n.second.name) for n in check(rows).near_duplicates] == [("2.png", "copy.png")]


def test_flat_images_resemble_nothing(rows, tmp_path):
    for i in (0, 4):
        rows[i] = changed(rows[i], path=save(tmp_path / f"flat{i}.png", np.full((40, 40), 10 * i)))
    assert check(rows).near_duplicates == ()
    assert not edge_signature(as_image(np.full((1, 1), 7.0))).any()


def test_edge_signature_ignores_brightness_and_contrast_and_follows_inversion():
    signature = edge_signature(as_image(smooth(5)))
    np.testing.assert_allclose(np.linalg.norm(signature), 1, rtol=1e-6)
    np.testing.assert_allclose(edge_signature(as_image(3 * smooth(5) - 1000)), signature, atol=1e-5)
    np.testing.assert_allclose(edge_signature(as_image(-smooth(5), invert=True)), signature, atol=1e-6)
    assert signature @ edge_signature(as_image(smooth(6))) < 0.5


def test_a_common_bright_rim_does_not_make_images_alike():
    row, column = np.mgrid[-1:1:96j, -1:1:80j]
    radius = np.hypot(row, column)
    discs = [np.where(radius < 0.9, 60 + 0.5 * smooth(seed), 0) + 180 * (abs(radius - 0.9) < 0.06) for seed in (5, 6)]
    first, second = (edge_signature(as_image(disc)) for disc in discs)
    assert first @ second < NEAR_SIMILARITY


def test_images_without_contrast_are_a_warning_with_the_rule_to_give(tmp_path):
    rows = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 4096, (32, 32)).astype(np.uint16)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(Sample(tmp_path / f"{number}.png", "brain", "test", 0))
    report = check(rows)
    assert report.ok
    told = [line for line in report.warnings if "contrast" in line or "intensity" in line]
    assert len(told) == 2
    assert told[0].startswith("3 images: hardly any contrast")
    assert told[1].startswith("brain: after intensity auto the images use 6 %")
    assert "Give --intensity range:0..4095," in told[1]
    for fine in (Intensity("range", 0, 4095), Intensity("percentile", 1, 99)):
        assert check(rows, intensity=fine).warnings == []


def test_gaps_of_the_table_are_warnings(rows):
    rows[0] = changed(rows[0], patient_id=None, label=None)
    rows[4] = changed(rows[4], mask=rows[5].path)
    assert check(rows).warnings == [
        "brain: 1 images name no patient, so leakage between splits cannot be ruled out",
        "brain: 1 training images have no label; training takes them as normal",
        "brain: only 1 of 2 anomalous images have a mask",
    ]


def test_long_lists_are_cut(rows, tmp_path):
    broken = [Sample(tmp_path / f"broken{i}.png", "brain", "test", 0, patient_id="p") for i in range(13)]
    for sample in broken:
        sample.path.write_bytes(b"no image")
    text = format_report(check([*rows, *broken]))
    assert "broken9.png" in text
    assert "broken10.png" not in text
    assert "... and 3 more" in text


REAL = Path(__file__).parents[3] / "shared" / "data" / "real"


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="the real image sets are absent")
def test_real_sets_have_no_leak_but_look_alikes_in_brain_tumor():
    report = check_manifest(load_manifest(REAL))
    assert report.ok
    assert report.unreadable == ()
    # All pairs were looked at: the same slice with another contrast, left over when near-duplicates were removed.
    assert {pair.first.task for pair in report.near_duplicates} == {"brain_tumor"}
    assert 20 <= len(report.near_duplicates) <= 40


def test_images_that_predict_would_refuse_are_told_with_the_rule_that_reads_them(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    voxels = np.arange(16 * 16 * 2, dtype=np.float32).reshape(16, 16, 2)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    report = check_manifest(load_manifest(tmp_path))
    assert [reason.split(",")[0] for _, reason in report.not_mapped] == ["the file declares no value range"] * 2
    assert report.unreadable == ()
    assert report.warnings[0] == (
        "2 images are refused by the intensity rule, by fit and predict too (see --intensity)"
    )
    assert "Refused by the intensity rule (2)" in format_report(report)
    for rule in (Intensity("range", 0, 500), Intensity("percentile", 1, 99)):
        assert check_manifest(load_manifest(tmp_path), intensity=rule).not_mapped == ()


def test_check_asks_the_function_that_predict_prepares_images_with(rows, monkeypatch):
    def refuse(sample, preprocessing):
        raise ReadError(f"{sample.path}: has no window. Set one.")

    monkeypatch.setattr("anatomaly.data.check.load", refuse)
    report = check(rows)
    assert report.not_mapped[0] == ("brain/train/0.png", "has no window. Set one.")
    assert len(report.not_mapped) == len(rows)
    assert report.unreadable == ()


def test_look_alikes_are_judged_without_the_window_of_a_dicom_file(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    seen = {}
    for name, window in (("plain", None), ("windowed", (100, 10))):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid()
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 96, 80, 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit = 7
        dataset.PixelData = smooth(1).round().astype(np.uint8).tobytes()
        if window:
            dataset.WindowCenter, dataset.WindowWidth = window
        dataset.save_as(tmp_path / f"{name}.dcm", enforce_file_format=True)
        seen[name] = Sample(tmp_path / f"{name}.dcm", "brain", "train" if window else "test", 0)
    (pair,) = check(list(seen.values())).near_duplicates
    assert pair.similarity == pytest.approx(1)


def test_what_was_left_out_is_one_line_of_the_report(rows):
    manifest = Manifest(tuple(rows), Path("source"), {("file", "hidden"): 2})
    assert "2 files left out: 2 hidden" in format_report(check_manifest(manifest)).splitlines()
