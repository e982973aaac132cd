"""DICOM series as volumes: put in order by their places, or refused with the reason."""

import io

import numpy as np
import pytest

from anatomaly.data.cuts import axes_of, volumes_of
from anatomaly.data.readers import read_image, read_sample
from anatomaly.data.series import read_series
from anatomaly.errors import ConfigError, ReadError
from anatomaly.synthetic.dicom_files import dicom_bytes
from anatomaly.types import Sample

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

COLUMNS, ROWS, SLICES = 12, 10, 9
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
TURNED = np.linalg.qr(np.array([[0.97, 0.1, -0.2], [-0.1, 0.98, 0.15], [0.2, -0.13, 0.97]]))[0]
OBLIQUE = tuple((np.sign(np.diag(TURNED)) * TURNED)[:, :2].T.round(9).ravel().tolist())
AXES = {
    "axial": AXIAL,
    "oblique": OBLIQUE,
    "flipped": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "feet first": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
}
VOXELS = np.random.default_rng(3).integers(0, 4096, (COLUMNS, ROWS, SLICES))


def series(
    folder, axes=AXIAL, places=range(0, 4 * SLICES, 4), *, shuffle=True, patient="p", change=None, task="brain_mr"
):
    """Files of VOXELS[column, row, slice]; with `shuffle` their names are in no order."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(axes[:3], axes[3:])
    names = np.random.default_rng(1).permutation(len(places)) if shuffle else range(len(places))
    for number, along in enumerate(places):
        pixels = VOXELS[:, :, number].T[None].astype(np.float32) / 4095
        position = (np.array([-20.0, 7.25, 3.0]) + along * normal).round(9).tolist()
        content = dicom_bytes(pixels, task=task, patient=patient, number=number, position=position, axes=axes)
        if change is not None:
            header = pydicom.dcmread(io.BytesIO(content))
            change(header, number)
            buffer = io.BytesIO()
            header.save_as(buffer)
            content = buffer.getvalue()
        (folder / f"{names[number]:03d}.dcm").write_bytes(content)
    return sorted(folder.glob("*.dcm"))


def rows_of(files):
    return [Sample(file, "t") for file in files]


@pytest.mark.parametrize("name", AXES)
def test_slices_lie_at_their_places_whatever_their_names(tmp_path, name):
    found = read_series(series(tmp_path, AXES[name]))
    for k, (file, frame) in enumerate(found.slices):
        header = pydicom.dcmread(file)
        assert frame is None
        assert header.InstanceNumber == k + 1
        corner = found.space.affine @ [3, 2, k, 1]
        x, y, z = np.array(header.ImagePositionPatient) + 2.0 * (
            3 * np.array(AXES[name][:3]) + 2 * np.array(AXES[name][3:])
        )
        np.testing.assert_allclose(corner[:3], (-x, -y, z), atol=1e-6)
    assert found.space.shape == VOXELS.shape


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        *(("oblique", axis) for axis in ("axial", "coronal", "sagittal")),
        *(("flipped", "coronal"), ("feet first", "sagittal"), ("sagittal", "axial"), ("coronal", "coronal")),
    ],
)
def test_a_cut_is_that_of_the_same_volume_as_nifti(tmp_path, name, axis):
    """Beside nibabel: the voxels of the series saved with its affine, and what the NIfTI reader makes of them."""
    import nibabel

    files = series(tmp_path / "dicom", AXES[name])
    nibabel.save(nibabel.Nifti1Image(VOXELS.astype(np.int16), read_series(files).space.affine), tmp_path / "v.nii")
    (volume,), (same,) = volumes_of(rows_of(files), (axis,)), volumes_of(rows_of([tmp_path / "v.nii"]), (axis,))
    assert [each.cut.position for each in volume.samples] == [each.cut.position for each in same.samples]
    for sample, other in list(zip(volume.samples, same.samples, strict=True))[::4]:
        pixels, expected = read_sample(sample).pixels[0], read_sample(other).pixels[0]
        if sample.cut.across:
            np.testing.assert_array_equal(pixels, expected)
        else:  # the file's own image, as it is stored
            np.testing.assert_array_equal(np.sort(pixels, axis=None), np.sort(expected, axis=None))
            assert read_image(sample.path).sha256 == read_sample(sample).sha256
    across = [sample.cut.across for sample in volume.samples]
    acquired = {"sagittal": "sagittal", "coronal": "coronal"}.get(name, "axial")
    assert across == [axis != acquired] * len(across)


def test_the_window_of_each_file_is_applied_where_the_rule_says_so(tmp_path):
    def window(header, number):
        header.WindowCenter, header.WindowWidth = 1000 + number, 500

    files = series(tmp_path, change=window)
    (volume,) = volumes_of(rows_of(files), ("coronal",))
    shown = read_sample(volume.samples[3], apply_voi=True)
    assert shown.value_range == (0.0, 1.0)
    k = read_series(files).slices[5][0]
    expected = read_image(k, apply_voi=True).pixels[0]
    assert shown.size == (SLICES, COLUMNS)
    # canonical y=3 from the back is stored row 6, canonical z=5 is row 3 from above; x runs against the columns
    np.testing.assert_allclose(shown.pixels[0, SLICES - 1 - 5], expected[ROWS - 1 - 3, ::-1], atol=1e-6)


def enhanced(file, places):
    """One file of several frames with a place each."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    made = pydicom.dcmread(
        io.BytesIO(dicom_bytes(np.zeros((1, ROWS, COLUMNS), np.float32), task="brain_mr", patient="p"))
    )
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del made[name]
    frames = []
    for along in places:
        groups, place, plane, measures = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient, plane.ImageOrientationPatient = [0, 0, along], list(AXIAL)
        measures.PixelSpacing = [2, 2]
        groups.PlanePositionSequence, groups.PlaneOrientationSequence = Sequence([place]), Sequence([plane])
        groups.PixelMeasuresSequence = Sequence([measures])
        frames.append(groups)
    made.PerFrameFunctionalGroupsSequence, made.NumberOfFrames = Sequence(frames), len(places)
    made.PixelData = np.stack([VOXELS[:, :, k].T for k in range(len(places))]).astype("<u2").tobytes()
    made.save_as(file)
    return file


