"""Shared by the tests of files and tables."""

import pytest

from anatomaly.data import readers, workers


@pytest.fixture
def decoding_here(monkeypatch):
    """Files are decoded in this process, so that what a test changes in it counts for the decoders too."""

    def ask(request):
        answer, pixels = readers.answer(request)
        workers.raise_error_of(answer)
        return answer, pixels

    monkeypatch.setattr(workers, "ask", ask)
