"""The HTTP interface, as the official client of OpenAI speaks it, and as strangers might."""

import base64
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="nox -s web runs these tests")
pytest.importorskip("openai", reason="nox -s web runs these tests")
import httpx
import openai
import web_world
from web_world import add, finish, served, until

from flashi2v_data import read_frames
from flashi2v_infer import demo, read_record
from flashi2v_infer.web.gate import Keys
from flashi2v_infer.web.jobs import Jobs
from flashi2v_infer.web.server import make_app
from flashi2v_infer.web.service import Service

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
ALICE, BOB = "alice-0123456789", "bob-0123456789ab"
HOSTS = {"127.0.0.1", "localhost"}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def service(jobs) -> Service:
    return Service(jobs, web_world.SERVED, keep_days=7, url_hosts=["127.0.0.1"])


@pytest.fixture(scope="module")
def address(service):
    """A server that is open."""
    with served(make_app(service, Keys([]), HOSTS)) as address:
        yield address


@pytest.fixture(scope="module")
def guarded(service):
    """A server with two keys, of the same queue."""
    with served(make_app(service, Keys([ALICE, BOB]))) as address:
        yield address


def official(address: str, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def posted(http: httpx.Client, image: object = None, **fields: object) -> httpx.Response:
    """Order a video by a form."""
    image = demo.IMAGE.read_bytes() if image is None else image
    return http.post("/v1/videos", data={"prompt": "a star", **fields}, files={"input_reference": ("x", image)})


def reason(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["message"]


def test_the_official_client_creates_follows_lists_downloads_and_deletes(address, jobs):
    client = official(address)
    options = {
        "num_inference_steps": 5,
        "seed": 3,
        "low_freq_energy_ratio": 0.2,
        "lora": ["style:0.5"],
        "flow_shift": 3,
    }
    made = client.videos.create(
        prompt=demo.PROMPT, input_reference=demo.IMAGE, size="80x64", seconds="1", model="demo", extra_body=options
    )
    assert (made.status, made.progress, made.object, made.model) == ("queued", 0, "video", "demo")
    assert (made.size, made.seconds, made.seed, made.lora, made.num_frames) == ("80x64", "1.0625", 3, ["style:0.5"], 17)
    assert jobs.get(made.id, "").request["image"].startswith("images/")
    finish(jobs, jobs.get(made.id, ""))
    done = client.videos.poll(made.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.expires_at == pytest.approx(done.completed_at + 7 * 86400, abs=1)
    contents = client.videos.download_content(made.id).read()
    assert contents == jobs.video(jobs.get(made.id, "")).read_bytes()
    assert client.videos.download_content(made.id, variant="spritesheet").read() == demo.IMAGE.read_bytes()
    others = [client.videos.create(prompt="b", input_reference=demo.IMAGE) for _ in range(3)]
    assert [video.id for video in client.videos.list(limit=2)][:4] == [*(video.id for video in others[::-1]), made.id]
    assert client.videos.list(limit=2, order="desc", after=others[1].id).data[0].id == others[0].id
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)
    (model,) = client.models.list()
    assert (model.id, model.defaults["num_frames"], model.lora) == ("demo", 17, ["style"])


def test_an_order_in_json_brings_its_picture_along(http, jobs):
    url = "data:image/png;base64," + base64.b64encode(demo.IMAGE.read_bytes()).decode()
    done = http.post("/v1/videos", json={"prompt": "a star", "input_reference": {"image_url": url}, "lora": "style"})
    assert done.status_code == 200, done.text
    job = jobs.get(done.json()["id"], "")
    assert (jobs.directory / job.request["image"]).read_bytes() == demo.IMAGE.read_bytes()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": "18"}, "num_frames must be 4k + 1, got 18: use 17 or 21"),
        ({"num_inference_steps": "101"}, "num_inference_steps: this server allows at most 100, got 101"),
        ({"size": "1x1"}, "size: "),
        ({"size": "1920x1088"}, "this server allows at most 921,600"),
        ({"num_frame": "5"}, "num_frame: unknown key, did you mean 'num_frames'?"),
        ({"seed": "-1"}, "seed: "),
        ({"guidance_scale": "nan"}, "guidance_scale: "),
        ({"prompt": ""}, "prompt: "),
        ({"model": "sora-2"}, "model: there is demo, not sora-2"),
        ({"lora": "/etc/passwd"}, "lora: there is no adapter '/etc/passwd'; known are: style"),
        ({"input_reference[image_url]": "file:///etc/passwd"}, None),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(http, jobs, fields, words):
    before = jobs.counts()
    done = posted(http, **fields)
    if words is None:  # the file that comes along is what counts
        assert done.status_code == 200
        return
    assert done.status_code == 422
    assert words in reason(done)
    assert jobs.counts() == before


def bomb() -> bytes:
    """A picture of few bytes and many pixels."""
    file = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"nothing", "input_reference: not an image of a known format"),
        (demo.IMAGE.read_bytes()[:200], "input_reference: cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "input_reference: not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "input_reference: not an image"),
        (None, "more than 67,108,864 pixels"),
        (b"", "input_reference: "),
    ],
)
def test_pictures_of_strangers_are_looked_at_before_anything_is_stored(http, jobs, image, words):
    before = sorted((jobs.directory / "images").iterdir())
    done = posted(http, bomb() if image is None else image)
    assert done.status_code == 422
    assert words in reason(done)
    assert "/" not in reason(done).replace(str(jobs.directory), "/")  # where it lies is nobody's business
    assert sorted((jobs.directory / "images").iterdir()) == before


