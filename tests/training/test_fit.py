"""fit: what it writes, what it may see, and that being killed, resumed or short of disk changes no number."""

import json
import shutil
from dataclasses import replace
from math import cos, pi

import pytest
import torch
from torch.optim import Adam

from anatomaly.backbones.feature_cache import FeatureCache
from anatomaly.backbones.teacher import Teacher
from anatomaly.backbones.weights import state_digest
from anatomaly.config import FitConfig, MethodConfig, TeacherConfig, TrainingConfig
from anatomaly.data.manifest import load_manifest
from anatomaly.detector.bundle import read_tensors
from anatomaly.detector.detector import Detector
from anatomaly.errors import AnatomalyError, ConfigError, OutputError, ReadError
from anatomaly.methods import METHODS, build_method
from anatomaly.methods.d24fad import D24FAD
from anatomaly.methods.settings import D24FADSettings, PDDSettings
from anatomaly.synthetic.phantom import MARKER, write_benchmark
from anatomaly.training import fit as training
from anatomaly.training import lesion_episodes, loaders
from anatomaly.training.fit import fit
from anatomaly.training.lesion_episodes import synthetic_images
from anatomaly.training.loaders import Preparation
from anatomaly.training.student import StudentTraining
from anatomaly.training.validation import Validation
from anatomaly.types import Intensity, Preprocessing, Sample

SMALL = Preprocessing(size=(64, 64))
TASKS = ("brain_mr", "fundus")


def settings(*, preprocessing=SMALL, **choices):
    defaults = {"shots": 2, "epochs": 2, "batch_size": 5, "learning_rate": 1e-3, "validate_every": 1, "device": "cpu"}
    return FitConfig(
        MethodConfig("d24fad"), preprocessing=preprocessing, training=TrainingConfig(**{**defaults, **choices})
    )


