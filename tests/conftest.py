"""Shared fixtures: the offline teacher, and models filled with the golden weights."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
sys.path.insert(0, str(Path(__file__).parent / "reference"))
REAL = Path(__file__).parents[2] / "shared" / "data" / "real"


def pytest_collection_modifyitems(items):
    for item in items:
        if "realdata" in item.keywords and not REAL.is_dir():
            item.add_marker(pytest.mark.skip(reason="../shared/data/real is absent"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def real_data():
    return REAL


@pytest.fixture(scope="module")
def browser():
    """A Chromium of the system, driven by playwright; what needs it is skipped without."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this system")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def lite0():
    from anatomaly.backbones import build_backbone

    return build_backbone("efficientnet_lite0")


@pytest.fixture(scope="session")
def vit():
    """A small vision transformer, 16 pixels a patch, untrained; its levels are blocks 0, 2, 3 and 5 of 6."""
    from anatomaly.backbones import build_backbone

    return build_backbone("timm/test_vit", weights="random")


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory):
    """Official-format weight files with the golden filling: a torchvision state dict and a {decoder, weight} file."""
    from golden_io import fill_entry
    from torchvision.models import wide_resnet50_2

    folder = tmp_path_factory.mktemp("golden")

    def fill(shapes, factor=1.0):
        return {k: factor * torch.as_tensor(fill_entry(k, tuple(shape))) for k, shape in shapes.items()}

    teacher = folder / "wide_resnet50_2.pth"
    torch.save(fill({k: v.shape for k, v in wide_resnet50_2().state_dict().items()}), teacher)
    decoder = json.loads((GOLDEN / "keys_d24fad_decoder.json").read_text())
    l2w = json.loads((GOLDEN / "keys_d24fad_l2w.json").read_text())
    checkpoint, training_checkpoint = folder / "d24fad.pth", folder / "d24fad_train.pth"
    torch.save({"decoder": fill(decoder), "weight": fill(l2w)}, checkpoint)
    torch.save({"decoder": fill(decoder), "weight": fill(l2w, 0.03)}, training_checkpoint)
    return {"teacher": teacher, "eval": checkpoint, "train": training_checkpoint}


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A small phantom benchmark at 64 px: two tasks, each with 8 normal training, 4 normal and 4 anomalous tests."""
    from anatomaly.data.manifest import load_manifest
    from anatomaly.synthetic.phantom import write_benchmark

    out = tmp_path_factory.mktemp("phantom")
    tasks = ("head_ct", "brain_mr")
    return load_manifest(write_benchmark(out, train=8, test_normal=4, test_anomalous=4, size=64, tasks=tasks))


@pytest.fixture(scope="session")
def make_detector(lite0):
    """make_detector("nearest", size=(64, 96), ...): an untrained, seeded detector at 64 px, new at every call."""
    from anatomaly.config import MethodConfig
    from anatomaly.detector.detector import Detector
    from anatomaly.detector.facts import ModelFacts
    from anatomaly.methods import METHODS, build_method
    from anatomaly.types import Preprocessing, Scoring

    def make(name="d24fad", *, teacher=lite0, seed=0, scoring=None, task_intensity=None, **preprocessing):
        method = build_method(name, [teacher] * METHODS[name].teachers, seed=seed)
        return Detector(
            method,
            preprocessing=Preprocessing(**{"size": (64, 64), **preprocessing}),
            scoring=scoring or Scoring(),
            facts=ModelFacts.of(MethodConfig(name), method),
            task_intensity=task_intensity,
            device="cpu",
        )

    return make
