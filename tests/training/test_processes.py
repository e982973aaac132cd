"""Training in several processes and in several steps a batch: the same numbers, nothing lost, and all end together."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch

from anatomaly import cli
from anatomaly.backbones.feature_cache import FeatureCache
from anatomaly.config import FitConfig, MethodConfig, TrainingConfig
from anatomaly.data.manifest import Manifest, load_manifest, write_csv
from anatomaly.errors import ConfigError, NotReadyError, ReadError
from anatomaly.methods.d24fad import D24FAD
from anatomaly.methods.pdd import PDD
from anatomaly.methods.settings import D24FADSettings
from anatomaly.synthetic.phantom import write_benchmark
from anatomaly.training import fit as training
from anatomaly.training import processes
from anatomaly.training.episodes import EpisodeSampler
from anatomaly.training.fit import fit
from anatomaly.training.loaders import Preparation
from anatomaly.training.parts import Parts, Ranks
from anatomaly.types import Preprocessing

SMALL = Preprocessing(size=(64, 64))


#: As it is, D24FAD's softmax makes a loss of 1e-2 from 1e-7 in the weights (docs/several-gpus.md).
SMOOTH = {"d24fad": D24FADSettings(softmax_scale="elements")}


def settings(method="d24fad", **choices):
    defaults = {"shots": 2, "epochs": 3, "batch_size": 4, "learning_rate": 1e-5, "validate_every": 1, "device": "cpu"}
    training = TrainingConfig(**{**defaults, **choices})
    return FitConfig(MethodConfig(method, SMOOTH.get(method)), preprocessing=SMALL, training=training)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two tasks of 7 normal training images; one of each is held out."""
    folder, tasks = tmp_path_factory.mktemp("scans"), ("brain_mr", "fundus")
    return load_manifest(write_benchmark(folder, train=7, size=64, tasks=tasks, test_normal=0, test_anomalous=0))


@pytest.fixture
def one_teacher(monkeypatch, lite0):
    """Spare the time to build the same teacher for every run."""
    monkeypatch.setattr(training, "build_backbone", lambda *_, **__: lite0)


def losses(out):
    """Every loss of every epoch."""
    lines = [json.loads(line) for line in (out / "training/progress.jsonl").read_text().splitlines()]
    return torch.tensor([[v for k, v in line.items() if "val" not in k and k != "seconds"] for line in lines])


def same_curve(one, other, *, rtol=5e-5):
    """Of two runs: the losses differ by far less than they move, and the gradients that Adam remembers are as large."""
    expected, found = losses(one), losses(other)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    assert bool(((expected[-1] - expected[0]).abs() > 5 * rtol * expected[0]).all()), "nothing was learned"
    wanted, got = (gradients(out) for out in (one, other))
    assert 0.8 < float(wanted @ got / (wanted @ wanted)) < 1.25


