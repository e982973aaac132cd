"""The API: sessions, queries, pictures; the same answers as `Detector.predict`; every error in one line."""

import base64
import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from calls import error_of, files
from PIL import Image

from anatomaly.service.desk import Desk
from anatomaly.service.limits import Limits
from anatomaly.service.uploads import display_name


@pytest.fixture
def on_disk(tmp_path, pictures):
    def write(count, seed=0):
        paths = []
        for name, content in pictures(count, seed=seed):
            (tmp_path / f"{seed}").mkdir(exist_ok=True)
            paths.append(tmp_path / f"{seed}" / name)
            paths[-1].write_bytes(content)
        return paths

    return write


@pytest.mark.parametrize("batch", [1, 5])
def test_answers_are_those_of_predict(service, opened, nearest, pictures, on_disk, batch):
    session = opened(service, 3)
    queries = pictures(5, seed=1)
    rows = []
    for first in range(0, 5, batch):
        answer = service.post(
            f"/sessions/{session['id']}/queries", files=files("images", queries[first : first + batch])
        )
        assert answer.status_code == 200
        rows += answer.json()["results"]
    bank = nearest.make_bank(on_disk(3))
    nearest.bank = bank
    expected = list(nearest.predict(on_disk(5, seed=1)))
    assert [row["score"] for row in rows] == pytest.approx([each.score for each in expected], abs=1e-5)
    if batch == 5:
        assert [row["score"] for row in rows] == [each.score for each in expected]
        weights = [None if e.support_weights is None else e.support_weights.mean(0).tolist() for e in expected]
        assert [row["support_weights"] for row in rows] == [w and pytest.approx(w) for w in weights]
    assert [row["name"] for row in rows] == [name for name, _ in queries]
    assert [each["score"] for each in session["normals"]] == list(bank.normal_scores)
    assert answer.json()["normal_scores"] == list(bank.normal_scores)


def test_two_sessions_do_not_mix(service, pictures, opened):
    one = opened(service, 3)
    other = service.post("/sessions", files=files("normals", pictures(2, seed=7))).json()
    query = files("images", pictures(1, seed=1))

    def score(session):
        return service.post(f"/sessions/{session['id']}/queries", files=query).json()["results"][0]["score"]

    first = score(one)
    assert score(other) != first
    assert score(one) == first


def test_a_batch_keeps_nothing_and_says_the_same(service, opened, pictures):
    session = opened(service, 3)
    query = files("images", pictures(2, seed=1))
    kept = service.post(f"/sessions/{session['id']}/queries", files=query).json()
    alone = service.post("/batch", files=files("normals", pictures(3)) + query).json()
    for answer in (kept, alone):
        for row in answer["results"]:
            row.pop("seconds")
    assert alone == kept
    assert b"anatomaly_sessions 1.0" in service.get("/metrics").content


def test_pictures_come_where_asked_for(service, opened, nearest, pictures, on_disk):
    from anatomaly.results.pictures import overlay, render_map

    session = opened(service, 3)
    url = f"/sessions/{session['id']}"
    query = files("images", pictures(1, seed=1))
    assert service.post(f"{url}/queries", files=query).json()["results"][0]["pictures"] is None
    asked = {"pictures": ["image", "map", "overlay"]}
    found = service.post(f"{url}/queries", files=query, params=asked).json()["results"][0]["pictures"]
    nearest.set_support(on_disk(3))
    (expected,) = nearest.predict(on_disk(1, seed=1))
    scale = nearest.bank.map_range
    wanted = {
        "map": render_map(expected.anomaly_map, scale),
        "overlay": overlay(expected.image, expected.anomaly_map, scale),
        "image": np.repeat(np.asarray(Image.open(on_disk(1, seed=1)[0]))[..., None], 3, 2),
    }
    for kind, pixels in wanted.items():
        content = base64.b64decode(found[kind])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels), kind
        alone = service.post(f"{url}/pictures/{kind}", files=query)
        assert (alone.headers["content-type"], alone.content) == ("image/png", content)
    small = service.post(f"{url}/pictures/overlay", files=query, params={"side": 24})
    assert Image.open(io.BytesIO(small.content)).size == (20, 24)
    shown = service.post("/sessions?pictures=true", files=files("normals", pictures(2))).json()["normals"]
    assert Image.open(io.BytesIO(base64.b64decode(shown[0]["picture"]))).size == (40, 48)


