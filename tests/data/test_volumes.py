import numpy as np
import pytest

from anatomaly.data.readers import count_frames, read_image
from anatomaly.data.transforms import load
from anatomaly.data.volumes import write_volume
from anatomaly.data.windows import parse_intensity
from anatomaly.errors import OutputError, ReadError, ShapeError
from anatomaly.types import Preprocessing, Sample

nibabel = pytest.importorskip("nibabel")

RNG = np.random.default_rng(11)
SHAPE = (9, 12, 10)


def save(path, voxels, affine, kind=nibabel.Nifti1Image):
    image = kind(voxels, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 3000
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Secret^Person"))
    nibabel.save(image, path)
    return path


def affine_of(codes, zooms=(2.0, 3.0, 4.0)):
    """The affine of a grid whose stored axes point to `codes`, such as "LPS"."""
    orientation = nibabel.orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for stored, (axis, direction) in enumerate(orientation):
        affine[int(axis), stored] = direction * zooms[stored]
    affine[:3, 3] = -30, 20, 10
    return affine


def oblique():
    turn = np.deg2rad(20)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    return rotation @ affine_of("PIR")


AFFINES = {codes: affine_of(codes) for codes in ("RAS", "LPS", "LAS", "SAR", "PIR", "ASL", "IRP")} | {
    "oblique": oblique()
}


@pytest.mark.parametrize("name", AFFINES)
def test_what_is_read_slice_by_slice_is_written_back_voxel_by_voxel(tmp_path, name):
    voxels = RNG.normal(size=SHAPE).astype(np.float32)
    source = save(tmp_path / "in.nii.gz", voxels, AFFINES[name])
    maps = {k: read_image(source, frame=k).pixels[0] for k in range(count_frames(source))}
    write_volume(maps, source, tmp_path / "out.nii.gz")
    written = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), voxels)
    np.testing.assert_allclose(written.affine, AFFINES[name], atol=1e-5)
    assert written.get_data_dtype() == np.float32


@pytest.mark.parametrize("name", AFFINES)
def test_a_marked_voxel_comes_back_at_its_index(tmp_path, name):
    voxels = np.zeros(SHAPE, np.int16)
    voxels[2, 7, 4] = 500
    source = save(tmp_path / "in.nii.gz", voxels, AFFINES[name])
    hits = {k: image for k in range(count_frames(source)) if (image := read_image(source, frame=k).pixels[0]).any()}
    assert len(hits) == 1
    write_volume(hits, source, tmp_path / "out.nii.gz")  # the other slices have no map
    written = nibabel.load(tmp_path / "out.nii.gz").get_fdata()
    assert written[2, 7, 4] == 500
    assert np.count_nonzero(np.nan_to_num(written)) == 1
    assert np.isfinite(written).sum() == next(iter(hits.values())).size  # a slice that was not judged is not a zero


def test_header_keeps_geometry_and_drops_the_rest(tmp_path):
    source = save(tmp_path / "in.nii.gz", np.zeros((9, 12, 10, 1), np.int16), AFFINES["LPS"], nibabel.Nifti2Image)
    write_volume({}, source, tmp_path / "out.nii")
    before, after = nibabel.load(source), nibabel.load(tmp_path / "out.nii")
    assert isinstance(after, nibabel.Nifti2Image)
    assert after.shape == before.shape
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.header.get_xyzt_units() == ("mm", "sec")
    assert [int(after.header[code]) for code in ("qform_code", "sform_code")] == [
        int(before.header[code]) for code in ("qform_code", "sform_code")
    ]
    assert after.header["cal_max"] == 0
    assert len(before.header.extensions) == 1
    assert len(after.header.extensions) == 0
    assert b"Secret" not in (tmp_path / "out.nii").read_bytes()
    assert np.isnan(after.get_fdata()).all()


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("rows", [None, 5])
def test_a_large_volume_is_written_in_blocks(tmp_path, monkeypatch, name, rows):
    whole, blocks = tmp_path / "whole.nii.gz", tmp_path / "blocks.nii.gz"
    source = save(tmp_path / "in.nii.gz", RNG.normal(size=SHAPE).astype(np.float32), AFFINES[name])
    maps = {k: read_image(source, frame=k).pixels[0] for k in range(count_frames(source))}
    kept = dict(list(maps.items())[1:rows])
    write_volume(kept, source, whole)
    monkeypatch.setattr("anatomaly.data.volumes._BLOCK", 4 * 9 * 12 * 3)  # three planes of ten
    write_volume(kept, source, blocks)
    assert np.isnan(nibabel.load(whole).get_fdata()).any()
    assert whole.read_bytes() == blocks.read_bytes()