def spread(out):
    """The running variances of the batch norms, of the deepest block of PDD's first student."""
    state = torch.load(out / "training/last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([state[f"method.students.0.layer1.0.bn{norm}.running_var"] for norm in (1, 3)])


def gradients(out):
    """Adam's running mean of them."""
    state = torch.load(out / "training/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    return torch.cat([each["exp_avg"].flatten() for each in state.values()])


def parts(count, *, size, **choices):
    """The parts of every process, of 3 epochs' second one."""
    found = []
    for rank in range(size):
        sampler = EpisodeSampler(["task"] * count, shots=1, seed=3)
        sampler.set_epoch(1)
        each = Parts(sampler, ranks=Ranks(rank, size), **choices)
        found.append(list(each))
        assert len(found[-1]) == len(each)
    return found, list(sampler)


@pytest.mark.parametrize("count", [8, 9, 10, 11, 14, 15])
@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (2, 4)])
def test_episodes_are_shared_out_without_overlap_and_without_loss(count, size, accumulate):
    found, episodes = parts(count, size=size, accumulate=accumulate, batch_size=8)
    assert len({len(each) for each in found}) == 1, "every process waits for the others at every part"
    seen, shares = [], []
    for step in zip(*found, strict=True):
        alone = {part.alone for part in step}
        assert len(alone) == 1
        if alone == {True}:
            assert all(part.episodes == step[0].episodes for part in step)
            assert 0 < len(step[0].episodes) < size
        seen += step[0].episodes if alone == {True} else [each for part in step for each in part.episodes]
        assert all(part.episodes for part in step)
        shares.append(sum(part.share for part in step))
    assert seen == episodes
    steps = [accumulate] * (count // 8) + ([len(shares) - accumulate * (count // 8)] if count % 8 else [])
    assert len(shares) == sum(steps)
    for whole in steps:
        assert sum(shares[:whole]) == pytest.approx(1.0)
        del shares[:whole]


def test_shares_follow_the_number_of_episodes():
    found, _ = parts(11, size=2, accumulate=1, batch_size=8)
    assert [[part.share for part in each] for each in found] == [[0.5, 2 / 3], [0.5, 1 / 3]]


def test_processes_exchange_the_features_that_each_has_computed():
    """In threads here; the processes have another number of entries each."""
    caches = [FeatureCache(memory_bytes=2**20) for _ in range(2)]
    for cache, numbers in zip(caches, (range(17), range(17, 20)), strict=True):
        cache._memory = {str(number): [torch.full((2,), float(number))] for number in numbers}
    board, barrier = [None, None], Barrier(2)

    def exchange(rank):
        def gather(what):
            board[rank] = what
            barrier.wait(60)
            found = list(board)
            barrier.wait(60)
            return found

        caches[rank].exchange(gather)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(exchange, range(2)))
    for cache in caches:
        assert {name: entry[0].tolist() for name, entry in cache._memory.items()} == {
            str(number): [float(number)] * 2 for number in range(20)
        }


@pytest.fixture
def whole_runs(tmp_path_factory):
    """whole_runs(config, manifest): the folder and the detector that one process makes of it."""

    def run(config, manifest):
        out = tmp_path_factory.mktemp("one") / "model"
        return out, fit(manifest, out, config)

    return run


def test_two_processes_learn_what_one_does_and_one_goes_on_where_two_were_killed(
    scans, tmp_path, monkeypatch, one_teacher, whole_runs
):
    """D24FAD; of the last three images of an epoch one takes two, and one process is killed in epoch 1."""
    scans = replace(scans, samples=scans.samples[1:])
    started, out, config = [], tmp_path / "model", settings(learning_rate=1e-6)
    popen = processes.Popen
    monkeypatch.setattr(processes, "Popen", lambda *a, **b: started.append(popen(*a, **b)) or started[-1])
    told = []

    def kill_in_epoch_1(done, total, unit):
        told.append((done, total, unit))
        if (done, unit) == (4, "steps"):
            started[1].kill()

    with pytest.raises(NotReadyError) as error:
        fit(scans, out, replace(config, training=replace(config.training, devices=2)), on_progress=kill_in_epoch_1)
    assert str(error.value).startswith("training: process 2 of 2 was killed (signal 9)")
    assert started[1].returncode == -9
    assert started[0].returncode, "the other one has ended too"
    assert [step for step in told if step[2] == "steps"][:5] == [(n, 9, "steps") for n in range(5)]
    assert not (out / "config.json").exists()
    assert len(losses(out)) < 3
    resumed = fit(scans, out, config)
    one, whole = whole_runs(config, scans)
    assert len(losses(out)) == 3
    same_curve(one, out, rtol=1e-4)
    assert resumed.facts.training["best_epoch"] == whole.facts.training["best_epoch"]
    assert not (out / "training/run.json").read_text().count("devices")