def test_p_values_where_the_calibration_fits(client, make_detector, pictures, on_disk):
    from dataclasses import replace

    detector = make_detector("nearest")
    detector.set_support(on_disk(3), task="head")
    setting = replace(detector.setting(detector.bank), scores=(-1.0, 9.0), images=(1, 1), sha256=("a", "b"))
    detector.calibrate_with(setting)
    with client(detector) as service:
        query = files("images", pictures(1, seed=1))
        fits = service.post("/batch", files=files("normals", pictures(3)) + query, data={"task": "head"}).json()
        assert fits["results"][0]["p_value"] == pytest.approx(2 / 3)
        assert fits["p_values"].startswith("p-values: 2 normal images")
        other = service.post("/batch", files=files("normals", pictures(3)) + query, data={"task": "foot"}).json()
        assert (other["results"][0]["p_value"], other["p_values"][:12]) == (None, "no p-values:")


def test_a_bad_file_costs_its_own_row(service, opened, pictures):
    session = opened(service)
    good, bad = pictures(2, seed=1), ("secret name.png", b"nonsense")
    answer = service.post(f"/sessions/{session['id']}/queries", files=files("images", [good[0], bad, good[1]]))
    assert answer.status_code == 200
    rows = answer.json()["results"]
    assert [row["score"] is None for row in rows] == [False, True, False]
    assert rows[1]["error"].startswith("secret name.png: is not a PNG")
    assert (answer.json()["judged"], answer.json()["failed"]) == (2, 1)
    alone = service.post(f"/sessions/{session['id']}/queries", files=files("images", [bad]))
    assert error_of(alone, 422).startswith("secret name.png: is not")


def test_a_volume_gives_a_row_per_slice_and_too_many_are_refused(client, opened, pictures):
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.full((32, 32), 40 * k, np.uint8)) for k in range(4)]
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:])
    stack = ("stack.tif", buffer.getvalue())
    with client(limits=Limits(images=5, normals=3)) as service:
        session = opened(service, 2)
        url = f"/sessions/{session['id']}/queries"
        rows = service.post(url, files=files("images", [stack])).json()["results"]
        assert [(row["name"], row["frame"]) for row in rows] == [("stack.tif", k) for k in range(4)]
        rows = service.post(url, files=files("images", [stack, stack])).json()["results"]
        assert [row["error"] is None for row in rows] == [True] * 4 + [False]
        assert "room for 1 more" in rows[4]["error"]
        frame = service.post(
            url.replace("queries", "pictures/image"), files=files("images", [stack]), params={"frame": 2}
        )
        assert np.asarray(Image.open(io.BytesIO(frame.content))).max() == 80
        nothing = service.post(
            url.replace("queries", "pictures/image"), files=files("images", [stack]), params={"frame": 9}
        )
        assert "no frame 9" in error_of(nothing, 422)
        assert service.get("/metrics").text.count('anatomaly_images_total{outcome="judged"} 9.0') == 1  # 4 + 4 + 1
        assert "room for 3" in error_of(service.post("/sessions", files=files("normals", [stack])), 422)
        assert "at most 3" in error_of(service.post("/sessions", files=files("normals", pictures(4))), 422)


