"""PDD piece by piece on small made-up teachers; test_pdd_golden.py compares with the release."""

import copy

import pytest
import torch
import torch.nn.functional as F

from anatomaly.backbones import build_backbone
from anatomaly.backbones.weights import state_digest
from anatomaly.errors import ConfigError, ShapeError, WeightsError
from anatomaly.methods.pdd import PDD, cosine_similarities, diversity, import_pdd
from anatomaly.methods.settings import PDDSettings
from anatomaly.scoring import anomaly_map


class Fake:
    """A frozen teacher: every level is pooled to its stride (incomplete cells count) and mixed by a fixed matrix."""

    def __init__(self, name, channels, strides, *, signed=False):
        self.name, self.channels, self.strides, self.signed = name, channels, strides, signed
        generator = torch.Generator().manual_seed(len(name))
        self.mix = [torch.randn(c, 3, generator=generator) for c in channels]

    def __call__(self, images):
        pooled = [F.avg_pool2d(images - 0.5, s, ceil_mode=True) for s in self.strides]
        levels = [torch.einsum("cr,brhw->bchw", m, p) for m, p in zip(self.mix, pooled, strict=True)]
        return tuple(level if self.signed else level.relu() for level in levels)


RESNET = Fake("resnet", (8, 16, 24, 32), (4, 8, 16, 32))
MERGED = Fake("merged", (12, 20, 28, 28), (8, 16, 32, 32), signed=True)  # the paper's geometry: every level coarser
PAIRS = {
    "coarser": (RESNET, MERGED),
    "same sizes and channels": (RESNET, Fake("twin", RESNET.channels, RESNET.strides)),
    "finer": (RESNET, Fake("finer", (6, 10, 14, 22), (2, 4, 8, 16))),
    "no whole factor": (RESNET, Fake("patches", (16, 16, 16, 16), (14, 14, 14, 14), signed=True)),
    "one size, signed": (Fake("columnar", (16, 16, 16, 16), (16, 16, 16, 16), signed=True), RESNET),
    "steps of one and four": (Fake("steps", (8, 12, 16, 20), (4, 4, 16, 32)), MERGED),
}


def images(batch=2, height=64, width=96, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def build(pair="coarser", *, seed=0, **settings):
    torch.manual_seed(seed)
    local, global_ = PAIRS[pair] if isinstance(pair, str) else pair
    return PDD(local, global_, settings=PDDSettings(**settings))


def check_pyramids(model, size):
    """Nine tensors with the local teacher's sizes and channels, six comparisons, one finite map."""
    local = model.teachers["local"]
    features = model.extract(images(2, *size))
    with torch.no_grad():
        encoded = model.encode(features)
    comparisons = model.compare(encoded, model.embed_support(features))
    assert len(encoded) == 9
    assert [level.shape for level in encoded] == [level.shape for level in features["local"][:3]] * 3
    for i, (student, target, weights, *_) in enumerate(comparisons):
        assert student is encoded[i]
        assert target is encoded[6 + i % 3]
        assert weights is None
    assert len(comparisons) == 6
    maps = anomaly_map(comparisons, size)
    assert bool(maps.isfinite().all())
    assert all(bool((level < 0).any()) == local.signed for level in encoded[:6])


@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
@pytest.mark.parametrize("pair", PAIRS)
def test_any_pair_of_teachers_fits(pair, size):
    check_pyramids(build(pair), size)


def test_two_timm_teachers_fit(lite0):
    other = build_backbone("timm/resnet18", weights="random")
    before = [state_digest(teacher.body.state_dict()) for teacher in (lite0, other)]
    model = build((other, lite0)).train()
    check_pyramids(model, (64, 96))
    model.training_loss(model.extract(images()), {})["total"].backward()
    assert [state_digest(teacher.body.state_dict()) for teacher in (lite0, other)] == before
    assert not any(p.grad is not None for teacher in (lite0, other) for p in teacher.parameters())
    assert {key.split(".")[0] for key in model.state_dict()} == {"adapters", "prior", "students"}
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for teacher in (lite0, other) for p in teacher.parameters()}
    assert model.teachers == {"local": other, "global": lite0}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_adapted_corners_stay_corners(pair):
    """InA and MMU resize with aligned corners, whatever the factor, and add to the local teacher."""
    model = build(pair).eval()
    features = model.extract(images())
    with torch.no_grad():
        united = model.unite(features)
        for level, adapter in enumerate(model.adapters):
            added = united[level] - features["local"][level]
            adapted = adapter(features["global"][level])
            for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
                index = (..., *corner)
                torch.testing.assert_close(added[index], adapted[index], atol=1e-5, rtol=1e-4)
            if pair.startswith("same"):
                torch.testing.assert_close(added, adapted, atol=1e-6, rtol=1e-5)


