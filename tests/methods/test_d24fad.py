"""D24FAD piece by piece, on numbers small enough to check by hand; test_d24fad_golden.py compares with the release."""

from math import exp, sqrt
from types import SimpleNamespace

import pytest
import torch

from anatomaly.backbones.weights import state_digest
from anatomaly.errors import ConfigError, ShapeError, WeightsError
from anatomaly.methods import METHODS, build_method
from anatomaly.methods.d24fad import D24FAD, LearnToWeight, distance, import_d24fad
from anatomaly.methods.settings import D24FADSettings
from anatomaly.methods.table import imported

TEACHER = SimpleNamespace(channels=(4, 6, 8, 10), strides=(4, 8, 16, 32), signed=False)


def method(*, seed=0, **settings):
    return build_method("d24fad", TEACHER, D24FADSettings(**settings), seed=seed)


def features(*batch, seed=0, size=(2, 3)):
    """A teacher's features of non-square images, with the given leading shape."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "teacher": [
            torch.rand(*batch, c, size[0] * 32 // s, size[1] * 32 // s, generator=generator)
            for c, s in zip(TEACHER.channels, TEACHER.strides, strict=True)
        ]
    }


def test_both_distances_by_hand():
    a = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # (1, 2, 1, 2): (1, 0) at the left, (0, 2) at the right
    b = torch.tensor([[[[1.0, 1.0]], [[1.0, 0.0]]]])  # (1, 1) at the left, (1, 0) at the right
    assert float(distance(a, b, "positionwise")) == pytest.approx(((1 - 1 / sqrt(2)) + 1) / 2)
    assert float(distance(a, b, "flattened")) == pytest.approx(1 - 1 / sqrt(5 * 3))


@pytest.mark.parametrize("kind", ["positionwise", "flattened"])
def test_a_distance_is_the_mean_over_the_images(kind):
    a, b = features(3, seed=1)["teacher"][0], features(3, seed=2)["teacher"][0]
    each = [float(distance(a[i : i + 1], b[i : i + 1], kind)) for i in range(3)]
    assert float(distance(a, b, kind)) == pytest.approx(sum(each) / 3, rel=1e-5)
    assert float(distance(a, -a, kind)) == pytest.approx(2)
    assert distance(a.bfloat16(), b.bfloat16(), kind).dtype == torch.float32


@pytest.mark.parametrize(("scale", "divisor"), [("channels", sqrt(2)), ("elements", sqrt(2 * 1 * 3))])
def test_both_softmax_scales_by_hand(scale, divisor):
    l2w = LearnToWeight([2], scale=scale)
    query = torch.ones(1, 2, 1, 3)
    supports = torch.stack([torch.full((2, 1, 3), 0.5), torch.full((2, 1, 3), 1.0)])  # products with the query: 3 and 6
    expected = torch.tensor([[3 / divisor, 6 / divisor]])
    torch.testing.assert_close(l2w.logits(query, supports), expected)
    torch.testing.assert_close(l2w.logits(query, supports[None]), expected)
    share = 1 / (1 + exp(-3 / divisor))
    assert float(l2w.logits(query, supports).softmax(dim=1)[0, 1]) == pytest.approx(share, rel=1e-5)


def test_shared_and_per_episode_supports_weigh_alike():
    l2w = LearnToWeight([4])
    query, supports = features(3, seed=1)["teacher"][0], features(5, seed=2)["teacher"][0]
    shared = l2w.logits(query, supports)
    assert shared.shape == (3, 5)
    torch.testing.assert_close(l2w.logits(query, supports.expand(3, *supports.shape)), shared)
    own = features(3, 5, seed=3)["teacher"][0]  # every episode its own supports
    alone = torch.cat([l2w.logits(query[b : b + 1], own[b]) for b in range(3)])
    torch.testing.assert_close(l2w.logits(query, own), alone)


@pytest.mark.parametrize("kind", ["positionwise", "flattened"])
def test_the_loss_is_what_prediction_compares(kind):
    """In eval mode an episode's loss is the distance between what `compare` returns: one model, two paths."""
    model = method(distance=kind, tsd_weight=0.3).eval()
    query, support = features(2, seed=1), features(4, seed=2)
    with torch.no_grad():
        encoded = model.encode(query)
        comparisons = model.compare(encoded, model.embed_support(support))
        episodes = {"teacher": [level.expand(2, *level.shape) for level in support["teacher"]]}
        losses = model.training_loss(query, episodes)
    ssd = sum(distance(c.student, c.target, kind) for c in comparisons)
    tsd = sum(distance(s, t, kind) for s, t in zip(encoded, query["teacher"], strict=False))
    torch.testing.assert_close(losses["ssd"], ssd, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["tsd"], tsd, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["total"], ssd + 0.3 * tsd, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["positionwise", "flattened"])