def test_errors_of_normals_are_told_in_the_clients_names(service, pictures):
    one = pictures(1)[0]
    twice = error_of(service.post("/sessions", files=files("normals", [one, ("copy.png", one[1])])), 422)
    assert "copy.png is given twice" in twice or "scan 0.png is given twice" in twice
    broken = ("x/../../y.png", one[1][:60])
    line = error_of(service.post("/sessions", files=files("normals", [one, broken])), 422)
    assert line.startswith("y.png: ") and "upload-" not in line and "/tmp" not in line
    assert "got no files" in error_of(service.post("/sessions", data={"task": "x"}, files=files("other", [one])), 422)


@pytest.mark.parametrize("text", ["window", "{}x", '{"rule": "window", "low": 1, "high": -1}', '{"a": 1}', "[" * 3000])
def test_an_intensity_that_is_none_is_refused(service, pictures, text):
    answer = service.post("/sessions", files=files("normals", pictures(2)), data={"intensity": text})
    assert "intensity" in error_of(answer, 422)


@pytest.mark.parametrize("rule", ['{"rule": "range", "low": 0, "high": 100}', "range:0..100"])
def test_intensity_and_task_are_used(service, opened, rule):
    found = opened(service, intensity=rule, task="ct of the head")
    assert (found["intensity"], found["task"]) == ("range 0, 100", "ct of the head")
    assert service.get(f"/sessions/{found['id']}").json() == found


def test_sessions_end_and_give_way_and_their_owners_are_told(client, opened):
    with client(limits=Limits(sessions=2)) as service:
        first, second = opened(service)["id"], opened(service)["id"]
        assert service.get(f"/sessions/{first}").status_code == 200  # used last
        third = opened(service)["id"]
        assert "gave way" in error_of(service.get(f"/sessions/{second}"), 410)
        assert service.delete(f"/sessions/{third}").status_code == 204
        assert "no such id" in error_of(service.get(f"/sessions/{third}"), 404)
        assert service.get(f"/sessions/{first}").status_code == 200
        assert "no such id" in error_of(service.delete("/sessions/x"), 404)


def test_memory_of_sessions_is_bounded(client, opened, pictures):
    with client() as service:
        opened(service)
        line = next(x for x in service.get("/metrics").text.splitlines() if x.startswith("anatomaly_session_bytes"))
        size = float(line.split()[1])
    with client(limits=Limits(memory_gib=2.5 * size / 2**30)) as service:
        keys = [opened(service)["id"] for _ in range(3)]
        assert [service.get(f"/sessions/{key}").status_code for key in keys] == [410, 200, 200]
    with client(limits=Limits(memory_gib=0.5 * size / 2**30)) as service:
        answer = service.post("/sessions", files=files("normals", pictures(3)))
        assert "max_memory_gib" in error_of(answer, 413)


def test_a_full_queue_sends_away_and_says_when_to_come_back(client, opened, pictures, nearest, monkeypatch):
    """The event loop is free meanwhile: /health answers while the detector works."""
    with client(limits=Limits(queue=1)) as service:
        session = opened(service)
        url, query = f"/sessions/{session['id']}/queries", files("images", pictures(1, seed=1))
        begun, go, answers = threading.Event(), threading.Event(), []
        real = nearest.predict

        def slow(*args, **kwargs):
            begun.set()
            assert go.wait(60)
            return real(*args, **kwargs)

        monkeypatch.setattr(nearest, "predict", slow)
        first = threading.Thread(target=lambda: answers.append(service.post(url, files=query)))
        first.start()
        assert begun.wait(60)
        sent_away = service.post(url, files=query)
        assert service.get("/health").json() == {"status": "ok"}
        not_ready = service.get("/ready")
        go.set()
        first.join()
        assert "queue" in error_of(sent_away, 429)
        assert int(sent_away.headers["retry-after"]) >= 1
        assert "queue" in error_of(not_ready, 503)
        assert answers[0].status_code == 200
        assert service.get("/ready").status_code == 200