def write_scans(folder, **counts):
    return load_manifest(write_benchmark(folder, **{"train": 6, "size": 64, "tasks": TASKS, **counts}))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two tasks of 6 normal training images, and no test images."""
    return write_scans(tmp_path_factory.mktemp("scans"), test_normal=0, test_anomalous=0)


@pytest.fixture(scope="module")
def finished(scans, tmp_path_factory):
    """A run of three epochs that nothing interrupted: (folder, detector)."""
    out = tmp_path_factory.mktemp("run") / "model"
    return out, fit(scans, out, settings(epochs=3))


@pytest.fixture
def one_teacher(monkeypatch, lite0):
    """Spare the time to build the same teacher for every run."""
    monkeypatch.setattr(training, "build_backbone", lambda *_, **__: lite0)


def progress(out):
    """The lines of a run's progress, without the time they took."""
    lines = [json.loads(line) for line in (out / "training" / "progress.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def losses(out):
    return torch.tensor([[line[name] for name in ("total", "ssd", "tsd")] for line in progress(out)])


def digest(detector):
    return state_digest(detector.method.state_dict())


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_bundle_is_written_that_gives_the_same_detector(finished, scans):
    out, detector = finished
    loaded = Detector.load(out, device="cpu")
    assert loaded.model_hash == detector.model_hash
    assert loaded.preprocessing == detector.preprocessing == SMALL
    assert not loaded.method.training
    facts = loaded.facts.training
    assert (facts["tasks"], facts["images"], facts["epochs"]) == (list(TASKS), 10, 3)  # 1 of 6 is held out in each
    assert facts["manifest"] == scans.fingerprint()
    assert not (out / "teacher.safetensors").exists()  # an installed package has them


def test_progress_tells_every_epoch(finished):
    out, detector = finished
    lines = progress(out)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["total"] == pytest.approx(line["ssd"] + 0.1 * line["tsd"], rel=1e-5)
        assert line["val_auroc"] == pytest.approx(sum(line[f"val_auroc/{task}"] for task in TASKS) / 2)
        assert 0 <= line["val_auroc"] <= 1
    best = max(lines, key=lambda line: line["val_auroc"])  # the first of equals
    assert detector.facts.training["best_epoch"] == best["epoch"]
    assert detector.facts.training["val_auroc"] == best["val_auroc"]


def test_the_log_says_how_many_images_a_validation_rests_on(scans, tmp_path, one_teacher, caplog, monkeypatch):
    """One normal image of each of two tasks is held out."""
    with caplog.at_level("INFO", logger="anatomaly"):
        fit(scans, tmp_path / "model", settings(epochs=1))
        monkeypatch.setattr("anatomaly.training.student._FEWEST", 2)
        fit(scans, tmp_path / "more", settings(epochs=1))
    few, enough = [record.getMessage() for record in caplog.records if "validation" in record.getMessage()]
    assert few.endswith("validation on 2 normal images, too few for a figure")
    assert "validation AUROC 0." in enough or "validation AUROC 1." in enough
    assert enough.endswith("from 2 normal images and as many with a pasted lesion")
    assert [each["val_images"] for each in progress(tmp_path / "model")] == [2]


def test_the_loss_falls(scans, tmp_path, one_teacher):
    fit(scans, tmp_path / "model", settings(epochs=8, validate_every=8, learning_rate=1e-2))
    ssd = [line["ssd"] for line in progress(tmp_path / "model")]
    assert sum(ssd[-2:]) < 0.8 * sum(ssd[:2])


def test_the_teacher_does_not_change(finished, lite0):
    teacher = finished[1].method.teachers["teacher"]
    assert state_digest(teacher.body.state_dict()) == teacher.weights_hash == lite0.weights_hash
    assert digest(finished[1]) != state_digest(build_method("d24fad", lite0, seed=111).state_dict())  # the student did


class Killed(BaseException):
    """Like a kill signal: no handler of ours expects it."""


def fit_until_killed(manifest, out, config, monkeypatch):
    """Killed in epoch 1, after it is noted in the progress and before it is saved."""
    on_train_epoch_end = StudentTraining.on_train_epoch_end

    def killed_in_epoch_1(self):
        on_train_epoch_end(self)
        if self.current_epoch == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StudentTraining, "on_train_epoch_end", killed_in_epoch_1)
        with pytest.raises(Killed):
            fit(manifest, out, config)


@pytest.mark.parametrize(("noted", "signal"), [(True, Killed), (False, KeyboardInterrupt)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    finished, scans, tmp_path, monkeypatch, one_teacher, noted, signal
):
    """It is killed in epoch 1, after or before the epoch is noted in the progress, and before it is saved."""
    on_train_epoch_end = StudentTraining.on_train_epoch_end

    def killed_in_epoch_1(self):
        if noted or self.current_epoch < 1:
            on_train_epoch_end(self)
        if self.current_epoch == 1:
            raise signal

    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(StudentTraining, "on_train_epoch_end", killed_in_epoch_1)
        with pytest.raises(signal):
            fit(scans, out, settings(epochs=3))
    assert not (out / "config.json").exists()
    epochs = []

    def note(self):
        epochs.append(self.current_epoch)
        on_train_epoch_end(self)

    monkeypatch.setattr(StudentTraining, "on_train_epoch_end", note)
    detector = fit(scans, out, settings(epochs=3))
    assert epochs == [1, 2]
    assert digest(detector) == digest(finished[1])
    assert detector.facts == finished[1].facts
    assert progress(out) == progress(finished[0])


def test_a_run_killed_before_its_bundle_is_whole_is_not_trained_again(scans, tmp_path, monkeypatch, one_teacher):
    def killed(self, folder):
        raise Killed

    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "save", killed)
        with pytest.raises(Killed):
            fit(scans, out, settings(epochs=1))
    before = progress(out)
    monkeypatch.setattr(StudentTraining, "training_step", lambda *_: pytest.fail("trained again"))
    detector = fit(scans, out, settings(epochs=1))
    assert progress(out) == before
    assert Detector.load(out, device="cpu").model_hash == detector.model_hash
    assert state_digest(read_tensors(out / "training" / "best.safetensors")) == digest(detector)


def test_a_finished_run_returns_at_once(finished, scans, monkeypatch):
    out, detector = finished
    monkeypatch.setattr(training, "train_student", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(Detector, "save", lambda *_: pytest.fail("written again"))
    assert fit(scans, out, settings(epochs=3)).model_hash == detector.model_hash


def test_every_validated_epoch_is_kept_where_asked(finished, scans, tmp_path, one_teacher):
    out = tmp_path / "model"
    detector = fit(scans, out, settings(epochs=3, validate_every=2, keep_checkpoints=True))
    kept = {file.name: state_digest(read_tensors(file)) for file in (out / "training").glob("epoch_*.safetensors")}
    assert sorted(kept) == ["epoch_1.safetensors", "epoch_2.safetensors"]
    assert len(set(kept.values())) == 2
    assert kept[f"epoch_{detector.facts.training['best_epoch']}.safetensors"] == digest(detector)
    assert not list((finished[0] / "training").glob("epoch_*"))
    assert kept["epoch_2.safetensors"] == state_digest(fit_last(finished[0])), "keeping them changes no number"


def fit_last(out):
    """Weights after the last epoch, as the training state holds them."""
    state = torch.load(out / "training/last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("method."): tensor for name, tensor in state.items()}


@pytest.fixture
def older(finished, tmp_path):
    """older("keep_checkpoints"): a copy of the finished run, recorded before there was that setting."""

    def make(setting):
        out = shutil.copytree(finished[0], tmp_path / "older")
        record = json.loads((out / "training/run.json").read_text())
        del record["training"][setting]
        (out / "training/run.json").write_text(json.dumps(record))
        return out

    return make


def test_a_run_recorded_before_a_setting_is_still_the_same_run(older, finished, scans, monkeypatch, one_teacher):
    out = older("keep_checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_student", lambda *_: pytest.fail("trained again"))
        assert fit(scans, out, settings(epochs=3)).model_hash == finished[1].model_hash
        with pytest.raises(ConfigError, match=r"\(training\.keep_checkpoints False, now True\)"):
            fit(scans, out, settings(epochs=3, keep_checkpoints=True))
    (out / "config.json").unlink()  # killed before its bundle was written
    assert digest(fit(scans, out, settings(epochs=3))) == digest(finished[1])


def test_a_run_that_lacks_another_setting_is_another_run(older, scans):
    with pytest.raises(ConfigError, match=r"other settings \(training\.resample None, now True\)"):
        fit(scans, older("resample"), settings(epochs=3))


OTHERS = {
    "training.learning_rate 0.001, now 0.002": settings(epochs=3, learning_rate=2e-3),
    "training.epochs 3, now 4": settings(epochs=4),
    "training.seed 111, now 1": settings(epochs=3, seed=1),
    "preprocessing.resize squash, now pad": settings(epochs=3, preprocessing=replace(SMALL, resize="pad")),
    "method.d24fad.distance flattened, now positionwise": replace(
        settings(epochs=3), method=MethodConfig("d24fad", D24FADSettings(distance="positionwise"))
    ),
    "teacher.normalise True, now False": replace(settings(epochs=3), teacher=TeacherConfig(normalise=False)),
    "task_intensity.fundus None, now": replace(settings(epochs=3), task_intensity={"fundus": Intensity("range", 0, 9)}),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_a_folder_is_not_shared_by_two_runs(finished, scans, difference):
    out, detector = finished
    with pytest.raises(ConfigError) as error:
        fit(scans, out, OTHERS[difference])
    message = one_line(error)
    assert message.startswith(f"{out}: holds a run with other settings (")
    assert difference in message
    assert Detector.load(out, device="cpu").model_hash == detector.model_hash


def test_the_order_of_the_rows_changes_no_training(scans, finished, tmp_path, one_teacher):
    turned = replace(scans, samples=scans.samples[::-1])
    assert digest(fit(turned, tmp_path / "model", settings(epochs=3))) == digest(finished[1])


def test_a_folder_is_not_shared_by_two_data_sets(finished, scans):
    with pytest.raises(ConfigError, match=r"other settings \(other images\)"):
        fit(replace(scans, samples=scans.samples[1:]), finished[0], settings(epochs=3))


def test_the_feature_cache_changes_no_loss(scans, tmp_path, monkeypatch, one_teacher):
    fit(scans, tmp_path / "cached", settings(epochs=1))
    caches = []
    monkeypatch.setattr(loaders, "FeatureCache", lambda **options: caches.append(FeatureCache(**options)) or caches[0])
    fit(scans, tmp_path / "anew", settings(epochs=1, cache_gib=0.0))
    assert (caches[0].hits, caches[0].memory_used) == (0, 0), "cached in spite of cache_gib=0"
    torch.testing.assert_close(losses(tmp_path / "cached"), losses(tmp_path / "anew"), rtol=1e-5, atol=1e-5)


def test_bf16_trains_nearly_alike(scans, tmp_path, one_teacher):
    fit(scans, tmp_path / "fp32", settings(epochs=1))
    detector = fit(scans, tmp_path / "bf16", settings(epochs=1, precision="bf16"))
    torch.testing.assert_close(losses(tmp_path / "bf16"), losses(tmp_path / "fp32"), rtol=0.05, atol=0.02)
    assert not torch.equal(losses(tmp_path / "bf16"), losses(tmp_path / "fp32"))
    floats = [tensor for tensor in detector.method.state_dict().values() if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in floats)


@pytest.mark.parametrize(("clip", "norms"), [(0.0, set()), (0.25, {0.25})])
def test_gradients_are_clipped_where_asked(scans, tmp_path, monkeypatch, one_teacher, clip, norms):
    clip_grad_norm_, seen = torch.nn.utils.clip_grad_norm_, set()

    def note(parameters, max_norm, **choices):
        seen.add(max_norm)
        return clip_grad_norm_(parameters, max_norm, **choices)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    fit(scans, tmp_path / "model", settings(epochs=1, gradient_clip=clip))
    assert seen == norms


def test_no_epochs_leave_the_student_as_it_starts(scans, tmp_path, lite0):
    detector = fit(scans, tmp_path / "model", settings(epochs=0))
    assert digest(detector) == state_digest(build_method("d24fad", lite0, seed=111).state_dict())
    assert Detector.load(tmp_path / "model", device="cpu").model_hash == detector.model_hash
    assert {file.name for file in (tmp_path / "model" / "training").iterdir()} == {"run.json"}


def test_a_method_without_weights_needs_no_training(scans, tmp_path):
    detector = fit(scans, tmp_path / "model", replace(settings(), method=MethodConfig(name="nearest")))
    assert Detector.load(tmp_path / "model", device="cpu").model_hash == detector.model_hash
    assert {file.name for file in (tmp_path / "model" / "training").iterdir()} == {"run.json"}


def test_the_best_epoch_is_kept_and_the_first_of_equals(scans, tmp_path, monkeypatch, one_teacher):
    figures = iter([0.5, 0.9, 0.9])
    monkeypatch.setattr(Validation, "__call__", lambda self: {"val_auroc": next(figures), "val_images": 2})
    detector = fit(scans, tmp_path / "three", settings(epochs=3))
    assert {name: detector.facts.training[name] for name in ("best_epoch", "val_auroc")} == {
        "best_epoch": 1,
        "val_auroc": 0.9,
    }
    figures = iter([0.5, 0.9])
    assert digest(fit(scans, tmp_path / "two", settings(epochs=2))) == digest(detector)


def test_the_best_epoch_is_remembered_when_a_run_goes_on(scans, tmp_path, monkeypatch, one_teacher):
    figures = iter([0.9, Killed(), 0.5])

    def validate(self):
        if isinstance(figure := next(figures), Killed):
            raise figure
        return {"val_auroc": figure, "val_images": 2}

    monkeypatch.setattr(Validation, "__call__", validate)
    with pytest.raises(Killed):
        fit(scans, tmp_path / "model", settings())
    assert fit(scans, tmp_path / "model", settings()).facts.training["best_epoch"] == 0


def test_validation_is_every_few_epochs_and_at_the_end_in_eval_mode(scans, tmp_path, monkeypatch, one_teacher):
    modes, steps = [], []
    validate, training_loss = Validation.__call__, D24FAD.training_loss

    def noted_validation(self):
        modes.append(self.method.training)
        return validate(self)

    def noted_step(self, query, support):
        steps.append(self.training)
        return training_loss(self, query, support)

    monkeypatch.setattr(Validation, "__call__", noted_validation)
    monkeypatch.setattr(D24FAD, "training_loss", noted_step)
    fit(scans, tmp_path / "model", settings(epochs=3, validate_every=2))
    assert [line["epoch"] for line in progress(tmp_path / "model") if "val_auroc" in line] == [1, 2]
    assert modes == [False, False]
    assert steps == [True] * 6


def test_test_images_and_other_tasks_are_never_opened(finished, tmp_path, one_teacher):
    tasks = (*TASKS, "histology")
    everything = write_scans(tmp_path / "scans", test_normal=2, test_anomalous=2, tasks=tasks)
    manifest = everything.select(task=TASKS)
    for sample in everything:
        if sample.split == "test" or sample.task == "histology":
            sample.path.unlink()
            if sample.mask is not None:
                sample.mask.unlink()
    assert len(list((tmp_path / "scans").rglob("*.png"))) == 12
    detector = fit(manifest, tmp_path / "model", settings(epochs=3))
    assert digest(detector) == digest(finished[1])  # the same training images, hence the same model


def test_percentiles_become_a_range_per_task(scans, tmp_path, one_teacher):
    rule = Intensity("percentile", 1, 99)
    preprocessing = replace(SMALL, intensity=rule)
    detector = fit(scans, tmp_path / "model", settings(epochs=1, preprocessing=preprocessing))
    assert set(detector.task_intensity) == set(TASKS)
    assert {each.rule for each in detector.task_intensity.values()} == {"range"}
    assert Detector.load(tmp_path / "model", device="cpu").task_intensity == detector.task_intensity


def test_an_unreadable_training_image_is_named_and_once_mended_the_run_starts(tmp_path, one_teacher):
    manifest = write_scans(tmp_path / "scans", test_normal=0, test_anomalous=0)
    broken = manifest.samples[3].path
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    with pytest.raises(ReadError) as error:
        fit(manifest, tmp_path / "model", settings(epochs=1))
    message = one_line(error)
    assert broken.name in message
    assert "anatomaly data check" in message
    assert not (tmp_path / "model" / "config.json").exists()
    broken.write_bytes(content)
    fit(manifest, tmp_path / "model", settings(epochs=1))


@pytest.mark.parametrize("size", [(64, 80), (100, 64)])
def test_a_size_that_does_not_fit_the_teacher_is_refused(scans, tmp_path, size):
    with pytest.raises(
        ConfigError, match=r"expected multiples of 32, such as .*\. Change --preprocessing\.size\.$"
    ) as error:
        fit(scans, tmp_path / "model", settings(preprocessing=Preprocessing(size=size)))
    assert str(size) in one_line(error)
    assert not (tmp_path / "model").exists()


def test_too_many_shots_are_refused(scans, tmp_path):
    with pytest.raises(ConfigError, match=r"has 5 normal training images, 5 shots need at least 6\. Lower --training"):
        fit(scans, tmp_path / "model", settings(shots=5))


@pytest.fixture
def disk_of():
    """disk_of(n): no file may grow beyond n bytes, as on a disk that is full; None lifts the limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit(None)


def test_a_full_disk_is_one_line_and_the_run_goes_on_with_more_room(finished, scans, tmp_path, disk_of, one_teacher):
    out = tmp_path / "model"
    for room, file in ((100, "run.json"), (500_000, "best.safetensors"), (2_000_000, "last.ckpt")):
        disk_of(room)
        with pytest.raises(OutputError) as error:
            fit(scans, out, settings(epochs=3))
        disk_of(None)
        message = one_line(error)
        assert message.startswith(f"{out / 'training' / file}: cannot be written: ")
        assert "Free some space" in message
    detector = fit(scans, out, settings(epochs=3))
    assert digest(detector) == digest(finished[1])
    assert progress(out) == progress(finished[0])
    assert not list(out.rglob("*.part"))


def test_a_folder_that_cannot_be_made_is_one_line(scans, tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(AnatomalyError) as error:
        fit(scans, tmp_path / "model", settings())
    assert "model" in one_line(error)


def test_test_files_are_not_even_hashed(scans, tmp_path, one_teacher):
    ghost = Sample(tmp_path / "gone.png", TASKS[0], "test", 1)
    detector = fit(replace(scans, samples=(*scans.samples, ghost)), tmp_path / "model", settings(epochs=0))
    assert detector.facts.training["manifest"] == scans.fingerprint()


def cosine_rate(epoch, *, start, period):
    return start * (0.1 + 0.9 * (1 + cos(pi * epoch / period)) / 2)


def test_the_cosine_schedule_falls_to_a_tenth_and_rises_again(tmp_path):
    config = FitConfig(
        MethodConfig("d24fad"), training=TrainingConfig(learning_rate=2e-3, schedule="cosine", epochs=100)
    )
    parts = StudentTraining(torch.nn.Linear(1, 1), dict, tmp_path, config).configure_optimizers()
    rates = []
    for _ in range(100):
        rates.append(parts["optimizer"].param_groups[0]["lr"])
        parts["optimizer"].step()
        parts["lr_scheduler"].step()
    assert rates == pytest.approx([cosine_rate(epoch, start=2e-3, period=40) for epoch in range(100)], rel=1e-6)
    assert (rates[0], rates[40], rates[80]) == pytest.approx((2e-3, 2e-4, 2e-3))
    assert parts["optimizer"].defaults["betas"] == (0.5, 0.999)
    constant = replace(config, training=replace(config.training, schedule="constant"))
    assert isinstance(StudentTraining(torch.nn.Linear(1, 1), dict, tmp_path, constant).configure_optimizers(), Adam)


@pytest.fixture
def rates(monkeypatch):
    """Learning rates of all steps, by epoch."""
    training_step, seen = StudentTraining.training_step, {}

    def noted(self, batch):
        seen.setdefault(self.current_epoch, set()).add(self.trainer.optimizers[0].param_groups[0]["lr"])
        return training_step(self, batch)

    monkeypatch.setattr(StudentTraining, "training_step", noted)
    return seen


@pytest.mark.parametrize("shared", [False, True])
def test_a_killed_run_of_pdd_goes_on_with_its_rate_and_to_the_bit(
    scans, tmp_path, monkeypatch, one_teacher, rates, shared
):
    config = settings(epochs=3, schedule="cosine", cosine_epochs=2)
    config = replace(config, method=MethodConfig("pdd", PDDSettings(shared_students=shared)))
    whole = fit(scans, tmp_path / "whole", config)
    expected = {epoch: [pytest.approx(cosine_rate(epoch, start=1e-3, period=2))] for epoch in range(3)}
    assert {epoch: list(each) for epoch, each in rates.items()} == expected
    fit_until_killed(scans, tmp_path / "model", config, monkeypatch)
    rates.clear()
    resumed = fit(scans, tmp_path / "model", config)
    assert {epoch: list(each) for epoch, each in rates.items()} == {epoch: expected[epoch] for epoch in (1, 2)}
    assert digest(resumed) == digest(whole)
    assert resumed.facts == whole.facts
    assert progress(tmp_path / "model") == progress(tmp_path / "whole")
    last = [torch.load(tmp_path / name / "training/last.ckpt", weights_only=True) for name in ("model", "whole")]
    assert state_digest(last[0]["state_dict"]) == state_digest(last[1]["state_dict"])
    assert digest(whole) != state_digest(
        build_method("pdd", [whole.method.teachers["local"]] * 2, seed=111).state_dict()
    )


@pytest.fixture
def teacher_runs(monkeypatch):
    """Numbers of images of all runs of a teacher."""
    forward, runs = Teacher.forward, []

    def noted(self, images):
        runs.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Teacher, "forward", noted)
    return runs


#: What validation runs the teacher on: 2 tasks x (one held-out normal, and again with a lesion, and 2 supports).
VALIDATED = 2 * (2 + 2)


def test_features_on_disk_serve_later_runs_and_other_methods(scans, tmp_path, monkeypatch, one_teacher, teacher_runs):
    monkeypatch.setenv("ANATOMALY_CACHE", str(tmp_path / "cache"))
    fit(scans, tmp_path / "first", settings(epochs=1, cache_disk_gib=1.0))
    assert sum(teacher_runs) == 10 + VALIDATED
    stored = sorted((tmp_path / "cache/features").rglob("*.safetensors"))
    assert len(stored) == 10
    values = [tensor for name, tensor in read_tensors(stored[0]).items() if name.startswith("level")]
    assert [tensor.dtype for tensor in values] == [torch.float16] * 4
    teacher_runs.clear()
    second = fit(scans, tmp_path / "second", settings(epochs=1, cache_disk_gib=1.0, cache_gib=0.0))
    assert sum(teacher_runs) == VALIDATED + 1  # a blank image: what is found on disk has to have the shapes it gives
    assert digest(second) == digest(Detector.load(tmp_path / "first", device="cpu"))
    assert progress(tmp_path / "second") == progress(tmp_path / "first")
    teacher_runs.clear()
    one_class = replace(settings(epochs=1, cache_disk_gib=1.0), method=MethodConfig("pdd"))
    fit(scans, tmp_path / "third", one_class)
    # Two teachers, which are the same here, and no supports; a lone image, as for a scale, comes twice.
    assert sum(teacher_runs) == 1 + 2 * (2 * 2) + 2 * (2 * 2), "shapes, validation, and the colour scales"
    assert len(list((tmp_path / "cache/features").rglob("*.safetensors"))) == 10


@pytest.mark.parametrize("disk", [0.0, 1.0])
def test_only_a_disk_cache_rounds_features(scans, tmp_path, monkeypatch, one_teacher, disk):
    monkeypatch.setenv("ANATOMALY_CACHE", str(tmp_path / "cache"))
    training_loss, seen = D24FAD.training_loss, []

    def noted(self, query, support):
        seen.extend([*query["teacher"], *support["teacher"]])
        return training_loss(self, query, support)

    monkeypatch.setattr(D24FAD, "training_loss", noted)
    fit(scans, tmp_path / "model", settings(epochs=1, cache_disk_gib=disk))
    assert len(seen) == 2 * (4 + 1)
    assert all(level.dtype == torch.float32 for level in seen)
    assert [torch.equal(level, level.half().float()) for level in seen] == [disk > 0] * len(seen)
    assert (tmp_path / "cache").exists() == (disk > 0)


@pytest.fixture
def short_epochs(monkeypatch):
    """Epochs of attention of 3 batches."""
    monkeypatch.setattr(lesion_episodes, "STEPS", 3)


@pytest.fixture(scope="module")
def elsewhere(scans, tmp_path_factory):
    """The same images in a folder that nobody can tell from one of real ones."""
    out = shutil.copytree(scans.source.parent, tmp_path_factory.mktemp("elsewhere") / "scans")
    (out / MARKER).unlink()
    return load_manifest(out / "manifest.csv")


ATTENTION = MethodConfig("attention")


def test_a_killed_run_of_attention_goes_on_to_the_same_weights_and_scores(
    scans, elsewhere, tmp_path, monkeypatch, one_teacher, short_epochs
):
    config = replace(settings(epochs=3, synthetic=3), method=ATTENTION)
    whole = fit(elsewhere, tmp_path / "whole", config)
    fit_until_killed(elsewhere, tmp_path / "model", config, monkeypatch)
    resumed = fit(elsewhere, tmp_path / "model", config)
    assert digest(resumed) == digest(whole)
    assert resumed.facts == whole.facts
    assert progress(tmp_path / "model") == progress(tmp_path / "whole")
    assert state_digest(fit_last(tmp_path / "model")) == state_digest(fit_last(tmp_path / "whole"))
    untrained = build_method("attention", whole.method.teachers["teacher"], seed=111)
    assert state_digest(fit_last(tmp_path / "whole")) != state_digest(untrained.state_dict())
    lines = progress(tmp_path / "whole")
    assert len({line["total"] for line in lines}) == 3
    for line in lines:
        assert line["total"] == pytest.approx(line["cells"] + line["images"], rel=1e-5)
    files = [row.path for row in scans]
    detectors = (whole, resumed, Detector.load(tmp_path / "whole", device="cpu"))
    scores = [[one.score for one in detector.set_support(files[:2]).predict(files[2:5])] for detector in detectors]
    assert scores[0] == scores[1] == scores[2]
    assert len(set(scores[0])) == 3


def lesion_loader(manifest, method, **choices):
    """The loader of attention and the rows it was made of."""
    config = settings(**{"shots": 2, "batch_size": 2, **choices})
    rows = sorted(manifest.samples, key=lambda sample: sample.task)
    return loaders.training_loader(
        method, rows, Preparation(SMALL, {}, "cpu"), config.training, record=METHODS["attention"]
    ), rows


@pytest.mark.parametrize(("synthetic", "added"), [(0, 0), (4, 5)])
def test_built_in_tasks_are_added_to_other_data_but_not_to_built_in_ones(scans, elsewhere, lite0, synthetic, added):
    method = build_method("attention", lite0)
    for manifest, more in ((elsewhere, added), (scans, 0)):
        loader, rows = lesion_loader(manifest, method, synthetic=synthetic)
        sizes = [len(members) for members in loader.dataset.members]
        assert sizes == [6, 6, *[synthetic] * more]
        assert sorted(index for members in loader.dataset.members for index in members) == list(range(sum(sizes)))
        assert len(rows) == 12
        config = replace(settings(shots=2, synthetic=synthetic), method=ATTENTION)
        facts = training._training_facts(config, manifest, manifest)
        assert facts["synthetic"] == (synthetic if more else 0), "what a bundle says is what was trained on"
    other = training._training_facts(settings(synthetic=9), elsewhere, elsewhere)
    assert other["synthetic"] == 0


def test_images_and_features_of_a_number_belong_together(elsewhere, lite0):
    """Those of the manifest come first, in the order of its rows, then the built-in ones in theirs."""
    method = build_method("attention", lite0)
    loader, rows = lesion_loader(elsewhere, method, synthetic=3, seed=4)
    dataset, (_, drawn) = loader.dataset, synthetic_images(3, SMALL.size)
    prepare = Preparation(SMALL, {}, "cpu")
    for members in dataset.members:
        chosen = members[::-1][:3].tolist()
        expected = torch.cat([next(prepare.inputs([rows[i]])) if i < 12 else drawn[i - 12][None] for i in chosen])
        assert torch.equal(dataset.load(chosen), expected)
        pairs = torch.tensor(chosen).expand(2, 3)
        levels = method.extract(expected)["teacher"]
        for index, first in ((pairs[0], levels), (pairs, [level.expand(2, *level.shape) for level in levels])):
            found = dataset.fetch(index, slice(None))["teacher"]
            for one, other in zip(found, first, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len({tuple(members) for members in dataset.members}) == 7


def test_batches_of_attention_can_be_learned_from(elsewhere, lite0, short_epochs):
    method = build_method("attention", lite0)
    loader, _ = lesion_loader(elsewhere, method, synthetic=3)
    loader.sampler.set_epoch(1)
    seen = 0
    for batch in loader:
        levels, pasted, (mask,) = batch.query["teacher"], batch.query["pasted"], batch.query["mask"]
        assert [level.shape for level in levels] == [level.shape for level in pasted]
        assert [level.shape[2:] for level in batch.support["teacher"]] == [level.shape[1:] for level in levels]
        assert (mask.shape, len(levels)) == ((2, *SMALL.size), 4)
        method.training_loss(batch.query, batch.support)["total"].backward()
        seen += 1
    assert seen == 3
    assert all(bool(parameter.grad.any()) for parameter in method.parameters())


def test_a_run_recorded_before_there_were_synthetic_images_is_the_same_run(older, finished, scans, monkeypatch):
    out = older("synthetic")
    monkeypatch.setattr(training, "train_student", lambda *_: pytest.fail("trained again"))
    assert fit(scans, out, settings(epochs=3)).model_hash == finished[1].model_hash
    with pytest.raises(ConfigError, match=r"\(training\.synthetic 0, now 5\)"):
        fit(scans, out, settings(epochs=3, synthetic=5))


@pytest.mark.parametrize("text", ["", "[" * 100_000, "5", '{"method": {"name": "no"}}', '{"method": {}}'])
def test_a_damaged_record_of_a_run_is_named(scans, tmp_path, text):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json: is damaged\. Choose another --out or delete"):
        fit(scans, tmp_path, settings(epochs=1))


def test_images_read_and_steps_trained_are_told_also_of_a_run_that_goes_on(scans, tmp_path, monkeypatch, one_teacher):
    told, out = [], tmp_path / "model"
    fit_until_killed(scans, out, settings(epochs=3), monkeypatch)
    fit(scans, out, settings(epochs=3), on_progress=lambda *step: told.append(step))
    images = [step for step in told if step[2] == "images"]
    steps = [step for step in told if step[2] == "steps"]
    assert told == images + steps
    assert images[-1][0] == images[-1][1] > 0
    each = steps[-1][1] // 3
    assert [done for done, _, _ in steps] == list(range(each, 3 * each + 1))


def test_a_method_that_learns_from_nothing_tells_what_it_reads(scans, tmp_path, one_teacher):
    config, told = replace(settings(), method=MethodConfig("nearest")), []
    fit(scans, tmp_path / "a", config, on_progress=lambda *step: told.append(step))
    assert told == []
    rule = replace(SMALL, intensity=Intensity("percentile", 1, 99))
    fit(scans, tmp_path / "b", replace(config, preprocessing=rule), on_progress=lambda *step: told.append(step))
    images = len(told) // 2
    assert told == [(done, images, "images") for done in range(1, images + 1)] * 2
