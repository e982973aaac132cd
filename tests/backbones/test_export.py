"""The ONNX file of a teacher: the same numbers, standard operators only, and nothing left behind when that fails."""

import functools
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from anatomaly import __version__, cli
from anatomaly.backbones import build_backbone, export
from anatomaly.backbones.export import export_teacher
from anatomaly.backbones.teacher import Teacher
from anatomaly.backbones.vmamba import selective_scan
from anatomaly.backbones.vmamba.network import VMamba
from anatomaly.errors import ConfigError, NotReadyError, OutputError, ShapeError

SIZE = (64, 96)
TEACHERS = ("timm/test_resnet", "timm/test_vit", "vmamba_tiny_merged", "vmamba_tiny_s1l8")


def build(name):
    """A teacher with random weights; a VMamba has one block in its first and last layer only, to export in seconds."""
    if name.startswith("timm/"):
        return build_backbone(name, weights="random")
    torch.manual_seed(0)
    body = VMamba(name.removesuffix("_merged"), merged=name.endswith("_merged"))
    for layer, depth in zip(body.layers, (1, 0, 0, 1), strict=True):
        layer.blocks = layer.blocks[:depth]
    facts = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "weights": "random"}
    return Teacher(name, body, channels=body.channels, strides=body.strides, **facts)


@pytest.fixture(scope="module")
def small():
    return build("timm/test_resnet")


@pytest.fixture(scope="module")
def export_once(tmp_path_factory):
    @functools.cache
    def call(name):
        teacher = build(name)
        return teacher, export_teacher(teacher, tmp_path_factory.mktemp("onnx") / "teacher.onnx", size=SIZE)

    return call


@pytest.fixture(scope="module", params=TEACHERS)
def exported(request, export_once):
    """(teacher, what export_teacher returned)."""
    return export_once(request.param)


@pytest.fixture
def traced(export_once, monkeypatch):
    """The graph that the next export takes for its own, to be broken before."""
    model = onnx.load(export_once("timm/test_resnet")[1].file)
    monkeypatch.setattr(export, "_trace", lambda teacher, size: model)
    return model


def nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


def test_onnxruntime_computes_the_levels_of_the_teacher_for_any_batch(exported):
    teacher, done = exported
    session = onnxruntime.InferenceSession(str(done.file), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["level_1", "level_2", "level_3", "level_4"]
    assert done.parity < 1e-4
    for batch in (1, 3):
        images = torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(batch))
        levels = session.run(None, {"images": images.numpy()})
        for got, expected in zip(levels, teacher(images), strict=True):
            assert got.shape == expected.shape
            assert np.linalg.norm(got - expected.numpy()) < 1e-4 * np.linalg.norm(expected.numpy())


def test_the_file_has_standard_operators_only(exported):
    _, done = exported
    model = onnx.load(done.file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in nodes(model.graph)} <= {"", "ai.onnx"}
    assert not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", done.opset)]
    assert sum(1 for _ in nodes(model.graph)) == done.nodes


def test_positions_may_grow_along_one_side_and_shrink_along_the_other(vit, tmp_path):
    """ONNX's own resampling is another one there."""
    before = vit.body.model.pos_embed.clone()
    assert export_teacher(vit, tmp_path / "teacher.onnx", size=(112, 224)).parity < 1e-4
    assert torch.equal(vit.body.model.pos_embed, before), "the teacher itself is not touched"


def test_the_scan_is_one_operator_or_two_not_a_chain_of_positions(exported):
    teacher, done = exported
    scans = sum(node.op_type == "Scan" for node in nodes(onnx.load(done.file).graph))
    assert scans == {"vmamba_tiny_merged": 2, "vmamba_tiny_s1l8": 2 * 2}.get(teacher.name, 0)


def test_the_file_says_what_it_is(exported):
    teacher, done = exported
    facts = {entry.key: entry.value for entry in onnx.load(done.file).metadata_props}
    assert facts["teacher"] == teacher.name
    assert facts["weights_hash"] == teacher.weights_hash
    assert facts["anatomaly"] == __version__
    assert facts["size"] == "64x96"
    assert facts["opset"] == str(done.opset)
    assert facts["note"] == "Research only, not for clinical use."


