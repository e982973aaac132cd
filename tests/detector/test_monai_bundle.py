"""A whole model as a MONAI bundle: complete, without names, prepared as the detector does, and run by MONAI itself."""

import csv
import importlib.util
import json
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest

from anatomaly import cli
from anatomaly.backbones import build_backbone
from anatomaly.data.readers import read_image
from anatomaly.data.transforms import preprocess
from anatomaly.detector.monai_bundle import export_monai
from anatomaly.detector.monai_scripts import Prepared
from anatomaly.errors import OutputError
from anatomaly.synthetic.phantom import draw, png_bytes

#: Required of metadata.json, and there of every tensor, by MONAI's schema of 2024-07-25.
REQUIRED = [
    *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
    *("task", "description", "authors", "copyright", "network_data_format"),
]
OF_TENSORS = ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        picture = draw("head_ct", seed=i, anomalous=i == 4, size=96)
        (folder / f"patient {i}.png").write_bytes(png_bytes(picture.pixels))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def detector(make_detector, files):
    return make_detector("nearest", teacher=build_backbone("timm/test_resnet", weights="random")).set_support(files[:3])


@pytest.fixture(scope="module")
def bundle(detector, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    images = [preprocess(read_image(file), detector.ready().preprocessing).input for file in files[3:]]
    export_monai(detector, folder, images)
    return folder


def test_a_bundle_is_complete_and_names_no_file(bundle):
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    assert set(REQUIRED) <= metadata.keys()
    told = metadata["network_data_format"]
    assert (list(told["inputs"]), list(told["outputs"])) == (["image"], ["map", "score"])
    assert all(set(OF_TENSORS) <= each.keys() for each in (*told["inputs"].values(), *told["outputs"].values()))
    assert told["inputs"]["image"]["spatial_shape"] == [64, 64]
    assert (bundle / "LICENSE").is_file()
    held = [file for file in bundle.rglob("*") if file.is_file()]
    assert not [file for file in held if b"patient 0" in file.read_bytes()]
    assert "import anatomaly" not in (script := (bundle / "scripts/__init__.py").read_text())
    assert "from anatomaly" not in script


class Read(np.ndarray):
    """What MONAI's LoadImage gives, as far as `Prepared` needs it."""

    meta: ClassVar = {"filename_or_obj": "a.png"}


@pytest.mark.parametrize(("change", "size"), [({"resize": "pad"}, (90, 61)), ({"interpolation": "bilinear"}, (64, 40))])
def test_images_are_prepared_as_the_detector_does(change, size, make_detector, tmp_path):
    from PIL import Image

    detector = make_detector("nearest", **change)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    told = {"size": [64, 64], "resize": "squash", "interpolation": "lanczos", **change}
    facts = {"preprocessing": {**told, "intensity": {"rule": "auto", "low": 0, "high": 1}}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    picture = np.moveaxis(pixels, -1, 0).astype(np.float32).view(Read)
    found = Prepared(str(tmp_path / "facts.json"))({"image": picture})["image"].numpy()
    expected = preprocess(read_image(tmp_path / "a.png"), detector.preprocessing).input
    assert np.abs(found - expected).max() < 1e-6


def test_a_folder_that_holds_something_is_refused(detector, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="not an empty folder"):
        export_monai(detector, tmp_path, [np.zeros((3, 64, 64), np.float32)])
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("words", [("--teacher.name", "timm/test_resnet"), ("--support", "x", "--support_input=true")])
def test_what_no_bundle_can_be_is_one_line(words, tmp_path, capfd):
    assert cli.main(["export", *words, "--format=monai", "--out", str(tmp_path / "out")]) == 2
    told = capfd.readouterr().err
    assert "a MONAI bundle" in told
    assert told.count("\n") == 1


RUN = """
from monai.bundle import run, verify_metadata
verify_metadata(meta_file="configs/metadata.json", filepath="schema.json")
run(config_file="configs/inference.json", dataset_dir="images")
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("monai", "ignite", "fire", "jsonschema")),
    reason="monai, pytorch-ignite, fire or jsonschema is not installed",
)
def test_monai_verifies_and_runs_it(bundle, files, detector):
    tensor = {"type": "object", "required": OF_TENSORS}
    named = {"additionalProperties": tensor}
    formats = {"required": ["inputs", "outputs"], "properties": {"inputs": named, "outputs": named}}
    schema = {"required": REQUIRED, "properties": {"network_data_format": formats}}
    (bundle / "schema.json").write_text(json.dumps(schema))
    (bundle / "images").mkdir()
    for file in files[3:]:
        (bundle / "images" / file.name).write_bytes(file.read_bytes())
    done = subprocess.run([sys.executable, "-c", RUN], cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verified with no error" in done.stderr + done.stdout
    with (bundle / "eval/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = list(detector.predict(files[3:]))
    assert [float(row["score"]) for row in rows] == pytest.approx([each.score for each in expected], rel=1e-3)
    assert [row["path"].rpartition("/")[2] for row in rows] == [file.name for file in files[3:]]
    saved = sorted((bundle / "eval").glob("*.npy"))
    assert [np.load(file).shape for file in saved] == [(64, 64)] * 2
