"""A real PACS: Orthanc with its DICOMweb plugin (Debian: apt-get install orthanc orthanc-dicomweb); skipped without."""

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
if ORTHANC is None or not PLUGIN.exists():
    pytest.skip("no Orthanc with DICOMweb on this system", allow_module_level=True)
pydicom = pytest.importorskip("pydicom")
requests = pytest.importorskip("requests")
STUDY, SERIES, OTHER = "1.2.826.0.1.3680043.8.1", "1.2.826.0.1.3680043.8.1.1", "1.2.826.0.1.3680043.8.1.2"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def instance(series, number, *, pixels=True):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 100"
    made.PatientName, made.PatientID, made.AccessionNumber = "Müller^Jo", "P-7", "A-1"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.SOPInstanceUID = STUDY, series, f"{series}.{number}"
    made.SOPClassUID, made.Modality, made.InstanceNumber, made.StudyDate = CTImageStorage, "CT", number, "20260102"
    if pixels:
        made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 40, 48, 1, "MONOCHROME2"
        made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
        made.PixelData = np.random.default_rng(number).integers(0, 4095, (40, 48), dtype=np.uint16).tobytes()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    """The address of a new Orthanc that holds one study: a series of three images, and one of an image and none."""
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    settings = {
        "StorageDirectory": str(folder / "db"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": True,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"me": "secret"},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=log, env=dict(os.environ)
        )
    url, auth = f"http://127.0.0.1:{port}", ("me", "secret")
    try:
        for _ in range(300):
            try:
                assert requests.get(f"{url}/system", auth=auth, timeout=5).ok
                break
            except requests.ConnectionError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        files = [instance(SERIES, k) for k in (3, 1, 2)] + [instance(OTHER, 1), instance(OTHER, 2, pixels=False)]
        for file in files:
            assert requests.post(f"{url}/instances", data=file, auth=auth, timeout=30).ok
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def pacs(orthanc):
    from anatomaly.service.pacs import Pacs

    return Pacs(f"{orthanc}/dicom-web", "me:secret")


def normals():
    return [("normals", (f"{k}.dcm", instance("1.2.3", 100 + k))) for k in range(3)]


@pytest.fixture
def connected(client, pacs):
    with client(pacs=pacs) as service:
        key = service.post("/sessions", files=normals()).json()["id"]
        yield service, f"/sessions/{key}/dicomweb", f"/sessions/{key}/queries"


def test_a_series_is_judged_like_its_files(connected):
    service, url, queries = connected
    answer = service.post(url, json={"study": STUDY, "series": SERIES}, params={"pictures": "map"})
    assert answer.status_code == 200, answer.text
    rows = answer.json()["results"]
    assert [row["name"] for row in rows] == [f"{SERIES}.{k}" for k in (1, 2, 3)]
    assert all(row["pictures"]["map"] for row in rows)
    sent = [("images", (str(k), instance(SERIES, k))) for k in (1, 2, 3)]
    expected = service.post(queries, files=sent).json()["results"]
    assert [row["score"] for row in rows] == [row["score"] for row in expected]
    assert answer.json()["pushed"] is None


def test_one_instance_and_a_whole_study(connected):
    service, url, _ = connected
    one = {"study": STUDY, "series": SERIES, "instance": f"{SERIES}.2"}
    assert [row["name"] for row in service.post(url, json=one).json()["results"]] == [f"{SERIES}.2"]
    answer = service.post(url, json={"study": STUDY}).json()
    failed = [row["name"] for row in answer["results"] if row["error"]]
    assert failed == [f"{OTHER}.2"]  # it has no pixels
    assert answer["judged"] >= 4


def test_results_come_back_into_the_study_as_a_new_series(connected, orthanc):
    service, url, _ = connected
    auth = ("me", "secret")
    before = set(requests.get(f"{orthanc}/series", auth=auth, timeout=30).json())
    answer = service.post(url, json={"study": STUDY, "series": SERIES, "push": True}).json()
    assert (answer["judged"], answer["pushed"], answer["error"]) == (3, 3, None)
    (new,) = set(requests.get(f"{orthanc}/series", auth=auth, timeout=30).json()) - before
    series = requests.get(f"{orthanc}/series/{new}", auth=auth, timeout=30).json()
    stored = [requests.get(f"{orthanc}/instances/{each}/file", auth=auth, timeout=30) for each in series["Instances"]]
    found = sorted((pydicom.dcmread(io.BytesIO(each.content)) for each in stored), key=lambda each: each.InstanceNumber)
    assert [each.InstanceNumber for each in found] == [1, 2, 3]
    for number, each in enumerate(found, 1):
        assert (str(each.PatientName), each.PatientID, each.StudyInstanceUID) == ("Müller^Jo", "P-7", STUDY)
        assert "RESEARCH ONLY" in each.SeriesDescription
        assert each.SourceImageSequence[0].ReferencedSOPInstanceUID == f"{SERIES}.{number}"
        assert f"{answer['results'][number - 1]['score']:.4g}" in each.ImageComments
        assert each.pixel_array.shape[2] == 3 and min(each.pixel_array.shape[:2]) >= 384
    requests.delete(f"{orthanc}/series/{new}", auth=auth, timeout=30)


@pytest.mark.parametrize(
    ("pull", "status", "words"),
    [
        ({"study": "1.2.3.4"}, 404, "no such study"),
        ({"study": STUDY, "series": "1.2.3"}, 404, "no such study"),
        ({"study": STUDY, "series": SERIES, "instance": "1.2.3"}, 404, "no such study"),
        ({"study": "../../instances"}, 422, "expected a DICOM UID"),
        ({"study": "1.2\n"}, 422, "expected a DICOM UID"),
        ({"study": STUDY, "instance": f"{SERIES}.2"}, 422, "without its series"),
        ({}, 422, "study"),
    ],
)
def test_what_cannot_be_pulled_is_told(connected, pull, status, words):
    service, url, _ = connected
    answer = service.post(url, json=pull)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]