ROWS = {  # the paper's ablation, and what each model must then hold and report
    "plain reverse distillation": ({"mpa": False, "two_students": False}, "plain_mse"),
    "two teachers": ({"mpa": False, "two_students": False}, "plain_mse"),
    "with MPA": ({"two_students": False}, "prior_mse prior_cosine"),
    "two students": ({}, "plain_mse prior_mse prior_cosine relation"),
    "shared weights": ({"shared_students": True}, "plain_mse prior_mse prior_cosine relation"),
    "two students without MPA": ({"mpa": False}, "plain_mse prior_mse prior_cosine relation"),
    "students alike": ({"relation": "alike"}, "plain_mse prior_mse prior_cosine relation"),
    "no diversity loss": ({"diversity_weight": 0.0}, "plain_mse prior_mse prior_cosine relation"),
}


def row(name, **settings):
    pair = (RESNET, None) if name.startswith("plain") else "coarser"
    return build(pair, **{**ROWS[name][0], **settings})


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_ablation(name):
    settings, parts = ROWS[name]
    model = row(name).train()
    features = model.extract(images())
    assert list(features) == (["local"] if name.startswith("plain") else ["local", "global"])
    losses = model.training_loss(features, {})
    assert list(losses) == ["total", *parts.split()]
    losses["total"].backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    modules = {key.split(".")[0] for key in model.state_dict()}
    assert ("prior" in modules) == settings.get("mpa", True)
    assert ("adapters" in modules) == (not name.startswith("plain"))
    students = 2 if settings.get("two_students", True) else 1
    assert len(model.students) == (1 if settings.get("shared_students") else students)
    encoded = model.encode(features)
    assert len(encoded) == 3 * (students + 1)
    assert len(model.compare(encoded, {})) == 3 * students


def test_plain_reverse_distillation_rebuilds_the_teacher_from_its_deepest_level():
    model = row("plain reverse distillation").eval()
    features = model.extract(images())
    encoded = model.encode(features)
    assert all(target is level for target, level in zip(encoded[3:], features["local"][:3], strict=True))
    expected = model.students[0](features["local"][3])
    assert all(torch.equal(a, b) for a, b in zip(encoded[:3], expected, strict=True))


@pytest.mark.parametrize("sign", ["paper", "release"])
@pytest.mark.parametrize("relation", ["diverse", "alike"])
def test_the_loss_by_hand(sign, relation):
    """All weights and thresholds arrive where the paper has them; cosines are those of whole levels."""
    weights = {"reconstruction_weight": 0.3, "cosine_weight": 0.7, "diversity_weight": 1.1}
    taus = {"tau_low": 0.2, "tau_high": 0.99, "low_levels": 2}
    model = build(cosine_sign=sign, relation=relation, **weights, **taus).eval()
    features = model.extract(images(3))
    with torch.no_grad():
        encoded, losses = model.encode(features), model.training_loss(features, {})
    plain, prior, target = encoded[:3], encoded[3:6], encoded[6:]
    expected = {"plain_mse": 0.0, "prior_mse": 0.0, "prior_cosine": 0.0, "relation": 0.0}
    for level in range(3):
        expected["plain_mse"] += float(((plain[level] - target[level]) ** 2).mean())
        expected["prior_mse"] += float(((prior[level] - target[level]) ** 2).mean())
        for b in range(3):
            p, i, t = (levels[level][b].double().flatten() for levels in (plain, prior, target))
            to_target = float(i @ t / (i.norm() * t.norm()))
            to_student = float(i @ p / (i.norm() * p.norm()))
            expected["prior_cosine"] += (to_target if sign == "release" else 1 - to_target) / 3
            hinge = max(0, to_student - 0.2) if level < 2 else max(0, 0.99 - to_student)
            expected["relation"] += (hinge if relation == "diverse" else 1 - to_student) / 3
    for name, value in expected.items():
        assert value > 1e-3
        assert float(losses[name]) == pytest.approx(value, rel=1e-4)
    total = 0.3 * (expected["plain_mse"] + expected["prior_mse"])
    total += 0.7 * expected["prior_cosine"] + 1.1 * expected["relation"]
    assert float(losses["total"]) == pytest.approx(total, rel=1e-4)


