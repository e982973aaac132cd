"""PDD against values computed with the official release; tolerances are those of golden/README."""

import json
from pathlib import Path

import pytest
import torch
from golden_io import Golden, fill_entry, uniform

from anatomaly.backbones import build_backbone
from anatomaly.backbones.weights import read_state
from anatomaly.methods.pdd import PDD, cosine_similarities, diversity, import_pdd, mse
from anatomaly.methods.settings import PDDSettings
from anatomaly.scoring import anomaly_map, blur, image_score
from anatomaly.types import Comparison, Scoring

FOLDER = __file__.rsplit("/", 2)[0] + "/golden"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Official-format files with the golden filling: VMamba-Tiny and PDD's decoder."""
    folder = tmp_path_factory.mktemp("pdd")
    for name in ("vanilla_vmamba_tiny", "pdd_decoder"):
        shapes = json.loads(Path(f"{FOLDER}/keys_{name}.json").read_text("utf-8"))
        state = {key: torch.as_tensor(fill_entry(key, tuple(shape))) for key, shape in shapes.items()}
        torch.save(state, folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def teachers(files, golden_files):
    return (
        build_backbone("wide_resnet50_2", weights=str(golden_files["teacher"])),
        build_backbone("vmamba_tiny_merged", weights=str(files / "vanilla_vmamba_tiny.pth")),
    )


@pytest.fixture(scope="module")
def features(teachers, files):
    return load(teachers, files).extract(torch.from_numpy(uniform("pdd.image", (2, 3, 256, 256))))


def load(teachers, files, *, shared_students=True):
    method = PDD(*teachers, settings=PDDSettings(shared_students=shared_students, cosine_sign="release"))
    import_pdd(read_state(files / "pdd_decoder.pth"), method, where="pdd_decoder.pth")
    return method


def losses_of(method, losses):
    """The release's four weighted terms and their sum, under its names."""
    return {
        "loss_mse_prior_student_vs_fused": method.settings.reconstruction_weight * losses["prior_mse"],
        "loss_cosine_prior_student_vs_fused": method.settings.cosine_weight * losses["prior_cosine"],
        "loss_mse_fused_vs_plain_student": method.settings.reconstruction_weight * losses["plain_mse"],
        "loss_diversity": method.settings.diversity_weight * losses["relation"],
        "loss_total": losses["total"],
    }


def relations_of(plain, prior):
    values = {f"student_cosine_f{i + 1}": cosine for i, cosine in enumerate(cosine_similarities(plain, prior))}
    values["extra_diversity_low1_tau0.1_0.999"] = diversity(plain, prior, tau_low=0.1, tau_high=0.999, low_levels=1)
    return values


@pytest.fixture(scope="module")
def evaluated(teachers, files, features):
    """Everything the eval golden holds, computed by our modules."""
    method = load(teachers, files).eval()
    with torch.no_grad():
        united, encoded = method.unite(features), method.encode(features)
        comparisons = method.compare(encoded, method.embed_support({}))
        values = losses_of(method, method.training_loss(features, {}))
        priors = method.prior(united[3], [(16, 16), (32, 32)])
    for i in range(4):
        values[f"teacher_resnet_f{i + 1}"] = features["local"][i]
        values[f"teacher_vmamba_f{i + 1}"] = features["global"][i]
    values |= {"fused_f0": united[3], "prior_1": priors[0], "prior_2": priors[1]}
    for who, levels in (("plain_student", encoded[:3]), ("prior_student", encoded[3:6]), ("fused", encoded[6:])):
        values |= {f"{who}_f{i + 1}": level for i, level in enumerate(levels)}
    values |= relations_of(encoded[:3], encoded[3:6])
    values["map_raw"] = anomaly_map(comparisons, (256, 256))
    values["map_gauss_per_image"] = blur(values["map_raw"], 4.0)
    for name, maps in (("raw", values["map_raw"]), ("gauss", values["map_gauss_per_image"])):
        values[f"score_{name}_max"] = image_score(maps, Scoring(pooling="max"))
        values[f"score_{name}_mean"] = image_score(maps, Scoring(pooling="mean"))
    return values


LOSSES = [
    *((f"loss_mse_{pair}", "vs_fp64", 1e-5) for pair in ("prior_student_vs_fused", "fused_vs_plain_student")),
    *((f"loss_{part}", "vs_fp64", 1e-5) for part in ("cosine_prior_student_vs_fused", "diversity", "total")),
    *((f"student_cosine_f{i}", "max_abs", 1e-4) for i in (1, 2, 3)),
    ("extra_diversity_low1_tau0.1_0.999", "vs_fp64", 1e-4),
]
EVAL = [
    *((f"teacher_{who}_f{i}", "rel_l2", 1e-5) for who in ("resnet", "vmamba") for i in (1, 2, 3, 4)),
    *((name, "rel_l2", 1e-5) for name in ("fused_f0", "prior_1", "prior_2")),
    *((f"{who}_f{i}", "rel_l2", 1e-5) for who in ("plain_student", "prior_student", "fused") for i in (1, 2, 3)),
    *LOSSES,
    *((name, "rel_l2", 2e-6) for name in ("map_raw", "map_gauss_per_image")),
    *((f"score_{blurred}_{pool}", "rel_l2", 2e-6) for blurred in ("raw", "gauss") for pool in ("max", "mean")),
]


@pytest.mark.parametrize(("name", "measure", "bound"), EVAL, ids=[row[0] for row in EVAL])
def test_evaluation(evaluated, name, measure, bound):
    result = Golden(f"{FOLDER}/pdd_eval.npz").compare(name, evaluated[name])
    assert result[measure] <= bound


def test_own_students_start_from_the_same_checkpoint(teachers, files, features, evaluated):
    with torch.no_grad():
        encoded = load(teachers, files, shared_students=False).eval().encode(features)
    for i in range(3):
        torch.testing.assert_close(encoded[i], evaluated[f"plain_student_f{i + 1}"])
        torch.testing.assert_close(encoded[3 + i], evaluated[f"prior_student_f{i + 1}"])


@pytest.fixture(scope="module")
def trained(teachers, files, features):
    """Losses, gradients and running statistics of one training step."""
    method = load(teachers, files).train()
    losses = method.training_loss(features, {})
    losses["total"].backward()
    student = method.students[0]
    values = losses_of(method, losses)
    values["bn_layer1_0_bn1_running_mean"] = student.layer1[0].bn1.running_mean.clone()
    values["bn_layer3_1_bn3_running_var"] = student.layer3[1].bn3.running_var.clone()
    values["bn_up_dim_v_r1_bn1_running_var"] = method.adapters[0].bn1.running_var.clone()
    values["bn_layer_num_batches_tracked"] = student.layer3[1].bn3.num_batches_tracked.clone()
    values["bn_adapter_num_batches_tracked"] = method.adapters[0].bn1.num_batches_tracked.clone()
    parts = {f"layer{i}": getattr(student, f"layer{i}") for i in (1, 2, 3)}
    parts |= {f"up_dim_v_r{i + 1}": adapter for i, adapter in enumerate(method.adapters)} | {"mlp": method.prior}
    for name, part in parts.items():
        squares = [p.grad.double().square().sum() for p in part.parameters()]
        values[f"grad_norm_{name}"] = torch.stack(squares).sum().sqrt()
    with torch.no_grad():  # again what the losses came from: batch statistics do not depend on the running ones
        encoded = method.encode(features)
    return values | relations_of(encoded[:3], encoded[3:6])


TRAIN = [
    *LOSSES,
    *((f"grad_norm_{part}", "rel_l2", 2e-3) for part in ("layer1", "layer2", "layer3", "mlp")),
    *((f"grad_norm_up_dim_v_r{i}", "rel_l2", 2e-3) for i in (1, 2, 3, 4)),
    ("bn_layer1_0_bn1_running_mean", "rel_l2", 1e-5),  # stage 1 runs once and still moves as far as two runs
    ("bn_layer3_1_bn3_running_var", "rel_l2", 1e-5),
    ("bn_up_dim_v_r1_bn1_running_var", "rel_l2", 1e-5),
    *((f"bn_{part}_num_batches_tracked", "max_abs", 0) for part in ("layer", "adapter")),
]


@pytest.mark.parametrize(("name", "measure", "bound"), TRAIN, ids=[row[0] for row in TRAIN])
def test_training_step(trained, name, measure, bound):
    result = Golden(f"{FOLDER}/pdd_train.npz").compare(name, trained[name])
    assert result[measure] <= bound


SMALL = [(other, low, taus) for other in ("near", "far") for low in (1, 2) for taus in ((0.75, 0.3), (0.5, 0.8))]


@pytest.fixture(scope="module")
def units():
    golden = Golden(f"{FOLDER}/small_units.npz")
    levels = {n: [torch.from_numpy(golden.z[f"unit_{n}{i}"]) for i in range(3)] for n in ("a", "near", "far", "t")}
    return golden, levels


@pytest.mark.parametrize(("other", "low", "taus"), SMALL)
def test_small_diversity(units, other, low, taus):
    golden, levels = units
    value = diversity(levels["a"], levels[other], tau_low=taus[0], tau_high=taus[1], low_levels=low)
    assert golden.compare(f"pdd_diversity_a_{other}_low{low}_{taus[0]}_{taus[1]}", value)["rel_l2"] <= 5e-6


@pytest.mark.parametrize("other", ["near", "far"])
def test_small_distances(units, other):
    golden, levels = units
    assert golden.compare(f"pdd_mse_a_{other}", mse(levels["a"], levels[other]))["rel_l2"] <= 5e-6
    cosine = cosine_similarities(levels["a"], levels[other]).mean(dim=1).sum()
    assert golden.compare(f"pdd_cosine_a_{other}", cosine)["rel_l2"] <= 5e-6


def test_small_map(units):
    golden, levels = units
    pairs = [Comparison(s, t) for n in ("near", "far") for s, t in zip(levels[n], levels["t"], strict=True)]
    assert golden.compare("pdd_map_near_far_vs_t", anomaly_map(pairs, (32, 32)))["rel_l2"] <= 5e-6
