"""One image, one number: whatever the batch, the neighbours and the door it came in through."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from anatomaly.data.transforms import load
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.protocols import samples_to_test
from anatomaly.methods import METHODS, build_method
from anatomaly.scoring import blur, predict_tensor
from anatomaly.types import Scoring

SCORING = Scoring(blur=4.0, pooling="topk", top_fraction=0.05)


@pytest.fixture(scope="module", params=[(name, teacher) for teacher in ("lite0", "vit") for name in METHODS])
def method(request):
    name, teacher = request.param
    return build_method(name, [request.getfixturevalue(teacher)] * METHODS[name].teachers, seed=3).eval()


@pytest.fixture(scope="module")
def images():
    """(11, 3, 64, 64) in [0, 1]: eight queries, then three supports, of very different brightness and texture."""
    rng = np.random.default_rng(5)
    smooth = gaussian_filter(rng.random((11, 3, 64, 64)), (0, 0, 2, 2))
    contrast = np.linspace(0.1, 1.0, 11).reshape(-1, 1, 1, 1)
    return torch.from_numpy((contrast * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32))


def judge(method, queries, supports):
    with torch.inference_mode():
        bank = method.embed_support(method.extract(supports))
    return predict_tensor(method, queries, bank, scoring=SCORING)


def test_a_batch_of_eight_scores_like_eight_batches_of_one(method, images):
    queries, supports = images[:8], images[8:]
    together = judge(method, queries, supports)
    alone = [judge(method, query[None], supports) for query in queries]
    assert together.scores.std() > 1e-3, "the images must differ for the comparison to mean anything"
    for field in ("maps", "scores") if together.weights is None else ("maps", "scores", "weights"):
        expected = torch.cat([getattr(one, field) for one in alone])
        torch.testing.assert_close(getattr(together, field), expected, rtol=0, atol=1e-5)


def test_a_score_does_not_depend_on_the_neighbours(method, images):
    queries, supports = images[:8], images[8:]
    found = {}
    for batches in ([[0, 1, 2], [3, 4, 5, 6, 7]], [[7, 0, 4], [5, 2], [1, 6, 3]]):
        for batch in batches:
            scored = judge(method, queries[batch], supports)
            for row, image in enumerate(batch):
                score, anomaly_map = found.setdefault(image, (scored.scores[row], scored.maps[row]))
                torch.testing.assert_close(scored.scores[row], score, rtol=0, atol=1e-5)
                torch.testing.assert_close(scored.maps[row], anomaly_map, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(METHODS))
def test_evaluate_predict_and_predict_tensor_give_the_same_number(name, make_detector, phantom):
    detector = make_detector(name, scoring=SCORING)
    (evaluation,) = evaluate(detector, phantom, task="head_ct", shots=[3], draws=1, batch_size=3)
    tests = samples_to_test(phantom, "head_ct")
    assert evaluation.samples == tests

    if detector.method.needs_support:
        detector.set_support(evaluation.supports[0], task="head_ct")
    bank = detector.ready()
    predictions = list(detector.predict(tests, batch_size=5))
    inputs = torch.stack([torch.from_numpy(load(row, bank.preprocessing).input) for row in tests])
    scored = predict_tensor(detector.method, inputs, bank.tensors, scoring=SCORING)

    assert scored.scores.std() > 1e-4
    np.testing.assert_allclose(evaluation.scores[0], scored.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose([p.score for p in predictions], scored.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose([p.anomaly_map for p in predictions], scored.maps, rtol=0, atol=1e-6)
    if scored.weights is not None:
        np.testing.assert_allclose([p.support_weights for p in predictions], scored.weights, rtol=0, atol=1e-6)


def test_blur_is_per_image():
    maps = torch.zeros(3, 40, 48)
    maps[0, 20, 24] = 1.0
    maps[2] = torch.rand(40, 48, generator=torch.Generator().manual_seed(0))
    blurred = blur(maps, 4.0)
    assert blurred[0].max() < 0.02, "the impulse must be spread"
    assert torch.equal(blurred[1], torch.zeros(40, 48))
    for before, after in zip(maps, blurred, strict=True):
        np.testing.assert_allclose(after, gaussian_filter(before.numpy(), 4.0), rtol=0, atol=1e-7)
