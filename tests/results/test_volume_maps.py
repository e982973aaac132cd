"""Maps of slices put back on the voxels of the source: every axis, their mean, both formats, and DICOM objects."""

import csv
import json

import numpy as np
import pytest

from anatomaly.data.cuts import axes_of, volumes_of
from anatomaly.data.readers import read_sample
from anatomaly.data.series import read_series
from anatomaly.results.pooled import write_pooled
from anatomaly.results.rows import stored_rows
from anatomaly.results.writer import ResultWriter
from anatomaly.synthetic.dicom_files import dicom_bytes
from anatomaly.types import Prediction, Sample

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

SHAPE = (12, 11, 9)
MARKED = (2, 7, 3)
ALL = ("axial", "coronal", "sagittal")
OBLIQUE = (0.9848, 0.1736, 0.0, -0.1632, 0.9254, 0.342)


@pytest.fixture(params=["nifti LPS", "nifti SAR", "dicom oblique", "dicom sagittal flipped"])
def source(request, tmp_path):
    """Rows of a volume that is 0 but for one voxel, the affine of its voxels, and which voxel that is."""
    kind, _, way = request.param.partition(" ")
    voxels = np.zeros(SHAPE, np.int16)
    voxels[MARKED] = 4095
    if kind == "nifti":
        affine = np.zeros((4, 4))
        for stored, (axis, direction) in enumerate(nibabel.orientations.axcodes2ornt(way)):
            affine[int(axis), stored] = direction * (1.0, 2.0, 3.0)[stored]
        affine[:, 3] = -30, 20, 10, 1
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "v.nii.gz")
        return [Sample(tmp_path / "v.nii.gz", "t")], affine, voxels
    axes = {"oblique": OBLIQUE, "sagittal flipped": (0, -1, 0, 0, 0, -1)}[way]
    normal, names = np.cross(axes[:3], axes[3:]), np.random.default_rng(2).permutation(SHAPE[2])
    (tmp_path / "series").mkdir()
    for k in range(SHAPE[2]):
        pixels, place = voxels[:, :, k].T[None].astype(np.float32) / 4095, (-20 + 4.0 * k * normal).tolist()
        content = dicom_bytes(pixels, task="brain_mr", patient="Secret", number=k, position=place, axes=axes)
        (tmp_path / "series" / f"{names[k]}.dcm").write_bytes(content)
    files = sorted((tmp_path / "series").glob("*.dcm"))
    return [Sample(file, "t") for file in files], read_series(files).space.affine, voxels


def judge(out, samples, **how):
    """A run in which every map is the image itself."""
    with ResultWriter(out, scale=(0.0, 1.0), overlays=False, **how) as writer:
        for number, sample in enumerate(samples):
            pixels = read_sample(sample).pixels
            writer.write(Prediction(sample, score=float(number), anomaly_map=pixels[0], image=pixels, sha256="0"))
        told = writer.finish()
    return told, writer.across


@pytest.mark.parametrize("axis", ALL)
def test_a_marked_voxel_comes_back_at_its_place(source, tmp_path, axis):
    rows, affine, voxels = source
    (volume,) = volumes_of(rows, (axis,))
    told, _ = judge(tmp_path / "out", volume.samples)
    assert told == ()
    (file,) = (tmp_path / "out/maps").glob("*.nii.gz")
    assert file.name.endswith(f"_{axis}_map.nii.gz")
    written = nibabel.load(file)
    np.testing.assert_array_equal(written.get_fdata(), voxels)
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)


def test_all_axes_together_are_the_mean_at_every_voxel(source, tmp_path):
    rows, affine, voxels = source
    (volume,) = volumes_of(rows, ALL)
    told, _ = judge(tmp_path / "out", volume.samples)
    assert told == ("1 map volumes of all axes together: maps/NAME_all_map.nii.gz.",)
    assert len(list((tmp_path / "out/maps").glob("*.nii.gz"))) == 4
    written = nibabel.load(next((tmp_path / "out/maps").glob("*_all_map.nii.gz")))
    np.testing.assert_allclose(written.get_fdata(), voxels, atol=1e-3)
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)


def test_slices_left_out_take_the_nearest_in_the_mean_and_nothing_alone(source, tmp_path):
    rows, _, _ = source
    (volume,) = volumes_of(rows, ALL, slices=4)
    told, across = judge(tmp_path / "out", volume.samples)
    assert told[0].startswith("3 of 3 map volumes: ")
    assert (len(across) > 0) == (len(rows) > 1)  # of a DICOM series
    alone = nibabel.load(next((tmp_path / "out/maps").glob("*_coronal_map.nii.gz"))).get_fdata()
    assert np.isnan(alone).any()
    assert np.isfinite(nibabel.load(next((tmp_path / "out/maps").glob("*_all_map.nii.gz"))).get_fdata()).all()


