"""Marked pixels: they carry their image's call, as arrays and as NIfTI volumes."""

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anatomaly.data.volumes import slice_grid
from anatomaly.results.marking import Marking, marked, rows_with_maps
from anatomaly.results.mask_volumes import write_mask_volumes
from anatomaly.results.writer import ResultWriter
from anatomaly.scoring import image_score
from anatomaly.types import Intensity, Prediction, Sample, Scoring

POOLINGS = [Scoring(pooling="max"), Scoring(pooling="mean"), Scoring(pooling="topk", top_fraction=0.1)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    scoring=st.sampled_from(POOLINGS),
    margin=st.floats(0.01, 3),
    factor=st.floats(0.1, 10),  # a geometric mean of levels is on another scale than the map
)
def test_a_called_image_has_marked_pixels_and_no_other_has(seed, scoring, margin, factor):
    anomaly_map = np.random.default_rng(seed).gamma(1.0, size=(7, 9)).astype(np.float32)
    pooled = np.partition(anomaly_map.ravel(), 57)[57:].mean() if scoring.pooling == "topk" else None
    pooled = {"max": anomaly_map.max(), "mean": anomaly_map.mean(), "topk": pooled}[scoring.pooling]
    score = float(pooled) * factor
    rule = Marking(0.1, threshold=score / (1 + margin), scoring=scoring)
    found = marked(anomaly_map, score=score, p_value=0.1, marking=rule)
    assert found.any()
    cut = float(pooled) / (1 + margin)  # whatever the factor
    assert found[anomaly_map > cut * (1 + 1e-5)].all()
    assert not found[anomaly_map < cut * (1 - 1e-5)].any()
    for p_value in (0.100001, None):
        assert not marked(anomaly_map, score=score, p_value=p_value, marking=rule).any()


@pytest.mark.parametrize("scoring", POOLINGS)
def test_where_the_score_is_pooled_from_the_map_the_threshold_is_that_of_the_map(scoring):
    import torch

    anomaly_map = np.random.default_rng(3).gamma(1.0, size=(20, 30)).astype(np.float32)
    score = float(image_score(torch.from_numpy(anomaly_map)[None], scoring))
    rule = Marking(0.1, threshold=0.9 * score, scoring=scoring)
    found = marked(anomaly_map, score=score, p_value=0.01, marking=rule)
    np.testing.assert_array_equal(found, anomaly_map > 0.9 * score)


def test_an_even_map_is_marked_whole_or_not_at_all():
    even = np.full((4, 4), 0.5, np.float32)
    rule = Marking(0.1, threshold=0.5, scoring=Scoring(pooling="max"))
    assert marked(even, score=0.5000001, p_value=0.05, marking=rule).all()