def test_diversity_by_hand():
    a = [torch.tensor([[[[1.0, 0.0]]], [[[1.0, 0.0]]]])] * 3  # two images; cosines with b: 1 and 0.6
    b = [torch.tensor([[[[2.0, 0.0]]], [[[3.0, 4.0]]]])] * 3
    assert torch.equal(cosine_similarities(a, b), torch.tensor([[1.0, 0.6]] * 3))
    high = {"tau_low": 0.5, "tau_high": 0.8}
    for low_levels, expected in enumerate((0.3, 0.5, 0.7, 0.9)):  # shallow (0.5 + 0.1) / 2, deep (0 + 0.2) / 2
        assert float(diversity(a, b, low_levels=low_levels, **high)) == pytest.approx(expected)
    assert float(diversity(a, b, tau_low=1.0, tau_high=0.6, low_levels=1)) == pytest.approx(0, abs=1e-7)


def test_shared_students_are_one_at_the_deepest_level():
    model = build(shared_students=True)
    encoded = model.encode(model.extract(images()))
    assert encoded[2] is encoded[5]
    assert not torch.equal(encoded[1], encoded[4])
    assert not torch.equal(encoded[0], encoded[3])
    own = build()
    encoded = own.encode(own.extract(images()))
    assert not any(torch.equal(encoded[i], encoded[3 + i]) for i in range(3))
    decoder = sum(p.numel() for p in model.students.parameters())
    assert sum(p.numel() for p in own.students.parameters()) == 2 * decoder


def test_own_students_with_equal_weights_are_shared_ones():
    shared, own = build(shared_students=True), build(seed=1)
    import_pdd(release(shared), own, where="x")
    features = shared.extract(images())
    for train in (True, False):
        one, two = shared.train(train).encode(features), own.train(train).encode(features)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        if train:  # the shared decoder is pulled by both students
            shared.training_loss(features, {})["total"].backward()
            own.training_loss(features, {})["total"].backward()
            grads = [dict(student.named_parameters()) for student in own.students]
            for name, p in shared.students[0].named_parameters():
                both = grads[0][name].grad + grads[1][name].grad
                torch.testing.assert_close(p.grad, both, atol=1e-6, rtol=1e-3)
            shared.load_state_dict(build(shared_students=True).state_dict())
            import_pdd(release(shared), own, where="x")


