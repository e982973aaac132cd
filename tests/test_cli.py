"""The command line as its users meet it: what it prints, what it leaves behind, and how it fails."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from scores import read_scores

from anatomaly import __version__, cli
from anatomaly.cli import COMMANDS, main
from anatomaly.commands import fit as fit_command
from anatomaly.evaluation.metrics import bootstrap
from anatomaly.types import Intensity, Preprocessing

TINY = (
    "--preset=attention",
    "--teacher.weights=random",
    "--preprocessing.size=[64,64]",
    "--training.shots=1",
    "--training.batch_size=2",
)


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    def call(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # --help and --print_config
            code = stop.code or 0
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(run):
    """Run something that must be told in one line with exit code 2; returns the line without its prefix."""

    def call(*words):
        code, _, err = run(*words)
        assert code == 2
        assert err.count("\n") == 1
        assert err.startswith("anatomaly: ")
        assert "Traceback" not in err
        return err.removeprefix("anatomaly: ")

    return call


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the commands need: a phantom `ph`, a tiny trained `model`, and `normals`, three PNG files."""
    folder = tmp_path_factory.mktemp("world")
    counts = ("--train=4", "--test_normal=3", "--test_anomalous=3", "--size=64")
    assert main(["data", "phantom", f"--out={folder / 'ph'}", *counts]) == 0
    fit = ["fit", f"--data={folder / 'ph'}", f"--out={folder / 'model'}", "--tasks=[fundus]", *TINY]
    assert main([*fit, "--training.epochs=1"]) == 0
    (folder / "normals").mkdir()
    for number, file in enumerate(sorted((folder / "ph/head_ct/train/normal").iterdir())[:3]):
        (folder / f"normals/{number}.png").write_bytes(file.read_bytes())
    return folder


def predict(world, out, *words):
    return ("predict", "--model", world / "model", "--task", "head_ct", "--out", out, *words)