def test_names_of_clients_never_reach_the_disk(http, jobs):
    for name in ("../../x", "/etc/passwd", "a" * 3000, "\u202e.png", ".."):
        done = http.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": (name, demo.IMAGE.read_bytes())})
        assert done.status_code == 200
    for path in ("/v1/videos/..%2f..%2fjobs.sqlite3/content", "/v1/videos/%00", "/v1/videos/video_%2e%2e/events"):
        assert http.get(path).status_code == 404
    assert {path.name for path in jobs.directory.iterdir()} >= {"images", "videos", "previews", "jobs.sqlite3"}
    assert all(len(path.name) == 64 for path in (jobs.directory / "images").iterdir())


def test_a_body_that_is_too_large_is_not_read(http):
    large = bytes(2**20 + 1)
    assert posted(http, large).status_code == 413
    parts = (large[:65536] for _ in range(20))  # without saying how long it will be
    assert http.post("/v1/videos", content=parts, headers={"content-type": "application/json"}).status_code == 413


class Elsewhere(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/image")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(demo.IMAGE.read_bytes() if self.path == "/image" else bytes(2**20 + 1))

    def log_message(self, *arguments):
        pass


def test_pictures_are_fetched_from_allowed_hosts_alone_and_nothing_is_followed(http):
    with http_server() as port:
        for url, status in (
            (f"http://127.0.0.1:{port}/image", 200),
            (f"http://127.0.0.1:{port}/moved", 422),
            (f"http://127.0.0.1:{port}/large", 422),
            (f"http://localhost:{port}/image", 422),
            (f"http://127.0.0.1@localhost:{port}/image", 422),
            ("file:///etc/passwd", 422),
            ("http://[", 422),
        ):
            done = http.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": url}})
            assert done.status_code == status, (url, done.text)
    assert Elsewhere.asked == ["/image", "/moved", "/large"]


class http_server:
    def __enter__(self) -> int:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self._server.server_port

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_no_more_wait_than_the_server_allows(tmp_path):
    from dataclasses import replace

    limits = replace(web_world.SERVED.limits, max_queue=1)
    service = Service(Jobs(tmp_path), replace(web_world.SERVED, limits=limits))
    with served(make_app(service, Keys([]))) as address, httpx.Client(base_url=address) as client:
        assert posted(client).status_code == 200
        done = posted(client)
    assert (done.status_code, done.headers["retry-after"]) == (429, "10")
    assert reason(done) == "1 videos wait already: try again later"


def test_keys_are_asked_for_and_nobody_sees_the_videos_of_another(guarded, jobs):
    with pytest.raises(openai.AuthenticationError):
        official(guarded, "bob-0123456789aX").videos.list()
    alice, bob = official(guarded, ALICE), official(guarded, BOB)
    made = alice.videos.create(prompt="secret", input_reference=demo.IMAGE)
    assert [video.id for video in alice.videos.list()] == [made.id]
    assert list(bob.videos.list()) == []
    for ask in (bob.videos.retrieve, bob.videos.delete, bob.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)
    with httpx.Client(base_url=guarded) as anybody:
        assert anybody.get("/health").status_code == 200
        for path in ("/v1/videos", "/v1/models", "/metrics", "/openapi.json", f"/v1/videos/{made.id}/events", "/"):
            assert anybody.get(path).status_code == 401
        # As browsers do.
        asked = anybody.get("/v1/videos")
        assert asked.headers["www-authenticate"].startswith("Basic")
        assert anybody.get("/v1/videos", auth=("any", ALICE)).status_code == 200
        for odd in ("Basic", "Basic !!!", "Bearer", f"Digest {ALICE}", "Bearer \xff"):
            headers = {"Authorization": odd.encode("latin-1")}
            assert anybody.get("/v1/videos", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "{address}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link
        ({"Host": "evil.example"}, 403),  # that was made to lead here
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(http, address, headers, status):
    headers = {name: value.format(address=address) for name, value in headers.items()}
    done = http.get("/v1/videos", headers=headers)
    assert done.status_code == status
    assert "access-control-allow-origin" not in done.headers


def test_content_comes_in_ranges_and_formats(http, jobs):
    job = add(jobs)
    assert http.get(f"/v1/videos/{job.id}/content").status_code == 400
    contents = finish(jobs, job).read_bytes()
    url = f"/v1/videos/{job.id}/content"
    part = http.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, contents[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(contents)}"
    assert http.get(url, headers={"Range": f"bytes={len(contents)}-"}).status_code == 416
    whole = http.get(url)
    assert (whole.content, whole.headers["content-type"]) == (contents, "video/mp4")
    assert whole.headers["x-content-type-options"] == "nosniff"
    for kind in ("gif", "webp"):
        for _ in range(2):  # made, and then kept
            done = http.get(url, params={"format": kind})
            assert (done.status_code, done.headers["content-type"]) == (200, f"image/{kind}")
        with Image.open(io.BytesIO(done.content)) as image:
            assert image.is_animated
        assert read_record(jobs.video(job).with_suffix(f".{kind}"))["prompt"] == demo.PROMPT
    with Image.open(io.BytesIO(http.get(url, params={"variant": "thumbnail"}).content)) as image:
        middle = read_frames(jobs.video(job), [8])[0]
        assert np.abs(np.asarray(image, int) - middle).mean() < 40  # of noise, in WebP
    assert http.get(url, params={"variant": "x"}).status_code == 422
    fast = add(jobs, fps=100)
    finish(jobs, fast)
    assert "at most 50" in reason(http.get(f"/v1/videos/{fast.id}/content", params={"format": "gif"}))


def test_events_show_progress_and_previews_and_end(http, jobs):
    job = add(jobs)
    taken = jobs.claim("w")
    while taken.id != job.id:
        jobs.end(taken, "failed")
        taken = jobs.claim("w")
    seen = []
    with http.stream("GET", f"/v1/videos/{job.id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        for line in lines:
            if line.startswith("event: "):
                seen.append((line[7:], json.loads(next(lines)[6:])))
                if len(seen) == 1:
                    jobs.progress(taken, 5, 25, 4.0)
                elif len(seen) == 2:
                    jobs.preview(job).write_bytes(b"picture")
                elif len(seen) == 3:
                    jobs.end(taken, "failed", code="failed", error="the disk is full")
    assert [name for name, _ in seen] == ["progress", "progress", "preview", "end"]
    assert [seen[1][1][name] for name in ("step", "progress", "seconds_left")] == [5, 19, 4.0]
    assert base64.b64decode(seen[2][1]["image"].partition(",")[2]) == b"picture"
    assert seen[3][1]["error"] == {"code": "failed", "message": "the disk is full"}
    jobs.preview(job).unlink()


def test_a_client_that_goes_away_cancels_if_it_asked_to(http, jobs):
    stays, goes = add(jobs), add(jobs)
    for job, asked in ((stays, "false"), (goes, "true")):
        with http.stream("GET", f"/v1/videos/{job.id}/events", params={"cancel_on_disconnect": asked}) as stream:
            next(stream.iter_lines())
    until(lambda: jobs.get(goes.id, "").state == "cancelled")
    assert jobs.get(stays.id, "").state == "queued"


def test_videos_are_cancelled_and_pinned(http, jobs):
    job = add(jobs)
    assert http.post(f"/v1/videos/{job.id}/pin").json()["pinned"] is True
    assert http.post(f"/v1/videos/{job.id}/pin", params={"pinned": False}).json()["pinned"] is False
    done = http.post(f"/v1/videos/{job.id}/cancel").json()
    assert (done["status"], done["error"]) == ("failed", {"code": "cancelled", "message": "cancelled"})


def test_health_and_metrics_tell_how_it_is(http, jobs, service):
    assert http.get("/health").json() == {"status": "ok", "workers_ready": 1}
    text = http.get("/metrics").text
    found = {name: float(value) for name, value in re.findall(r"^(flashi2v\S+) (\S+)$", text, re.M)}
    counts = jobs.counts()
    assert found['flashi2v_jobs{state="done"}'] == found["flashi2v_video_seconds_count"] == counts["done"]
    assert found["flashi2v_data_bytes"] == jobs.num_bytes() > 1000
    loading = Service(jobs, web_world.SERVED, num_ready=lambda: 0)
    with served(make_app(loading, Keys([]))) as address:
        done = httpx.get(f"{address}/health")
    assert (done.status_code, done.json()["status"]) == (503, "loading")


def test_a_full_disk_is_told_by_507(http, jobs, monkeypatch):
    job = add(jobs)
    video = finish(jobs, job)
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        done = http.get(f"/v1/videos/{job.id}/content", params={"format": "gif"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.status_code == 507, done.text
    assert not Path(f"{video.with_suffix('.gif')}").exists()


def test_the_interface_describes_itself(http):
    described = http.get("/openapi.json").json()
    forms = described["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(forms) == {"application/json", "multipart/form-data"}
    for form in forms.values():
        assert {"flow_shift", "lora", "low_freq_energy_ratio", "num_frames"} <= set(form["schema"]["properties"])
    # For people too, and offline.
    page = http.get("/docs").text
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(sources) >= 2
    for source in sources:
        assert source.startswith("/")
        assert http.get(source).status_code == 200
