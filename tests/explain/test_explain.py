"""Where teachers look and which supports matter: maps and numbers against hand-made cases, and both commands whole."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from anatomaly.backbones import BACKBONES, build_backbone
from anatomaly.backbones.timm_features import TimmSpec
from anatomaly.backbones.weights import state_digest
from anatomaly.cli import main
from anatomaly.config import MethodConfig
from anatomaly.data.manifest import Manifest, write_csv
from anatomaly.detector.detector import Detector
from anatomaly.detector.facts import ModelFacts
from anatomaly.errors import ConfigError, OutputError
from anatomaly.explain.classifiers import classifier_of, eigen_cam, grad_cam
from anatomaly.explain.figure import SIDE, Panel, compose, draw, outline
from anatomaly.explain.measures import agreement, area, entropy, lift, top_share
from anatomaly.explain.supports import explain_supports, summarise_supports
from anatomaly.explain.table import RowTable
from anatomaly.explain.teachers import explain_teachers, summarise_teachers
from anatomaly.methods import build_method
from anatomaly.methods.settings import D24FADSettings
from anatomaly.types import Preprocessing, Sample, Scoring

OUTLINE = (64, 255, 160)
SMALL = Preprocessing(size=(64, 64), interpolation="bilinear")


@pytest.fixture(scope="module")
def resnet():
    return build_backbone("timm/resnet18", weights="random")


@pytest.fixture(scope="module")
def pair(lite0, resnet):
    return classifier_of(lite0, BACKBONES["efficientnet_lite0"]), classifier_of(resnet, TimmSpec("resnet18"))


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def rows_of(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


# --- class-activation maps ---


def test_grad_cam_of_a_linear_head_is_what_the_formula_says():
    left, right, negative = ([[1.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [0.0, 8.0]], [[0.0, 0.0], [4.0, 0.0]])
    activation = torch.tensor([[left, right, negative], [right, left, negative]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, -4.0]])  # two classes
    bias = torch.tensor([0.0, 0.5])
    seen = grad_cam(activation, lambda a: a.mean(dim=(2, 3)) @ weight.T + bias)
    # image 0: logits (1, 1.5): class 1, channel weights (0, 2, -4) / 4; image 1: (2.5, -1.5): class 0, (1, 0, 0) / 4
    assert seen.classes == [1, 0]
    assert seen.maps.tolist() == [[[0.0, 1.0], [0.0, 4.0]], [[0.0, 0.5], [0.0, 2.0]]]
    assert seen.probabilities == pytest.approx([1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(-4.0))], abs=1e-6)


def test_grad_cam_needs_no_gradient_of_the_caller_and_leaves_none():
    activation = torch.rand(1, 3, 2, 2)
    with torch.no_grad():
        seen = grad_cam(activation, lambda a: a.mean(dim=(2, 3)))
    assert not activation.requires_grad
    assert not seen.maps.requires_grad


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_eigen_cam_of_a_rank_one_activation_is_its_place(sign):
    place = torch.tensor([[4.0, 1.0], [0.0, 2.0]])
    channels = sign * torch.tensor([2.0, -1.0, 2.0])  # length 3
    maps = eigen_cam(torch.stack([channels[:, None, None] * place, channels[:, None, None] * place.T]))
    torch.testing.assert_close(maps, 3 * torch.stack([place, place.T]), rtol=0, atol=1e-5)


def test_eigen_cam_takes_the_strongest_part_and_cuts_the_side_with_less_energy():
    strong, weak = torch.tensor([[5.0, -1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    maps = eigen_cam(torch.stack([weak, strong])[None])  # orthogonal channels: the direction is the second one
    torch.testing.assert_close(maps, torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(eigen_cam(-torch.ones(1, 4, 2, 2)), torch.full((1, 2, 2), 2.0), rtol=0, atol=1e-5)


def test_the_head_of_lite0_is_that_of_its_package(lite0, images):
    import timm

    from anatomaly.backbones.weights import find_weights

    stored = torch.load(find_weights("x", BACKBONES["efficientnet_lite0"].source), weights_only=True)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), stored.values(), strict=True)))
    with torch.no_grad():
        probabilities = whole((images - 127 / 255) / (128 / 255)).softmax(dim=1)
    seen = classifier_of(lite0, BACKBONES["efficientnet_lite0"]).look(images)
    assert seen.classes == probabilities.argmax(dim=1).tolist()
    assert seen.probabilities == pytest.approx(probabilities.amax(dim=1).tolist(), abs=1e-5)
    assert seen.maps.shape == (2, 2, 3)


def test_a_random_teacher_and_its_classifier_are_one_network(resnet, images):
    found = classifier_of(resnet, TimmSpec("resnet18"))
    torch.testing.assert_close(found.activate(images), resnet(images)[-1], rtol=0, atol=1e-5)
    maps = found.look(images).maps
    torch.testing.assert_close(maps[1:], found.look(images[1:]).maps, rtol=0, atol=1e-6)  # no neighbours


def test_vmamba_is_read_with_its_own_classifier(images):
    name = "vmamba_tiny_s1l8_merged"
    teacher = build_backbone(name, weights="random")
    found = classifier_of(teacher, BACKBONES[name])
    seen = found.look(images)
    with torch.no_grad():
        logits = teacher.body.classify((images - teacher.mean) / teacher.std)
    assert seen.classes == logits.argmax(dim=1).tolist()
    # The whole gradient, through the scan, of the same network: the head is all that stands behind the deepest level.
    kept = []
    layer = teacher.body.layers[-1].register_forward_hook(lambda _, __, out: kept.append(out[0]))
    scaled = ((images - teacher.mean) / teacher.std).requires_grad_()
    top = teacher.body.classify(scaled).amax(dim=1).sum()
    layer.remove()
    gradient = torch.autograd.grad(top, kept[0])[0]
    expected = (gradient.mean(dim=(1, 2), keepdim=True) * kept[0]).sum(dim=3).relu()
    torch.testing.assert_close(seen.maps, expected.detach(), rtol=1e-4, atol=1e-6)


def test_without_a_head_it_is_eigen_cam_and_the_reason_is_told(resnet, images, tmp_path):
    import timm

    whole = timm.create_model("resnet18")
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    torch.save({k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")}, tmp_path / "headless.pth")
    torch.save(whole.state_dict() | {"fc.weight": torch.ones(7, 512), "fc.bias": torch.ones(7)}, tmp_path / "seven.pth")
    spec = TimmSpec("resnet18")
    kinds = {}
    for name in ("whole", "headless", "seven"):
        teacher = build_backbone("timm/resnet18", weights=str(tmp_path / f"{name}.pth"))
        kinds[name] = classifier_of(teacher, spec)
    assert kinds["whole"].kind == "grad-cam"
    with torch.no_grad():
        logits = whole.eval()((images - teacher.mean) / teacher.std)
    assert kinds["whole"].look(images).classes == logits.argmax(dim=1).tolist()
    for name in ("headless", "seven"):
        assert kinds[name].kind == "eigen-cam"
        assert "holds no class head that fits" in kinds[name].why
        seen = kinds[name].look(images)
        assert (seen.classes, seen.probabilities) == (None, None)
        torch.testing.assert_close(seen.maps, eigen_cam(teacher(images)[-1]))
    tokens = classifier_of(
        build_backbone("timm/xcit_nano_12_p16_224", weights="random"), TimmSpec("xcit_nano_12_p16_224")
    )
    assert tokens.why == "its head does not read a grid of features"
    assert tokens.look(images).maps.shape == (2, 4, 6)
    assert "another network" in classifier_of(resnet, TimmSpec("mambaout_femto")).why


@pytest.mark.parametrize("name", ["efficientnet_lite0", "timm/resnet18", "vmamba_tiny"])
def test_looking_leaves_the_teacher_as_it_was(name, images):
    teacher = build_backbone(name, weights="random")
    before = state_digest(teacher.state_dict())
    found = classifier_of(teacher, BACKBONES.get(name) or TimmSpec("resnet18"))
    state = torch.random.get_rng_state()
    found.look(images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert state_digest(teacher.state_dict()) == before
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


# --- measures ---


def test_entropy_and_area_of_even_maps():
    one = np.zeros((8, 8))
    one[3, 4] = 5.0
    half = np.zeros((8, 8))
    half[:4] = 0.25
    assert (entropy(np.full((8, 8), 7.0)), entropy(one)) == (pytest.approx(1.0, abs=1e-12), 0.0)
    assert entropy(half) == pytest.approx(np.log(32) / np.log(64), abs=1e-12)
    assert [area(m) for m in (np.ones((8, 8)), one, half)] == pytest.approx([1.0, 1 / 64, 0.5], abs=1e-12)
    uneven = np.array([[3.0, 1.0]])
    assert entropy(uneven) == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)), abs=1e-12)


def test_a_map_of_zeros_has_no_numbers_and_a_negative_one_is_refused():
    zeros = np.zeros((4, 4))
    mask = np.eye(4, dtype=bool)
    assert all(np.isnan(value) for value in (entropy(zeros), area(zeros), top_share(zeros), lift(zeros, mask)))
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="negative or non-finite"):
            entropy(np.array([[1.0, bad]]))


def test_top_share_counts_five_percent():
    heat = np.full((10, 10), 0.2 / 95)
    heat[0, :5] = 0.8 / 5
    assert top_share(heat) == pytest.approx(0.8, abs=1e-12)
    assert top_share(np.ones((10, 10))) == pytest.approx(0.05, abs=1e-12)
    assert top_share(np.array([[3.0, 1.0]])) == 0.75  # at least one pixel


def test_agreement_is_spearmans():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    one = rng.random((6, 7))
    assert agreement(one, np.exp(9 * one)) == pytest.approx(1.0, abs=1e-12)
    assert agreement(one, -one) == pytest.approx(-1.0, abs=1e-12)
    assert np.isnan(agreement(one, np.ones((6, 7))))
    tied, other = rng.integers(0, 3, (2, 6, 7))
    assert agreement(tied, other) == pytest.approx(spearmanr(tied.ravel(), other.ravel()).statistic, abs=1e-12)


def test_lift_is_one_by_chance_and_one_over_the_area_at_best():
    mask = np.zeros((10, 10), bool)
    mask[2:4, 2:4] = True
    assert lift(mask.astype(float), mask) == pytest.approx(25.0, abs=1e-9)
    assert lift(np.ones((10, 10)), mask) == pytest.approx(1.0, abs=1e-9)
    assert lift((~mask).astype(float), mask) == 0.0
    assert np.isnan(lift(np.ones((10, 10)), np.zeros((10, 10), bool)))


# --- figures and the table ---


def test_an_outline_is_the_rim_of_a_mask():
    mask = np.zeros((7, 7), bool)
    mask[1:6, 1:6] = True
    assert outline(mask).sum() == 16
    assert not outline(mask)[2:5, 2:5].any()


def test_pictures_have_square_pixels_and_maps_the_colours_of_overlays():
    from anatomaly.results.pictures import overlay

    image = np.random.default_rng(0).random((1, SIDE, SIDE // 2)).astype(np.float32)
    assert draw(image, spacing=None).shape == (SIDE, SIDE // 2, 3)
    assert draw(image, spacing=(1.0, 2.0)).shape == (SIDE, SIDE, 3)
    heat = image[0] * 3
    assert np.array_equal(draw(image, spacing=None, heat=heat, scale=(0.5, 2.0)), overlay(image, heat, (0.5, 2.0)))
    mask = np.zeros(heat.shape, bool)
    mask[40:80, 30:60] = True
    marked = draw(image, spacing=None, heat=heat, mask=mask)
    assert np.array_equal((marked == OUTLINE).all(axis=2), outline(mask))


def test_a_sheet_holds_all_rows_and_any_name(tmp_path):
    square, flat = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((40, SIDE, 3), 9, np.uint8)
    (tmp_path / "sheet.png").write_bytes(
        compose([[Panel(square, ["ünïcödé 日本.png " * 20]), Panel(flat)], [Panel(flat, ("a", "b", ""))]])
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 2 * SIDE + 3 * 8
    assert (sheet == 0).all(axis=2).sum() >= SIDE * SIDE
    assert (sheet == 9).all(axis=2).sum() == 2 * 40 * SIDE
    assert (sheet[:, SIDE + 8 : SIDE + 15] == 255).all()  # a long caption is cut before its neighbour's column


def test_a_table_is_never_overwritten_and_a_failed_row_leaves_nothing(tmp_path, monkeypatch):
    with RowTable(tmp_path / "new/t.csv", ("a", "b")) as table:
        table.append([{"a": 1.0, "b": float("nan")}, {"b": "x,y"}])
        before = table.path.read_bytes()
        assert before == b'a,b\n1.0,\n,"x,y"\n'

        class Full:
            def __init__(self, file):
                self.file = file

            def write(self, content):
                return self.file.write(content[:3])

            def __getattr__(self, name):
                return getattr(self.file, name)

        monkeypatch.setattr(table._file, "_files", [Full(file) for file in table._file._files])
        with pytest.raises(OutputError, match="The 2 rows written so far are complete"):
            table.append([{"a": 123456, "b": 2}])
        assert table.path.read_bytes() == before
    with pytest.raises(OutputError, match="already exists"):
        RowTable(tmp_path / "new/t.csv", ("a",))


# --- explain teachers ---


@pytest.fixture(scope="module")
def explained(pair, phantom, tmp_path_factory):
    """Rows and folder of the phantom's 16 test images, the first of them damaged, one with a mask that does not fit."""
    folder = tmp_path_factory.mktemp("explained")
    samples = list(phantom.select(split="test"))
    broken = folder / "broken.png"
    broken.write_bytes(samples[0].path.read_bytes()[:60])
    samples[0] = Sample(broken, samples[0].task, label=samples[0].label, patient_id="Jane Doe")
    marked = next(i for i, s in enumerate(samples) if s.mask is not None)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / "mask.png")
    odd = samples[marked]
    samples[marked] = Sample(odd.path, odd.task, label=odd.label, mask=folder / "mask.png")
    seen = []
    out = folder / "out"
    rows = explain_teachers(pair, samples, out, preprocessing=SMALL, batch_size=3, on_progress=seen.append)
    assert seen == samples
    return samples, rows, out, marked