def write_png(path, seed=0, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


# --- help, version, words that are no command ---


def test_help_lists_every_command_and_no_command_means_help(run):
    for words in (["--help"], ["-h"], []):
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert all(f"  {name} " in out for name in COMMANDS)


def test_a_group_lists_its_own_commands_only(run):
    for words in (["data"], ["data", "--help"]):
        code, out, _ = run(*words)
        assert code == 0
        assert "data check" in out
        assert "predict" not in out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_its_options(name, run):
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    assert COMMANDS[name].help.split(",")[0] in out
    assert "--config" in out


def test_version(run):
    assert run("--version") == Answer(0, f"anatomaly {__version__}\n", "")


def test_an_unknown_command_names_the_nearest(refused):
    assert "Did you mean predict?" in refused("predit")
    assert "Did you mean" not in refused("xyzzy")
    assert "expected one of data check, data phantom" in refused("data", "chek", "folder")


def test_an_unknown_option_names_the_nearest(refused):
    line = refused("fit", "--data", "x", "--out", "y", "--training.epoch", "3")
    assert "--training.epoch 3. Did you mean training.epochs?" in line
    assert "See anatomaly fit --help." in line
    assert "Did you mean near?" in refused("data", "check", "x", "--neer=true")


def test_an_unknown_key_in_a_file_names_the_nearest(refused, tmp_path):
    file = tmp_path / "fit.yaml"
    file.write_text("training: {epoch: 3}\n")
    assert "Did you mean training.epochs?" in refused("fit", "--data", "x", "--out", "y", "-c", file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data check", "the following arguments are required: data"),
        ("data phantom --out x --train abc", "--train: expected a whole number, got abc"),
        ("data phantom --out x --train -5", "at least 0"),
        ("data check x --near maybe", "--near: expected true or false, got maybe"),
        ("fit --data x --out y --tasks brain", "--tasks: expected a list in brackets, got brain"),
        ("fit --data x --out y --preprocessing.size 100", "--preprocessing.size: expected a list in brackets, got 100"),
        ("fit --data x --out y --training.precision fp8", "expected one of 'fp32', 'bf16', got fp8"),
        ("fit --data x --out y --training.epochs 1.5", "--training.epochs: expected a whole number, got 1.5"),
        ("fit --data x --out y --training.epochs -1", "training.epochs: got -1, expected 0 or more"),
        ("fit --data x --out y --training.learning_rate .nan", "training.learning_rate: got nan"),
        ("fit --data x --out y --preprocessing.intensity {rule: window, low: 4, high: 0}", "a width above 0"),
        ("fit --data x --out y -c missing.yaml", "File does not exist"),
        ("predict --model m --images i --out o --support s --intensity range", "--intensity: got range, expected auto"),
        ("predict --model m --images i --out o --support s --intensity.rule rang", "'percentile', got rang."),
        ("predict --model m --images i --out o --support s --bank b", "either --support (normal images) or --bank"),
        ("predict --model m --images i --out o --bank b --shots 2", "--bank has its own shots and intensity rule"),
        ("predict --model m --images i --out o --bank b --intensity.rule auto", "--bank has its own shots"),
        ("evaluate --model m --data d --shots two", "--shots: expected a list in brackets, got two"),
        ("import d24fad missing.pth --out x", "missing.pth: no such file"),
    ],
)
def test_wrong_options_are_one_line(words, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head, brace, tail = words.partition("{")
    line = refused(*head.split(), *([brace + tail] if brace else []))
    assert message in line
    for python in ("<class", "Literal", "Union", "NestedArg", "Parser key"):
        assert python not in line


@pytest.mark.parametrize(
    "content",
    [
        b"[1, 2]",
        b"a: [1\n b: {",
        b"training: 5\n",
        b"\xff\xfe\0\0",
        b"training: !!python/object:os.system {}",
        b"training: " + b"[" * 5000,
    ],
)
def test_a_settings_file_that_is_none_is_one_line(content, refused, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert "See anatomaly fit --help." in refused("fit", "--data", "x", "--out", "y", "-c", tmp_path / "bad.yaml")


# --- data ---


def test_data_check_of_a_sound_set_is_0(run, world, tmp_path):
    table = tmp_path / "table.csv"
    code, out, err = run("data", "check", world / "ph", "--csv", table)
    assert (code, err) == (0, "")
    assert out.endswith("ok\n")
    assert "not ok" not in out
    assert len(table.read_text().splitlines()) == 1 + 5 * 10


def test_data_check_of_a_patient_in_two_splits_is_1(run, tmp_path):
    rows = ["path,label,split,patient_id"]
    for number, split in enumerate(("train", "test")):
        write_png(tmp_path / f"{number}.png", seed=number)
        rows.append(f"{number}.png,normal,{split},Jane Doe")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    code, out, err = run("data", "check", tmp_path / "table.csv")
    assert (code, err) == (1, "")
    assert "1 patients have images in two splits" in out
    assert "Jane" not in out


def test_data_check_looks_for_look_alikes_unless_told_not_to(run, tmp_path):
    scan = np.add.outer(np.arange(96) % 40, np.arange(96) % 25).astype(np.uint8)
    for folder, change in (("train", 0), ("test", 10)):
        (tmp_path / folder / "good").mkdir(parents=True)
        Image.fromarray(scan + np.uint8(change)).save(tmp_path / folder / "good/a.png")
    assert "1 pairs of images look the same across splits" in run("data", "check", tmp_path).out
    assert "look the same" not in run("data", "check", tmp_path, "--near=false").out


def test_data_check_of_nothing_is_2(refused, tmp_path):
    assert refused("data", "check", tmp_path / "missing") == f"{tmp_path / 'missing'}: no such file or folder.\n"
    (tmp_path / "empty").mkdir()
    assert "no images found" in refused("data", "check", tmp_path / "empty")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "cannot be read as JSON" in refused("data", "check", tmp_path / "deep.json")
    assert "the name is too long" in refused("data", "check", "x" * 300)


def test_data_phantom_prints_its_manifest_and_spares_other_folders(run, refused, tmp_path):
    counts = ("--train=1", "--test_normal=1", "--test_anomalous=1", "--size=32")
    code, out, _ = run("data", "phantom", "--out", tmp_path / "ph", *counts)
    assert (code, out) == (0, f"{tmp_path / 'ph' / 'manifest.csv'}\n")
    write_png(tmp_path / "mine/scan.png")
    assert "nothing was written" in refused("data", "phantom", "--out", tmp_path / "mine", *counts)


# --- fit ---


def test_fit_wrote_a_model_and_a_finished_run_is_not_repeated(run, world, caplog):
    fit = ("fit", "--data", world / "ph", "--out", world / "model", "--tasks=[fundus]", *TINY, "--training.epochs=1")
    facts = json.loads((world / "model/config.json").read_text())
    assert facts["training"]["tasks"] == ["fundus"]
    assert facts["training"]["epochs"] == 1
    before = (world / "model/weights.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert run(*fit)[:2] == (
            0,
            "normal images: fundus 4\n"
            "attention on efficientnet_lite0, 1 epoch. Patch attention: rebuilds a query from the supports' patches "
            f"(docs/patch-attention.md).\nmodel: {world / 'model'}\n",
        )
    assert "finished already" in caplog.text
    assert (world / "model/weights.safetensors").stat().st_mtime_ns == before


def test_fit_does_not_mix_two_runs(refused, world):
    fit = ("fit", "--data", world / "ph", "--out", world / "model", "--tasks=[fundus]", *TINY)
    assert "training.epochs 1, now 2" in refused(*fit, "--training.epochs=2")


def test_a_run_that_failed_at_once_does_not_block_its_folder(run, refused, world, tmp_path):
    fit = ("fit", "--data", world / "ph", "--out", tmp_path / "m", "--tasks=[fundus]", *TINY)
    assert "Lower --training.shots" in refused(*fit, "--training.shots=50", "--training.epochs=1")
    assert run(*fit, "--training.epochs=0").code == 0


def test_fit_spares_a_model_it_did_not_make(refused, world, tmp_path):
    for name in ("config.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((world / "model" / name).read_bytes())
    line = refused("fit", "--data", world / "ph", "--out", tmp_path, *TINY, "--training.epochs=0")
    assert "other settings (they are not recorded)" in line


def test_fit_tells_of_divergence(refused, world, tmp_path):
    fit = ("fit", "--data", world / "ph", "--out", tmp_path / "m", "--tasks=[fundus]", *TINY)
    assert "Lower --training.learning_rate" in refused(*fit, "--training.epochs=1", "--training.learning_rate=1e30")


def test_fit_into_a_file_is_one_line(refused, world, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("fit", "--data", world / "ph", "--out", tmp_path / "file", *TINY, "--training.epochs=0")
    assert "cannot be written: not a directory" in line


def test_flags_after_a_file_win_and_the_printed_settings_give_the_same_again(run, world, tmp_path):
    file, printed = tmp_path / "fit.yaml", tmp_path / "printed.yaml"
    file.write_text(
        f"data: {world / 'ph'}\nout: {tmp_path / 'm'}\ntasks: [fundus]\nteacher: {{weights: random}}\n"
        "preprocessing: {size: [64, 96], intensity: {rule: range, low: 0, high: 200}}\n"
        "task_intensity: {head_ct: {rule: window, low: 40, high: 80}}\n"
        "scoring: {blur: 2}\ntraining: {epochs: 7, shots: 1, seed: 3}\n"
    )
    words = ("-c", file, "--training.epochs=0", "--scoring.pooling=mean")
    code, out, err = run("fit", *words, "--print_config")
    assert (code, err) == (0, "")
    printed.write_text(out)
    assert run("fit", "-c", printed, "--print_config").out == out
    assert run("fit", *words).code == 0
    first = json.loads((tmp_path / "m/config.json").read_text())
    assert run("fit", "-c", printed, "--out", tmp_path / "again").code == 0
    assert json.loads((tmp_path / "again/config.json").read_text()) == first
    training = json.loads((tmp_path / "m/training/run.json").read_text())["training"]
    assert (training["epochs"], training["seed"], training["shots"]) == (0, 3, 1)
    assert first["preprocessing"]["size"] == [64, 96]
    assert first["preprocessing"]["intensity"] == {"rule": "range", "low": 0.0, "high": 200.0}
    assert first["scoring"] == {"blur": 2.0, "pooling": "mean", "top_fraction": 0.05, "levels": "geometric"}, (
        "the rest is the default preset's"
    )


def test_ctrl_c_during_training_is_130(run, world, tmp_path, monkeypatch):
    def stop(*_, **__):  # what Lightning does
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise SystemExit(1)

    monkeypatch.setattr("lightning.Trainer.fit", stop)
    fit = ("fit", "--data", world / "ph", "--out", tmp_path / "m", "--tasks=[fundus]", *TINY, "--training.epochs=1")
    code, _, err = run(*fit)
    assert code == 130
    assert err == "anatomaly: interrupted; what was written so far is complete.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- predict ---


def test_predict_a_folder_against_a_folder_of_normals(run, world, tmp_path):
    words = predict(world, tmp_path / "out", "--images", world / "ph/head_ct/test", "--support", world / "normals")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    first, yardstick = out.splitlines()
    assert first == f"6 images scored, 0 could not be read. Report: {tmp_path / 'out/report.html'}"
    assert yardstick.startswith("Among themselves the 3 support images score ")
    rows = read_scores(tmp_path / "out/scores.csv")
    assert len(rows) == 6
    assert all(np.isfinite(row["score"]) and row["task"] == "head_ct" for row in rows)
    assert len(list((tmp_path / "out/maps").iterdir())) == 6
    assert len(list((tmp_path / "out/overlays").iterdir())) == 6


def test_a_saved_bank_gives_the_same_scores_without_the_images(run, world, tmp_path):
    images = ("--images", world / "ph/head_ct/test")
    support = ("--support", world / "normals", "--save_bank", tmp_path / "bank")
    assert run(*predict(world, tmp_path / "one", *images, *support, "--maps=false", "--overlays=false")).code == 0
    assert run(*predict(world, tmp_path / "two", *images, "--bank", tmp_path / "bank", "--batch_size=1")).code == 0
    one, two = (read_scores(tmp_path / name / "scores.csv") for name in ("one", "two"))
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], rel=1e-5)
    assert not (tmp_path / "one/maps").exists()
    assert not (tmp_path / "one/overlays").exists()


def test_a_bank_of_bf16_is_used_in_bf16_and_everything_else_in_fp32(run, world, tmp_path):
    normals = sorted((world / "ph/head_ct/train/normal").iterdir())
    shutil.copytree(world / "model", tmp_path / "model")
    normals, supports = ("--normals", *normals[2:]), ("--support", *normals[:2])
    words = ("--task", "head_ct", *normals, *supports, "--save_bank", tmp_path / "bank", "--precision=bf16")
    assert run("calibrate", "--model", tmp_path / "model", *words).code == 0
    image, kept = ("--images", world / "normals/0.png"), ("--bank", tmp_path / "bank")
    for name, more, known in (("auto", (), True), ("fp32", ("--precision=fp32",), False)):
        code, out, _ = run(*predict(tmp_path, tmp_path / name, *image, *kept, *more))
        assert code == 0
        assert ("no p-values" in out) != known, "they hold in the precision that they were calibrated in"
    fp32, auto = (tmp_path / name for name in ("fp32_support", "auto_support"))
    for out, more in ((fp32, ("--precision=fp32",)), (auto, ())):
        assert run(*predict(world, out, *image, *supports, *more)).code == 0
    one, two = (read_scores(out / "scores.csv")[0]["score"] for out in (fp32, auto))
    assert one == two


def test_images_and_supports_may_be_several_paths_as_a_shell_makes_of_a_star(run, refused, world, tmp_path):
    files = sorted((world / "ph/head_ct/test/normal").iterdir())
    normals = sorted((world / "normals").iterdir())
    words = ("--images", *files[:2], world / "ph/head_ct/test", "--support", *normals[:2], normals[0])
    assert run(*predict(world, tmp_path / "out", *words)).code == 0
    rows = read_scores(tmp_path / "out/scores.csv")
    assert len(rows) == 6, "an image counts once"
    assert [name for name in rows[0] if name.startswith("weight_")] == ["weight_0", "weight_1"]
    mixed = ("--images", os.path.relpath(files[0]), files[1], "--support", os.path.relpath(normals[0]), normals[1])
    assert run(*predict(world, tmp_path / "mixed", *mixed)).code == 0, "relative and absolute"
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"images: {files[0]}\nsupport: [{normals[0]}, {normals[1]}]\n")
    assert run(*predict(world, tmp_path / "file", "-c", settings)).code == 0
    line = refused(*predict(world, tmp_path / "x", "--images", world / "ph/manifest.csv", files[0]))
    assert "got a table and other paths, expected it alone" in line
    assert "nothing.png: no such file" in refused(*predict(world, tmp_path / "x", "--images", files[0], "nothing.png"))
    assert not (tmp_path / "x").exists()


def test_somebody_at_a_terminal_is_told_of_the_wait_at_once(run, world, tmp_path, monkeypatch):
    words = ("--images", world / "normals/0.png", "--support", world / "normals")
    assert run(*predict(world, tmp_path / "out", *words)).err == ""
    told = []
    monkeypatch.setattr("anatomaly.commands.arguments.tell_wait", told.append)
    monkeypatch.setattr("anatomaly.detector.detector.Detector.load", lambda *_, **__: told.append("load") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*predict(world, tmp_path / "other", *words))
    assert told == [f"Loading {world / 'model'}; this takes some seconds.", "load"]


def test_shots_takes_the_first_of_the_supports(run, refused, world, tmp_path):
    words = ("--images", world / "normals/2.png", "--support", world / "normals")
    assert run(*predict(world, tmp_path / "out", *words, "--shots=2")).code == 0
    [row] = read_scores(tmp_path / "out/scores.csv")
    assert [name for name in row if name.startswith("weight_")] == ["weight_0", "weight_1"]
    for shots in (50, 0, -1):
        line = refused(*predict(world, tmp_path / "more", *words, f"--shots={shots}"))
        assert f"has 3 normal images, {shots} shots asked" in line


def test_supports_of_a_labelled_set_are_its_normal_training_images(run, world, tmp_path):
    table = world / "ph/some.csv"
    rows = (world / "ph/manifest.csv").read_text().splitlines()
    table.write_text("\n".join([rows[0], *(row for row in rows if row.startswith("head_ct/"))]))
    assert run(*predict(world, tmp_path / "out", "--images", world / "normals/0.png", "--support", table)).code == 0
    names = json.loads((tmp_path / "out/scores.jsonl").read_text())["support"]
    assert names == [file.name for file in sorted((world / "ph/head_ct/train/normal").iterdir())]


def test_an_image_labelled_anomalous_is_no_support(run, world, tmp_path):
    rows = ["path,label"] + [f"normals/{n}.png,{label}" for n, label in enumerate(("normal", "anomalous", ""))]
    (world / "table.csv").write_text("\n".join(rows))
    words = ("--images", world / "normals/1.png", "--support", world / "table.csv")
    assert run(*predict(world, tmp_path / "out", *words)).code == 0
    assert json.loads((tmp_path / "out/scores.jsonl").read_text())["support"] == ["0.png", "2.png"]


def test_unreadable_images_are_rows_and_end_nothing(run, world, tmp_path):
    good = write_png(tmp_path / "in/good.png")
    (tmp_path / "in/short.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "in/empty.dcm").write_bytes(b"")
    write_png(tmp_path / "in/dot.png", size=(1, 1))
    code, out, err = run(*predict(world, tmp_path / "out", "--images", tmp_path / "in", "--support", world / "normals"))
    assert (code, err) == (0, "")
    assert out.startswith("1 image scored, 3 could not be read.")
    rows = {Path(row["path"]).name: row for row in read_scores(tmp_path / "out/scores.csv")}
    assert {name for name, row in rows.items() if row["status"] == "error"} == {"short.png", "empty.dcm", "dot.png"}
    assert "0 bytes" in rows["empty.dcm"]["error"]


def test_no_readable_image_at_all_is_2(run, world, tmp_path):
    (tmp_path / "empty.dcm").write_bytes(b"")
    words = ("--images", tmp_path / "empty.dcm", "--support", world / "normals")
    code, out, err = run(*predict(world, tmp_path / "out", *words))
    assert code == 2
    assert err == "anatomaly: no image could be scored; scores.csv says why for each.\n"
    assert out.startswith("0 images scored, 1 could not be read.")
    assert len(read_scores(tmp_path / "out/scores.csv")) == 1


def test_a_nifti_volume_gives_a_row_per_slice_and_a_volume_of_maps(run, world, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    voxels = np.random.default_rng(0).uniform(-50, 150, (40, 48, 3)).astype(np.float32)
    affine = np.diag([-0.5, 0.5, 5.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "head.nii.gz")
    intensity = ("--intensity.rule=range", "--intensity.low=-50", "--intensity.high=150")
    words = ("--images", tmp_path / "head.nii.gz", "--support", world / "normals", *intensity)
    code, out, _ = run(*predict(world, tmp_path / "out", *words))
    assert code == 0
    assert "3 images scored" in out
    assert out.startswith("3 of 3 images: of a NIfTI file where the support images are of picture files")
    assert [row["frame"] for row in read_scores(tmp_path / "out/scores.csv")] == [0, 1, 2]
    maps = nibabel.load(tmp_path / "out/maps/head_map.nii.gz")
    assert maps.shape == voxels.shape
    assert np.array_equal(maps.affine, affine)
    assert np.asarray(maps.dataobj).any(axis=(0, 1)).all()


def write_dicom(path, stored, photometric):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID = "Doe^Jane", "secret-42"
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, photometric, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelData = stored.astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def test_dicom_is_judged_as_displayed_and_names_no_patient(run, world, tmp_path):
    pytest.importorskip("pydicom")
    stored = np.random.default_rng(0).integers(0, 4096, (40, 48))
    write_dicom(tmp_path / "in/one.dcm", 4095 - stored, "MONOCHROME1")
    write_dicom(tmp_path / "in/two.dcm", stored, "MONOCHROME2")
    write_dicom(tmp_path / "in/wrong.dcm", 4095 - stored, "MONOCHROME2")
    code, _, _ = run(*predict(world, tmp_path / "out", "--images", tmp_path / "in", "--support", world / "normals"))
    assert code == 0
    one, two, wrong = (row["score"] for row in read_scores(tmp_path / "out/scores.csv"))
    assert one == pytest.approx(two, rel=1e-5)
    assert one != pytest.approx(wrong, rel=1e-3)
    written = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert b"Jane" not in written
    assert b"secret-42" not in written


def test_odd_file_names_reach_table_and_report_unharmed(run, world, tmp_path):
    names = ["new\nline.png", "q'uo\"te;,.png", "<script>alert(1)<_b>.png", "ünïcödé 日本.png"]
    for seed, name in enumerate(names):
        write_png(tmp_path / "in" / name, seed)
    words = ("--images", tmp_path / "in", "--support", world / "normals")
    assert run(*predict(world, tmp_path / "out", *words)).code == 0
    found = {Path(row["path"]).name for row in read_scores(tmp_path / "out/scores.csv")}
    assert found == set(names)
    assert "<script>alert" not in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images=missing", "--support=normals"], "missing: no such file or folder"),
        (["--images=normals", "--support=missing"], "missing: no such file or folder"),
        (["--images=normals", "--bank=missing"], "missing: not a support bank"),
        (["--images=normals", "--bank=model/weights.safetensors"], "not a support bank"),
        (["--images=normals", "--support=normals", "--batch_size=0"], "batch_size: got 0"),
        (["--images=normals", "--support=normals", "--model=normals"], "normals: not a model bundle"),
        (["--images=normals", "--support=normals", "--teacher.weights=missing"], "no weights file at missing"),
        (["--images=normals", "--support=normals", "--out=normals/0.png"], "cannot be written: file exists"),
        (["--images=normals", "--support=normals", "--save_bank=normals"], "cannot be written: is a directory"),
        (
            ["--images=normals", "--support=normals", "--intensity.rule=range", "--intensity.low=5"],
            "range: got 5 and 1",
        ),
    ],
)
def test_predictions_that_cannot_be_made_are_one_line(words, message, refused, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    assert message in refused(*predict(world, tmp_path / "out", *words))
    assert not (tmp_path / "out/scores.csv").exists()


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("preprocessing", {"size": [-64, 64]}, "preprocessing.size: got (-64, 64)"),
        ("preprocessing", {"resize": "stretch"}, "preprocessing.resize: got stretch"),
        ("preprocessing", {"intensity": {"rule": "magic", "low": 0, "high": 1}}, "intensity.rule: got magic"),
        ("preprocessing", {"intensity": {"rule": "range", "low": "a", "high": 1}}, "is damaged"),
        ("preprocessing", {"size": "large"}, "not a model bundle"),
        ("scoring", {"blur": "x"}, "is damaged"),
        ("scoring", {"pooling": "median"}, "scoring.pooling: got median"),
        ("scoring", {"colour": 1}, "not a model bundle"),
        ("method", {"attention": {"deepest": -1}}, "method.attention.deepest: got -1"),
        ("method", {"attention": {"depth": 2}}, "not a model bundle"),
        ("method", {"colour": 1}, "method: unknown setting 'colour'"),
        ("method", {"name": "best"}, "method: unknown name 'best'"),
        ("teacher", {"name": 5}, "teacher.name: got 5"),
        ("teacher", {"normalise": "no"}, "teacher.normalise: got 'no'"),
    ],
)
def test_an_edited_model_is_refused_and_not_guessed_at(part, changes, message, refused, world, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes((world / "model/weights.safetensors").read_bytes())
    facts = json.loads((world / "model/config.json").read_text())
    facts[part] |= changes
    (tmp_path / "config.json").write_text(json.dumps(facts))
    words = ("--images", world / "normals/0.png", "--support", world / "normals", "--model", tmp_path)
    line = refused(*predict(world, tmp_path / "out", *words))
    assert message in line
    assert str(tmp_path) in line


def test_results_are_never_overwritten(run, refused, world, tmp_path):
    words = predict(world, tmp_path / "out", "--images", world / "normals/2.png", "--support", world / "normals")
    assert run(*words).code == 0
    before = (tmp_path / "out/scores.csv").read_bytes()
    assert "already exists" in refused(*words)
    assert (tmp_path / "out/scores.csv").read_bytes() == before


def test_results_are_no_images(run, refused, world, tmp_path):
    shutil.copytree(world / "normals", tmp_path / "scans")
    words = ("--images", tmp_path / "scans", "--support", world / "normals")
    assert run(*predict(world, tmp_path / "scans/first", *words)).code == 0
    code, out, _ = run(*predict(world, tmp_path / "scans/second", *words))
    assert code == 0
    assert "1 folder left out: 1 of results" in out
    assert len(read_scores(tmp_path / "scans/second/scores.csv")) == 3
    assert "is both --out and --images" in refused(*predict(world, tmp_path / "scans", *words))
    assert "is both --out and --support" in refused(*predict(world, world / "normals", *words))


# --- without a model, and from a plain folder ---


def test_predict_without_a_model_uses_the_built_in_one(run, refused, world, tmp_path):
    words = ("predict", "--images", world / "normals/2.png", "--out")
    code, out, _ = run(*words, tmp_path / "out", "--support", world / "normals")
    assert code == 0
    assert "Built-in model: matching on efficientnet_lite0, which learned from no medical image." in out
    assert len(read_scores(tmp_path / "out/scores.csv")) == 1
    assert re.search(r"the 3 support images score 0\.\d+ to 0\.\d+; 0 of 1 images score higher\.", out)
    assert "needs normal images to compare with. Give --support or --bank." in refused(*words, tmp_path / "other")


def test_the_built_in_model_is_calibrated_into_a_new_folder(run, refused, world, tmp_path):
    words = ("calibrate", "--support", world / "normals")
    assert "Give --out" in refused(*words)
    assert f"{world} exists already" in refused(*words, "--out", world)
    code, out, _ = run(*words, "--out", tmp_path / "model")
    assert code == 0
    assert f"predict --model {tmp_path / 'model'} uses it" in out
    words = ("--images", world / "ph/head_ct/test", "--support", world / "normals", "--out", tmp_path / "out")
    assert run("predict", "--model", tmp_path / "model", *words).code == 0
    assert all(row["p_value"] for row in read_scores(tmp_path / "out/scores.csv"))


def test_fit_takes_a_plain_folder_of_normal_images(run, refused, world, tmp_path):
    code, out, _ = run("fit", "--data", world / "normals", "--task", "ct", "--out", tmp_path / "model")
    assert code == 0
    assert "normal images: ct 3" in out
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.png").write_bytes((world / "normals/0.png").read_bytes())
    line = refused("fit", "--data", tmp_path / "one", "--out", tmp_path / "other", *TINY)
    assert "one: 1 normal image; expected some of another patient, to be held out" in line


def test_a_lone_task_is_trained_with_drawn_ones(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_command, "_DRAWN", 4)
    small = ("--preprocessing.size=[64,64]", "--training.shots=1", "--training.epochs=1", "--teacher.weights=random")
    words = ("fit", "--data", world / "normals", "--out", tmp_path / "model", "--method.name=d24fad", *small)
    code, out, _ = run(*words)
    assert code == 0
    assert "One kind of image is too few to learn from: 4 drawn ones of 5 kinds join it." in out
    tasks = json.loads((tmp_path / "model/config.json").read_text())["training"]["tasks"]
    assert tasks == ["brain_mr", "chest_xray", "fundus", "head_ct", "histology", "normals"]
    before = (tmp_path / "model/weights.safetensors").stat().st_mtime_ns
    assert run(*words).code == 0
    assert (tmp_path / "model/weights.safetensors").stat().st_mtime_ns == before, "a finished run was repeated"


# --- a support that does not belong ---


def test_support_check_finds_the_image_of_another_kind(run, refused, world, tmp_path):
    folder = tmp_path / "supports"
    folder.mkdir()
    for file in [*world.glob("ph/head_ct/train/normal/*"), *world.glob("ph/head_ct/test/normal/*")]:
        shutil.copy(file, folder)
    code, out, _ = run("support", "check", folder)
    assert code == 0
    assert "None stands out" in out
    assert "share of" in out
    (folder / "other.png").write_bytes(next((world / "ph/histology/train/normal").iterdir()).read_bytes())
    code, out, err = run("support", "check", folder)
    assert code == 1
    assert err.splitlines()[-1].startswith("anatomaly: other.png stands out.")
    assert re.search(r"other\.png .*look at it", out)
    assert "2 normal images, expected at least 4" in refused("support", "check", folder, "--shots=2")
    words = ("predict", "--support", folder, "--images", world / "normals/0.png", "--out", tmp_path / "out")
    assert "other.png stands out among the support images" in run(*words).err


# --- evaluate, import, demo ---


def test_evaluate_prints_a_table_and_writes_it(run, world, tmp_path):
    words = ("--shots=[2]", "--draws=1", "--tasks=[head_ct]", "--out", tmp_path)
    code, out, err = run("evaluate", "--model", world / "model", "--data", world / "ph", *words)
    assert (code, err) == (0, "")
    assert "image AUROC" in out
    [facts] = json.loads((tmp_path / "evaluation.json").read_text())
    assert (facts["task"], facts["shots"], facts["draws"], facts["images"]) == ("head_ct", 2, 1, 6)
    assert len((tmp_path / "test_scores.csv").read_text().splitlines()) == 1 + 6
    assert len((tmp_path / "draws.csv").read_text().splitlines()) == 1 + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks=[fundu]"], "no task 'fundu', the tasks are"),
        (["--shots=[50]"], "50 shots asked"),
        (["--shots=[]"], "shots is empty"),
        (["--draws=0"], "at least 1"),
        (["--batch_size=0"], "batch_size: got 0"),
    ],
)
def test_evaluations_that_cannot_be_made_are_one_line(words, message, refused, world):
    assert message in refused("evaluate", "--model", world / "model", "--data", world / "ph", *words)


