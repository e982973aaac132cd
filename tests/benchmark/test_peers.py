"""Peers against anomalib's own models run the normal way, and the rules every score obeys here."""
# ruff: noqa: NPY002 - anomalib draws from NumPy's global state

import importlib.util
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from anatomaly.backbones import build_backbone
from anatomaly.benchmark.peers import PEERS, RESNETS, build_peer
from anatomaly.errors import ConfigError, NotReadyError, ReadError
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.types import Intensity, Preprocessing

TASK = "head_ct"
SMALL = Preprocessing(size=(64, 64))
OPTIONS = {"rd4ad": {"max_steps": 1}}
needs_anomalib = pytest.mark.skipif(importlib.util.find_spec("anomalib") is None, reason="anomalib is not installed")
EVERY = [name if name == "knn" else pytest.param(name, marks=needs_anomalib) for name in PEERS]


@pytest.fixture(scope="module")
def resnet18():
    """Random weights; its input is not scaled, so that anomalib's extractor sees what the teacher sees."""
    return build_backbone("timm/resnet18", weights="random", normalise=False)


@pytest.fixture(scope="module")
def make_peer(resnet18):
    def make(name, teacher=resnet18, *, seed=0, **options):
        return build_peer(name, teacher, preprocessing=SMALL, seed=seed, **{**OPTIONS.get(name, {}), **options})

    return make


@pytest.fixture(scope="module")
def normals(phantom):
    return phantom.select(task=TASK, split="train").samples


@pytest.fixture(scope="module")
def images():
    """(5, 3, 64, 64) in [0, 1], of very different brightness and texture."""
    noise = F.interpolate(torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(3)), 64, mode="bilinear")
    return noise * torch.linspace(0.2, 1, 5).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def banks(make_peer, normals):
    """banks(name): a peer and its bank on four normal images, fitted once."""
    made = {}

    def bank(name):
        if name not in made:
            peer = make_peer(name)
            made[name] = peer, peer.make_bank(normals[:4], task=TASK)
        return made[name]

    return bank


@pytest.fixture(scope="module")
def scarred(phantom, tmp_path_factory):
    """The phantom's normal test images, and copies of them with a bright disc somewhere."""
    folder, rng = tmp_path_factory.mktemp("scarred"), np.random.default_rng(0)
    rows = [row for row in phantom.select(task=TASK) if row.label == 0]
    for row in phantom.select(task=TASK, split="test", label=0):
        pixels = np.asarray(Image.open(row.path).convert("L")).copy()
        y, x = rng.integers(20, 44, 2)
        disc = np.hypot(*(np.mgrid[:64, :64] - np.array([y, x]).reshape(2, 1, 1))) < 9
        pixels[disc] = 255
        file, mask = folder / f"{row.path.stem}.png", folder / f"{row.path.stem}_mask.png"
        Image.fromarray(pixels).save(file)
        Image.fromarray(disc).save(mask)
        rows.append(replace(row, path=file, mask=mask, label=1, sha256=None, patient_id=None))
    return replace(phantom, samples=tuple(rows))


def judge(peer, bank, images):
    return peer.compare(peer.encode(list(images.numpy())), bank)


def pixels_of(peer, rows):
    from anatomaly.data.transforms import load

    return torch.from_numpy(np.stack([load(row, peer.preprocessing).input for row in rows]))


def own_way(model, teacher, extractor):
    """anomalib's model as it builds it, with its own feature extractor and the teacher's weights in it."""
    own = getattr(model, extractor).feature_extractor
    weights = teacher.body.state_dict()
    assert set(own.state_dict()) <= set(weights)
    own.load_state_dict({key: weights[key] for key in own.state_dict()})
    return model


