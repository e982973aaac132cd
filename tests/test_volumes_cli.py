"""`predict --axis` as its users meet it: volumes in, volumes out, and nonsense told in one line."""

import numpy as np
import pytest
from scores import read_scores

from anatomaly.cli import main
from anatomaly.data.cuts import volumes_of
from anatomaly.types import Intensity, Sample, Scoring

nibabel = pytest.importorskip("nibabel")


@pytest.fixture(scope="module")
def world(make_detector, tmp_path_factory):
    """Three normal volumes, one with a bright cube, a picture, a small model, and two banks of it."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(8)
    for name in ("normal/a", "normal/b", "normal/c", "query"):
        voxels = rng.uniform(60, 90, (16, 14, 12))
        if name == "query":
            voxels[5:9, 5:9, 5:9] = 250
        (folder / name).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), np.eye(4)), folder / f"{name}.nii.gz")
    from PIL import Image

    Image.new("L", (20, 20)).save(folder / "picture.png")
    settings = {"intensity": Intensity("range", 0.0, 255.0), "scoring": Scoring(blur=0)}
    detector = make_detector("matching", size=(32, 32), **settings)
    detector.save(folder / "model")
    row = Sample(folder / "normal/a.nii.gz", "t", frame=3)
    (volume,) = volumes_of([row], ("axial",), slices=2)
    detector.set_support(volume.samples).save_support(folder / "slices.bank")
    detector.set_support([row]).save_support(folder / "image.bank")
    return folder


@pytest.fixture
def run(world, tmp_path, capsys):
    """Run predict with the small model; returns code, output and errors."""

    def call(*words, out="out"):
        capsys.readouterr()
        given = ["predict", "--model", world / "model", "--out", tmp_path / out, *words]
        return main([str(word) for word in given]), *capsys.readouterr()

    return call


def test_volumes_are_judged_along_all_axes_and_come_back_as_volumes(run, world, tmp_path):
    volumes = ("--images", world / "query.nii.gz", "--axis", "all", "--slices", "6")
    supports = ("--support", world / "normal", "--shots", "2", "--support_match", "position")
    code, said, _ = run(*volumes, *supports, "--save_bank", tmp_path / "v.bank")
    assert code == 0
    assert "18 images scored, 0 could not be read" in said
    assert "calibrate" not in said
    rows = read_scores(tmp_path / "out/scores.csv")
    assert [row["axis"] for row in rows] == ["axial"] * 6 + ["coronal"] * 6 + ["sagittal"] * 6
    assert sum(name.startswith("weight_") for name in rows[0]) == 36
    together = nibabel.load(tmp_path / "out/maps/query_all_map.nii.gz").get_fdata()
    assert together.shape == (16, 14, 12)
    inside = together[5:9, 5:9, 5:9].mean()
    assert inside > 1.3 * together.mean()
    code, said, _ = run(*volumes, "--bank", tmp_path / "v.bank", out="again")
    again = read_scores(tmp_path / "again/scores.csv")
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in rows], abs=1e-6)


def test_a_file_that_is_no_volume_costs_its_own_row(run, world, tmp_path):
    images = ("--images", world / "query.nii.gz", world / "picture.png", "--axis", "coronal", "--slices", "2")
    code, said, _ = run(*images, "--support", world / "normal", "--maps", "false", "--overlays", "false")
    assert code == 0
    assert "picture.png: is no volume, expected a NIfTI file or a DICOM series." in said
    assert [row["status"] for row in read_scores(tmp_path / "out/scores.csv")] == ["ok", "ok", "error"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--images Q --support N --slices 3", "--slices is about volumes. Give --axis"),
        ("--images Q --support N --support_match position", "--support_match position is about volumes. Give --axis"),
        ("--images Q --support N --axis axial --slices 0", "slices is 0, expected at least 1"),
        ("--images Q --support N --axis oblique", "expected one of 'axial', 'coronal', 'sagittal', 'all'"),
        ("--images Q --support N --axis axial --support_match near", "expected one of 'none', 'position'"),
        ("--images Q --support N --axis axial --alpha 0.1", "there is no calibration of volumes yet"),
        ("--images Q --support N --axis axial --shots 9", "got 3 normal volumes, expected 9 (--shots)"),
        ("--images Q --support P --axis axial", "no volume can be cut. The first: "),
        ("--images P --support N --axis axial", "picture.png: is no volume, expected a NIfTI file or a DICOM series"),
        ("--images Q --bank B --axis axial --support_match position", "--bank says itself how slices are matched"),
        ("--images Q --bank B --axis coronal", "holds axial slices of volumes, --axis is coronal. Give --axis axial"),
        ("--images Q --bank B", "holds axial slices of volumes, --axis is missing. Give --axis axial"),
        ("--images Q --bank A --axis axial", "holds images of no volumes, --axis is axial. Leave out --axis"),
    ],
)
def test_nonsense_is_told_in_one_line(words, told, run, world):
    places = {"Q": world / "query.nii.gz", "N": world / "normal", "P": world / "picture.png"}
    places |= {"A": world / "image.bank", "B": world / "slices.bank"}
    code, _, said = run(*(places.get(word, word) for word in words.split()))
    assert code == 2
    assert told in said
    assert said.strip().count("\n") == 0