def test_every_image_has_two_rows_and_bad_ones_a_reason(explained):
    samples, rows, out, marked = explained
    table = rows_of(out / "explain.csv")
    assert len(table) == len(rows) == 2 * len(samples)
    assert [row["path"] for row in table[::2]] == [str(s.path) for s in samples]
    assert [row["role"] for row in table[:2]] == ["teacher", "global_teacher"]
    assert {row["teacher"] for row in table[1::2]} == {"timm/resnet18"}
    assert [row["status"] for row in table[:2]] == ["error", "error"]
    assert "broken.png" in table[0]["error"]
    assert table[0]["figure"] == table[0]["entropy"] == ""
    assert table[2 * marked]["status"] == "mask error"
    assert "the mask has (8, 8) pixels" in table[2 * marked]["error"]
    assert table[2 * marked]["lift"] == ""
    assert table[2 * marked]["entropy"] != ""
    assert {row["status"] for i, row in enumerate(table) if i // 2 not in (0, marked)} == {"ok"}
    assert "Jane" not in (out / "explain.csv").read_text()


def test_the_numbers_are_those_of_the_maps(explained, pair):
    from sklearn.metrics import roc_auc_score

    from anatomaly.data.readers import read_mask_of
    from anatomaly.data.transforms import load

    samples, rows, _, marked = explained
    number = next(i for i, s in enumerate(samples) if s.mask is not None and i != marked)
    mask = read_mask_of(samples[number])  # 64 x 64, as the input
    batch = torch.from_numpy(load(samples[number], SMALL).input)[None]
    heats = []
    for which, row in enumerate(rows[2 * number : 2 * number + 2]):
        seen = pair[which].look(batch)
        grown = torch.nn.functional.interpolate(seen.maps[:, None], (64, 64), mode="bilinear", align_corners=False)
        heats.append(grown[0, 0].double().numpy())
        assert row["entropy"] == pytest.approx(entropy(heats[-1]), abs=1e-5)
        assert row["area"] == pytest.approx(area(heats[-1]), abs=1e-4)
        assert row["top5_share"] == pytest.approx(top_share(heats[-1]), abs=1e-5)
        assert row["lift"] == pytest.approx(lift(heats[-1], mask), rel=1e-4)
        assert row["pixel_auroc"] == pytest.approx(roc_auc_score(mask.ravel(), heats[-1].ravel()), abs=1e-4)
        assert (row["class"], row["method"]) == (seen.classes[0], "grad-cam")
        assert row["probability"] == pytest.approx(seen.probabilities[0], abs=1e-5)
    assert [r["agreement"] for r in rows[2 * number : 2 * number + 2]] == pytest.approx(
        [agreement(*heats)] * 2, abs=1e-3
    )
    assert all(np.isnan(row["lift"]) for row in rows[2:] if row["label"] == "normal")


def test_figures_show_the_lesion_where_one_is_known(explained):
    samples, rows, out, marked = explained
    for number, sample in enumerate(samples[1:], 1):
        sheet = np.asarray(Image.open(out / rows[2 * number]["figure"]))
        assert sheet.shape[1] == 3 * SIDE + 4 * 8
        panels = [sheet[8 : 8 + SIDE, left : left + SIDE] for left in (8, 16 + SIDE, 24 + 2 * SIDE)]
        known = sample.mask is not None and number != marked
        assert [bool((panel == OUTLINE).all(axis=2).any()) for panel in panels] == [known] * 3
    assert len({row["figure"] for row in rows[2:]}) == len(samples) - 1


def test_the_summary_is_the_mean_of_the_rows(explained):
    _, rows, _, _ = explained
    means = summarise_teachers(rows)
    assert [(m[0], m[2]) for m in means[:3]] == [("efficientnet_lite0", w) for w in ("all", "normal", "anomalous")]
    ours = [r for r in rows[2:] if r["role"] == "global_teacher" and r["label"] == "anomalous"]
    name, method, word, number, found = means[5]
    assert (name, method, word, number) == ("timm/resnet18", "grad-cam", "anomalous", len(ours))
    assert found["entropy"] == pytest.approx(np.mean([r["entropy"] for r in ours]), abs=1e-12)
    assert found["lift"] == pytest.approx(np.nanmean([r["lift"] for r in ours]), abs=1e-12)
    assert np.isnan(means[1][4]["lift"])


def test_batches_change_nothing(pair, phantom, tmp_path):
    samples = phantom.select(split="test").samples[:3]
    one, three = (explain_teachers(pair, samples, tmp_path / str(n), preprocessing=SMALL, batch_size=n) for n in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert a["entropy"] == pytest.approx(b["entropy"], abs=1e-5)
        assert a["class"] == b["class"]
    with pytest.raises(ConfigError, match="multiples of 32, such as 64x96 or 64x128 and no side below 64 for"):
        explain_teachers(pair, samples, tmp_path / "x", preprocessing=Preprocessing(size=(64, 100)))


# --- explain supports ---


@pytest.mark.parametrize(("method", "levels"), [("attention", 7), ("d24fad", 3), ("nearest", 3)])
def test_supports_say_what_the_prediction_says_and_what_it_would_be_without_each(
    method, levels, make_detector, phantom, tmp_path
):
    detector = make_detector(method)
    supports = phantom.select(task="head_ct", split="train").samples[:3]
    queries = phantom.select(task="head_ct", split="test").samples[2:6]
    detector.set_support(supports, task="head_ct")
    bank = detector.bank
    pictures = [np.zeros((1, 64, 64), np.float32)] * 3
    rows = explain_supports(detector, queries, tmp_path, pictures=pictures, batch_size=3)
    assert detector.bank is bank
    assert len(rows) == 12
    for number, prediction in enumerate(detector.predict(queries)):
        own = rows[3 * number : 3 * number + 3]
        mean = prediction.support_weights.mean(axis=0)
        order = np.argsort(-mean, kind="stable")
        assert [row["support"] for row in own] == [supports[k].name for k in order]
        assert [row["mean_weight"] for row in own] == pytest.approx(mean[order].tolist(), abs=1e-5)
        assert sum(row["mean_weight"] for row in own) == pytest.approx(1.0, abs=1e-5)
        by_level = [[row[f"weight_level_{level + 1}"] for row in own] for level in range(levels)]
        np.testing.assert_allclose(by_level, prediction.support_weights[:, order], atol=1e-5)
        assert own[0]["score"] == pytest.approx(prediction.score, rel=1e-5)
    for k in range(3):  # encoded anew, without that image
        detector.set_support([s for i, s in enumerate(supports) if i != k], task="head_ct")
        for number, prediction in enumerate(detector.predict(queries)):
            row = next(r for r in rows[3 * number : 3 * number + 3] if r["support"] == supports[k].name)
            assert row["score_without"] == pytest.approx(prediction.score, rel=1e-4)
            assert row["change"] == pytest.approx(prediction.score - row["score"], abs=1e-4)
    table = rows_of(tmp_path / "supports.csv")
    assert [float(row["mean_weight"]) for row in table] == [row["mean_weight"] for row in rows]
    named = [name for name in table[0] if name.startswith("weight_level_")]
    assert named == [f"weight_level_{level + 1}" for level in range(levels)]
    assert [float(table[0][name]) for name in named] == [rows[0][name] for name in named]
    assert all((tmp_path / row["figure"]).is_file() for row in table)


def test_a_model_whose_supports_count_nothing_is_refused_before_anything_is_written(lite0, phantom, tmp_path):
    config = MethodConfig("d24fad", D24FADSettings(self_distillation=False))
    method = build_method("d24fad", lite0, config.settings)
    settings = {"preprocessing": Preprocessing((64, 64)), "scoring": Scoring(), "facts": ModelFacts.of(config, method)}
    detector = Detector(method, **settings, device="cpu")
    supports = phantom.select(task="head_ct", split="train").samples[:2]
    detector.set_support(supports)
    with pytest.raises(ConfigError, match="does not say what each support counted"):
        explain_supports(detector, supports, tmp_path / "out", pictures=[np.zeros((1, 64, 64), np.float32)] * 2)
    assert not (tmp_path / "out").exists()


def test_one_support_leaves_nothing_to_leave_out(make_detector, phantom, tmp_path):
    detector = make_detector("d24fad").set_support(phantom.select(task="head_ct", split="train").samples[:1])
    picture = np.zeros((1, 64, 64), np.float32)
    rows = explain_supports(detector, phantom.select(split="test").samples[:1], tmp_path, pictures=[picture])
    assert rows[0]["mean_weight"] == 1.0
    [row] = rows_of(tmp_path / "supports.csv")
    assert (row["score_without"], row["change"], row["status"]) == ("", "", "ok")
    assert np.isnan(summarise_supports(rows)[0][4])


def test_the_summary_counts_who_led():
    def row(query, index, weight, change):
        name = {"path": query, "frame": None, "status": "ok", "support": f"s{index}", "support_index": index}
        return name | {"mean_weight": weight, "change": change}

    rows = [row("a", 1, 0.9, 0.5), row("a", 0, 0.1, 0.0), row("b", 1, 0.6, -0.1), row("b", 0, 0.4, 0.2)]
    rows += [{"path": "c", "frame": None, "status": "error"}]
    found = summarise_supports([*rows[:2], *rows[2:]])
    assert [(name, number, led) for name, number, _, led, _ in found] == [("s1", 2, 2), ("s0", 2, 0)]
    assert [m[2] for m in found] == pytest.approx([0.75, 0.25])
    assert [m[4] for m in found] == pytest.approx([0.2, 0.1])


# --- the commands ---


@pytest.fixture
def run(capsys):
    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def models(make_detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("d24fad", "nearest", "pdd"):
        make_detector(name).save(folder / name)
    return folder


RANDOM = ("--teacher.name=timm/resnet18", "--teacher.weights=random", "--size", "64", "64")


def test_the_command_for_teachers(run, phantom, tmp_path):
    words = ("explain", "teachers", "--images", phantom.source, "--limit=4", "--out", tmp_path / "out", *RANDOM)
    words += ("--global_teacher.name=vmamba_tiny_merged", "--global_teacher.weights=random")
    code, out, err = run(*words)
    assert code == 0
    assert "Traceback" not in err
    assert "4 images explained, 0 could not be read" in out
    assert all(word in out for word in ("vmamba_tiny_merged", "grad-cam", "normal", "entropy"))
    table = rows_of(tmp_path / "out/explain.csv")
    assert [row["path"] for row in table[::2]] == [str(phantom.samples[i * len(phantom) // 4].path) for i in range(4)]
    before = (tmp_path / "out/explain.csv").read_bytes()
    code, _, err = run(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "already exists" in err
    assert (tmp_path / "out/explain.csv").read_bytes() == before


def test_the_command_says_where_it_is_eigen_cam(run, phantom, tmp_path, resnet):
    torch.save(resnet.body.state_dict(), tmp_path / "headless.pth")
    words = ("--teacher.name=timm/resnet18", "--teacher.weights", tmp_path / "headless.pth", "--size", "64", "64")
    words += ("--global_teacher.name=efficientnet_lite0", "--images", phantom.samples[0].path)
    code, out, _ = run("explain", "teachers", *words, "--out", tmp_path / "out")
    assert code == 0
    assert "timm/resnet18: Eigen-CAM instead of Grad-CAM, its weights file holds no class head that fits." in out
    table = rows_of(tmp_path / "out/explain.csv")
    assert [row["method"] for row in table] == ["eigen-cam", "grad-cam"]
    assert table[0]["class"] == ""


@pytest.mark.parametrize("method", ["d24fad", "nearest"])
def test_the_command_for_supports(method, run, models, phantom, tmp_path):
    head = phantom.select(task="head_ct")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    write_csv(Manifest((*head.samples, Sample(broken, "head_ct")), head.source), tmp_path / "table.csv")
    words = ("--model", models / method, "--images", tmp_path / "table.csv", "--support", tmp_path / "table.csv")
    code, out, err = run("explain", "supports", *words, "--shots=2", "--task=head_ct", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "16 images explained, 1 could not be read" in out
    assert "counted most in" in out
    table = rows_of(tmp_path / "out/supports.csv")
    assert len(table) == 2 * 16 + 1
    assert (table[-1]["status"], table[-1]["support"]) == ("error", "")
    assert "broken.png" in table[-1]["error"]


def test_pdd_has_no_supports(run, models, phantom, tmp_path):
    words = ("--model", models / "pdd", "--images", phantom.source, "--support", phantom.source)
    code, _, err = run("explain", "supports", *words, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "pdd has no supports" in err
    assert not (tmp_path / "out").exists()


def test_both_commands_may_share_a_folder(run, models, phantom, tmp_path):
    image = shutil.copy(phantom.samples[0].path, tmp_path / "one.png")
    support = ("--support", phantom.source, "--shots=2")
    assert (
        run("explain", "supports", "--model", models / "nearest", "--images", image, *support, "--out", tmp_path)[0]
        == 0
    )
    before = (tmp_path / "supports/00001_one_png.png").read_bytes()
    other = ("--global_teacher.name=timm/resnet18", "--global_teacher.weights=random")
    assert run("explain", "teachers", "--images", image, *RANDOM, *other, "--out", tmp_path)[0] == 0
    assert (tmp_path / "supports/00001_one_png.png").read_bytes() == before
    assert (tmp_path / "explain/00001_one_png.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images=missing"], "missing: no such file or folder"),
        (["--size", "64", "100"], "size: got 64 100, expected multiples of 32"),
        (["--size", "0", "64"], "preprocessing.size: got (0, 64)"),
        (["--limit=0"], "limit: got 0, expected at least 1"),
        (["--batch_size=0"], "batch_size: got 0"),
        (["--teacher.name=resnet"], "teacher: unknown name 'resnet'"),
        (["--teacher.weights=missing.pth"], "no weights file at missing.pth"),
        (
            ["--intensity.rule=percentile", "--intensity.low=1", "--intensity.high=99"],
            "percentile is fixed on supports",
        ),
        (["--intensity.rule=range", "--intensity.low=5"], "range: got 5 and 1"),
        (["--out=/dev/null/x"], "/dev/null/x/explain.csv: cannot be written"),
        (["--images=text.png"], "no image could be explained"),
    ],
)
def test_nonsense_is_one_line(words, message, run, phantom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    other = ("--global_teacher.name=timm/resnet18", "--global_teacher.weights=random")
    code, _, err = run("explain", "teachers", "--images", phantom.samples[0].path, *RANDOM, *other, "--out=out", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert err.startswith("anatomaly: ")


def test_the_help_names_both(run):
    code, out, _ = run("explain")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  explain")] == ["teachers", "supports"]
