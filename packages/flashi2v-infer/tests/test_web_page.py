"""The page in headless Chromium: what people do with it, by mouse and by keyboard, on a phone, in the dark."""

import contextlib
import http.client
import json
import mimetypes
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="nox -s web runs these tests")
pytest.importorskip("playwright", reason="nox -s web runs these tests")
from playwright.sync_api import Browser, Page, expect, sync_playwright
from web_world import SERVED, served, until

from flashi2v_infer import demo
from flashi2v_infer.execution import Execution
from flashi2v_infer.web.gate import Keys
from flashi2v_infer.web.jobs import Jobs
from flashi2v_infer.web.page import mount_page
from flashi2v_infer.web.planner import Planner
from flashi2v_infer.web.server import make_app
from flashi2v_infer.web.service import Service
from flashi2v_infer.web.worker import Setup
from flashi2v_infer.web.workers import Workers

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
MILLISECONDS = 900_000  # against hangs alone
expect.set_options(timeout=MILLISECONDS)
ALICE, BOB = "alice-0123456789", "bob-0123456789ab"


@contextlib.contextmanager
def site(data: Path, *keys: str) -> Iterator[str]:
    """Serve everything that flashi2v-web does; yield its address."""
    os.environ["GRADIO_TEMP_DIR"] = str(data / "uploads")
    jobs, opened = Jobs(data), Keys(keys)
    setup = Setup(data, SERVED, Execution(device="cpu", keep_text_encoder=True))
    workers = Workers(setup, jobs, 1)
    service = Service(jobs, SERVED, workers.wake, workers.num_ready)
    app = mount_page(make_app(service, opened), service, opened, Planner(setup, jobs))
    workers.start()
    try:
        with served(app) as address:
            yield address
    finally:
        workers.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium, which Debian and Ubuntu have as a package")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("web")


@contextlib.contextmanager
def opened(browser: Browser, address: str, **options: object) -> Iterator[Page]:
    """Open the page; nothing is asked of other hosts, and nothing goes wrong in it."""
    with browser.new_context(**options) as context:
        context.set_default_timeout(MILLISECONDS)
        page = context.new_page()
        asked, faults = [], []
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "data:", "blob:")) else asked.append(request.url),
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#history .f2v")
        yield page
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        assert faults == []