def assert_same(scored, found):
    assert scored.maps.std() > 1e-3 and scored.scores.std() > 1e-3
    torch.testing.assert_close(scored.maps, found.anomaly_map[:, 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scored.scores, found.pred_score.flatten(), rtol=1e-3, atol=1e-4)


@needs_anomalib
@pytest.mark.parametrize("few", [True, False])
def test_patchcore_is_anomalibs(few, resnet18, make_peer, normals, images, monkeypatch):
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    if not few:
        monkeypatch.setattr("anatomaly.benchmark.peers._FEW", 3)
    peer = make_peer("patchcore", seed=4, coreset=0.2)
    bank = peer.make_bank(normals[:4], task=TASK)
    model = PatchcoreModel(["layer2", "layer3"], backbone="resnet18", pre_trained=False)
    own_way(model, resnet18, "feature_extractor").train()(pixels_of(peer, normals[:4]))
    patches = 4 * 8 * 8
    if few:
        model.memory_bank = torch.vstack(model.embedding_store)
    else:
        torch.manual_seed(4)
        np.random.seed(4)
        model.subsample_embedding(0.2)
        assert len(model.memory_bank) == int(0.2 * patches)
    assert torch.allclose(bank.fitted.args[0].memory_bank, model.memory_bank, atol=1e-5)
    assert_same(judge(peer, bank, images), model.eval()(images))


@needs_anomalib
def test_padim_is_anomalibs(resnet18, banks, normals, images):
    from anomalib.models.image.padim.torch_model import PadimModel

    peer, bank = banks("padim")
    model = PadimModel("resnet18", pre_trained=False)
    chosen = bank.fitted.args[0].idx
    assert chosen.shape == model.idx.shape == (100,)
    assert len(set(chosen.tolist())) == 100 and 350 < chosen.max() < 64 + 128 + 256
    model.idx = chosen
    own_way(model, resnet18, "feature_extractor").train()(pixels_of(peer, normals[:4]))
    model.fit()
    assert_same(judge(peer, bank, images), model.eval()(images))


@needs_anomalib
def test_rd4ad_is_anomalibs_after_training_as_anomalib_trains(resnet18, make_peer, normals, images):
    from anomalib.models import ReverseDistillation

    peer = make_peer("rd4ad", seed=6, max_steps=2)
    bank = peer.make_bank(normals[:4], task=TASK)
    torch.manual_seed(6)
    module = ReverseDistillation(
        backbone="resnet18", pre_trained=False, post_processor=False, evaluator=False, visualizer=False
    )
    torch.manual_seed(6)
    fresh = type(module.model)("resnet18", SMALL.size, module.layers, module.anomaly_map_mode, pre_trained=False)
    module.model = own_way(fresh, resnet18, "encoder").train()
    optimiser = module.configure_optimizers()
    for _ in range(2):
        optimiser.zero_grad()
        module.loss(*module.model(pixels_of(peer, normals[:4]))).backward()
        optimiser.step()
    assert_same(judge(peer, bank, images), module.model.eval()(images))


@needs_anomalib
def test_rd4ad_trains(resnet18, normals, caplog):
    peer = build_peer("rd4ad", resnet18, preprocessing=SMALL, epochs=3, batch_size=3)
    with caplog.at_level(logging.INFO, "anatomaly.benchmark.peers"):
        peer.make_bank(normals[:4], task=TASK)
    losses = [record.args[2] for record in caplog.records]
    assert [record.args[0] for record in caplog.records] == [1, 2, 3, 4, 5, 6]  # 4 images are two steps
    assert losses[-1] < 0.6 * losses[0]


@needs_anomalib
def test_anomalib_has_a_decoder_for_every_resnet_named_here():
    from anomalib.models.components.backbone import get_decoder

    with torch.device("meta"):
        for name in RESNETS:
            get_decoder(name)


def test_knn_is_the_cosine_of_mean_features(lite0, make_peer, normals, images):
    peer = make_peer("knn", lite0)
    scored = judge(peer, peer.make_bank(normals[:3], task=TASK), images)
    supports = lite0(pixels_of(peer, normals[:3]))[2].double().mean((2, 3))
    queries = lite0(images)[2].double()
    far = [[1 - F.cosine_similarity(q.mean((1, 2)), s, dim=0) for s in supports] for q in queries]
    torch.testing.assert_close(scored.scores.double(), torch.tensor(far).amin(1), rtol=0, atol=1e-6)
    corner = [min(1 - F.cosine_similarity(q[:, 0, -1], s, dim=0) for s in supports) for q in queries]
    torch.testing.assert_close(scored.maps[:, 0, -1].double(), torch.tensor(corner), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_scores_do_not_depend_on_the_batch(name, banks, images):
    peer, bank = banks(name)
    together = judge(peer, bank, images)
    assert together.weights is None
    assert together.maps.shape == (5, 64, 64) and together.scores.shape == (5,)
    assert together.maps.dtype == together.scores.dtype == torch.float32
    scale = together.scores.std()
    assert scale > 1e-3
    for batch in ([3], [4, 0], [2, 1, 3]):
        some = judge(peer, bank, images[batch])
        torch.testing.assert_close(some.scores, together.scores[batch], rtol=1e-4, atol=1e-4 * float(scale))
        torch.testing.assert_close(some.maps, together.maps[batch], rtol=1e-3, atol=1e-3 * float(scale))


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_gives_the_same_peer(name, make_peer, banks, normals, images):
    first, again = judge(*banks(name), images), make_peer(name)
    torch.rand(3), np.random.random(3)  # must not matter
    second = judge(again, again.make_bank(normals[:4], task=TASK), images)
    assert torch.equal(first.scores, second.scores) and torch.equal(first.maps, second.maps)


@needs_anomalib
@pytest.mark.parametrize(("name", "options"), [("padim", {}), ("patchcore", {"coreset": 0.2})])
def test_another_seed_is_another_peer_and_the_global_one_stays(name, options, make_peer, normals, monkeypatch, capsys):
    monkeypatch.setattr("anatomaly.benchmark.peers._FEW", 3)
    found = []
    for seed in (0, 0, 1):
        torch.rand(3), np.random.random(3)  # must not matter
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2]
        model = make_peer(name, seed=seed, **options).make_bank(normals[:4], task=TASK).fitted.args[0]
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1]) and np.random.get_state()[2] == before[2]
        found.append(model.memory_bank if name == "patchcore" else model.idx)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert capsys.readouterr().err == ""  # no progress bar