def test_a_run_goes_on_with_its_volumes(source, tmp_path):
    rows, _, voxels = source
    (volume,) = volumes_of(rows, ALL)
    judge(tmp_path / "whole", volume.samples)
    judge(tmp_path / "cut", volume.samples[:14])
    for file in (tmp_path / "cut/maps").glob("*.nii.gz"):
        file.unlink()
    stored = stored_rows(tmp_path / "cut", volume.samples, batch_size=1)
    assert len(stored) == 14
    (other,) = volumes_of(rows, ("coronal",))
    assert not stored_rows(tmp_path / "cut", other.samples, batch_size=1)
    with ResultWriter(tmp_path / "cut", scale=(0.0, 1.0), overlays=False, stored=stored) as writer:
        for sample in volume.samples[14:]:
            pixels = read_sample(sample).pixels
            writer.write(Prediction(sample, score=1.0, anomaly_map=pixels[0], image=pixels, sha256="0"))
        writer.finish()
    for file in (tmp_path / "whole/maps").glob("*.nii.gz"):
        assert (tmp_path / "cut/maps" / file.name).read_bytes() == file.read_bytes()
    np.testing.assert_allclose(nibabel.load(tmp_path / "cut/maps" / file.name).get_fdata(), voxels, atol=1e-3)


def test_parametric_maps_lie_on_the_images_of_the_series(source, tmp_path):
    pytest.importorskip("highdicom")
    from anatomaly.results.dicom_objects import Maker
    from anatomaly.results.dicom_out import write_dicom

    rows, _, _ = source
    (volume,) = volumes_of(rows, ALL)
    _, across = judge(tmp_path / "out", volume.samples)
    told = write_dicom(tmp_path / "out", Maker("m", "ab" * 32, "cd" * 32), None, across)
    if len(rows) == 1:
        assert told == ("dicom: no image is a DICOM file; nothing was written to dicom/.",)
        return
    assert f"parametric maps: {len(ALL) + 1}." in told[0]
    assert any(line.endswith("slices across a series are no images of it; maps/ has them.") for line in told)
    images = {str(header.SOPInstanceUID): header for header in map(pydicom.dcmread, (row.path for row in rows))}
    made = [pydicom.dcmread(file) for file in sorted((tmp_path / "out/dicom").rglob("map_*.dcm"))]
    assert len({each.SeriesDescription for each in made}) == len({each.SeriesInstanceUID for each in made}) == 4
    for each in made:
        assert each.NumberOfFrames == SHAPE[2]
        for groups, frame in zip(each.PerFrameFunctionalGroupsSequence, each.pixel_array, strict=True):
            uid = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            np.testing.assert_allclose(frame, images[uid].pixel_array, atol=1e-3)
            place = groups.PlanePositionSequence[0].ImagePositionPatient
            np.testing.assert_allclose(place, images[uid].ImagePositionPatient, atol=1e-6)


def test_rows_say_where_slices_lie_and_name_nobody(source, tmp_path):
    rows, _, _ = source
    (volume,) = volumes_of(rows, ALL)
    judge(tmp_path / "out", volume.samples)
    with (tmp_path / "out/scores.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [row["axis"] for row in table] == [sample.cut.axis for sample in volume.samples]
    assert [float(row["position"]) for row in table] == [sample.cut.position for sample in volume.samples]
    assert len({row["map"] for row in table}) == len(table) == sum(SHAPE)
    assert all(
        sample.cut.own or sample.cut.axis in row["map"] for sample, row in zip(volume.samples, table, strict=True)
    )
    lines = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    assert ["across" in line for line in lines] == [sample.cut.across for sample in volume.samples]
    assert "Secret" not in (tmp_path / "out/scores.csv").read_text() + str(list((tmp_path / "out").rglob("*")))


def test_volumes_have_a_row_for_each_axis_and_one_for_all(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4)), tmp_path / "v.nii")
    rows = [Sample(tmp_path / "v.nii", "t", label=1, patient_id="p")]
    (volume,) = volumes_of(rows, axes_of("all"), slices=4)
    scores = [*(1.0, 2.0, 3.0, 4.0), *(10.0, 20.0, 30.0, 40.0), *(0.0, 0.0, 0.0, 300.0)]
    said = [Prediction(sample, score=score, sha256="0") for sample, score in zip(volume.samples, scores, strict=True)]
    write_pooled(tmp_path, said, None)
    with (tmp_path / "volumes.csv").open(newline="") as lines:
        found = [(row["axis"], float(row["score_max"]), float(row["score_top3"])) for row in csv.DictReader(lines)]
    assert found == [
        ("axial", 4.0, 3.0),
        ("coronal", 40.0, 30.0),
        ("sagittal", 300.0, 100.0),
        ("all", pytest.approx(344 / 3), pytest.approx(133 / 3)),
    ]
    with (tmp_path / "patients.csv").open(newline="") as lines:
        (patient,) = csv.DictReader(lines)
    assert (patient["axis"], float(patient["score_max"]), patient["images"]) == ("all", pytest.approx(344 / 3), "12")
