"""Scores of slices pooled to volumes and patients, and whose p-values hold."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from anatomaly.results.pooled import write_pooled
from anatomaly.synthetic.dicom_files import dicom_bytes
from anatomaly.synthetic.phantom import draw
from anatomaly.types import Calibration, Prediction, Preprocessing, Sample, Scoring

CALIBRATION = Calibration(
    task="t",
    kind="held-out",
    guarantee="exact",
    unit="patient",
    scores=tuple(float(score) for score in range(20)),
    images=(4,) * 20,
    sha256=(),
    model_hash="",
    bank_digest="",
    preprocessing=Preprocessing(),
    scoring=Scoring(),
    precision="fp32",
)


def verdict(path, score, *, patient=None, frame=None, p=None, label=None, digest=None):
    sample = Sample(Path(path), "t", frame=frame, patient_id=patient, label=label)
    if score is None:
        return Prediction(sample, score=float("nan"), error="broken")
    digest = f"{digest or path}#{frame or 0}"
    return Prediction(sample, score=score, p_value=p, sha256=digest)


def table(file):
    with file.open(newline="") as lines:
        return {row.get("patient") or row["volume"]: row for row in csv.DictReader(lines)}


def test_patients_get_their_worst_slice_and_its_p_value(tmp_path):
    verdicts = [
        verdict("a.png", 3.0, patient="one", p=0.4, label=0),
        verdict("b.png", 9.0, patient="one", p=0.1, label=1),
        verdict("c.png", 6.0, patient="one", p=0.2, label=0),
        verdict("d.png", 1.0, patient="one", p=0.9),
        verdict("e.png", 2.0, patient="two", p=0.5, label=0),
        verdict("f.png", None, patient="two", label=0),
        verdict("g.png", 5.0),
    ]
    write_pooled(tmp_path, verdicts, CALIBRATION)
    rows = table(tmp_path / "patients.csv")
    assert set(rows) == {"one", "two"}
    one, two = rows["one"], rows["two"]
    assert (one["images"], one["unreadable"], one["label"], one["worst_path"]) == ("4", "0", "1", "b.png")
    assert (float(one["score_max"]), float(one["score_top3"]), float(one["p_value"])) == (9.0, 6.0, 0.1)
    assert (two["images"], two["unreadable"], two["label"], float(two["score_top3"])) == ("1", "1", "0", 2.0)
    assert float(two["p_value"]) == 0.5
    assert not (tmp_path / "volumes.csv").exists()


def test_the_p_value_is_that_of_a_whole_unit_of_the_calibration_and_of_nothing_else(tmp_path):
    verdicts = [
        *(verdict("a.nii", float(k), frame=k, patient="one", p=0.1 * (k + 1)) for k in range(2)),
        *(verdict("b.nii", float(k), frame=k, patient="one", p=0.3) for k in range(2)),
        *(verdict("c.nii", float(k), frame=k, p=0.25 * (k + 1)) for k in range(2)),  # of nobody: its file is the unit
    ]
    write_pooled(tmp_path, verdicts, CALIBRATION)
    patients, volumes = table(tmp_path / "patients.csv"), table(tmp_path / "volumes.csv")
    assert float(patients["one"]["p_value"]) == 0.1
    assert [volumes[name]["p_value"] for name in ("a.nii", "b.nii", "c.nii")] == ["", "", "0.25"]
    assert volumes["a.nii"]["note"] == "no p-value: calibrated by patient"
    assert volumes["a.nii"]["worst_frame"] == "1"

    write_pooled(tmp_path, verdicts, replace(CALIBRATION, unit="scan"))
    patients, volumes = table(tmp_path / "patients.csv"), table(tmp_path / "volumes.csv")
    assert patients["one"]["p_value"] == ""
    assert [volumes[name]["p_value"] for name in ("a.nii", "b.nii", "c.nii")] == ["0.1", "0.3", "0.25"]

    write_pooled(tmp_path, verdicts, replace(CALIBRATION, unit="image"))
    assert {row["p_value"] for row in table(tmp_path / "volumes.csv").values()} == {""}

    write_pooled(tmp_path, [replace(each, p_value=None) for each in verdicts], None)
    assert {row["note"] for row in table(tmp_path / "volumes.csv").values()} == {""}


def test_more_images_than_were_calibrated_on_have_no_p_value(tmp_path):
    verdicts = [verdict(f"{k}.png", float(k), patient="one", p=0.1) for k in range(5)]
    write_pooled(tmp_path, verdicts, CALIBRATION)
    row = table(tmp_path / "patients.csv")["one"]
    assert row["p_value"] == ""
    assert row["note"] == "no p-value: more images than the 4 of those calibrated on"


def test_slices_of_a_dicom_series_are_a_volume_and_nobody_is_named(tmp_path):
    pixels = draw("head_ct", seed=0, size=48).pixels
    verdicts = []
    for patient in ("Secret1", "Secret2"):
        for number in range(2):
            file = tmp_path / "scans" / f"{patient[-1]}_{number}.dcm"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(dicom_bytes(pixels, task="head_ct", patient=patient, number=number))
            verdicts.append(verdict(file, float(number)))
    write_pooled(tmp_path, [*verdicts, verdict(tmp_path / "absent.dcm", None)], None)
    rows = table(tmp_path / "volumes.csv")
    assert {name: row["images"] for name, row in rows.items()} == {"scans": "2", "scans_2": "2"}
    assert rows["scans_2"]["worst_path"].endswith("2_1.dcm")
    text = (tmp_path / "volumes.csv").read_text()
    assert "Secret" not in text
    assert "Phantom" not in text
    assert not (tmp_path / "patients.csv").exists()


def test_a_run_writes_them(tmp_path, make_detector, phantom):
    from anatomaly.results.folder import predict_to_folder

    rows = [row for row in phantom if row.task == "head_ct"]
    detector = make_detector("nearest")
    detector.set_support([row for row in rows if row.split == "train"][:2], task="head_ct")
    queries = [row for row in rows if row.split == "test"]
    summary = predict_to_folder(detector, queries, tmp_path / "out")
    found = table(tmp_path / "out" / "patients.csv")
    assert sum(int(row["images"]) for row in found.values()) == len(queries)
    highest = {}
    for each in summary.predictions:
        highest[each.sample.patient_id] = max(each.score, highest.get(each.sample.patient_id, -1.0))
    assert {name: float(row["score_max"]) for name, row in found.items()} == pytest.approx(highest)