def test_the_scaling_and_byte_order_of_the_source_do_not_change_the_maps(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_slope_inter(2.0, -7.0)
    nibabel.save(nibabel.Nifti1Image(np.ones(SHAPE), AFFINES["LPS"], header), tmp_path / "in.nii")
    maps = {k: np.full((12, 9), k + 0.5, np.float32) for k in range(10)}
    write_volume(maps, tmp_path / "in.nii", tmp_path / "out.nii")
    written = nibabel.load(tmp_path / "out.nii").get_fdata()
    np.testing.assert_array_equal(written[4, 4], np.arange(10) + 0.5)


def test_a_volume_that_cannot_be_written_leaves_nothing(tmp_path):
    source = save(tmp_path / "in.nii.gz", np.zeros(SHAPE, np.int16), AFFINES["RAS"])
    for maps, error in (({0: np.zeros((9, 12), np.float32)}, ShapeError), ({10: np.zeros((12, 9))}, ShapeError)):
        with pytest.raises(error):
            write_volume(maps, source, tmp_path / "out.nii.gz")
    assert [file.name for file in tmp_path.iterdir()] == ["in.nii.gz"]


def test_maps_that_do_not_fit(tmp_path):
    source = save(tmp_path / "in.nii.gz", np.zeros(SHAPE, np.int16), AFFINES["RAS"])
    with pytest.raises(ShapeError, match=r"slice 3 is \(9, 12\), slices are \(12, 9\)"):
        write_volume({3: np.zeros((9, 12), np.float32)}, source, tmp_path / "out.nii.gz")
    for index in (-1, 10):
        with pytest.raises(ShapeError, match=f"slice {index}, the volume has slices 0..9"):
            write_volume({index: np.zeros((12, 9), np.float32)}, source, tmp_path / "out.nii.gz")


def test_unusable_paths(tmp_path):
    source = save(tmp_path / "in.nii.gz", np.zeros(SHAPE, np.int16), AFFINES["RAS"])
    with pytest.raises(OutputError, match=r"expected \.nii\.gz or \.nii"):
        write_volume({}, source, tmp_path / "out.png")
    with pytest.raises(OutputError, match="cannot be written"):
        write_volume({}, source, tmp_path / "absent" / "out.nii.gz")
    with pytest.raises(ReadError, match="no such file"):
        write_volume({}, tmp_path / "absent.nii.gz", tmp_path / "out.nii.gz")
    (tmp_path / "note.nii.gz").write_text("not a volume")
    with pytest.raises(ReadError, match="cannot be decoded"):
        write_volume({}, tmp_path / "note.nii.gz", tmp_path / "out.nii.gz")


def test_a_rewritten_volume_is_read_anew(tmp_path):
    import os

    path = tmp_path / "v.nii.gz"
    for value in (1, 2):
        save(path, np.full(SHAPE, value, np.int16), AFFINES["RAS"])
        os.utime(path, ns=(value, value))
        assert read_image(path, frame=0).pixels.max() == value


@pytest.mark.parametrize(
    ("voxels", "words"),
    [
        (np.arange(1080).reshape(SHAPE) * 4 + 7, "--intensity range:"),
        (np.linspace(-300, 900, 1080).astype(np.int16).reshape(SHAPE), "--intensity range:-"),
        (np.where(RNG.random(SHAPE) < 0.5, -1000, 40).astype(np.int16), "--intensity brain"),
        (np.full(SHAPE, 3, np.int16), "--intensity percentile:0.5..99.5"),
    ],
)
def test_a_volume_that_auto_refuses_names_the_rule_to_give(tmp_path, voxels, words):
    file = save(tmp_path / "v.nii.gz", voxels.astype(np.int16), affine_of("RAS"))
    with pytest.raises(ReadError, match=r"declares no value range, intensity rule 'auto' needs one\.") as err:
        load(Sample(file, "task", frame=5), Preprocessing())
    assert f"Give {words}" in str(err.value)
    assert "(in fit and benchmark: --preprocessing.intensity)" in str(err.value)
    given = str(err.value).partition("--intensity ")[2].split()[0]
    if not given.startswith("percentile"):
        load(Sample(file, "task", frame=5), Preprocessing(intensity=parse_intensity(given)))
