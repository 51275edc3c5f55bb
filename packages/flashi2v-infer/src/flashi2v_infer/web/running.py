"""The server while it runs: its queue, its workers, the HTTP interface and the page."""

import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI

from flashi2v_data.locking import hold
from flashi2v_infer.errors import SamplingError
from flashi2v_infer.web.cli import AccessOptions, ModelOptions
from flashi2v_infer.web.gate import Keys
from flashi2v_infer.web.jobs import Jobs
from flashi2v_infer.web.page import mount_page
from flashi2v_infer.web.planner import Planner
from flashi2v_infer.web.server import make_app
from flashi2v_infer.web.service import Service
from flashi2v_infer.web.worker import Setup
from flashi2v_infer.web.workers import Workers, num_devices

_END_SECONDS = 3


def serve(
    setup: Setup, options: ModelOptions, access: AccessOptions, keys: Sequence[str], listener: socket.socket
) -> None:
    """Serve until the process is told to end.

    Args:
        setup: of the workers.
        options: how many they are, and how long videos are kept.
        access: who may ask.
        keys: that open the server.
        listener: where requests come in.

    Raises:
        InputError: the model cannot be used, or another server has the directory.
        SamplingError: no worker could load the model.
    """
    model = setup.model(setup.served.choices(list(setup.served.adapters)))
    model.check()
    number = options.workers or num_devices(model, setup.execution)
    keep_bytes = None if options.keep_gib is None else options.keep_gib * 2**30
    url_hosts = frozenset(access.allow_url_hosts or ())
    setup.data.mkdir(parents=True, exist_ok=True)
    with hold(setup.data / "lock", f"--data {setup.data}"):
        jobs = Jobs(setup.data)
        workers = Workers(setup, jobs, number)
        service = Service(jobs, setup.served, workers.wake, workers.num_ready, options.keep_days, keep_bytes, url_hosts)
        opened = Keys(keys)
        app = make_app(service, opened, access.names(keys))
        mount_page(app, service, opened, Planner(setup, jobs))
        _run(app, listener, workers)
        if workers.have_failed:
            raise SamplingError("no worker could load the model: see above")


def _run(app: FastAPI, listener: socket.socket, workers: Workers) -> None:
    options = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": _END_SECONDS, "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # once the server has answered the last
    workers.start(on_failure=lambda: setattr(server, "should_exit", True))
    try:
        address, port = listener.getsockname()[:2]
        print(f"flashi2v-web: http://{f'[{address}]' if ':' in address else address}:{port}", flush=True)
        server.run(sockets=[listener])
    finally:
        workers.stop()