def number(page: Page, id: str, value: int) -> None:
    """Set a slider by its number."""
    field = page.locator(f"#{id} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def drop(page: Page, selector: str, path: Path) -> None:
    """Drop a file, as from the desktop."""
    contents = list(path.read_bytes())
    transfer = page.evaluate_handle(
        """([contents, name, type]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(contents)], name, {type}));
            return transfer;
        }""",
        [contents, path.name, mimetypes.guess_type(path.name)[0]],
    )
    page.wait_for_selector(selector)
    page.dispatch_event(selector, "drop", {"dataTransfer": transfer})


def test_a_video_from_a_dropped_image_and_all_that_one_does_with_it(browser, data, tmp_path):
    with site(data) as address, opened(browser, address, viewport={"width": 1280, "height": 900}) as page:
        page.click("#make")
        expect(page.locator(".toast-body")).to_contain_text("give an image first")
        drop(page, "#image [aria-dropeffect], #image button", demo.IMAGE)
        expect(page.locator("#crop img")).to_have_attribute("alt", "the first frame, cropped to 96 x 96")
        expect(page.locator("#plan")).to_contain_text("MiB of memory")

        # The nearest sentence that the demo knows, while one types.
        page.locator("#prompt textarea").press_sequentially("my kite flies fast up into the clouds")
        sentence = "it moves quickly up"
        expect(page.locator("#hint")).to_have_text(sentence)
        page.click("#hint")
        expect(page.locator("#prompt textarea")).to_have_value(sentence)

        # A preview that changes, and a stop.
        page.get_by_role("button", name="Settings").first.click()
        number(page, "steps", 100)
        number(page, "frames", 121)
        page.click("#make")
        preview = page.locator("#result img.preview")
        expect(preview).to_have_attribute("src", re.compile("^data:image/webp"))
        first = preview.get_attribute("src")
        expect(preview).not_to_have_attribute("src", first)
        expect(page.locator("#result .state")).to_contain_text("s left")
        page.click("#stop")
        expect(page.locator("#result .fault")).to_have_text("cancelled")

        # A video that plays beside its image.
        number(page, "steps", 4)
        number(page, "frames", 17)
        page.click("#dice")
        expect(page.locator("#seed input, #seed textarea")).not_to_have_value("")
        seed = page.locator("#seed input, #seed textarea").input_value()
        page.click("#make")
        video = page.locator("#result video")
        expect(video).to_be_visible()
        until(lambda: video.evaluate("video => video.loop && video.currentTime > 0"))
        expect(page.locator("#result .facts")).to_contain_text(f"seed {seed}")
        expect(page.locator("#result .strip")).to_be_visible()
        expect(page.locator("#plan")).to_contain_text("by the speed of the last video")
        for name in ("MP4", "GIF", "WebP"):
            with page.expect_download() as download:
                page.get_by_role("link", name=name, exact=True).click()
            download.value.save_as(tmp_path / f"made.{name.lower()}")
        clip = video.get_attribute("src")

        # Its last frame starts the next one.
        before = page.locator("#crop img").get_attribute("src")
        page.get_by_role("button", name="Last frame as image").click()
        expect(page.locator("#crop img")).not_to_have_attribute("src", before)
        page.click("#make")
        expect(page.locator(f'#result video:not([src="{clip}"])')).to_be_visible()

        # Two of them side by side, in step.
        for index in (0, 1):
            page.locator("#history .f2v-cards li").nth(index).get_by_role("button", name="Compare").click()
            expect(page.locator("#pair")).to_contain_text("Choose another" if index == 0 else "Close")
        until(lambda: page.locator("#pair video").count() == 2)
        page.evaluate("() => { const [a] = document.querySelectorAll('#pair video'); a.pause(); a.currentTime = 0.5; }")
        until(
            lambda: page.evaluate(
                "[...document.querySelectorAll('#pair video')].every(v => Math.abs(v.currentTime - .5) < .04)"
            )
        )
        page.get_by_role("button", name="Close the comparison").click()
        expect(page.locator("#pair video")).to_have_count(0)

        # What was made here brings its settings back.
        for name in ("mp4", "webp"):
            page.fill("#prompt textarea", "something else")
            number(page, "steps", 9)
            drop(page, "#restore [aria-dropeffect], #restore button", tmp_path / f"made.{name}")
            expect(page.locator("#prompt textarea")).to_have_value(sentence)
            expect(page.locator("#steps input[type=number]")).to_have_value("4")
            expect(page.locator("#seed input, #seed textarea")).to_have_value(seed)
        expect(page.locator("#crop img")).to_have_attribute("src", before)

    # The history outlives the server.
    with site(data) as address, opened(browser, address) as page:
        cards = page.locator("#history .f2v-cards li")
        expect(cards).to_have_count(3)
        expect(page.locator("#result video")).to_be_visible()  # the newest
        cards.nth(2).locator(".open").click()
        expect(page.locator("#result .fault")).to_have_text("cancelled")
        cards.nth(1).get_by_role("button", name="Delete").click()
        expect(cards).to_have_count(2)
        page.fill("#search input, #search textarea", "zebra")
        expect(page.locator("#history")).to_contain_text("Nothing yet.")
        page.fill("#search input, #search textarea", "QUICKLY")
        expect(cards).to_have_count(2)


def test_the_page_needs_no_mouse_and_fits_a_phone_in_the_dark(browser, data):
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    with site(data) as address, opened(browser, address, **phone) as page:
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate(
                    "() => { const e = document.activeElement;"
                    " return e.dataset.action || e.closest('[id]:not(input):not(textarea)')?.id || e.tagName; }"
                )
            )
        assert {"make", "stop", "prompt", "image", "restore", "search", "open"} <= reached, reached
        page.locator("#prompt textarea").focus()
        page.keyboard.type("a star")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        red, green, blue = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
        )
        assert red + green + blue < 200


def test_a_browser_asks_for_the_key_and_shows_no_videos_of_another(browser, tmp_path):
    with site(tmp_path / "keys", ALICE, BOB) as address:
        with browser.new_context() as context:
            assert context.request.get(address).status == 401
        with opened(browser, address, http_credentials={"username": "any", "password": ALICE}) as page:
            page.get_by_text("it drifts slowly upwards").click()
            expect(page.locator("#crop img")).to_be_visible()
            page.click("#make")
            expect(page.locator("#history .f2v-cards li")).to_have_count(1)
            expect(page.locator("#result video")).to_be_visible()  # followed with the key
        with opened(browser, address, http_credentials={"username": "any", "password": BOB}) as page:
            expect(page.locator("#history")).to_contain_text("Nothing yet.")


def test_what_programs_may_send_to_the_page_reads_and_fetches_nothing(data):
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

        def log_message(self, *arguments):
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    with site(data) as address:
        host = address.removeprefix("http://")

        def call(method: str, path: str, body: object = None) -> bytes:
            connection = http.client.HTTPConnection(host, timeout=60)
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return b"%d " % response.status + response.read(2000)

        for file in (f"http://127.0.0.1:{other.server_port}/image.png", "/etc/passwd", str(data / "jobs.sqlite3")):
            picture = {"path": file, "url": file, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
            for function in range(12):
                values = [picture, "64x64"]
                call("POST", "/gradio_api/queue/join", {"data": values, "fn_index": function, "session_hash": "s"})
            answer = call("GET", f"/gradio_api/file={file}")
            assert b"root:" not in answer
            assert b"SQLite" not in answer
        call("GET", "/gradio_api/queue/data?session_hash=s")
    assert asked == []
    other.shutdown()
