"""The command: what it prints, where it listens, when it wants a token, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from anatomaly.cli import main
from anatomaly.errors import ConfigError
from anatomaly.service.serving import is_loopback, listen, token_for


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_a_token_is_made_where_others_can_ask(host, local):
    assert is_loopback(host) == local
    made = token_for(host, None)
    assert made is None if local else len(made) >= 32
    assert token_for(host, "a-token-of-24-characters") == "a-token-of-24-characters"


@pytest.mark.parametrize(
    "given", ["", "short", "with spaces in it 12345", "ünïcödeünïcödeünïcöde", "line\nline12345678901"]
)
def test_a_weak_token_is_refused_and_not_shown(given):
    with pytest.raises(ConfigError) as err:
        token_for("0.0.0.0", given)
    assert not given or given not in str(err.value)


def test_an_address_that_cannot_be_had_is_told_in_a_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            listen("127.0.0.1", port)
        assert main(["serve", "--port", str(port)]) == 2
    assert "Choose another --host or --port." in capsys.readouterr().err
    for host in ("no.such.host.invalid", "256.1.1.1", "x" * 300):
        with pytest.raises(ConfigError):
            listen(host, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max_files", "0"], "max_files: got 0"),
        (["--max_seconds", "-1"], "max_seconds"),
        (["--port", "99999"], "port: got 99999"),
        (["--token", "short"], "token"),
        (["--dicomweb", "nonsense"], "dicomweb"),
        (["--model", "/nowhere", "--port", "0"], "not a model bundle"),
    ],
)
def test_options_that_make_no_sense_are_refused(capsys, words, told):
    assert main(["serve", *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


_HELP = """
import contextlib, sys, anatomaly.cli
with contextlib.suppress(SystemExit):
    anatomaly.cli.main(["serve", "--help"])
sys.exit(" ".join({"fastapi", "uvicorn", "starlette", "torch", "pydicom"} & set(sys.modules)) or 0)
"""


def test_help_is_quick():
    result = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True)
    assert "--max_upload_mib" in result.stdout
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def served(make_detector, tmp_path):
    """served("--host", "0.0.0.0"): the running command and its first lines."""
    make_detector("nearest").save(tmp_path / "model")
    running = []

    def start(*words, **environment):
        command = [sys.executable, "-m", "anatomaly.cli", "serve", "--model", str(tmp_path / "model"), "--port", "0"]
        process = subprocess.Popen(
            [*command, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment, "TMPDIR": str(tmp_path)},
        )
        running.append(process)
        lines = []
        while not lines or "Page: " not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        return process, lines

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_it_says_where_the_page_is_and_ends_when_told(served, tmp_path):
    process, lines = served()
    assert "Not a medical device" in lines[0]
    url = re.search(r"http://127\.0\.0\.1:\d+/", lines[-1])[0]
    assert httpx.get(url).status_code == 200
    assert httpx.get(url + "ready").json() == {"status": "ready"}
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.endswith("Stopped.\n") and "Traceback" not in out
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_for_other_machines_it_makes_a_token_and_tells_it_once(served):
    process, lines = served("--host", "0.0.0.0")
    token = next(re.search(r"Token: (\S+)", line)[1] for line in lines if "Token" in line)
    port = re.search(r":(\d+)/", lines[-1])[1]
    assert f"#token={token}" in lines[-1]
    url = f"http://127.0.0.1:{port}/about"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    process.send_signal(signal.SIGINT)
    assert token not in process.communicate(timeout=60)[0]


def test_a_token_of_the_environment_is_used_and_not_printed(served):
    token = "from-the-environment-1234"
    process, lines = served(ANATOMALY_TOKEN=token)
    url = re.search(r"http://127\.0\.0\.1:\d+/", lines[-1])[0]
    assert httpx.get(url + "about").status_code == 401
    assert httpx.get(url + "about", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert token not in "".join(lines) + out
    assert process.returncode == 0 and out.endswith("Stopped.\n")


def test_raw_nonsense_on_the_socket_ends_nothing(served):
    _, lines = served()
    port = int(re.search(r":(\d+)/", lines[-1])[1])
    for words in (
        b"\0\1\2\3",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /batch HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(words)
            raw.shutdown(socket.SHUT_WR)
            raw.recv(1000)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:  # goes away in the middle of a file
        raw.sendall(
            b"POST /batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b'Content-Length: 99999\r\n\r\n--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\nxx'
        )
    time.sleep(0.2)
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_the_python_example_of_the_docs_runs(served, pictures, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs/service.md").read_text("utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.S)[1]
    for folder, seed in (("normal", 0), ("cases", 1)):
        (tmp_path / folder).mkdir()
        for name, content in pictures(3, seed=seed):
            (tmp_path / folder / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    _, lines = served()
    exec(example.replace("http://localhost:8000", re.search(r"http://127\.0\.0\.1:\d+", lines[-1])[0]), {})
    out = capsys.readouterr().out
    assert re.search(r"^scan 2\.png \d+\.\d+ None$", out, re.M)
    assert "among themselves: [" in out