def test_frames_of_one_file_are_put_in_order_too(tmp_path):
    file = enhanced(tmp_path / "e.dcm", [0, 8, 4, 12, 20, 16, 24, 28])
    assert [frame for _, frame in read_series([file]).slices] == [0, 2, 1, 3, 5, 4, 6, 7]
    rows = [Sample(file, "t", frame=frame) for frame in range(8)]
    axial, coronal = volumes_of(rows, ("axial",))[0], volumes_of(rows, ("coronal",))[0]
    assert [sample.frame for sample in axial.samples] == [0, 2, 1, 3, 5, 4, 6, 7]
    cut = read_sample(coronal.samples[0]).pixels[0]
    np.testing.assert_array_equal(cut[::-1, ::-1], VOXELS[:, ROWS - 1, [0, 2, 1, 3, 5, 4, 6, 7]].T)


def other_size(header, number):
    if number == 2:
        header.Rows, header.PixelData = ROWS - 1, header.PixelData[: 2 * COLUMNS * (ROWS - 1)]


def other_plane(header, number):
    if number == 2:
        header.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def no_place(header, number):
    if number == 2:
        del header.ImagePositionPatient


BROKEN = {
    "gap": ({"places": [0, 4, 8, 16, 20, 24, 28, 32]}, "slices are 4 to 8 mm apart", "Add the missing slices"),
    "double": ({"places": [0, 4, 8, 8, 12, 16, 20, 24]}, "lie at one place", "Keep phases and echoes apart"),
    "mixed planes": ({"change": other_plane}, "differ in orientation", "Keep scouts"),
    "mixed sizes": ({"change": other_size}, "9x12 pixels", "Keep scouts"),
    "nowhere": ({"change": no_place}, "does not say where it lies", "Leave out --axis"),
    "one": ({"places": [0]}, "is a series of one image", "Leave out --axis"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_volume_is_refused_in_a_line_and_stays_readable_as_images(tmp_path, name):
    how, got, advice = BROKEN[name]
    files = series(tmp_path / "broken", **how)
    with pytest.raises(ReadError, match=got) as err:
        read_series(files)
    assert advice in str(err.value)
    assert "\n" not in str(err.value)
    assert "Phantom" not in str(err.value)
    good = series(tmp_path / "good", patient="other")
    broken, whole = volumes_of(rows_of([*files, *good]), ("coronal", "axial"))
    assert got in broken.error
    assert len(broken.samples) == 1
    with pytest.raises(ReadError, match=got):
        read_sample(broken.samples[0])
    assert len(whole.samples) == ROWS + SLICES
    assert all(read_image(file).pixels.any() for file in files)
    with pytest.raises(ConfigError, match=f"no volume can be cut. The first: .*{got}"):
        volumes_of(rows_of(files), ("axial",))


def test_copies_in_two_folders_are_told_apart(tmp_path):
    files = [*series(tmp_path / "one"), *series(tmp_path / "two")]
    with pytest.raises(ReadError, match=r"(one/(\d+)\.dcm and two/\2|two/(\d+)\.dcm and one/\3)\.dcm lie at one place"):
        read_series(files)


def test_a_slice_that_cannot_be_decoded_is_named(tmp_path):
    def cut_short(header, number):
        if number == 4:
            header.PixelData = header.PixelData[:40]

    files = series(tmp_path, change=cut_short)
    bad = read_series(files).slices[4][0]
    (volume,) = volumes_of(rows_of(files), ("coronal",))
    with pytest.raises(ReadError, match=rf"is no volume: {bad.name} pixel data of frame 0 cannot be decoded"):
        read_sample(volume.samples[0])


def test_colours_and_windows_that_differ_are_refused(tmp_path):
    def inverted(header, number):
        header.PhotometricInterpretation = "MONOCHROME1" if number == 2 else "MONOCHROME2"

    def windowed(header, number):
        if number == 2:
            header.WindowCenter, header.WindowWidth = 1000, 500

    for change, voi in ((inverted, False), (windowed, True)):
        files = series(tmp_path / change.__name__, change=change, patient=change.__name__)
        (volume,) = volumes_of(rows_of(files), ("coronal",))
        with pytest.raises(ReadError, match="is not shown like"):
            read_sample(volume.samples[0], apply_voi=voi)


def test_rows_become_volumes(tmp_path):
    import nibabel

    file = tmp_path / "v.nii.gz"
    nibabel.save(nibabel.Nifti1Image(VOXELS.astype(np.int16), np.diag([2.0, 2.0, 4.0, 1.0])), file)
    thin = tmp_path / "thin.nii.gz"
    nibabel.save(nibabel.Nifti1Image(VOXELS[:, :, :3].astype(np.int16), np.eye(4)), thin)
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    files = series(tmp_path / "series")
    rows = [Sample(file, "t", frame=k, label=int(k == 3), patient_id="x") for k in (3, 4)]
    rows += [Sample(path, "t", label=0) for path in (*files, thin, picture)]
    nifti, dicom, flat, other = volumes_of(rows, axes_of("all"), slices=3)
    assert [(s.cut.axis, s.frame) for s in nifti.samples] == [
        *(("axial", k) for k in (1, 4, 7)),
        *(("coronal", k) for k in (1, 5, 8)),
        *(("sagittal", k) for k in (2, 6, 10)),
    ]
    assert [s.cut.position for s in nifti.samples[:3]] == [1 / 8, 4 / 8, 7 / 8]
    assert {(s.label, s.patient_id) for s in nifti.samples} == {(1, "x")}
    assert {s.label for s in dicom.samples} == {0}
    assert "its coronal slices are 3x12 voxels, expected at least 8 on each side. Choose another --axis." in flat.error
    assert "is no volume, expected a NIfTI file or a DICOM series" in other.error
    names = [s.name for s in (nifti.samples[0], dicom.samples[0], dicom.samples[-1])]
    assert names[0] == "v.nii.gz#axial 1"
    assert names[1].endswith(".dcm")
    assert names[2] == "series#sagittal 10"
    keys = {s.key("0") + str(s.path) for s in (*nifti.samples, *dicom.samples)}
    assert len(keys) == 18