def test_evaluate_counts_unreadable_images_on_the_terminal(run, world, tmp_path):
    for seed, name in enumerate(
        ("train/good/0", "train/good/1", "test/good/0", "test/good/1", "test/bad/0", "test/bad/1")
    ):
        write_png(tmp_path / f"liver/{name}.png", seed)
    words = ("evaluate", "--model", world / "model", "--data", tmp_path / "liver", "--shots=[1]", "--draws=1")
    assert "unreadable" not in run(*words).out
    for name in ("test/good/1", "test/bad/0"):
        (tmp_path / f"liver/{name}.png").write_bytes(b"")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if "the first" in line]
    assert line.startswith("2 of 4 test images are unreadable and left out of all figures; the first: ")
    assert ".png" in line
    assert "2 test images, 2 unreadable" in out
    assert ": 1 support draw " in out
    assert "it needs 2 images of a class, there is 1 normal one" in out


def test_evaluating_a_set_of_one_class_is_one_line(refused, world, tmp_path):
    for seed, name in enumerate(("train/good/0", "train/good/1", "train/good/2", "test/good/0", "test/good/1")):
        write_png(tmp_path / f"liver/{name}.png", seed)
    line = refused("evaluate", "--model", world / "model", "--data", tmp_path / "liver", "--shots=[2]")
    assert "2 normal, 0 anomalous and 0 unlabelled test images" in line