@pytest.mark.slow
def test_pdd_learns_in_two_processes_what_it_does_in_one(scans, tmp_path, one_teacher, whole_runs, capfd, caplog):
    """From the command line; the last batch is one image, which both take; every validated epoch is kept once."""
    fewer = replace(scans, samples=scans.samples[3:])
    write_csv(fewer, tmp_path / "scans.csv")
    out = tmp_path / "model"
    words = ["--method.name=pdd", "--training.epochs=2", "--training.batch_size=4", "--training.learning_rate=1e-5"]
    words += ["--global_teacher.name=efficientnet_lite0", "--training.validate_every=1", "--training.device=cpu"]
    words += [
        "--preprocessing.size=[64,64]",
        "--training.devices=2",
        "--training.keep_checkpoints=true",
        "--training.shots=2",
    ]
    with caplog.at_level("INFO", logger="anatomaly"):
        assert cli.main(["fit", f"--data={tmp_path / 'scans.csv'}", f"--out={out}", *words]) == 0
    said = capfd.readouterr()
    assert "Gloo" not in said.out + said.err
    assert [each.getMessage()[:13] for each in caplog.records] == ["epoch 0: loss", "epoch 1: loss"], "one tells it"
    one, _ = whole_runs(settings("pdd", epochs=2, keep_checkpoints=True), fewer)
    same_curve(one, out)
    assert float((spread(out) - spread(one)).norm() / spread(one).norm()) < 1e-3, "as many values as there are"
    files = sorted(file.name for file in (out / "training").iterdir())
    assert files == sorted(file.name for file in (one / "training").iterdir())
    facts = [json.loads((each / "config.json").read_text())["training"] for each in (out, one)]
    assert [each.pop("devices") for each in facts] == [2, 1]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(("name", "method"), [("d24fad", D24FAD), ("pdd", PDD)])
def test_a_batch_in_several_steps_is_the_same_step(scans, tmp_path, monkeypatch, one_teacher, name, method):
    """With batch norms that do not see the batch; else each sees a part of it (docs/several-gpus.md)."""
    training_loss = method.training_loss
    monkeypatch.setattr(method, "training_loss", lambda self, *batch: training_loss(self.eval(), *batch))
    fewer = replace(scans, samples=scans.samples[1:])
    for accumulate in (1, 2):
        fit(fewer, tmp_path / str(accumulate), settings(name, epochs=2, accumulate=accumulate))
    same_curve(tmp_path / "1", tmp_path / "2")
    assert not torch.equal(losses(tmp_path / "1"), losses(tmp_path / "2")), "it was one step"


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"devices": 3}, r"training\.batch_size: got 4, expected a multiple of .* 3 x 1, such as 3 or 6\."),
        ({"devices": 2, "accumulate": 4}, r"training\.batch_size: got 4, .* 2 x 4, such as 8\."),
        ({"accumulate": 0}, r"training\.accumulate: got 0, expected 1 or more"),
        ({"devices": 0}, r"training\.devices: got 0, expected 1 or more, or auto\."),
        ({"devices": True}, r"training\.devices: got True, expected"),
        ({"devices": "all"}, r"training\.devices: got 'all', expected"),
        ({"strategy": "fsdp"}, r"training\.strategy: got fsdp, expected one of auto, ddp\."),
    ],
)
def test_what_cannot_be_shared_out_is_refused(choices, expected):
    with pytest.raises(ConfigError, match=expected):
        settings(**choices)


@pytest.mark.parametrize("choices", [{"devices": 2}, {"accumulate": 2}])
def test_methods_that_compare_the_images_of_a_batch_train_in_one_process(scans, tmp_path, choices):
    with pytest.raises(ConfigError, match=r"^training: attention compares .* Leave out --training\.devices"):
        fit(scans, tmp_path / "model", settings("attention", **choices))
    assert not (tmp_path / "model").exists()


def test_teachers_that_exist_in_this_process_only_train_in_it(scans, tmp_path, lite0):
    with pytest.raises(ConfigError, match=r"^training\.devices: teachers given as objects"):
        fit(scans, tmp_path / "model", settings(devices=2), teachers=[lite0])