def test_images_that_are_left_when_time_is_up_are_told(client, opened, pictures, nearest, monkeypatch):
    from anatomaly.service import judging

    with client(limits=Limits(seconds=100)) as service:
        session = opened(service)
        now = iter([0.0] + [50.0] * 3 + [200.0] + [60.0] * 2 + [200.0])  # start; files opened; files read
        monkeypatch.setattr(judging, "time", SimpleNamespace(monotonic=lambda: next(now)))
        answer = service.post(f"/sessions/{session['id']}/queries", files=files("images", pictures(4, seed=1)))
    rows = answer.json()["results"]
    assert [row["error"] is None for row in rows] == [True, True, False, False]
    assert "not judged within 100 s" in rows[3]["error"]


def test_a_defect_is_answered_and_logged_without_names(client, opened, pictures, nearest, monkeypatch, caplog):
    from starlette.testclient import TestClient

    def broken(*_args, **_kwargs):
        raise RuntimeError("patient DOE^JOHN")

    with client() as service:
        session = opened(service)
        url = f"/sessions/{session['id']}/queries"
        monkeypatch.setattr(nearest, "predict", broken)
        caplog.set_level("DEBUG")
        assert isinstance(service, TestClient)
        answer = service.post(url, files=files("images", pictures(1)))
        assert "something broke" in error_of(answer, 500)
        monkeypatch.undo()
        assert service.post(url, files=files("images", pictures(1))).status_code == 200
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("anatomaly")]
    assert any("RuntimeError in" in line for line in ours)
    assert not any("DOE" in line or "scan" in line for line in ours)


def test_logs_hold_no_file_names_and_uploads_leave_nothing(client, opened, pictures, tmp_path, monkeypatch, caplog):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    caplog.set_level("INFO", logger="anatomaly")
    with client() as service:
        session = opened(service)
        service.post(f"/sessions/{session['id']}/queries", files=files("images", [*pictures(1, seed=1), ("DOE", b"x")]))
    assert list(tmp_path.iterdir()) == []
    assert "POST /sessions/{key}/queries 200" in caplog.text
    assert "scan" not in caplog.text and "DOE" not in caplog.text and session["id"] not in caplog.text


def test_names_of_clients_touch_no_disk_and_stay_short():
    assert display_name("../../etc/passwd") == "passwd"
    assert display_name("C:\\scans\\a\x00\u202e.png") == "a.png"
    assert display_name("/") == "file"
    assert len(display_name("x" * 10_000)) <= 120


def test_the_schema_is_complete_and_nothing_asks_another_server(service):
    schema = service.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        *("/sessions", "/sessions/{key}", "/sessions/{key}/queries", "/sessions/{key}/pictures/{kind}", "/batch"),
        *("/sessions/{key}/dicomweb", "/about", "/health", "/ready", "/metrics"),
    }
    body = schema["paths"]["/batch"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["required"] == ["images", "normals"]
    assert service.get("/docs").status_code == 404
    for path in ("/", "/page.css", "/page.js"):
        answer = service.get(path)
        assert answer.status_code == 200
        assert "http" not in answer.text
    about = service.get("/about").json()
    assert (about["needs_normals"], about["limits"]["queue"]) == (True, 16)


def test_a_model_without_support_needs_no_normals(client, make_detector, pictures):
    with client(make_detector("pdd")) as service:
        session = service.post("/sessions", files=files("other", pictures(1)), data={"task": "x"})
        assert session.status_code == 201, session.text
        url = f"/sessions/{session.json()['id']}/queries"
        row = service.post(url, files=files("images", pictures(1))).json()["results"][0]
        assert row["score"] is not None and row["support_weights"] is None


def test_the_desk_begins_no_job_nobody_waits_for():
    import asyncio

    from anatomaly.service.limits import RefusedError

    async def gone():
        return True

    async def scenario():
        desk, done = Desk(1), []
        with pytest.raises(RefusedError):
            await desk.run(lambda: done.append(1), gone)
        desk.close()
        return done

    assert asyncio.run(scenario()) == []
