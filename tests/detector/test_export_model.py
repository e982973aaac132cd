"""A whole model as ONNX: the detector's scores for any batch, refused where it disagrees, run without this package."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from anatomaly import cli
from anatomaly.backbones import build_backbone
from anatomaly.data.readers import read_image
from anatomaly.data.transforms import preprocess
from anatomaly.detector import export
from anatomaly.detector.detector import Detector
from anatomaly.detector.export import blur_matrix, check_agreement, export_model
from anatomaly.errors import ConfigError, OutputError, ShapeError
from anatomaly.methods import METHODS
from anatomaly.methods.matching import _solve
from anatomaly.scoring import blur
from anatomaly.synthetic.phantom import draw, png_bytes
from anatomaly.types import Scoring

RUNNER = Path(__file__).parents[2] / "docs/run_onnx.py"
DEFAULT = Scoring(pooling="topk", top_fraction=0.05, levels="geometric")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six normal images, then two that are not."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        picture = draw("head_ct", seed=i, anomalous=i > 5, size=96)
        (folder / f"{i}.png").write_bytes(png_bytes(picture.pixels))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def made(make_detector, files):
    """made(method, scoring): a detector on a small network, with a support of three where it takes one."""
    teacher = build_backbone("timm/test_resnet", weights="random")

    def make(name, scoring=DEFAULT):
        detector = make_detector(name, teacher=teacher, scoring=scoring)
        return detector.set_support(files[:3]) if detector.method.needs_support else detector

    return make


def inputs(detector, files):
    return [preprocess(read_image(file), detector.ready().preprocessing).input for file in files]


def run(file, images, **given):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(["map", "score"], {"images": np.stack(images), **given})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "attention" else [])
        for name in METHODS.built_in
        if name != "matching"  # which the command exports
    ],
)
def test_onnxruntime_scores_as_the_detector_in_any_batch(name, made, files, tmp_path):
    detector = made(name, Scoring() if name == "pdd" else DEFAULT)
    images = inputs(detector, files)
    done = export_model(detector, tmp_path / "model.onnx", images[3:])
    assert done.images == 5
    expected = detector.compare(detector.encode(images), detector.ready())
    for part in (slice(3, 4), slice(3, 8)):
        maps, scores = run(done.file, images[part])
        assert scores == pytest.approx(expected.scores[part].numpy(), rel=1e-3)
        assert np.abs(maps - expected.maps[part].numpy()).max() < 1e-3 * expected.maps.max()


def test_the_support_may_be_an_input(made, files, tmp_path, monkeypatch):
    detector = made("nearest")
    monkeypatch.setattr(export, "_compare_openvino", lambda content, given, named, scores: float(scores.sum()))
    images = inputs(detector, files)
    done = export_model(detector, tmp_path / "model.onnx", images[3:], support=images[:3])
    assert done.facts["inputs"]["support"] == [3, 3, 64, 64]
    assert done.openvino_difference == pytest.approx(sum(each.score for each in detector.predict(files[3:])), rel=1e-3)
    detector.set_support(files[3:6])
    expected = detector.compare(detector.encode(images[6:]), detector.ready()).scores
    _, scores = run(done.file, images[6:], support=np.stack(images[3:6]))
    assert scores == pytest.approx(expected.numpy(), rel=1e-3)


def test_a_file_that_disagrees_is_not_written(made, files, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "blur_matrix", lambda side, sigma: 1.01 * blur_matrix(side, sigma))
    detector = made("nearest", Scoring())
    with pytest.raises(OutputError, match=r"not written: onnxruntime differs from the model by 2\.0e-02 of a score"):
        export_model(detector, tmp_path / "model.onnx", inputs(detector, files[3:]))
    assert not list(tmp_path.iterdir())


def test_openvino_is_compared_where_it_is_installed(monkeypatch):
    class Core:
        def read_model(self, content, weights):
            return content

        def compile_model(self, model, device, hints):
            assert (model, device, hints) == (b"model", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            return lambda given: {"score": given["images"].mean(axis=(1, 2, 3))}

    images = [np.full((3, 8, 8), value, np.float32) for value in range(1, 11)]
    true = np.arange(1, 11) * np.array([1.1] + [1] * 9)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    assert export._compare_openvino(b"model", images, {}, true) == pytest.approx(0.1 / 1.1)
    monkeypatch.setattr(Core, "read_model", lambda *_: exec("raise RuntimeError"))
    assert np.isnan(export._compare_openvino(b"model", images, {}, true))
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert export._compare_openvino(b"model", images, {}, true) is None


def test_agreement_is_of_scores_maps_and_ranks():
    maps, scores = np.ones((3, 4, 4), np.float32), np.array([0.5, 0.5002, 1e-6])
    file = Path("model.onnx")
    assert check_agreement(file, (maps, scores), (maps, scores)) == (0, 0)
    assert check_agreement(file, (maps, scores + np.array([0, 0, 5e-6])), (maps, scores))[0] == pytest.approx(5e-4), (
        "rounding"
    )
    for other in (scores * 1.002, scores * np.nan):
        with pytest.raises(OutputError, match="of a score"):
            check_agreement(file, (maps, other), (maps, scores))
    with pytest.raises(OutputError, match=r" 1 ranks"):
        check_agreement(file, (maps, scores[[1, 0, 2]]), (maps, scores))
    with pytest.raises(OutputError, match=r"2\.0e-03 of the highest map value"):
        check_agreement(file, (maps * 1.002, scores), (maps, scores))


@pytest.mark.parametrize(("size", "sigma"), [((64, 96), 4.0), ((8, 5), 6.0)])
def test_the_blur_is_that_of_scoring(size, sigma):
    maps = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    rows, columns = (blur_matrix(side, sigma) for side in size)
    assert torch.allclose(rows @ maps @ columns.T, blur(maps, sigma), atol=1e-5)


@pytest.mark.parametrize("shots", [1, 3, 300])
def test_the_solver_of_a_graph_is_torchs(shots):
    generator = torch.Generator().manual_seed(0)
    wholes = torch.rand(shots, 20, generator=generator, dtype=torch.float64)  # of rank 20 at most
    alike = wholes @ wholes.T
    alike += 0.01 * alike.diagonal().mean() * torch.eye(shots)
    rows = torch.rand(shots, 4, generator=generator, dtype=torch.float64)
    assert torch.allclose(_solve(alike, rows), torch.linalg.solve(alike, rows), rtol=1e-8)


def test_wrong_input_is_refused(made, files, tmp_path):
    detector = made("nearest")
    with pytest.raises(ConfigError, match="no images"):
        export_model(detector, tmp_path / "model.onnx", [])
    with pytest.raises(ShapeError, match="expected"):
        export_model(detector, tmp_path / "model.onnx", [np.zeros((3, 32, 32), np.float32)])


def test_the_command_and_the_runner_give_the_default_models_scores(files, tmp_path, capfd):
    out, support = tmp_path / "model.onnx", [str(file) for file in files[:4]]
    assert cli.main(["export", "--support", *support, "--out", str(out)]) == 0
    assert "on 4 images onnxruntime is within" in capfd.readouterr().out
    told = out.with_name("model.onnx.json").read_text()
    assert json.loads(told)["preprocessing"]["size"] == [224, 224]
    assert files[0].name not in told
    result = subprocess.run([sys.executable, RUNNER, out, *files[4:]], capture_output=True, text=True, check=True)
    scores = [float(line.split("\t")[0]) for line in result.stdout.splitlines()]
    expected = [each.score for each in Detector.default(device="cpu").set_support(support).predict(files[4:])]
    assert scores == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("change", "size"), [({"resize": "pad"}, (90, 61)), ({"interpolation": "bilinear"}, (64, 40))])
def test_the_runner_prepares_as_the_detector(change, size, make_detector, tmp_path):
    from PIL import Image

    detector = make_detector("nearest", **change)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / "a.png")
    source = RUNNER.read_text().split("\nmodel, *files")[0]
    space = {"__name__": "runner"}
    exec(compile(source, str(RUNNER), "exec"), space)
    told = {"size": [64, 64], "resize": "squash", "interpolation": "lanczos", **change}
    found = space["prepare"](tmp_path / "a.png", {**told, "intensity": {"rule": "auto", "low": 0, "high": 1}})
    expected = preprocess(read_image(tmp_path / "a.png"), detector.preprocessing).input
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--size", "64", "64"), "a model has its own size"),
        (("--teacher.name", "timm/test_resnet", "--support", "x"), "Leave out --support"),
        (("--bank", "x"), "no images to compare on"),
        (("--images", "x", "--support_input", "true"), "needs the images themselves"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(words, reason, tmp_path, capfd):
    assert cli.main(["export", *words, "--out", str(tmp_path / "model.onnx")]) == 2
    told = capfd.readouterr().err
    assert reason in told
    assert told.count("\n") == 1