def test_without_self_distillation_only_the_teacher_counts(kind):
    model = method(self_distillation=False, distance=kind, tsd_weight=0.3).eval()
    query, support = features(2, seed=1), features(4, seed=2)
    with torch.no_grad():
        encoded = model.encode(query)
        comparisons = model.compare(encoded, model.embed_support(support))
        losses = model.training_loss(query, {"teacher": [features(2, 3, seed=4)["teacher"][-1]]})
    assert len(comparisons) == 3
    for level, (student, target, weights, *_) in enumerate(comparisons):
        assert student.shape == target.shape
        assert torch.equal(target, query["teacher"][level])
        assert not torch.equal(student, target)
        assert weights is None
    tsd = sum(distance(student, target, kind) for student, target, *_ in comparisons)
    assert set(losses) == {"total", "tsd"}
    torch.testing.assert_close(losses["tsd"], tsd, rtol=1e-5, atol=1e-6)
    assert torch.equal(losses["total"], losses["tsd"]), "lambda weighs nothing where there is one loss"


def test_without_self_distillation_supports_are_ignored():
    model = method(self_distillation=False).eval()
    query = features(2, seed=1)
    with torch.no_grad():
        encoded = model.encode(query)
        banks = [model.embed_support(features(k, seed=k)) for k in (1, 3)]
        one, other, none = (model.compare(encoded, bank) for bank in (*banks, {}))
        assert torch.equal(model.training_loss(query, {})["total"], model.training_loss(query, features(2, 1))["total"])
    for a, b, c in zip(one, other, none, strict=True):
        assert torch.equal(a.student, b.student)
        assert torch.equal(a.target, b.target)
        assert torch.equal(a.target, c.target)
    assert [tensor.shape[0] for tensor in banks[1].values()] == [3] * 6, "a bank has one kind of tensors in any case"


def test_without_learn_to_weight_every_support_counts_the_same():
    model = method(learn_to_weight=False).eval()
    query, support = features(2, seed=1), features(4, seed=2)
    with torch.no_grad():
        encoded, bank = model.encode(query), model.embed_support(support)
        comparisons = model.compare(encoded, bank)
        episodes = {"teacher": [level.expand(2, *level.shape) for level in support["teacher"]]}
        losses = model.training_loss(query, episodes)
    for level, (student, target, weights, *_) in enumerate(comparisons):
        assert torch.equal(weights, torch.full((2, 4), 0.25))
        assert student is encoded[level]
        for image in target:
            torch.testing.assert_close(image, bank[f"value_{level}"].mean(dim=0))
    ssd = sum(distance(student, target, "flattened") for student, target, *_ in comparisons)
    tsd = sum(distance(s, t, "flattened") for s, t in zip(encoded, query["teacher"], strict=False))
    assert set(losses) == {"total", "ssd", "tsd"}
    torch.testing.assert_close(losses["ssd"], ssd, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["total"], ssd + 0.1 * tsd, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("choices", "silent"),
    [({"self_distillation": False}, {"l2w"}), ({"learn_to_weight": False}, {"l2w"}), ({"tsd_weight": 0.0}, set())],
    ids=str,
)
def test_what_an_ablation_leaves_out_gets_no_gradient(choices, silent):
    model = method(**choices)
    model.training_loss(features(2, seed=1), features(2, 3, seed=2))["total"].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"student", "l2w"} - silent


def test_a_comparison_is_the_weighted_support():
    model = method().eval()
    with torch.no_grad():
        encoded, bank = model.encode(features(2, seed=1)), model.embed_support(features(3, seed=2))
        comparisons = model.compare(encoded, bank)
    assert len(comparisons) == 3
    for level, (student, target, weights, *_) in enumerate(comparisons):
        assert student is encoded[level]
        assert weights.shape == (2, 3)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
        for b in range(2):
            expected = sum(weights[b, k] * bank[f"value_{level}"][k] for k in range(3))
            torch.testing.assert_close(target[b], expected)


def test_the_order_of_the_supports_does_not_matter_and_one_is_enough():
    model = method().eval()
    with torch.no_grad():
        encoded, bank = model.encode(features(2, seed=1)), model.embed_support(features(3, seed=2))
        turned = model.compare(encoded, {name: tensor.flip(0) for name, tensor in bank.items()})
        single = model.compare(encoded, {name: tensor[:1] for name, tensor in bank.items()})
        for level, comparison in enumerate(model.compare(encoded, bank)):
            torch.testing.assert_close(turned[level].target, comparison.target)
            torch.testing.assert_close(turned[level].weights.flip(1), comparison.weights)
            assert torch.equal(single[level].weights, torch.ones(2, 1))
            torch.testing.assert_close(single[level].target[1], bank[f"value_{level}"][0])


def test_gradients_reach_the_student_and_phi_but_not_the_teacher(lite0):
    model = build_method("d24fad", lite0).train()
    before = state_digest(lite0.body.state_dict())
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    query = model.extract(images[:2])
    support = {"teacher": [level.unflatten(0, (2, 2)) for level in model.extract(images[2:])["teacher"]]}
    model.training_loss(query, support)["total"].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.startswith("l2w") and name.endswith("bias") for name in silent)
    assert not any(p.grad is not None or p.requires_grad for p in lite0.parameters())
    assert not {id(p) for p in lite0.parameters()} & {id(p) for p in model.parameters()}
    assert not any("teacher" in name or "body" in name for name in model.state_dict())
    assert not lite0.training
    assert state_digest(lite0.body.state_dict()) == before


