"""What the tests of the web share: the demo model served, jobs that are done without sampling, servers."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import uvicorn

from flashi2v_infer import demo, save_video
from flashi2v_infer.defaults import read_defaults
from flashi2v_infer.web.jobs import Job, Jobs
from flashi2v_infer.web.schema import Limits, Order, Served, request_of

SERVED = Served(
    "demo", "demo", read_defaults("demo"), Limits(max_upload_mib=1), {"style": "/adapters/style.safetensors"}
)


def until(is_so: Callable[[], object]) -> None:
    while not is_so():
        time.sleep(0.01)


def add(jobs: Jobs, owner: str = "", **order: object) -> Job:
    """Queue a job."""
    image = jobs.add_image(demo.IMAGE.read_bytes())
    return jobs.add(owner, SERVED.request(Order(**{"prompt": demo.PROMPT, "seed": 1, **order}), image), 10**6)


def finish(jobs: Jobs, job: Job) -> Path:
    """Do what a worker does, without sampling: noise for a video."""
    while (taken := jobs.claim("w")).id != job.id:
        jobs.end(taken, "failed", code="failed", error="left out")
    settings = request_of(job).settings
    frames = np.random.default_rng(0).integers(0, 256, (settings.num_frames, settings.height, settings.width, 3), "u1")
    record = {**job.request, "versions": {}}
    save_video(jobs.video(job), frames, job.request["fps"], record)
    jobs.video(job).with_suffix(".png").write_bytes(demo.IMAGE.read_bytes())
    jobs.end(taken, "done")
    return jobs.video(job)


@contextlib.contextmanager
def served(app: object) -> Iterator[str]:
    """Serve an application from a thread; yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join()
