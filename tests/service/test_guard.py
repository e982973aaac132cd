"""What passes the guard: hosts, origins, tokens, sizes, times; and hostile files, which the service outlives."""

import asyncio
import gzip
import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from calls import error_of, files

from anatomaly.service.limits import Limits


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "127.0.0.1:8000", "[::1]:8000"])
def test_this_machine_is_served_under_its_names(service, host):
    assert service.get("/about", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.org", "evil.org:8000", "localhost.evil.org", "127.0.0.1.evil.org", "[", ""])
def test_other_names_for_this_machine_are_not(service, host):
    assert "host" in error_of(service.get("/about", headers={"Host": host}), 421)


@pytest.mark.parametrize("origin", ["http://evil.org", "null", "http://localhost:9", "https://localhost.evil.org:8000"])
def test_pages_of_other_sites_get_nothing(service, opened, origin):
    session = opened(service)
    for call in (service.post, service.delete, service.get):
        assert "origin" in error_of(call(f"/sessions/{session['id']}", headers={"Origin": origin}), 403)
    own = {"Origin": "http://localhost:8000"}
    assert service.get(f"/sessions/{session['id']}", headers=own).status_code == 200


def test_a_token_is_asked_for_everywhere_but_where_nothing_is_anybodys(client, pictures):
    token = "a-token-of-24-characters"
    with client(token=token) as service:
        for path in ("/", "/page.js", "/page.css", "/health", "/ready", "/openapi.json"):
            assert service.get(path, headers={"Host": "anything.example"}).status_code == 200
        wrong = (
            {},
            {"Authorization": "Bearer x"},
            {"Authorization": f"Bearer {token}x"},
            {"Authorization": "Bearer é"},
        )
        for headers in wrong:
            headers = {name: value.encode() for name, value in headers.items()}
            for path in ("/about", "/metrics", "/sessions/x", "/about/"):
                answer = service.get(path, headers=headers)
                assert "token" in error_of(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
            answer = service.post("/sessions", files=files("normals", pictures(2)), headers=headers)
            assert "token" in error_of(answer, 401)
        right = {"Authorization": f"Bearer {token}"}
        assert service.get("/about", headers=right).status_code == 200
        assert "origin" in error_of(service.get("/about", headers={**right, "Origin": "http://evil.org"}), 403)


def test_answers_forbid_scripts_from_elsewhere_frames_and_caches(service):
    for path in ("/", "/about", "/nothing"):
        headers = service.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_bodies_are_bounded_whatever_they_say_of_their_length(client, opened, pictures):
    with client(limits=Limits(upload_mib=0.25)) as service:
        session = opened(service)
        url, large = f"/sessions/{session['id']}/queries", [("x.png", b"\0" * 300_000)]
        assert "0.25 MiB" in error_of(service.post(url, files=files("images", large)), 413)

        def endless():
            yield b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
            for _ in range(200):
                yield b"\0" * 2**16

        chunked = {"Content-Type": "multipart/form-data; boundary=b"}
        assert "0.25 MiB" in error_of(service.post(url, content=endless(), headers=chunked), 413)
        text = {"Content-Type": "application/json"}
        assert (
            service.post(f"/sessions/{session['id']}/dicomweb", content=b" " * 70_000, headers=text).status_code == 400
        )
        assert service.post(url, files=files("images", pictures(1))).status_code == 200


def test_a_request_that_is_sent_too_slowly_ends(nearest, monkeypatch):
    from anatomaly.service import guard
    from anatomaly.service.app import make_app

    monkeypatch.setattr(guard, "_DRAIN_SECONDS", 0.01)
    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=b")]
    scope = {"type": "http", "method": "POST", "path": "/batch", "raw_path": b"/batch", "scheme": "http"}
    sent = []

    async def never():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    app = make_app(nearest, Limits(seconds=1))
    asyncio.run(app({**scope, "headers": headers, "query_string": b""}, never, send))
    assert sent[0]["status"] == 408


def test_ten_thousand_tiny_files_are_refused_at_once(service, pictures):
    tiny = [("images", ("x", b"x"))] * 10_000
    assert "more than 256 files" in error_of(service.post("/batch", files=tiny), 413)
    assert service.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--"),
        ("multipart/form-data; boundary=" + "b" * 5000, b"--b\r\n"),
        ("application/zip", b"PK"),
        ("application/json", b"{" * 9999),
        ("application/x-www-form-urlencoded", b"a=b"),
    ],
)
def test_bodies_that_are_no_form_are_refused(service, kind, content):
    answer = service.post("/batch", content=content, headers={"Content-Type": kind})
    error_of(answer, answer.status_code)
    assert answer.status_code in (400, 415, 422)


def png_bomb(side):
    """A PNG that declares side x side pixels and unpacks to that."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 2**20)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zip_slip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("../../../tmp/slipped", b"x" * 1000)
    return buffer.getvalue()


def dicom(**changes):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = CTImageStorage, generate_uid(), "CT"
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 32, 32, 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 0
    made.PixelData = np.arange(1024, dtype=np.uint16).tobytes()
    for name, value in changes.items():
        setattr(made, name, value)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


HOSTILE = {
    "a decompression bomb": lambda: png_bomb(60_000),
    "a PNG that ends early": lambda: png_bomb(4000),
    "a gzip bomb": lambda: gzip.compress(b"\0" * 2**22),
    "a zip that climbs out": zip_slip,
    "DICOM with many frames": lambda: dicom(NumberOfFrames=2_000_000_000),
    "DICOM with huge sides": lambda: dicom(Rows=65535, Columns=65535),
    "DICOM that ends early": lambda: dicom()[:700],
    "DICOM without pixels": lambda: dicom(Rows=None),
    "a script": lambda: b"<script>alert(1)</script>",
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_told_in_one_line_and_the_service_lives_on(service, opened, pictures, kind):
    session = opened(service)
    url, hostile = f"/sessions/{session['id']}/queries", ("../../../tmp/evil", HOSTILE[kind]())
    line = error_of(service.post(url, files=files("images", [hostile])), 422)
    assert line.startswith("evil: ")
    assert "upload-" not in line and "anatomaly-" not in line
    assert line in error_of(service.post("/sessions", files=files("normals", [*pictures(1), hostile])), 422)
    assert service.post(url, files=files("images", pictures(1))).status_code == 200


def test_good_dicom_is_judged(service):
    pixels = [np.random.default_rng(k).integers(0, 65535, 1024, dtype=np.uint16).tobytes() for k in (1, 2)]
    normals = [("a.dcm", dicom(PixelData=each)) for each in pixels]
    answer = service.post("/batch", files=files("normals", normals) + files("images", [("q.dcm", dicom())]))
    assert answer.status_code == 200, answer.text
    assert answer.json()["judged"] == 1