def test_both_branches_of_the_student_and_phi_are_trained_by_ssd():
    model = method(tsd_weight=0.0)
    query, support = features(2, seed=1), features(2, 3, seed=2)
    inputs = query["teacher"][-1].requires_grad_(), support["teacher"][-1].requires_grad_()
    model.training_loss(query, support)["total"].backward()
    assert all(bool(each.grad.any()) for each in inputs)
    assert all(bool(projection.weight.grad.any()) for projection in model.l2w.projections)


def test_detached_supports_give_the_same_loss_and_no_gradient():
    losses, gradients = [], []
    for detach in (False, True):
        model = method(tsd_weight=0.0, detach_supports=detach)
        query, support = features(2, seed=1), features(2, 3, seed=2)
        bottlenecks = query["teacher"][-1].requires_grad_(), support["teacher"][-1].requires_grad_()
        losses.append(model.training_loss(query, support))
        losses[-1]["total"].backward()
        assert all(bool(projection.weight.grad.any()) for projection in model.l2w.projections)
        gradients.append([each.grad is not None and bool(each.grad.any()) for each in bottlenecks])
    assert gradients == [[True, True], [True, False]]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in ("total", "ssd", "tsd"))
    with torch.no_grad():
        assert not method().training_loss(query, support)["total"].requires_grad, "the caller's no_grad is kept"


def test_phis_bias_cancels():
    model = method(softmax_scale="elements").double()  # a softmax that is not one-hot has gradients to speak of
    query, support = ({"teacher": [f.double() for f in features(*b, seed=3)["teacher"]]} for b in ((2,), (2, 3)))
    model.training_loss(query, support)["total"].backward()
    for projection in model.l2w.projections:
        assert float(projection.bias.grad.abs().max()) < 1e-5 * float(projection.weight.grad.abs().max())


@pytest.mark.parametrize("signed", [False, True])
def test_the_student_can_be_negative_where_the_teacher_is(signed):
    model = D24FAD(SimpleNamespace(channels=TEACHER.channels, strides=TEACHER.strides, signed=signed))
    assert all(bool((level < 0).any()) == signed for level in model.encode(features(2)))


@pytest.mark.parametrize("size", [(3, 2), (4, 6)])
def test_a_bank_of_another_size_is_refused(size):
    model = method().eval()
    encoded, bank = model.encode(features(1)), model.embed_support(features(2, size=size))
    with pytest.raises(ShapeError, match=r"level 1 of the query is \(1, 4, 16, 24\), the support bank holds \(2, 4, "):
        model.compare(encoded, bank)


def release(model):
    """A method's weights as the release saves them."""
    weight = {
        f"proj_in{i + 1}.{leaf}": getattr(projection, leaf)
        for i, projection in enumerate(model.l2w.projections)
        for leaf in ("weight", "bias")
    }
    return {"decoder": dict(model.student.state_dict()), "weight": weight}


def test_an_official_checkpoint_is_imported():
    source, target = method(seed=1), method(seed=2)
    import_d24fad(release(source), target, where="net.pth")
    assert state_digest(target.state_dict()) == state_digest(source.state_dict())


@pytest.mark.parametrize("part", ["decoder", "weight"])
def test_a_checkpoint_without_a_part_is_refused(part):
    content = release(method())
    content["other"] = content.pop(part)
    with pytest.raises(WeightsError, match=rf"^net\.pth: expected a state dict under '{part}', found the keys .*other"):
        import_d24fad(content, method(), where="net.pth")


@pytest.mark.parametrize("part", ["decoder", "weight"])
def test_a_checkpoint_of_another_shape_is_refused(part):
    other = SimpleNamespace(channels=(8, 12, 16, 20), strides=TEACHER.strides, signed=False)
    content = {**release(method()), part: release(D24FAD(other))[part]}
    with pytest.raises(WeightsError) as error:
        import_d24fad(content, method(), where="net.pth")
    message = str(error.value)
    assert message.startswith(f"net.pth ({part}): keys do not fit the model: ")
    assert "of another shape" in message
    assert "\n" not in message


def test_seeds_make_methods_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = state_digest(method(seed=1).state_dict())
    assert torch.equal(torch.rand(3), expected)
    assert first == state_digest(method(seed=1).state_dict())
    assert first != state_digest(method(seed=2).state_dict())


def test_the_choices_arrive_and_the_table_is_complete():
    model = method(distance="positionwise", softmax_scale="elements", tsd_weight=0.7)
    settings = model.settings
    assert (settings.distance, model.l2w.scale, settings.tsd_weight) == ("positionwise", "elements", 0.7)
    built = {name: type(build_method(name, TEACHER)) for name in METHODS}
    assert built == {name: imported(record.method) for name, record in METHODS.items()}


def test_an_unknown_method_is_refused():
    known = ", ".join(METHODS)
    message = rf"^method: unknown name 'd24', expected one of {known}\. Did you mean d24fad\?$"
    with pytest.raises(ConfigError, match=message):
        build_method("d24", TEACHER)