@pytest.mark.parametrize(
    ("devices", "strategy", "device", "gpus", "expected"),
    [
        (1, "auto", "cpu", 0, 0),
        (1, "ddp", "cpu", 0, 1),
        (2, "auto", "cpu", 0, 2),
        ("auto", "auto", "cpu", 0, 0),
        ("auto", "auto", "cuda", 1, 0),
        ("auto", "auto", "cuda", 4, 4),
        (2, "auto", "cuda", 4, 2),
        ("auto", "auto", "cuda", 3, r"training\.batch_size: got 4"),
        (4, "auto", "cuda", 2, r"training\.devices: got 4, expected at most 2, the GPUs"),
    ],
)
def test_how_many_processes_train(monkeypatch, devices, strategy, device, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = settings(devices=devices, strategy=strategy)
    if isinstance(expected, int):
        assert processes.processes_of(config, device, own_teachers=False) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            processes.processes_of(config, device, own_teachers=False)


#: A process that does what its rank's line of DO says, with `tell` and `task`; the heavy one is `rank.serve`.
STUB = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[1])
task = json.loads(sys.stdin.readline())
def tell(*what): print(json.dumps(what), flush=True)
exec({do!r}[task["rank"]])
"""


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """watched(what rank 0 does, what rank 1 does): what comes of it; all processes have ended then."""

    def run(*do, on_progress=lambda *_: None):
        started, popen = [], processes.Popen
        monkeypatch.setattr(processes, "_BOOT", STUB.format(do=do))
        monkeypatch.setattr(processes, "Popen", lambda *a, **b: started.append(popen(*a, **b)) or started[-1])
        empty, prepare = Manifest((), tmp_path), Preparation(SMALL, {}, "cpu")
        try:
            return processes.train_in_processes(len(do), empty, empty, prepare, tmp_path, settings(), on_progress)
        finally:
            assert len(started) == len(do)
            assert all(each.poll() is not None for each in started)

    return run


WAIT = "time.sleep(600)"


def test_what_processes_tell_is_passed_on(watched, caplog):
    told = []
    first = "tell('log', ['anatomaly.training', 30, '100 % said']); tell('progress', [1, 2, 'steps']); "
    first += "tell('best', {'a': 1})"
    assert watched(first, "pass", on_progress=lambda *step: told.append(step)) == {"a": 1}
    assert told == [(1, 2, "steps")]
    assert [(each.name, each.levelname, each.getMessage()) for each in caplog.records] == [
        ("anatomaly.training", "WARNING", "100 % said")
    ]


def test_an_error_of_one_process_ends_all_and_is_told_as_it_is(watched):
    with pytest.raises(ReadError, match=r"^scan\.png: cannot be read\.$"):
        watched(WAIT, "tell('ReadError', 'scan.png: cannot be read.'); os._exit(1)")


def test_the_cause_is_told_and_not_that_the_others_noticed(watched):
    noticed = "tell('defect', 'Connection closed by peer'); os._exit(1)"
    with pytest.raises(ReadError, match="late"):
        watched(noticed, "time.sleep(0.5); tell('ReadError', 'late'); os._exit(1)")
    with pytest.raises(NotReadyError, match=r"process 2 of 2 was killed \(signal 9\)"):
        watched(noticed, "time.sleep(0.5); os.kill(os.getpid(), 9)")


def test_a_defect_comes_with_its_traceback(watched):
    with pytest.raises(RuntimeError, match=r"process 1 failed\.\nTraceback .* ZeroDivisionError"):
        watched("tell('defect', 'Traceback ... ZeroDivisionError'); os._exit(1)", "pass")


def test_ctrl_c_ends_all_processes(watched):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched(f"tell('progress', [1, 2, 'steps']); {WAIT}", WAIT, on_progress=interrupt)


def test_no_process_outlives_a_killed_parent(tmp_path):
    boot = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from anatomaly.training.processes import *; "
    boot += "end_with_parent(); print('up', flush=True); __import__('time').sleep(600)"
    script = (
        f"from anatomaly.training import processes\nprocesses._BOOT = {boot!r}\n"
        "with processes._started(2) as started:\n"
        "    assert [each.stdout.read(2) for each in started] == [b'up'] * 2\n"
        "    print(*(each.pid for each in started), flush=True)\n    input()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 2
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while alive := [child for child in children if running(child)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def running(pid):
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_may_go_on_with_another_number_of_processes_but_not_of_steps(scans, tmp_path, monkeypatch, one_teacher):
    out = tmp_path / "model"
    detector = fit(scans, out, settings(epochs=1))
    monkeypatch.setattr(training, "train_in_processes", lambda *_: pytest.fail("trained again"))
    assert fit(scans, out, settings(epochs=1, devices=2, strategy="ddp")).model_hash == detector.model_hash
    with pytest.raises(ConfigError, match=r"other settings \(training\.accumulate 1, now 2\)"):
        fit(scans, out, settings(epochs=1, accumulate=2))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_learn_what_one_does(scans, tmp_path):
    for devices in (1, 2):
        config = settings("pdd", epochs=1, device="cuda", devices=devices)
        fit(scans, tmp_path / str(devices), config)
    torch.testing.assert_close(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-2, atol=1e-4)