def test_the_teacher_stays_as_it_was(exported):
    teacher, _ = exported
    modules = [module for module in teacher.modules() if hasattr(module, "scan_backend")]
    assert {module.scan_backend for module in modules} <= {"auto"}
    assert all(torch.isfinite(level).all() for level in teacher(torch.rand(1, 3, *SIZE)))


@pytest.mark.parametrize("broken", [1.01, float("nan")])
def test_a_file_that_disagrees_is_not_written(small, traced, tmp_path, broken):
    weight = next(tensor for tensor in traced.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(broken), weight.name))
    with pytest.raises(OutputError, match=r"not written: onnxruntime differs from timm/test_resnet by .*at most 1e-04"):
        export_teacher(small, tmp_path / "teacher.onnx", size=SIZE)
    assert not list(tmp_path.iterdir())


def test_an_operator_that_is_not_standard_is_refused(small, traced, tmp_path):
    traced.graph.node[-1].domain = "com.microsoft"
    with pytest.raises(NotReadyError, match=r"needs operators of com\.microsoft"):
        export_teacher(small, tmp_path / "teacher.onnx", size=(64, 64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(small, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotReadyError, match=r"is not installed\. pip install anatomaly\[export\]"):
        export_teacher(small, tmp_path / "teacher.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(60, 64), (64, 0), (-32, 64)])
def test_a_size_that_does_not_fit_is_refused(small, tmp_path, size):
    with pytest.raises(ShapeError, match=rf"got size {size[0]}x{size[1]}, expected multiples of 32"):
        export_teacher(small, tmp_path / "teacher.onnx", size=size)
    assert not list(tmp_path.iterdir())


def test_weights_beyond_one_file_are_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="GiB of weights, one ONNX file holds 2"):
        export_teacher(small, tmp_path / "teacher.onnx")


def test_a_network_that_torch_cannot_export_is_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "forward", lambda self, images: [images] * (4 if images.sum() > 0 else 3))
    with pytest.raises(NotReadyError, match=r"^export: torch \S+ cannot export timm/test_resnet: [^\n]+$"):
        export_teacher(small, tmp_path / "teacher.onnx", size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_the_backend_computes_nothing_outside_an_export():
    tensor = torch.ones(1, 4, 5)
    states = torch.ones(1, 4, 2, 5)
    with pytest.raises(NotReadyError, match='backend "onnx" computes nothing'):
        selective_scan.selective_scan(tensor, tensor, -torch.ones(4, 2), states, states, backend="onnx")


def test_a_torch_without_own_operators_is_named(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.onnx, "ops")
    with pytest.raises(NotReadyError, match=r"2\.8 or newer is needed"):
        export_teacher(build("vmamba_tiny_s1l8"), tmp_path / "teacher.onnx", size=(32, 32))


def test_the_command_prints_where_what_and_how_close(tmp_path, capfd):
    out = tmp_path / "new/teacher.onnx"
    words = ("--teacher.name", "timm/test_resnet", "--teacher.weights", "random", "--size", "32", "64")
    assert cli.main(["export", *words, "--out", str(out)]) == 0
    told = capfd.readouterr()
    assert told.out.startswith(f"{out}: images of 32x64, opset 20, onnxruntime within ")
    assert told.out.count("\n") == 1
    assert onnx.load(out).graph.input[0].type.tensor_type.shape.dim[3].dim_value == 64


def test_the_command_fails_in_one_line(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    words = ("--teacher.name", "timm/test_resnet", "--teacher.weights", "random", "--size")
    for size, out, reason in (
        (("32", "33"), tmp_path / "teacher.onnx", "expected multiples of 32"),
        (("32", "32"), tmp_path / "file/teacher.onnx", "cannot be written"),
    ):
        assert cli.main(["export", *words, *size, "--out", str(out)]) == 2
        told = capfd.readouterr()
        assert reason in told.err
        assert told.err.count("\n") == 1
        assert not told.out
