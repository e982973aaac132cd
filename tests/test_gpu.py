"""The same numbers on a CUDA device as on the CPU; runs only where there is one."""

import pytest
import torch

from anatomaly.backbones import build_backbone
from anatomaly.methods import build_method
from anatomaly.scoring import predict_tensor
from anatomaly.types import Scoring

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["d24fad", "nearest"])
def test_scores_on_cuda_are_those_of_the_cpu(name):
    images = torch.rand(6, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    scores = {}
    for device in ("cpu", "cuda"):
        teacher = build_backbone("efficientnet_lite0", weights="random").to(device)
        method = build_method(name, teacher).eval().to(device)
        with torch.inference_mode():
            support = method.embed_support(method.extract(images[:3].to(device)))
        scores[device] = predict_tensor(method, images[3:].to(device), support, scoring=Scoring()).scores.cpu()
    torch.testing.assert_close(scores["cuda"], scores["cpu"], rtol=5e-3, atol=5e-4)  # TF32 convolutions


def test_fit_and_predict_on_cuda(tmp_path):
    from anatomaly.config import FitConfig, MethodConfig, TrainingConfig
    from anatomaly.data.manifest import load_manifest
    from anatomaly.synthetic.phantom import write_benchmark
    from anatomaly.training.fit import fit

    tasks = ("brain_mr", "head_ct")
    manifest = load_manifest(write_benchmark(tmp_path / "data", train=12, test_normal=2, test_anomalous=2, tasks=tasks))
    config = FitConfig(
        MethodConfig("d24fad"), training=TrainingConfig(shots=2, epochs=2, device="cuda", precision="bf16")
    )
    detector = fit(manifest, tmp_path / "model", config)
    rows = manifest.select(task="head_ct", split="train").samples[:2]
    detector.set_support(rows, task="head_ct")
    predictions = list(detector.predict(manifest.select(task="head_ct", split="test")))
    assert [p.error for p in predictions] == [None] * 4
    assert all(p.score == p.score for p in predictions)