def a_volume(path, axcodes, shape=(9, 12, 10)):
    """A NIfTI file whose stored axes are `axcodes`."""
    wanted = nibabel.orientations.axcodes2ornt(axcodes)
    image = nibabel.Nifti1Image(np.zeros(shape, np.int16), np.diag([1.5, 2.0, 3.0, 1.0]))
    turned = image.as_reoriented(nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], wanted))
    nibabel.save(turned, path)
    return path


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAR", "ILP"])
def test_a_mask_volume_lies_on_its_map_volume(tmp_path, axcodes):
    source = a_volume(tmp_path / "scan.nii.gz", axcodes)
    count, height, width = slice_grid(source)
    rng = np.random.default_rng(0)
    judged = [each for each in range(count) if each != 4]
    with ResultWriter(tmp_path / "out", scale=(0, 1), overlays=False) as writer:
        for index in judged:
            anomaly_map = rng.uniform(size=(height, width)).astype(np.float32)
            called = bool(index % 3)
            said = Prediction(
                Sample(source, "t", frame=index),
                score=float(anomaly_map.max()),
                anomaly_map=anomaly_map,
                p_value=0.05 if called else 0.5,
            )
            writer.write(said)
        writer.finish()
    rule = Marking(0.1, threshold=0.8, scoring=Scoring(pooling="max"))
    assert write_mask_volumes(tmp_path / "out", rule) == ()
    mask = nibabel.load(tmp_path / "out" / "maps" / "scan_mask.nii.gz")
    maps = nibabel.load(tmp_path / "out" / "maps" / "scan_map.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, maps.affine)
    assert mask.header.get_xyzt_units() == maps.header.get_xyzt_units()
    assert "".join(nibabel.aff2axcodes(mask.affine)) == axcodes
    found, values = np.asarray(mask.dataobj), np.asarray(maps.dataobj)
    assert set(np.unique(found)) == {0, 1}
    axis = axcodes.index("S") if "S" in axcodes else axcodes.index("I")
    for index in range(count):
        stored = index if "S" in axcodes else count - 1 - index
        own, map_slice = np.take(found, stored, axis), np.take(values, stored, axis)
        if index == 4:
            assert np.isnan(map_slice).all()
            assert not own.any()
        else:
            np.testing.assert_array_equal(own, (map_slice > 0.8) & bool(index % 3))


def test_a_source_that_is_gone_costs_its_mask_only(tmp_path):
    source = a_volume(tmp_path / "scan.nii", "RAS")
    _, height, width = slice_grid(source)
    with ResultWriter(tmp_path / "out", scale=(0, 1), overlays=False) as writer:
        said = Prediction(Sample(source, "t", frame=0), score=1.0, anomaly_map=np.ones((height, width), np.float32))
        writer.write(said)
        writer.finish()
    source.unlink()
    (told,) = write_mask_volumes(tmp_path / "out", Marking(0.1, 0.8, Scoring()))
    assert told.startswith("maps/scan_mask.nii.gz could not be made")
    assert len(list(rows_with_maps(tmp_path / "out"))) == 1
    assert not (tmp_path / "out" / "maps" / "scan_mask.nii.gz").exists()


def test_a_calibrated_run_writes_masks(tmp_path, make_detector):
    """Slices of a NIfTI file and a DICOM file: what is marked is what is called."""
    import pydicom

    from anatomaly.detector.calibrate import calibrate
    from anatomaly.results.folder import predict_to_folder
    from anatomaly.synthetic.dicom_files import dicom_bytes
    from anatomaly.synthetic.phantom import draw

    pytest.importorskip("highdicom")

    def slices(name, **how):
        drawn = np.stack([draw("head_ct", seed=seed, size=64, **how).pixels[0] for seed in range(3)])
        image = nibabel.Nifti1Image((drawn.transpose(2, 1, 0)[:, ::-1] * 4095).astype(np.int16), np.eye(4))
        nibabel.save(image, tmp_path / name)
        return [Sample(tmp_path / name, "head_ct", frame=frame) for frame in range(3)]

    files = []
    for seed in range(12):
        pixels = draw("head_ct", seed=100 + seed, size=64).pixels
        files.append(tmp_path / f"{seed}.dcm")
        files[-1].write_bytes(dicom_bytes(pixels, task="head_ct", patient=str(seed)))
    bad = tmp_path / "bad.dcm"
    bad.write_bytes(dicom_bytes(1 - draw("head_ct", seed=7, size=64).pixels, task="head_ct", patient="bad"))
    detector = make_detector("nearest")
    rule = Intensity("range", 0, 4095)
    detector.set_support([Sample(file, "head_ct") for file in files[:3]], task="head_ct", intensity=rule)
    calibrate(detector, [Sample(file, "head_ct") for file in files[3:]])
    queries = [*slices("scan.nii"), Sample(bad, "head_ct")]
    for alpha, made in ((0.2, True), (None, False)):
        out = tmp_path / f"out_{alpha}"
        summary = predict_to_folder(detector, queries, out, alpha=alpha, dicom=True)
        assert (out / "maps" / "scan_mask.nii.gz").exists() == made
        assert bool(list(out.rglob("marked_0001.dcm"))) == made
        assert any("no segmentations at a threshold" in line for line in summary.remarks) != made
    out = tmp_path / "out_0.2"
    called = [(row["p_value"] or 1) <= 0.2 for row in rows_with_maps(out)]
    assert called[-1]  # the inverted image
    mask = np.asarray(nibabel.load(out / "maps" / "scan_mask.nii.gz").dataobj)
    assert [bool(mask[:, :, k].any()) for k in range(3)] == called[:3]
    assert pydicom.dcmread(next(out.rglob("marked_0001.dcm"))).pixel_array.any()
