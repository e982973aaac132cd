"""D24FAD against values computed with the official release; tolerances are those of golden/README."""

import pytest
import torch
from golden_io import Golden, uniform

from anatomaly.backbones import build_backbone
from anatomaly.backbones.weights import read_state
from anatomaly.methods.d24fad import D24FAD, LearnToWeight, distance, import_d24fad
from anatomaly.scoring import anomaly_map, blur, image_score
from anatomaly.types import Comparison, Scoring

FOLDER = __file__.rsplit("/", 2)[0] + "/golden"


@pytest.fixture(scope="module")
def teacher(golden_files):
    return build_backbone("wide_resnet50_2", weights=str(golden_files["teacher"]), normalise=False)


def load(teacher, file):
    method = D24FAD(teacher)
    import_d24fad(read_state(file), method, where=file.name)
    return method


@pytest.fixture(scope="module")
def evaluated(teacher, golden_files):
    """Everything the eval golden holds, computed by our modules."""
    method = load(teacher, golden_files["eval"]).eval()
    with torch.no_grad():
        query = method.extract(torch.from_numpy(uniform("d24fad.query", (2, 3, 128, 128))))
        support = method.extract(torch.from_numpy(uniform("d24fad.support", (3, 3, 128, 128))))
        encoded, bank = method.encode(query), method.embed_support(support)
        comparisons = method.compare(encoded, bank)
        values = {f"teacher_f{i + 1}": f for i, f in enumerate(query["teacher"])}
        for i, comparison in enumerate(comparisons):
            values[f"query_student_f{i + 1}"] = encoded[i]
            values[f"support_student_f{i + 1}"] = bank[f"value_{i}"]
            values[f"att_logits_f{i + 1}"] = method.l2w.logits(encoded[i], bank[f"key_{i}"])
            values[f"att_weights_f{i + 1}"] = comparison.weights
            values[f"weighted_support_f{i + 1}"] = comparison.target
        values["loss_tsd"] = sum(distance(s, t, "flattened") for s, t in zip(encoded, query["teacher"], strict=False))
        values["loss_ssd"] = sum(distance(c.student, c.target, "flattened") for c in comparisons)
        values["loss_total"] = values["loss_ssd"] + method.settings.tsd_weight * values["loss_tsd"]
        values["map_raw"] = anomaly_map(comparisons, (128, 128))
        values["map_gauss_per_image"] = blur(values["map_raw"], 4.0)
        for name, maps in (("raw", values["map_raw"]), ("gauss", values["map_gauss_per_image"])):
            values[f"score_{name}_max"] = image_score(maps, Scoring(pooling="max"))
            values[f"score_{name}_mean"] = image_score(maps, Scoring(pooling="mean"))
    return values


EVAL = (
    [(f"teacher_f{i}", "rel_l2", 1e-5) for i in (1, 2, 3, 4)]
    + [(f"{who}_student_f{i}", "rel_l2", 1e-5) for who in ("query", "support") for i in (1, 2, 3)]
    + [(f"att_logits_f{i}", "max_abs", 1e-2) for i in (1, 2, 3)]
    + [(f"att_weights_f{i}", "max_abs", 2e-3) for i in (1, 2, 3)]
    + [(f"weighted_support_f{i}", "rel_l2", 1e-4) for i in (1, 2, 3)]
    + [(f"loss_{part}", "vs_fp64", 3e-5) for part in ("tsd", "ssd", "total")]
    + [(name, "rel_l2", 1e-3) for name in ("map_raw", "map_gauss_per_image")]
    + [(f"score_{b}_{p}", "rel_l2", 1e-3) for b in ("raw", "gauss") for p in ("max", "mean")]
)


@pytest.mark.parametrize(("name", "measure", "bound"), EVAL, ids=[row[0] for row in EVAL])
def test_evaluation(evaluated, name, measure, bound):
    result = Golden(f"{FOLDER}/d24fad_eval.npz").compare(name, evaluated[name])
    assert result[measure] <= bound