def test_limits_hold_for_what_is_pulled(client, pacs):
    from anatomaly.service.limits import Limits

    for limits, words in ((Limits(images=2), "more than 2 instances"), (Limits(upload_mib=0.01), "0.01 MiB")):
        with client(pacs=pacs, limits=limits) as service:
            key = service.post("/sessions", files=normals()[:2]).json()["id"]
            answer = service.post(f"/sessions/{key}/dicomweb", json={"study": STUDY})
            assert (answer.status_code, words in answer.json()["error"]) == (413, True), answer.text


def test_a_pacs_that_is_not_there_or_lets_nobody_in_is_told_and_nothing_is_logged(client, orthanc, caplog):
    from anatomaly.service.pacs import Pacs

    caplog.set_level("DEBUG")
    cases = (
        (Pacs(f"http://127.0.0.1:{free_port()}/dicom-web"), "cannot be reached"),
        (Pacs(f"{orthanc}/dicom-web", "me:wrong"), "status 401"),
        (Pacs(f"{orthanc}/system", "me:secret"), "status"),
    )
    for pacs, words in cases:
        with client(pacs=pacs) as service:
            key = service.post("/sessions", files=normals()).json()["id"]
            answer = service.post(f"/sessions/{key}/dicomweb", json={"study": STUDY})
            assert answer.status_code in (404, 502), answer.text
            assert words in answer.json()["error"] or answer.status_code == 404
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("anatomaly", "dicomweb"))]
    assert not [line for line in ours if STUDY in line]


def test_without_a_pacs_it_says_so(service, opened):
    answer = service.post(f"/sessions/{opened(service)['id']}/dicomweb", json={"study": STUDY})
    assert (answer.status_code, "--dicomweb" in answer.json()["error"]) == (404, True)


def test_a_result_the_pacs_does_not_take_is_told_and_the_verdict_is_not_lost(connected, pacs, monkeypatch):
    service, url, _ = connected

    def refuse(*_args, **_kwargs):
        raise requests.ConnectionError("gone")

    monkeypatch.setattr(pacs._client, "store_instances", refuse)
    answer = service.post(url, json={"study": STUDY, "series": SERIES, "push": True})
    assert (answer.status_code, answer.json()["judged"], answer.json()["pushed"]) == (200, 3, 0)
    assert "cannot be reached" in answer.json()["error"]


def test_a_result_that_cannot_be_written_is_told_and_the_verdict_is_not_lost(connected, monkeypatch):
    from anatomaly.errors import ReadError
    from anatomaly.service import pacs as module

    def refuse(prediction, *_args):
        raise ReadError(f"{prediction.sample.path}: has no StudyID.")

    monkeypatch.setattr(module, "secondary_capture", refuse)
    service, url, _ = connected
    answer = service.post(url, json={"study": STUDY, "series": SERIES, "push": True})
    assert (answer.status_code, answer.json()["judged"], answer.json()["pushed"]) == (200, 3, 0)
    assert answer.json()["error"] == f"{SERIES}.1: has no StudyID."


def test_the_walk_of_the_page_ends_with_a_segmentation_in_the_study(orthanc, tmp_path, monkeypatch, capsys):
    """docs/clinic.md from top to bottom; only the address is another, and the login stands in a netrc file."""
    pytest.importorskip("highdicom")
    from anatomaly import cli

    text = (Path(__file__).parents[2] / "docs/clinic.md").read_text("utf-8").partition("## What is written")[0]
    found = re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.S | re.M)
    walk = [(language, block) for language, block in found if "install" not in block]
    assert [language for language, _ in walk] == ["bash"] * 6 + ["python"]
    host, login = orthanc.removeprefix("http://"), tmp_path / "netrc"
    login.write_text(f"machine {host.partition(':')[0]} login me password secret")
    login.chmod(0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(login))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for language, block in walk:
        block = block.replace("localhost:8042", host)
        if block.startswith("anatomaly "):
            assert cli.main(shlex.split(block)[1:]) == 0, capsys.readouterr().err
        elif language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block], check=True, capture_output=True)
        else:
            capsys.readouterr()
            space = {"__name__": "page"}
            exec(compile(block, "clinic.md", "exec"), space)
    assert capsys.readouterr().out.startswith("5 objects in the study; ")
    mask = next(Path("phantom/head_ct").rglob("masks/*p0020_0*"))
    truth = np.asarray(Image.open(mask)) > 0
    assert space["marked"].shape == truth.shape
    assert (space["marked"] & truth).sum() > 0.3 * truth.sum()
    assert Path("marked.png").is_file()