def test_shared_stage_one_moves_its_statistics_twice_per_step():
    model = build(shared_students=True).train()
    decoder = copy.deepcopy(model.students[0])
    for module in decoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    for seed in (0, 1):  # from fresh statistics, and from moved ones
        features = model.extract(images(seed=seed))
        with torch.no_grad():
            bottleneck = model.unite(features)[-1]
            model.adapters.load_state_dict(build(shared_students=True).adapters.state_dict())
            model.encode(features)
            decoder.layer1(bottleneck)
            decoder.layer1(bottleneck)
    expected = decoder.layer1.state_dict()
    for key, value in model.students[0].layer1.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
    assert all(m.momentum == 0.1 for m in build().students.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_the_priors_enter_after_stage_one_and_after_stage_two():
    model = build(shared_students=True).eval()
    features = model.extract(images())
    heads = [head.weight for head in model.prior.heads]
    kept = [head.detach().clone() for head in heads]
    changed = {}
    with torch.no_grad():
        for silent in ((0, 1), (0,), (1,), ()):
            for i, head in enumerate(heads):
                head.copy_(torch.zeros_like(head) if i in silent else kept[i])
            encoded = model.encode(features)
            changed[silent] = [not torch.equal(encoded[i], encoded[3 + i]) for i in range(3)]  # shallow to deep
    assert changed == {
        (0, 1): [False, False, False],
        (0,): [True, False, False],
        (1,): [True, True, False],
        (): [True, True, False],
    }


def gradients(model, features):
    model.train().zero_grad()
    model.training_loss(features, {})["total"].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_targets_are_trained_unless_detached():
    features = build().extract(images())
    flowing, stopped = (gradients(build(detach_targets=d), features) for d in (False, True))
    for name in flowing:
        ina = name.startswith(("adapters.0", "adapters.1", "adapters.2"))
        assert bool(flowing[name].any()), name
        assert (stopped[name] is None) == ina, name
        if name.startswith("students"):  # the students learn the same from both
            torch.testing.assert_close(stopped[name], flowing[name])


def test_both_students_and_both_terms_train_the_targets():
    features = build().extract(images())
    only = {"reconstruction_weight": 0.0, "cosine_weight": 0.0, "diversity_weight": 0.0}
    for weight, expected in (("reconstruction_weight", True), ("cosine_weight", True), ("diversity_weight", False)):
        grads = gradients(build(tau_low=-1.0, **{**only, weight: 1.0}), features)
        reached = grads["adapters.0.conv1.weight"]
        assert (reached is not None and bool(reached.any())) == expected
        assert bool(grads["adapters.3.conv1.weight"].any())  # MMU feeds the students


def test_the_releases_cosine_sign_is_the_papers_turned_round():
    only = {"reconstruction_weight": 0.0, "diversity_weight": 0.0, "cosine_weight": 1.0}
    features = build().extract(images())
    paper, release_ = (gradients(build(cosine_sign=sign, **only), features) for sign in ("paper", "release"))
    moved = [name for name, grad in paper.items() if bool(grad.any())]
    assert any(name.startswith("students.1") for name in moved)
    assert not any(name.startswith("students.0") for name in moved)  # the plain student has no cosine term
    for name in moved:
        torch.testing.assert_close(paper[name], -release_[name])


@pytest.mark.parametrize(("sign", "rises"), [("paper", True), ("release", False)])
def test_training_moves_the_cosine_by_its_sign(sign, rises):
    model = build(cosine_sign=sign, cosine_weight=1.0, detach_targets=True).train()
    features = model.extract(images())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    cosines = []
    for _ in range(8):
        with torch.no_grad():
            encoded = model.encode(features)
        cosines.append(float(cosine_similarities(encoded[3:6], encoded[6:]).mean()))
        optimizer.zero_grad()
        model.training_loss(features, {})["total"].backward()
        optimizer.step()
    assert (cosines[-1] > cosines[0] + 0.02) if rises else (cosines[-1] < cosines[0] - 0.02)


@pytest.mark.parametrize("name", ROWS)
def test_images_do_not_see_their_neighbours(name):
    model = row(name).eval()
    batch = images(3)
    with torch.no_grad():
        together = model.compare(model.encode(model.extract(batch)), {})
        alone = [model.compare(model.encode(model.extract(batch[i : i + 1])), {}) for i in range(3)]
    maps = torch.cat([anomaly_map(comparisons, (64, 96)) for comparisons in alone])
    torch.testing.assert_close(anomaly_map(together, (64, 96)), maps, atol=2e-6, rtol=1e-5)


def test_the_support_is_not_looked_at():
    model = build().eval()
    features = model.extract(images())
    assert model.embed_support(features) == {}
    with torch.no_grad():
        first, second = model.training_loss(features, {}), model.training_loss(features, {"local": [torch.zeros(1)]})
    assert first == second


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((72, 96), "level 2 of resnet is 9x12, expected 10x12, 2 times level 3"),
        ((64, 80), "level 3 of resnet is 4x5, expected 4x6, 2 times level 4"),
    ],
)
def test_sizes_the_students_cannot_make_are_refused(size, message):
    model = build()
    with pytest.raises(ShapeError, match=rf"^PDD: {message}\. Use images whose sides are multiples of 32 and "):
        model.encode(model.extract(images(1, *size)))