@pytest.fixture(scope="module")
def trained(teacher, golden_files):
    """Losses, gradients and running statistics of one training step."""
    golden = Golden(f"{FOLDER}/d24fad_train.npz")
    batch, shots = golden.shape("att_weights_f1")
    method = load(teacher, golden_files["train"]).train()
    query = method.extract(torch.from_numpy(uniform("d24fad.train.query", (batch, 3, 128, 128))))
    support = torch.from_numpy(uniform("d24fad.train.support", (shots, batch, 3, 128, 128)))
    bottleneck = torch.stack([method.extract(support[k])["teacher"][-1] for k in range(shots)], dim=1)
    losses = method.training_loss(query, {"teacher": [bottleneck]})
    losses["total"].backward()
    student, projections = method.student, method.l2w.projections
    values = {f"loss_{part}": losses[part].detach() for part in ("tsd", "ssd", "total")}
    for i, stage in enumerate((student.layer1, student.layer2, student.layer3), start=1):
        squares = [p.grad.double().square().sum() for p in stage.parameters()]
        values[f"grad_norm_layer{i}"] = torch.stack(squares).sum().sqrt()
        values[f"grad_norm_proj_in{i}"] = projections[i - 1].weight.grad.double().norm()
    values["grad_layer3_3_conv1_weight"] = student.layer3[3].conv1.weight.grad
    values["grad_proj_in1_weight"] = projections[0].weight.grad
    values["bn_layer1_0_bn1_running_mean"] = student.layer1[0].bn1.running_mean
    values["bn_layer1_0_bn1_running_var"] = student.layer1[0].bn1.running_var
    values["bn_layer3_0_bn2_running_var"] = student.layer3[0].bn2.running_var
    values["bn_num_batches_tracked"] = student.layer1[0].bn1.num_batches_tracked
    return values


TRAIN = (
    [(f"loss_{part}", "vs_fp64", 3e-5) for part in ("tsd", "ssd", "total")]
    + [(f"grad_norm_{part}{i}", "rel_l2", 1e-2) for part in ("layer", "proj_in") for i in (1, 2, 3)]
    + [(name, "rel_l2", 5e-2) for name in ("grad_layer3_3_conv1_weight", "grad_proj_in1_weight")]
    + [(f"bn_layer1_0_bn1_running_{stat}", "rel_l2", 1e-5) for stat in ("mean", "var")]
    + [("bn_layer3_0_bn2_running_var", "rel_l2", 1e-5), ("bn_num_batches_tracked", "max_abs", 0)]
)


@pytest.mark.parametrize(("name", "measure", "bound"), TRAIN, ids=[row[0] for row in TRAIN])
def test_training_step(trained, name, measure, bound):
    result = Golden(f"{FOLDER}/d24fad_train.npz").compare(name, trained[name])
    assert result[measure] <= bound


def test_small_units():
    from golden_io import fill_entry

    golden = Golden(f"{FOLDER}/small_units.npz")
    unit = {k: torch.from_numpy(v) for k, v in golden.z.items() if v.ndim}
    a, near, t = ([unit[f"unit_{n}{i}"] for i in range(3)] for n in ("a", "near", "t"))
    loss = sum(distance(x, y, "flattened") for x, y in zip(a, near, strict=True))
    assert golden.compare("d24fad_cosine_a_near", loss)["rel_l2"] <= 5e-6
    maps = anomaly_map([Comparison(x, y) for x, y in zip(near, t, strict=True)], (32, 32))
    assert golden.compare("d24fad_map", maps)["rel_l2"] <= 5e-6
    assert golden.compare("d24fad_map_gauss", blur(maps, 4.0))["rel_l2"] <= 5e-6

    channels = [256, 512, 1024]
    l2w = LearnToWeight(channels)
    for i, c in enumerate(channels):
        for leaf, shape in (("weight", (c, c, 1, 1)), ("bias", (c,))):
            value = torch.from_numpy(fill_entry(f"proj_in{i + 1}.{leaf}", shape))
            getattr(l2w.projections[i], leaf).data.copy_(value)
        support = unit[f"l2w_support{i + 1}"].transpose(0, 1)  # (B, K, C, h, w)
        keys = l2w.project(i, support.flatten(0, 1)).unflatten(0, support.shape[:2])
        weights = l2w.logits(unit[f"l2w_query{i + 1}"], keys).softmax(dim=1)
        out = torch.einsum("bk,bkchw->bchw", weights, support)
        assert golden.compare(f"l2w_out{i + 1}", out)["rel_l2"] <= 5e-6