def test_importing_what_is_no_checkpoint_is_one_line(refused, world, tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    words = ("--teacher.weights=random", "--out", tmp_path / "m")
    assert "text.pth: not a readable weights file" in refused("import", "d24fad", tmp_path / "text.pth", *words)
    assert "weights.safetensors" in refused("import", "d24fad", world / "model/weights.safetensors", *words)
    assert not (tmp_path / "m").exists()


def test_the_demo_runs_from_images_to_report_once(run, refused, tmp_path, monkeypatch):
    from anatomaly.benchmark import demo

    draw = demo.write_benchmark

    def few(out, *, train, seed):
        return draw(out, train=4, test_normal=2, test_anomalous=2, size=64, seed=seed, tasks=("fundus", "head_ct"))

    monkeypatch.setattr(demo, "write_benchmark", few)
    monkeypatch.setattr(demo, "_SHOTS", (1, 2))
    monkeypatch.setattr("anatomaly.evaluation.evaluate.bootstrap", partial(bootstrap, samples=10))
    load = demo.load_preset

    def short(name):
        config = load(name)
        return replace(config, training=replace(config.training, epochs=1, shots=2))

    monkeypatch.setattr(demo, "load_preset", short)
    monkeypatch.setattr("anatomaly.training.lesion_episodes.STEPS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "fit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("demo", "--out", tmp_path / "demo")
    first = tmp_path / "demo/predictions/report.html"
    before = first.stat().st_mtime_ns  # there is a report before anything is trained, and it is kept
    code, out, _ = run("demo", "--out", tmp_path / "demo")
    assert code == 0
    assert first.stat().st_mtime_ns == before
    assert out.endswith(f"Report: {tmp_path / 'demo/report.html'}\n")
    assert all(name in out for name in ("d24fad", "matching", "nearest"))
    assert "A task nobody trained on" in (tmp_path / "demo/report.html").read_text()
    for model in ("d24fad", "matching"):
        config = json.loads((tmp_path / f"demo/models/{model}/config.json").read_text())
        assert "head_ct" not in config.get("training", {}).get("tasks", [])
    assert "report.html: already exists" in refused("demo", "--out", tmp_path / "demo")


# --- how it ends ---


def ending(monkeypatch, error):
    def stop(options):
        raise error

    monkeypatch.setitem(COMMANDS, "data check", COMMANDS["data check"]._replace(run=stop))


def test_an_interrupt_is_130(run, monkeypatch):
    ending(monkeypatch, KeyboardInterrupt())
    assert run("data", "check", "x") == Answer(
        130, "", "anatomaly: interrupted; what was written so far is complete.\n"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_closed_disk_is_one_line(number, refused, monkeypatch):
    ending(monkeypatch, OSError(number, os.strerror(number), "scores.csv"))
    assert refused("data", "check", "x").startswith(f"scores.csv: cannot be written ({os.strerror(number)}).")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_too_little_memory_is_one_line(error, refused, monkeypatch):
    ending(monkeypatch, error)
    assert "not enough memory. Lower --batch_size" in refused("data", "check", "x")


def test_a_defect_of_the_package_is_not_hidden(run, monkeypatch):
    ending(monkeypatch, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        run("data", "check", "x")
    ending(monkeypatch, RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        run("data", "check", "x")
    ending(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run("data", "check", "x")


def test_messages_of_several_lines_become_one(refused, monkeypatch):
    ending(monkeypatch, cli.ConfigError("a\nb\r\n  c"))
    assert refused("data", "check", "x") == "a b c\n"


def test_a_reader_that_goes_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "anatomaly.cli", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_and_version_load_none_of_the_heavy_libraries():
    code = (
        "import sys; from anatomaly.cli import main; main(['--help']); main(['--version']); main(['predit'])\n"
        "heavy = {'torch', 'jsonargparse', 'numpy', 'lightning', 'timm', 'rich', 'PIL'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_neither_the_help_of_a_command_nor_a_typo_waits_for_torch():
    """jsonargparse runs imports that stand under TYPE_CHECKING in the files of the records it reads."""
    code = (
        "import sys; from contextlib import suppress; from anatomaly.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    for word in ('--help', '--help_all', '--trainin.epochs=3'):\n"
        "        with suppress(SystemExit): main([*name.split(), word])\n"
        "        if heavy := {'torch', 'torchvision', 'lightning', 'timm', 'numba'} & set(sys.modules):\n"
        "            sys.exit(f'{name} {word}: {heavy}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_help_of_fit_shows_what_most_people_need_and_names_the_rest(run):
    words = ("--data", "--out", "--preset", "--method.name", "--preprocessing.intensity", "--training.epochs")
    rare = ("--method.pdd.tau_low", "--global_teacher.name", "--training.cache_gib", "--scoring.blur")
    short, whole = run("fit", "--help").out, run("fit", "--help_all").out
    assert all(word in short for word in words)
    assert not any(word in short for word in rare)
    assert "--help_all shows every one" in " ".join(short.split())
    assert all(word in whole for word in (*words, *rare))


# --- what is left out, names and terminals of any encoding, words that YAML takes for something else ---


def test_data_check_fit_and_predict_say_in_one_line_what_they_left_out(run, world, tmp_path):
    for number in range(3):
        write_png(tmp_path / f"in/train/good/{number}.png", number)
    for name in ("a.txt", "b.xml", ".DS_Store"):
        (tmp_path / "in/train/good" / name).write_text("text")
    line = "3 files left out: 2 not an image, 1 hidden"
    assert line in run("data", "check", tmp_path / "in").out.splitlines()
    fit = run("fit", "--data", tmp_path / "in", "--out", tmp_path / "m", *TINY, "--method.name=nearest")
    assert fit.out.splitlines()[0] == f"{tmp_path / 'in'}: {line}"
    both = ("--images", tmp_path / "in/train", "--support", tmp_path / "in/train/good")
    out = run(*predict(world, tmp_path / "o", *both)).out.splitlines()
    assert [f"{tmp_path / 'in/train'}: {line}", f"{tmp_path / 'in/train/good'}: {line}"] == out[:2]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf_8_pass_through_every_table(run, world, tmp_path):
    for number in range(4):
        write_png(tmp_path / f"in/train/good/{number}.png", number)
        write_png(tmp_path / f"in/test/{'good' if number % 2 else 'bad'}/{number}.png", 10 + number)
    for folder in ("train/good", "test/bad"):
        (tmp_path / "in" / folder / "0.png").rename(tmp_path / "in" / folder / os.fsdecode(b"M\xfcller.png"))
    assert run("data", "check", tmp_path / "in", "--csv", tmp_path / "t.csv").code == 0
    assert b"M\xfcller.png" in (tmp_path / "t.csv").read_bytes()
    data = ("--model", world / "model", "--data", tmp_path / "t.csv", "--shots", "2", "--draws", "1")
    assert run("evaluate", *data, "--out", tmp_path / "e").code == 0
    assert "M\\udcfcller.png" in (tmp_path / "e/test_scores.csv").read_text(encoding="utf-8")
    both = ("--images", tmp_path / "in/test", "--support", tmp_path / "in/train/good", "--shots", "2")
    assert run(*predict(world, tmp_path / "o", *both)).code == 0
    rows = [json.loads(line) for line in (tmp_path / "o/scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert os.fsdecode(b"M\xfcller.png") in {Path(row["path"]).name for row in rows}


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_cannot_show_a_name_loses_nothing(tmp_path, environment):
    write_png(tmp_path / "in/\u4e2d\u00fc.png")
    write_png(tmp_path / "in/\u4e2d\u00fd.png")
    words = [sys.executable, "-m", "anatomaly.cli", "data", "check", tmp_path / "in", "--csv", tmp_path / "t.csv"]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"warning: 1 images are repeated" in done.stdout
    assert "\u4e2d\u00fd.png" in (tmp_path / "t.csv").read_text(encoding="utf-8")


def test_the_table_is_on_disk_before_anything_is_printed(tmp_path, monkeypatch):
    write_png(tmp_path / "in/a.png")
    monkeypatch.setattr("builtins.print", lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError()))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert main(["data", "check", str(tmp_path / "in"), "--csv", str(tmp_path / "t.csv")]) == 141
    assert "a.png" in (tmp_path / "t.csv").read_text(encoding="utf-8")


def test_an_intensity_rule_may_be_a_word_in_flags_and_files(tmp_path):
    (tmp_path / "s.yaml").write_text("preprocessing: {size: [64, 96], intensity: lung}\ntask_intensity: {a: brain}\n")
    fit = ["--data=d", "--out=o", "-c", str(tmp_path / "s.yaml")]
    options = cli._parse("fit", fit)
    assert options.preprocessing == Preprocessing((64, 96), intensity=Intensity("window", -600, 1500))
    assert options.task_intensity == {"a": Intensity("window", 40, 80)}
    words = ["--preprocessing.intensity=range:0..4095", "--task_intensity={a: auto, b: {rule: range, high: 7}}"]
    options = cli._parse("fit", [*fit, *words])
    assert options.preprocessing.intensity == Intensity("range", 0, 4095)
    assert options.task_intensity == {"a": Intensity(), "b": Intensity("range", 0, 7)}
    for word in ("brain", "window:40/80", "{rule: window, low: 40, high: 80}", "{rule: window, centre: 40, width: 80}"):
        for name, start in (("predict", PREDICT[1:]), ("evaluate", ("--model=m", "--data=d")), ("data check", ("d",))):
            options = cli._parse(name, [*start, f"--intensity={word}"])
            assert options.intensity == Intensity("window", 40, 80)


@pytest.mark.parametrize("name", ["no", "yes", "2024", "null", "1e3", "0x1f", "~"])
def test_words_of_yaml_are_names_of_tasks(tmp_path, name):
    rules = f"task_intensity: {{{name}: {{rule: range, low: 0, high: 255}}}}"
    (tmp_path / "s.yaml").write_text(f"training: {{resample: no, epochs: 1_0}}\ntasks: [{name}]\n{rules}\n")
    options = cli._parse("fit", ["--data=d", "--out=o", "-c", str(tmp_path / "s.yaml")])
    assert options.task_intensity == {name: Intensity("range", 0, 255)}
    assert (options.tasks, options.training.resample, options.training.epochs) == ([name], False, 10)
    words = [f"--task_intensity={{{name}: {{rule: window, low: 4e1, high: 80}}}}", "--training.keep_checkpoints=on"]
    options = cli._parse("fit", ["--data=d", "--out=o", f"--tasks=[{name}, b]", *words])
    assert options.task_intensity == {name: Intensity("window", 40, 80)}
    assert (options.tasks, options.training.keep_checkpoints) == ([name, "b"], True)
    assert cli._parse("fit", ["--data=d", "--out=o", "--tasks=null"]).tasks is None


def test_a_task_called_no_is_trained(run, tmp_path):
    for number in range(2):
        write_png(tmp_path / f"no/train/good/{number}.png", number)
    words = ("--data", tmp_path, *TINY, "--method.name=nearest", "--training.validation=0.5", "--tasks=[no]")
    assert run("fit", *words, "--out", tmp_path / "m", "--task_intensity={no: {rule: range, high: 255}}").code == 0
    assert list(json.loads((tmp_path / "m/config.json").read_text())["task_intensity"]) == ["no"]


# --- what jsonargparse says, in our words ---

FIT = ("fit", "--data=x", "--out=y")
PREDICT = ("predict", "--model=m", "--images=i", "--out=o")
REWORDED = {
    ("fit",): "the following arguments are required: data, out.",
    (*FIT, "--training.epochs=many"): "--training.epochs: expected a whole number, got many.",
    (*FIT, "--training.learning_rate=fast"): "--training.learning_rate: expected a number, got fast.",
    (*FIT, "--scoring.pooling=median"): "--scoring.pooling: expected one of 'max', 'mean', 'topk', got median.",
    (*FIT, "--preprocessing.size=64"): "--preprocessing.size: expected a list in brackets, got 64.",
    (*FIT, "--preprocessing.size=[a,b]"): "--preprocessing.size: expected a whole number, got a.",
    (*FIT, "--method.attention.mirrored=maybe"): "--method.attention.mirrored: expected true or false, got maybe.",
    (*FIT, "--tasks=a"): "--tasks: expected a list in brackets, got a.",
    (*FIT, "--task_intensity={ct: 5}"): "--task_intensity: got 5, expected auto, window:40/80 (centre/width), ",
    (*PREDICT, "--intensity=soft"): "--intensity: got soft, expected auto, window:40/80 (centre/width), ",
    (*PREDICT, "--shots=few"): "--shots: expected a whole number, got few.",
    (*PREDICT, "--intensity={rule: magic}"): "expected one of 'auto', 'window', 'range', 'percentile', got magic",
    ("benchmark", "--data=d", "--out=o", "--methods=5"): "--methods: expected settings in braces, got 5.",
}
#: Of jsonargparse 4.46, which anomalib asks for.
EARLIER = (
    "Option 'data' is required but not provided or its value is None",
    "Expected a number. Got value: fast. Got NestedArg(key='learning_rate', val='fast')",
)


def test_what_jsonargparse_says_is_said_in_our_words(refused, monkeypatch):
    used, plain = set(), cli._plain

    def noted(message):
        text = " ".join(message.split()).rstrip(".")
        for number, (pattern, words) in enumerate(cli._REWORDED):
            used.update([number] * bool(re.search(pattern, text)))
            text = re.sub(pattern, words, text)
        return plain(message)

    monkeypatch.setattr(cli, "_plain", noted)
    for words, expected in REWORDED.items():
        line = refused(*words)
        assert expected in line
        assert not re.search(r"<class|typing\.|NestedArg|NoneType|Parser key|dot import", line)
    for message in EARLIER:
        noted(message)
    assert used == set(range(len(cli._REWORDED))), "a pattern that nothing matches any more"


# --- images that show next to nothing ---


def test_evaluate_takes_a_rule_and_refuses_one_that_shows_nothing(world, refused):
    words = (
        "evaluate",
        "--model",
        world / "model",
        "--data",
        world / "ph",
        "--tasks=[head_ct]",
        "--shots=2",
        "--draws=1",
    )
    line = refused(*words, "--intensity=window:9999/2")
    assert "support: intensity window:9999/2 leaves one value for all pixels of all 2 images" in line
    assert "Give --intensity range:0..255" in line
    assert "percentile: got 5 and 4" in refused(*words, "--intensity=percentile:5..4")


def test_fit_tells_of_training_images_that_show_nothing(run, world, tmp_path, caplog):
    words = ("--data", world / "ph", "--out", tmp_path / "m", "--method.name=nearest", "--teacher.weights=random")
    words = (*words, "--preprocessing.size=[64,64]", "--training.device=cpu", "--preprocessing.intensity=range:0..9999")
    assert run("fit", *words, "--tasks=[head_ct]").code == 0
    assert "head_ct: after intensity range:0..9999 the images use 3 % of the input range." in caplog.text
    assert "Give --preprocessing.intensity range:0..255, the values these files use." in caplog.text
