"""A service around a small, untrained model, in this process; skipped where the extra `service` is not installed."""

import io
from contextlib import contextmanager

import numpy as np
import pytest
from calls import files

pytest.importorskip("fastapi")
pytest.importorskip("httpx")


@pytest.fixture(scope="session")
def nearest(make_detector):
    return make_detector("nearest")


@pytest.fixture(scope="session")
def pictures():
    """pictures(3): names and bytes of three small PNG files, always the same."""
    from PIL import Image

    def make(count, *, seed=0, size=(48, 40)):
        random = np.random.default_rng(seed)
        found = []
        for k in range(count):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(buffer, "PNG")
            found.append((f"scan {k}.png", buffer.getvalue()))
        return found

    return make


@pytest.fixture
def client(nearest):
    """client(limits=..., token=...): a client of a new service; it raises nothing that the service swallows."""
    from starlette.testclient import TestClient

    from anatomaly.service.app import make_app
    from anatomaly.service.limits import Limits

    @contextmanager
    def start(detector=nearest, limits=None, **options):
        app = make_app(detector, limits or Limits(), **options)
        with TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=True) as running:
            yield running

    return start


@pytest.fixture
def service(client):
    with client() as running:
        yield running


@pytest.fixture
def opened(pictures):
    """opened(service, k=3): the facts of a new session."""

    def create(service, k=3, **data):
        answer = service.post("/sessions", files=files("normals", pictures(k)), data=data)
        assert answer.status_code == 201, answer.text
        return answer.json()

    return create
