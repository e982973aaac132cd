"""The page in a browser; skipped where there is none.

It needs the package playwright and a Chromium of the system (Debian: apt-get install chromium); nothing is downloaded.
"""

import threading
import time

import pytest

playwright = pytest.importorskip("playwright.sync_api")
TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def serve(make_detector):
    """serve(token=...): the address of a service that runs in a thread."""
    import uvicorn

    from anatomaly.service.app import make_app
    from anatomaly.service.limits import Limits
    from anatomaly.service.serving import listen

    running = []

    def start(limits=None, **options):
        listening = listen("127.0.0.1", 0)
        app = make_app(make_detector("matching"), limits or Limits(), **options)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(serve):
    return serve()


@pytest.fixture
def opened(browser):
    """Open a page; at the end it must have complained of nothing and asked nobody else."""
    contexts, complaints, asked = [], [], []

    def open_page(url, *, width=1200, scheme="light", complains=()):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        open_page.base, open_page.complains = url.split("#")[0], complains
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in complaints if not any(word in each for word in open_page.complains)] == []
    assert [each for each in asked if not each.startswith((open_page.base, "data:"))] == []


@pytest.fixture
def on_disk(tmp_path, pictures):
    def write(count, seed=0):
        paths = []
        for name, content in pictures(count, seed=seed):
            paths.append(tmp_path / f"{seed} {name}")
            paths[-1].write_bytes(content)
        return paths

    return write


def told(page, where, words):
    """Wait until the page says so; its security policy allows no functions of Playwright's in it."""
    playwright.expect(page.locator(where)).to_contain_text(words, timeout=60_000)


def judged(page, count):
    playwright.expect(page.locator("#list li")).to_have_count(count, timeout=60_000)
    told(page, "#cases-told", f"{count} judged")
    return page.locator("#list button").all()


def test_normals_and_cases_become_a_sorted_list_with_what_mattered(opened, url, on_disk):
    page = opened(url)
    assert "RESEARCH ONLY" in page.locator(".banner").inner_text()
    page.set_input_files("#cases", on_disk(2, seed=1))
    assert page.locator("#cases-told").inner_text() == "2 cases wait for normal images."
    page.set_input_files("#normals", on_disk(3))
    judged(page, 2)
    bad = on_disk(1, seed=2)[0].with_name("<b>bad.png")
    bad.write_bytes(b"x")
    page.set_input_files("#cases", [*on_disk(3, seed=3), bad])
    rows = judged(page, 5)
    scores = [float(row.locator(".value").inner_text()) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert page.locator("#gallery img").count() == 3
    told(page, "#errors", "bad")
    assert page.locator("#errors li").inner_text().startswith("<b>bad.png: is not")  # as text, never as markup
    rows[0].click()
    assert page.locator("#case-name").inner_text() == rows[0].locator("b").inner_text()
    assert "of 3 normal images" in page.locator("#facts").inner_text()
    shares = [int(each.split(" %")[0]) for each in page.locator("#mattered li span").all_inner_texts()]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and 98 <= sum(shares) <= 102
    page.set_input_files("#cases", on_disk(3)[2:])  # the last normal itself: it rests on that one
    judged(page, 6)[-1].click()
    assert page.locator("#mattered li span").first.inner_text().endswith("0 scan 2.png")
    assert "compared with itself" in page.locator("#case-note").inner_text()
    for picture in ("#image", "#overlay"):
        assert page.locator(picture).evaluate("image => image.naturalWidth") == 40
    page.locator("#forget").click()
    assert not page.locator("#found").is_visible()
    assert page.locator("#gallery img").count() == 0


def test_it_is_used_with_keys_alone(opened, url, on_disk):
    page = opened(url)
    met = []
    for _ in range(4):
        page.keyboard.press("Tab")
        met.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert met[:2] == ["normals", "SUMMARY"] or met[0] == "normals"
    assert "cases" in met
    page.set_input_files("#normals", on_disk(2))
    page.set_input_files("#cases", on_disk(3, seed=1))
    rows = judged(page, 3)
    names = [row.locator("b").inner_text() for row in rows]
    page.locator("#list button[aria-current=true]").focus()
    for key, at in [("ArrowDown", 1), ("End", 2), ("ArrowUp", 1), ("Home", 0)]:
        page.keyboard.press(key)
        assert page.locator("#case-name").inner_text() == names[at]
        assert page.evaluate("document.activeElement.querySelector('b').textContent") == names[at]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "strength"
    assert page.locator("#overlay").evaluate("image => getComputedStyle(image).opacity") == "0.8"
    page.keyboard.press("Home")
    assert page.locator("#overlay").evaluate("image => getComputedStyle(image).opacity") == "0"


def test_files_are_dropped(opened, url, on_disk):
    page = opened(url)
    content = on_disk(1)[0].read_bytes()
    data = page.evaluate_handle(
        """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "dropped.png")); return data; }""",
        list(content),
    )
    page.dispatch_event("#normals-drop", "drop", {"dataTransfer": data})
    page.wait_for_selector("#gallery img")
    assert page.locator("#gallery").inner_text() == "dropped.png"


def test_what_normals_are_not_is_told_and_another_rule_judges_again(opened, url, on_disk):
    page = opened(url, complains=("422",))
    page.set_input_files("#normals", on_disk(2))
    page.set_input_files("#cases", on_disk(1, seed=1))
    before = judged(page, 1)[0].locator(".value").inner_text()
    page.locator("summary").click()
    page.select_option("#rule", "range")
    assert page.locator("#high").input_value() == "255"
    page.fill("#high", "-1")
    page.locator("#again").click()
    told(page, "#normals-told", "intensity")
    page.fill("#high", "90")
    page.locator("#again").click()
    page.wait_for_selector("#list li")
    assert judged(page, 1)[0].locator(".value").inner_text() != before


def test_a_session_that_gave_way_is_made_again(opened, serve, on_disk):
    from anatomaly.service.limits import Limits

    url = serve(limits=Limits(sessions=1))
    first, second = opened(url, complains=("410",)), opened(url, complains=("410",))
    first.set_input_files("#normals", on_disk(2))
    first.wait_for_selector("#gallery img")
    second.set_input_files("#normals", on_disk(2))
    second.wait_for_selector("#gallery img")
    first.set_input_files("#cases", on_disk(2, seed=1))
    judged(first, 2)


def test_a_token_comes_from_the_address_or_is_asked_for(opened, serve, on_disk):
    url = serve(token=TOKEN)
    page = opened(f"{url}#token={TOKEN}", complains=("401",))
    told(page, "#model", "Model")
    assert TOKEN not in page.url
    page = opened(url, complains=("401",))
    page.wait_for_selector("#ask", state="visible")
    page.fill("#token", TOKEN)
    page.locator("#ask button").click()
    told(page, "#model", "Model")
    page.set_input_files("#normals", on_disk(2))
    page.wait_for_selector("#gallery img")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_needs_no_sideways_scrolling(opened, url, on_disk, scheme, tmp_path):
    page = opened(url, width=400, scheme=scheme)
    page.set_input_files("#normals", on_disk(3))
    long = tmp_path / f"{'x' * 110}.png"
    long.write_bytes(on_disk(1, seed=1)[0].read_bytes())
    bad = tmp_path / f"{'y' * 110}.png"
    bad.write_bytes(b"x")
    page.set_input_files("#cases", [long, bad])
    judged(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    above, below = (page.locator(each).bounding_box() for each in ("#normals-drop", "#cases-drop"))
    assert above["y"] + above["height"] < below["y"] and above["width"] > 300
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
