"""DICOM objects: the same study, the same places, the same pixels as the maps, whatever the series is like."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest

from anatomaly.errors import ConfigError, NotReadyError
from anatomaly.results.dicom_objects import Maker
from anatomaly.results.dicom_out import check_dicom, write_dicom
from anatomaly.results.marking import Marking
from anatomaly.results.writer import ResultWriter
from anatomaly.synthetic.dicom_files import dicom_bytes
from anatomaly.synthetic.phantom import draw
from anatomaly.types import Prediction, Sample, Scoring

hd = pytest.importorskip("highdicom")

MAKER = Maker("matching", "ab" * 32, "cd" * 32)
SCALE = (0.5, 1.5)
MARKING = Marking(0.1, threshold=1.2, scoring=Scoring(pooling="max"))
SIZE = (32, 48)
TURNED = np.linalg.qr(np.array([[0.9, 0.2, -0.3], [-0.1, 0.8, 0.5], [0.4, -0.3, 0.7]]))[0]
SERIES = {  # ImageOrientationPatient, and positions along the normal in the order of the files' names
    "axial": ((1, 0, 0, 0, 1, 0), (0, 5, 10, 15)),
    "shuffled": ((1, 0, 0, 0, 1, 0), (10, 0, 15, 5)),
    "oblique": (tuple(TURNED[:, :2].T.ravel().tolist()), (0, 3, 6, 9)),
    "flipped": ((-1, 0, 0, 0, 1, 0), (15, 10, 5, 0)),
    "sagittal": ((0, 1, 0, 0, 0, -1), (0, 2, 4, 6)),
    "gapped": ((1, 0, 0, 0, 1, 0), (0, 5, 20, 25)),
}


def write_series(folder, axes, places, *, patient="p1", task="head_ct", change=None):
    """Files 000.dcm, 001.dcm, ... of one series; `change` may edit each."""
    folder.mkdir(parents=True, exist_ok=True)
    normal, pixels = np.cross(axes[:3], axes[3:]), draw(task, seed=1, size=48).pixels[:, : SIZE[0]]
    for number, along in enumerate(places):
        position = (np.array([-40.0, 7.25, 3.0]) + along * normal).round(9).tolist()
        axes = [round(float(cosine), 12) for cosine in axes]
        content = dicom_bytes(pixels, task=task, patient=patient, number=number, position=position, axes=axes)
        if change is not None:
            header = pydicom.dcmread(io.BytesIO(content))
            change(header, number)
            header.save_as(folder / f"{number:03d}.dcm")
        else:
            (folder / f"{number:03d}.dcm").write_bytes(content)
    return sorted(folder.glob("*.dcm"))


def a_run(out, images, *, sizes=SIZE):
    """What a run leaves: random maps; every second image is called. `images` are files or (file, frame)."""
    maps = {}
    with ResultWriter(out, scale=SCALE) as writer:
        for number, image in enumerate(images):
            path, frame = image if isinstance(image, tuple) else (image, None)
            rng = np.random.default_rng(number)
            maps[number] = rng.uniform(0.3, 1.4, sizes).astype(np.float32)
            maps[number][3, 5 + number % 20] = score = np.float32(1.6 if number % 2 else 1.1)
            said = Prediction(
                Sample(path, "head_ct", frame=frame),
                score=float(score),
                anomaly_map=maps[number],
                image=rng.uniform(size=(1, *sizes)).astype(np.float32),
                spacing=(2.0, 2.0),
                p_value=0.05 if number % 2 else 0.6,
                sha256="0",
            )
            writer.write(said)
        writer.finish()
    return maps


def objects(out):
    """Kind -> datasets in the order of their names."""
    found = {"overlay": [], "marked": [], "map01": [], "map": []}
    for file in sorted((out / "dicom").rglob("*.dcm")):
        found[file.name.rsplit("_", 1)[0]].append(pydicom.dcmread(file))
    return found


def frames_of(made):
    """(position, SOPInstanceUID and frame number of the source, pixels) of every frame."""
    pixels = made.pixel_array.reshape(-1, made.Rows, made.Columns)
    for groups, frame in zip(made.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        number = source.get("ReferencedFrameNumber")
        yield np.array(place, float), (str(source.ReferencedSOPInstanceUID), number and int(number)), frame


def expected(kind, maps, number):
    if kind == "map":
        return maps[number]
    if kind == "marked":
        return (maps[number] > 1.2) & bool(number % 2)
    return np.rint(np.clip((maps[number] - 0.5) / 1.0, 0, 1) * 255)


@pytest.mark.parametrize("name", SERIES)
def test_a_series_keeps_its_places(tmp_path, name):
    axes, places = SERIES[name]

    def lie(header, number):
        header.SpacingBetweenSlices = 99

    files = write_series(tmp_path / "series", axes, places, change=lie)
    maps = a_run(tmp_path / "out", files)
    told = write_dicom(tmp_path / "out", MAKER, MARKING)
    assert told == (
        f"dicom: written to {tmp_path / 'out' / 'dicom'}: overlays (Secondary Capture): 4, segmentations at the "
        "threshold: 1, fractional segmentations: 1, parametric maps: 1.",
    )
    found = objects(tmp_path / "out")
    sources = [pydicom.dcmread(file) for file in files]
    number_of = {str(source.SOPInstanceUID): number for number, source in enumerate(sources)}
    for kind in ("marked", "map01", "map"):
        (made,) = found[kind]
        for each in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "StudyDate"):
            assert made[each].value == sources[0][each].value
        shared = made.SharedFunctionalGroupsSequence[0]
        cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
        np.testing.assert_allclose(cosines, np.array(sources[0].ImageOrientationPatient, float), atol=1e-6)
        assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [2, 2]
        apart = shared.PixelMeasuresSequence[0].get("SpacingBetweenSlices")
        assert apart == (None if name == "gapped" else pytest.approx(sorted(places)[1]))
        seen, along = set(), []
        for position, (uid, _), pixels in frames_of(made):
            number = number_of[uid]
            seen.add(number)
            along.append(float(np.cross(cosines[:3], cosines[3:]) @ position))
            source = np.array(sources[number].ImagePositionPatient, float)
            np.testing.assert_allclose(position, source, atol=1e-6)
            np.testing.assert_array_equal(pixels, expected(kind, maps, number))
        assert seen == {0, 1, 2, 3}
        assert along in (sorted(along), sorted(along, reverse=True))
    uids = [{str(made.SeriesInstanceUID) for made in found[kind]} for kind in found]
    assert all(len(each) == 1 for each in uids)
    assert len(set.union(*uids, {str(sources[0].SeriesInstanceUID)})) == 5
    if name != "gapped":
        volume = hd.imread(next((tmp_path / "out").rglob("map_0001.dcm"))).get_volume()
        assert volume.spatial_shape == (4, *SIZE)


def test_overlays_show_every_pixel_and_name_their_source(tmp_path):
    from PIL import Image

    files = write_series(tmp_path / "series", *SERIES["axial"])
    a_run(tmp_path / "out", files)
    write_dicom(tmp_path / "out", MAKER, None)
    found = objects(tmp_path / "out")["overlay"]
    assert len(found) == 4
    for file, made in zip(files, found, strict=True):
        source = pydicom.dcmread(file)
        reference = made.SourceImageSequence[0]
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert (made.StudyInstanceUID, made.PatientID) == (source.StudyInstanceUID, source.PatientID)
        assert made.BurnedInAnnotation == "YES"
        assert made.ImageComments.startswith("score 1.")
        assert made.PatientOrientation == ["L", "P"]
        zoom = 12  # 32 pixels to at least 384
        assert list(made.PixelSpacing) == pytest.approx([2 / zoom, 2 / zoom])
        shown = np.asarray(Image.open(tmp_path / "out" / "overlays" / f"{file.stem}.png").convert("RGB"))
        top = (made.Rows - zoom * SIZE[0]) // 2
        np.testing.assert_array_equal(made.pixel_array[top : made.Rows - top : zoom, : zoom * SIZE[1] : zoom], shown)
        assert made.pixel_array[:top].any()  # text
        assert made.pixel_array[-top:].any()


def test_the_same_verdict_is_the_same_object(tmp_path):
    files = write_series(tmp_path / "series", *SERIES["axial"])
    for run in "ab":
        a_run(tmp_path / run, files)
        write_dicom(tmp_path / run, MAKER, MARKING)
    a_run(tmp_path / "c", files)
    write_dicom(tmp_path / "c", Maker("matching", "ef" * 32, "cd" * 32), MARKING)
    uids = [
        [
            (str(made.SeriesInstanceUID), str(made.SOPInstanceUID))
            for kind in objects(tmp_path / run).values()
            for made in kind
        ]
        for run in "abc"
    ]
    assert len(set(uids[0])) == 7
    assert uids[0] == uids[1]
    assert not set(uids[0]) & set(uids[2])


def test_images_without_a_place_get_one_segmentation_each(tmp_path):
    files = write_series(tmp_path / "series", *SERIES["axial"], task="chest_xray")[:2]
    maps = a_run(tmp_path / "out", files)
    told = write_dicom(tmp_path / "out", MAKER, MARKING)
    found = objects(tmp_path / "out")
    assert {kind: len(made) for kind, made in found.items()} == {"overlay": 2, "marked": 2, "map01": 2, "map": 0}
    assert any("parametric maps not made: 2, the source has no position in space" in line for line in told)
    for number, made in enumerate(found["marked"]):
        np.testing.assert_array_equal(made.pixel_array, expected("marked", maps, number))


def ultrasound(path, frames, *, patient="us"):
    def change(header, _):
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
        header.Modality, header.NumberOfFrames, header.FrameTime = "US", frames, 40
        header.FrameIncrementPointer = 0x00181063
        header.PixelData = header.PixelData * frames
        for name in ("PixelSpacing",):
            header.pop(name, None)

    write_series(path.parent, *SERIES["axial"], patient=patient, task="chest_xray", change=change)
    for each in sorted(path.parent.glob("*.dcm"))[1:]:
        each.unlink()
    next(path.parent.glob("*.dcm")).rename(path)


def test_several_frames_without_a_place_are_told_and_cost_nothing(tmp_path):
    ultrasound(tmp_path / "us" / "clip.dcm", 3)
    a_run(tmp_path / "out", [(tmp_path / "us" / "clip.dcm", frame) for frame in range(3)])
    told = write_dicom(tmp_path / "out", MAKER, MARKING)
    found = objects(tmp_path / "out")
    assert {kind: len(made) for kind, made in found.items()} == {"overlay": 3, "marked": 0, "map01": 0, "map": 0}
    assert [made.SourceImageSequence[0].ReferencedFrameNumber for made in found["overlay"]] == [1, 2, 3]
    assert any("the frames have no position in space" in line for line in told)


def test_one_frame_of_a_multi_frame_kind(tmp_path):
    ultrasound(tmp_path / "us" / "clip.dcm", 1)
    a_run(tmp_path / "out", [tmp_path / "us" / "clip.dcm"])
    write_dicom(tmp_path / "out", MAKER, MARKING)
    assert {kind: len(made) for kind, made in objects(tmp_path / "out").items()} == {
        "overlay": 1,
        "marked": 1,
        "map01": 1,
        "map": 0,
    }


def enhanced(tmp_path, name, *, own_groups=False):
    """A whole series as one enhanced CT, optionally with orientation and spacing frame by frame."""
    files = write_series(tmp_path / "series", *SERIES[name])
    made = hd.legacy.LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(file) for file in files],
        series_instance_uid=hd.UID(),
        series_number=2,
        sop_instance_uid=hd.UID(),
        instance_number=1,
    )
    if own_groups:
        shared = made.SharedFunctionalGroupsSequence[0]
        for group in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            for own in made.PerFrameFunctionalGroupsSequence:
                setattr(own, group, shared[group].value)
            delattr(shared, group)
    path = tmp_path / "enhanced" / "all.dcm"
    path.parent.mkdir()
    made.save_as(path)
    return path, made


@pytest.mark.parametrize("own_groups", [False, True])
@pytest.mark.parametrize("name", ["oblique", "shuffled"])
def test_an_enhanced_file_of_which_some_frames_were_judged(tmp_path, name, own_groups):
    path, source = enhanced(tmp_path, name, own_groups=own_groups)
    judged = [3, 0, 2]
    maps = a_run(tmp_path / "out", [(path, frame) for frame in judged])
    told = write_dicom(tmp_path / "out", MAKER, MARKING)
    assert len(told) == 1, told
    found = objects(tmp_path / "out")
    assert {kind: len(made) for kind, made in found.items()} == {"overlay": 3, "marked": 1, "map01": 1, "map": 1}
    for kind in ("marked", "map01", "map"):
        seen = set()
        for position, (uid, number), pixels in frames_of(found[kind][0]):
            assert uid == source.SOPInstanceUID
            own = source.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence[0]
            np.testing.assert_allclose(position, np.array(own.ImagePositionPatient, float), atol=1e-6)
            np.testing.assert_array_equal(pixels, expected(kind, maps, judged.index(number - 1)))
            seen.add(number - 1)
        assert seen == set(judged)


def test_several_enhanced_files_of_a_series_are_several_stacks(tmp_path):
    path, _ = enhanced(tmp_path, "axial")
    other = pydicom.dcmread(path)
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = "2.25.7"
    for groups in other.PerFrameFunctionalGroupsSequence:
        groups.PlanePositionSequence[0].ImagePositionPatient[2] += 100
    other.save_as(path.with_name("other.dcm"))
    images = [(file, frame) for file in (path, path.with_name("other.dcm")) for frame in range(4)]
    a_run(tmp_path / "out", images)
    write_dicom(tmp_path / "out", MAKER, None)
    made = [{uid for _, (uid, _), _ in frames_of(each)} for each in objects(tmp_path / "out")["map"]]
    assert made == [{str(pydicom.dcmread(path).SOPInstanceUID)}, {"2.25.7"}]


def test_phases_at_the_same_places_and_scouts_become_stacks_of_their_own(tmp_path):
    places = (0, 5, 0, 5, 10)

    def change(header, number):
        if number == 4:  # a sagittal scout in the same series
            header.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    files = write_series(tmp_path / "series", SERIES["axial"][0], places, change=change)
    maps = a_run(tmp_path / "out", files)
    write_dicom(tmp_path / "out", MAKER, MARKING)
    number_of = {str(pydicom.dcmread(file).SOPInstanceUID): number for number, file in enumerate(files)}
    made = [sorted(number_of[uid] for _, (uid, _), _ in frames_of(each)) for each in objects(tmp_path / "out")["map"]]
    assert made == [[0, 1], [2, 3], [4]]
    assert len(maps) == 5


def test_without_a_calibration_there_is_no_mask_and_the_reader_is_told(tmp_path):
    files = write_series(tmp_path / "series", *SERIES["axial"])
    a_run(tmp_path / "out", files)
    told = write_dicom(tmp_path / "out", MAKER, None)
    assert objects(tmp_path / "out")["marked"] == []
    assert any("they need a calibrated model and --alpha" in line for line in told)


def test_what_the_fractional_segmentation_means_is_said(tmp_path):
    files = write_series(tmp_path / "series", *SERIES["axial"])
    a_run(tmp_path / "out", files)
    write_dicom(tmp_path / "out", MAKER, MARKING)
    found = objects(tmp_path / "out")
    assert found["map01"][0].SeriesDescription == "Anomaly map, 0=0.5, 1=1.5 or more - RESEARCH ONLY"
    assert "No probability" in found["map01"][0].SegmentSequence[0].SegmentDescription
    assert found["marked"][0].SeriesDescription == "Anomaly at 10 % false-positive rate - RESEARCH ONLY"
    assert (found["map01"][0].SegmentationType, found["marked"][0].SegmentationType) == ("FRACTIONAL", "BINARY")


def break_study(header, number):
    header.PatientName = "Secret"
    if number == 0:
        del header.StudyInstanceUID


def break_class(header, number):
    header.PatientName = "Secret"
    header.SOPClassUID = "1.2.3.4"


@pytest.mark.parametrize("change", [break_study, break_class])
def test_a_series_that_cannot_be_referred_to_costs_itself_only(tmp_path, change, caplog, capfd, recwarn):
    broken = write_series(tmp_path / "broken", *SERIES["axial"], patient="p2", change=change)
    whole = write_series(tmp_path / "whole", *SERIES["axial"])
    a_run(tmp_path / "out", [*broken, *whole])
    recwarn.clear()
    told = write_dicom(tmp_path / "out", MAKER, MARKING)
    made = {folder.name: len(list(folder.iterdir())) for folder in (tmp_path / "out" / "dicom").iterdir()}
    assert made == {"whole": 7}
    assert any("not made" in line for line in told)
    assert "Secret" not in " ".join(told) + caplog.text + "".join(capfd.readouterr())
    assert not recwarn.list  # highdicom quotes a name of one part


def test_a_source_that_is_gone_and_an_odd_birth_date(tmp_path, caplog, recwarn):
    def change(header, number):
        header.PatientSex, header.PatientName = "unknown", "Secret^Name^With^Too^Many^Parts^Here"
        header["PatientBirthDate"] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(0x00100030), "DA", 4, b"1950", 0, False, True
        )

    odd = write_series(tmp_path / "odd", *SERIES["axial"], patient="p2", change=change)
    gone = write_series(tmp_path / "gone", *SERIES["axial"])
    a_run(tmp_path / "out", [*odd, *gone])
    for file in gone:
        file.unlink()
    caplog.clear()
    recwarn.clear()
    write_dicom(tmp_path / "out", MAKER, MARKING)
    assert {folder.name for folder in (tmp_path / "out" / "dicom").iterdir()} == {"odd"}
    assert not caplog.text
    assert not recwarn.list
    assert {kind: len(made) for kind, made in objects(tmp_path / "out").items()} == {
        "overlay": 4,
        "marked": 1,
        "map01": 1,
        "map": 1,
    }


def test_a_disk_that_is_full_costs_no_result(tmp_path):
    files = write_series(tmp_path / "series", *SERIES["axial"])
    a_run(tmp_path / "out", files)
    (tmp_path / "out" / "dicom").write_text("in the way")
    told = write_dicom(tmp_path / "out", MAKER, MARKING)
    assert told[0].endswith(": nothing.")
    assert any("cannot be written" in line for line in told)


def test_pictures_are_no_dicom(tmp_path):
    from anatomaly.synthetic.phantom import png_bytes

    (tmp_path / "a.png").write_bytes(png_bytes(draw("head_ct", seed=0, size=48).pixels))
    a_run(tmp_path / "out", [tmp_path / "a.png"])
    assert write_dicom(tmp_path / "out", MAKER, MARKING) == (
        "dicom: no image is a DICOM file; nothing was written to dicom/.",
    )


def test_refused_before_it_begins(monkeypatch):
    check_dicom(maps=True, overlays=True)
    for maps, overlays in ((False, True), (True, False)):
        with pytest.raises(ConfigError, match="made of maps and overlays"):
            check_dicom(maps=maps, overlays=overlays)
    monkeypatch.setattr("anatomaly.results.dicom_out.find_spec", lambda name: None)
    with pytest.raises(NotReadyError, match=r"dicom-out"):
        check_dicom(maps=True, overlays=True)


def conforms(out):
    """Errors that an independent checker of DICOM objects finds."""
    files = sorted((out / "dicom").rglob("*.dcm"))
    assert files
    lines = []
    for file in files:
        ran = subprocess.run(["dciodvfy", file], capture_output=True, text=True, errors="replace", check=False)
        lines += [f"{file.name}: {line}" for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("Error")]
    return lines


needs_dciodvfy = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")


@needs_dciodvfy
@pytest.mark.parametrize("name", ["oblique", "flipped", "gapped", "enhanced", "chest_xray", "brain_mr", "fundus", "us"])
def test_conforms(tmp_path, name):
    sizes = SIZE
    if name == "enhanced":
        path, _ = enhanced(tmp_path, "oblique")
        images = [(path, frame) for frame in (0, 2, 3)]
    elif name == "us":
        ultrasound(tmp_path / "us" / "clip.dcm", 2)
        images = [(tmp_path / "us" / "clip.dcm", frame) for frame in range(2)]
    else:
        axes, places = SERIES.get(name, SERIES["oblique"])
        task = name if name in ("chest_xray", "brain_mr", "fundus") else "head_ct"
        images = write_series(tmp_path / "series", axes, places, task=task)
    a_run(tmp_path / "out", images, sizes=sizes)
    write_dicom(tmp_path / "out", MAKER, MARKING)
    assert conforms(tmp_path / "out") == []


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["mr_dicom/11-T1post-18670", "mr_dicom/11_HCropVolume", "ich_dicom"])
def test_real_series(tmp_path, real_data, name):
    folder = real_data.parent / "volumes" / name
    if not folder.is_dir():
        pytest.skip("no volumes")
    files = sorted(folder.glob("*.dcm"))[3:9]
    sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    sizes = int(sources[0].Rows), int(sources[0].Columns)
    maps = a_run(tmp_path / "out", [Path(file) for file in files], sizes=sizes)
    write_dicom(tmp_path / "out", MAKER, MARKING)
    found = objects(tmp_path / "out")
    assert len(found["overlay"]) == 6
    number_of = {str(source.SOPInstanceUID): number for number, source in enumerate(sources)}
    if name == "ich_dicom":  # slices of their own, without a place
        assert [len(found[kind]) for kind in ("marked", "map01", "map")] == [6, 6, 0]
    else:
        assert [len(found[kind]) for kind in ("marked", "map01", "map")] == [1, 1, 1]
        for kind in ("marked", "map01", "map"):
            for position, (uid, _), pixels in frames_of(found[kind][0]):
                number = number_of[uid]
                np.testing.assert_allclose(position, np.array(sources[number].ImagePositionPatient, float), atol=1e-6)
                np.testing.assert_array_equal(pixels, expected(kind, maps, number))
    if shutil.which("dciodvfy"):
        assert conforms(tmp_path / "out") == []


def test_predict_writes_dicom(tmp_path, make_detector):
    from anatomaly.results.folder import predict_to_folder

    files = write_series(tmp_path / "series", *SERIES["axial"])
    normals = write_series(tmp_path / "normals", *SERIES["axial"], patient="p2")
    detector = make_detector("nearest")
    detector.set_support([Sample(file, "head_ct") for file in normals[:2]], task="head_ct")
    summary = predict_to_folder(detector, files, tmp_path / "out", task="head_ct", dicom=True)
    assert any("overlays (Secondary Capture): 4" in line for line in summary.remarks)
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    (made,) = objects(tmp_path / "out")["map"]
    number_of = {str(pydicom.dcmread(file).SOPInstanceUID): number for number, file in enumerate(files)}
    for _, (uid, _), pixels in frames_of(made):
        row = rows[number_of[uid]]
        np.testing.assert_array_equal(pixels, np.load(tmp_path / "out" / row["map"]))
    with pytest.raises(ConfigError, match="maps and overlays"):
        predict_to_folder(detector, files, tmp_path / "never", dicom=True, maps=False)
    assert not (tmp_path / "never").exists()
