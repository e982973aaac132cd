"""One Ray for all tests of archives, and a set of images with everything in it that may meet a run."""

import contextlib
import sys

import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("pyarrow")


@pytest.fixture(scope="session")
def ray_here():
    """A small cluster in place of those that runs start and end."""
    from anatomaly.archive.cluster import connected

    with connected(processors=4, store=2**27):
        yield


@pytest.fixture
def one_ray(ray_here, monkeypatch):
    import anatomaly.archive.run

    same = contextlib.nullcontext({"CPU": 4.0})
    monkeypatch.setattr(anatomaly.archive.run, "connected", lambda *_, **__: same)


@pytest.fixture(scope="session")
def archive(phantom, tmp_path_factory):
    """A folder of pictures, grey and in colour, a volume of 5 slices, a cut-off file and one that kills its decoder."""
    nibabel = pytest.importorskip("nibabel")
    from PIL import Image

    folder = tmp_path_factory.mktemp("archive")
    for number, row in enumerate(phantom.select(task="head_ct", split="test").samples):
        (folder / f"p{number}.png").write_bytes(row.path.read_bytes())
    (folder / "broken.png").write_bytes((folder / "p0.png").read_bytes()[:99])
    Image.open(folder / "p0.png").convert("RGB").save(folder / "q colour.png")
    voxels = np.random.default_rng(0).uniform(0, 255, (24, 20, 5)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / "r.nii.gz")
    return folder


@pytest.fixture(scope="session")
def judging(make_detector, phantom):
    """A detector with its support and a calibration."""
    from anatomaly.detector.calibrate import calibrate_on_support
    from anatomaly.types import Intensity

    made = make_detector("nearest", intensity=Intensity("range", 0.0, 255.0))
    calibrate_on_support(made, phantom.select(task="head_ct", split="train").samples[:3], task="head_ct")
    return made


if sys.platform != "linux":
    collect_ignore_glob = ["*"]