def test_a_local_teacher_whose_strides_do_not_divide_is_refused_and_a_global_one_is_not():
    uneven = Fake("uneven", (8, 12, 16, 20), (4, 6, 12, 24))
    odd = build((uneven, RESNET))
    with pytest.raises(
        ShapeError, match=r"^PDD: level 1 of uneven is 24x24, expected 16x16, 1 times level 2\..*24 and"
    ):
        odd.encode(odd.extract(images(1, 96, 96)))
    check_pyramids(build((RESNET, uneven)), (96, 96))


@pytest.mark.parametrize("settings", [{"mpa": False}, {"two_students": False}])
def test_one_student_or_no_prior_cannot_be_shared(settings):
    with pytest.raises(
        ConfigError, match=r"^PDD: got shared_students with two_students=.*Set shared_students to False"
    ):
        build(shared_students=True, **settings)


@pytest.mark.parametrize("low_levels", [-1, 4])
def test_levels_that_are_not_there_are_refused(low_levels):
    with pytest.raises(ConfigError, match=rf"^method\.pdd\.low_levels: got {low_levels}, expected 0 to 3\."):
        build(low_levels=low_levels)


def release(model):
    """A method's weights under the release's names; the first student's decoder."""
    state = dict(model.students[0].state_dict())
    for i, adapter in enumerate(model.adapters, start=1):
        official = ((key.replace("shortcut", "residual_proj"), tensor) for key, tensor in adapter.state_dict().items())
        state |= {f"up_dim_v_r{i}.{key}": tensor for key, tensor in official}
    names = (("shared_transform", model.prior.shared), ("branch1", model.prior.heads[0]))
    for name, module in (*names, ("branch2", model.prior.heads[1])):
        state |= {f"mlp.{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return {key: tensor.clone() for key, tensor in state.items()}


@pytest.mark.parametrize("pair", ["coarser", "same sizes and channels"])
def test_an_official_checkpoint_is_imported(pair):
    source, target = build(pair, shared_students=True), build(pair, shared_students=True, seed=1)
    import_pdd(release(source), target, where="net.pth")
    assert state_digest(target.state_dict()) == state_digest(source.state_dict())
    own = build(pair, seed=2)
    import_pdd({"model": release(source)}, own, where="net.pth")
    for student in own.students:
        assert state_digest(student.state_dict()) == state_digest(source.students[0].state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("up_dim_v_r2.bn1.weight"), r"1 missing \(adapters\.1\.bn1\.weight\)"),
        (lambda state: state.update({"bn.conv.weight": torch.ones(1)}), r"1 unexpected \(bn\.conv\.weight\)"),
        (lambda state: state.update({"mlp.branch2.weight": torch.ones(1)}), r"of another shape \(prior\.heads\.1\."),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message):
    model = build(shared_students=True)
    before = state_digest(model.state_dict())
    content = release(build(shared_students=True, seed=1))
    change(content)
    with pytest.raises(WeightsError, match=r"^net\.pth: keys do not fit the model: .*" + message):
        import_pdd(content, model, where="net.pth")
    assert state_digest(model.state_dict()) == before


def test_a_checkpoint_without_tensors_is_refused():
    with pytest.raises(WeightsError, match=r"^net\.pth: expected a state dict, found the keys epoch\."):
        import_pdd({"epoch": 3}, build(), where="net.pth")