@pytest.mark.parametrize("name", EVERY)
def test_evaluate_takes_a_peer(name, phantom, resnet18, make_peer):
    (found,) = evaluate(make_peer(name), phantom, task=TASK, shots=[3], draws=2, batch_size=5)
    assert found.scores.shape == (2, 8)
    assert {"auroc", "pixel_auroc"} <= set(found.metrics[0])
    assert not np.array_equal(found.scores[0], found.scores[1])


@pytest.mark.parametrize("name", [*EVERY[:2], "knn"])
def test_discs_are_found(name, lite0, make_peer, scarred):
    (found,) = evaluate(make_peer(name, lite0), scarred, task=TASK, shots=[8], draws=1)
    assert found.metrics[0]["auroc"] > 0.8
    assert found.metrics[0]["pixel_auroc"] > 0.8


def test_the_intensity_rule_of_the_task_is_fixed_on_the_normal_images(lite0, phantom, normals):
    percentile = replace(SMALL, intensity=Intensity("percentile", 1, 90))
    rules = {"brain_mr": Intensity("range", 0, 100)}
    peer = build_peer("knn", lite0, preprocessing=percentile, task_intensity=rules)
    found = [peer.make_bank(rows, task=TASK).preprocessing.intensity for rows in (normals[:1], normals[:2])]
    assert [rule.rule for rule in found] == ["range", "range"] and found[0] != found[1]
    other = phantom.select(task="brain_mr", split="train").samples
    assert peer.make_bank(other, task="brain_mr").preprocessing.intensity == rules["brain_mr"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("patch_core", {}, "peers: unknown name 'patch_core', expected one of patchcore, padim, rd4ad, knn"),
        ("knn", {"neighbours": 3}, "knn: got option neighbours=3, expected none"),
        ("padim", {"coreset": 0.1}, "padim: got option coreset=0.1, expected features"),
        ("patchcore", {"coreset": "all"}, "coreset='all', expected coreset .float or int., neighbours .int.. "),
        ("patchcore", {"neighbours": 2.5}, "got option neighbours=2.5, expected"),
        ("rd4ad", {"epochs": True}, "got option epochs=True, expected"),
        ("patchcore", {"coreset": 0.0}, "patchcore: got coreset 0 and 9 neighbours, expected a share in"),
        ("patchcore", {"neighbours": 0}, "got coreset .* and 0 neighbours"),
        ("padim", {"features": 177}, "padim: got 177 features, levels 1 to 3 of efficientnet_lite0 have 176"),
        ("padim", {"features": 0}, "padim: got 0 features"),
        ("rd4ad", {"epochs": 0}, "rd4ad: got epochs 0"),
        ("rd4ad", {"learning_rate": 0.0}, "learning_rate 0, expected"),
        ("rd4ad", {}, r"rd4ad: anomalib has no decoder for efficientnet_lite0, expected one of resnet18.*method pdd"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(name, options, message, lite0):
    with pytest.raises(ConfigError, match=message):
        build_peer(name, lite0, preprocessing=SMALL, **options)


def test_sizes_that_will_not_do_are_refused(lite0, resnet18):
    with pytest.raises(ConfigError, match="padim: covariances of 176 features at each of 256x256 positions take"):
        build_peer("padim", lite0, preprocessing=Preprocessing(size=(1024, 1024)), features=176)
    with pytest.raises(ConfigError, match="rd4ad: the input is 64x32, expected at least 64x64"):
        build_peer("rd4ad", resnet18, preprocessing=Preprocessing(size=(64, 32)))


@pytest.mark.parametrize("name", ["patchcore", "padim", "rd4ad"])
def test_without_anomalib_the_extra_is_named(name, resnet18, monkeypatch):
    monkeypatch.setattr("anatomaly.benchmark.anomalib_bridge.find_spec", lambda name: None)
    with pytest.raises(NotReadyError, match=r"anomalib is not installed.*pip install 'anatomaly\[peers\]'"):
        build_peer(name, resnet18, preprocessing=SMALL)


def test_images_that_cannot_be_fitted_on_are_refused(make_peer, phantom, normals, tmp_path):
    peer = make_peer("knn")
    with pytest.raises(ConfigError, match="task 'head_ct' has no normal images"):
        peer.make_bank([], task=TASK)
    with pytest.raises(ConfigError, match="is labelled anomalous, expected normal images"):
        peer.make_bank(phantom.select(task=TASK, label=1).samples[:2], task=TASK)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ReadError, match=r"broken\.png"):
        peer.make_bank([*normals[:2], replace(normals[0], path=tmp_path / "broken.png")], task=TASK)


@needs_anomalib
def test_too_few_images_are_refused(make_peer, normals, monkeypatch):
    with pytest.raises(ConfigError, match="padim: got 1 normal image, expected at least 2"):
        make_peer("padim").make_bank(normals[:1], task=TASK)
    monkeypatch.setattr("anatomaly.benchmark.peers._FEW", 1)
    with pytest.raises(ConfigError, match=r"patchcore: coreset 0\.001 leaves none of 128 patches"):
        make_peer("patchcore", coreset=0.001).make_bank(normals[:2], task=TASK)
