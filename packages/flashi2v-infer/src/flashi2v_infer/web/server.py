"""The HTTP interface: OpenAI's `/v1/videos` as its clients speak it, events, health, metrics, and the page.

A request comes through the `gate`, is read into an `Order`, becomes a job in the queue, and is answered by what the
queue says of it. Nothing is kept in this process that a restart would lose.
"""

import asyncio
import base64
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import anyio
import prometheus_client
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from flashi2v_data.errors import InputError, StorageError
from flashi2v_infer import __version__
from flashi2v_infer.web.gate import Gate, Keys, fault
from flashi2v_infer.web.incoming import from_url, order_schema, read
from flashi2v_infer.web.jobs import ENDED, Job
from flashi2v_infer.web.schema import Video
from flashi2v_infer.web.service import Service

T = TypeVar("T")

_POLL_SECONDS, _BEAT_SECONDS = 0.2, 5.0
_DECODERS = 2  # pictures that are looked at at once: each may take hundreds of MB
_TYPES = {"mp4": "video/mp4", "gif": "image/gif", "webp": "image/webp"}
_SWEEP_SECONDS = 30.0


class Problem(BaseModel):
    """An error as OpenAI has it."""

    message: str
    type: str
    param: str | None
    code: str | None


class Problems(BaseModel):
    """What is answered where something is wrong."""

    error: Problem


class Page(BaseModel):
    """Some videos, the newest first."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """That a video is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "loading"]
    workers_ready: int


def make_app(service: Service, keys: Keys, hosts: Collection[str] | None = None) -> FastAPI:
    """Return the whole HTTP interface, without the page.

    Args:
        service: what it stands on.
        keys: who may ask.
        hosts: as of `Gate`.
    """
    app: FastAPI = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        title="FlashI2V",
        version=__version__,
        description="Videos that start with an image.",
        lifespan=_living,
        exception_handlers=_FAULTS,
    )
    app.state.service = service
    app.state.metrics = prometheus_client.CollectorRegistry()
    app.state.metrics.register(_Collector(service))
    app.add_middleware(Gate, keys=keys, max_bytes=service.served.limits.max_upload_mib * 2**20, hosts=hosts)
    app.include_router(_videos)
    app.include_router(_others)
    return app


def _wrong(request: Request, error: InputError) -> Response:
    return fault(422, str(error), code="invalid_value", param=str(error).partition(":")[0].split(" ")[0])


def _malformed(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"][1:]))
    return fault(422, f"{where}: {first['msg']}", code=first["type"], param=where)


def _refused(request: Request, error: HTTPException) -> Response:
    response = fault(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


def _full(request: Request, error: Exception) -> Response:
    return fault(507, f"the server cannot store it: {error}", code="storage")


_FAULTS: dict[int | type[Exception], Any] = {
    InputError: _wrong,
    RequestValidationError: _malformed,
    HTTPException: _refused,
    StorageError: _full,
    sqlite3.OperationalError: _full,
}


@contextlib.asynccontextmanager
async def _living(app: FastAPI) -> AsyncIterator[None]:
    app.state.decoders = anyio.CapacityLimiter(_DECODERS)  # made in the loop that it belongs to
    task = asyncio.create_task(_sweep(app.state.service))
    yield
    task.cancel()


async def _sweep(service: Service) -> None:
    while True:
        with contextlib.suppress(OSError, sqlite3.OperationalError):  # a full disk, of which jobs tell
            await _aside(service.jobs.sweep, service.keep_days, service.keep_bytes)
        await asyncio.sleep(_SWEEP_SECONDS)


async def _aside(function: Callable[..., T], *arguments: Any) -> T:
    """Run what waits for the disk in a thread."""
    return await anyio.to_thread.run_sync(partial(function, *arguments))


def _answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Problems} for code in (401, 403, 413, 422, *codes)}


def _service(request: Request) -> Service:
    return request.app.state.service


_Service = Annotated[Service, Depends(_service)]


def _job(id: str, request: Request, service: _Service) -> Job:
    job = service.jobs.get(id, request.state.owner)
    if job is None:
        raise HTTPException(404, f"there is no video {id!r}")
    return job


_Found = Annotated[Job, Depends(_job)]
_videos, _others = APIRouter(prefix="/v1/videos", tags=["videos"]), APIRouter()


@_videos.post("", responses=_answers(400, 408, 429, 507), openapi_extra=order_schema())
async def create(request: Request, service: _Service) -> Video:
    """Queue a video that starts with an image; a file of it, or as JSON a data: URL."""
    order, image = await read(request)
    if image is None:
        if order.input_reference is None:
            raise InputError("input_reference: the image that the video starts with is missing")
        image = await from_url(order.input_reference.image_url, service)
    add = partial(service.add, request.state.owner, order, image)
    job = await anyio.to_thread.run_sync(add, limiter=request.app.state.decoders)
    return await _aside(service.describe, job)


@_videos.get("", responses=_answers(404))
def list_videos(
    request: Request,
    service: _Service,
    after: Annotated[str | None, Query(max_length=64, description="The id that they follow.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Page:
    """List your videos, page by page."""
    number = None if after is None else _job(after, request, service).number
    found = service.jobs.find(request.state.owner, limit=limit + 1, after=number, ascending=order == "asc")
    shown = [service.describe(job) for job in found[:limit]]
    ids: list[str | None] = [video.id for video in shown] or [None]
    return Page(data=shown, has_more=len(found) > limit, first_id=ids[0], last_id=ids[-1])


@_videos.get("/{id}", responses=_answers(404))
def retrieve(job: _Found, service: _Service) -> Video:
    """Say how far a video is."""
    return service.describe(job)


@_videos.delete("/{id}", responses=_answers(404))
def delete(job: _Found, service: _Service) -> Deleted:
    """Remove a video; one that is not finished is cancelled."""
    service.jobs.delete(job.id, job.owner)
    return Deleted(id=job.id)


@_videos.post("/{id}/cancel", responses=_answers(404))
def cancel(job: _Found, request: Request, service: _Service) -> Video:
    """Stop a video: at once where it waits, else within one step and a second."""
    service.jobs.cancel(job.id, job.owner)
    return service.describe(_job(job.id, request, service))


@_videos.post("/{id}/pin", responses=_answers(404))
def pin(job: _Found, request: Request, service: _Service, pinned: bool = True) -> Video:
    """Keep a video whatever the limits of the server are, or no longer."""
    service.jobs.pin(job.id, job.owner, pinned)
    return service.describe(_job(job.id, request, service))


@_videos.get(
    "/{id}/content",
    responses={**_answers(400, 404, 507), 200: {"content": {kind: {} for kind in (*_TYPES.values(), "image/png")}}},
    response_class=FileResponse,
)
def content(
    job: _Found,
    service: _Service,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    format: Annotated[Literal["mp4", "gif", "webp"], Query(description="Of the video.")] = "mp4",
) -> FileResponse:
    """Return a finished video, whole or a range of its bytes; or one picture of it, or several in a row."""
    if job.state != "done":
        raise HTTPException(400, f"video {job.id} is {job.state}: it has no content")
    path = service.rendition(job, format if variant == "video" else variant)
    if not path.exists():  # it was removed in between
        raise HTTPException(404, f"there is no video {job.id!r}")
    media = _TYPES.get(path.suffix[1:], "image/png")
    return FileResponse(path, media_type=media, filename=path.name, content_disposition_type="inline")


@_videos.get(
    "/{id}/events", responses={**_answers(404), 200: {"content": {"text/event-stream": {}}}},
    response_class=StreamingResponse,
)  # fmt: skip
def events(job: _Found, service: _Service, cancel_on_disconnect: bool = False) -> StreamingResponse:
    """Follow a video: `progress` has it as JSON, `preview` what is seen of it so far, `end` comes last."""
    stream = _follow(service, job, cancel_on_disconnect)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _follow(service: Service, job: Job, cancels: bool) -> AsyncIterator[str]:
    shown, preview, quiet = None, 0, 0.0
    try:
        while True:
            found = await _aside(service.jobs.get, job.id, job.owner)
            if found is None:
                return
            job, before = found, shown
            shown = (await _aside(service.describe, job)).model_dump_json()
            if job.has_ended:
                yield _event("end", shown)
                return
            if shown != before:
                quiet = 0.0
                yield _event("progress", shown)
            with contextlib.suppress(FileNotFoundError):
                file = service.jobs.preview(job)
                if preview != (preview := file.stat().st_mtime_ns):
                    picture = base64.b64encode(await _aside(file.read_bytes)).decode()
                    yield _event(
                        "preview", json.dumps({"step": job.step, "image": f"data:image/webp;base64,{picture}"})
                    )
            await asyncio.sleep(_POLL_SECONDS)
            if (quiet := quiet + _POLL_SECONDS) >= _BEAT_SECONDS:  # so that a reader who has gone is noticed
                quiet = 0.0
                yield ": \n\n"
    finally:
        if cancels and not job.has_ended:
            service.jobs.cancel(job.id, job.owner)


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


@_others.get("/v1/models", tags=["models"], responses=_answers())
def models(service: _Service) -> dict[str, Any]:
    """Return the one model that is served, what it was trained for, and the adapters there are."""
    served = service.served
    about = {"defaults": served.defaults.model_dump(exclude_none=True), "lora": list(served.adapters)}
    model = {"id": served.model, "object": "model", "created": 0, "owned_by": "flashi2v"}
    return {"object": "list", "data": [model | about]}


@_others.get("/health", responses={503: {"model": Health}})
def health(response: Response, service: _Service) -> Health:
    """Say whether videos are sampled."""
    ready = service.num_ready()
    response.status_code = 200 if ready else 503
    return Health(status="ok" if ready else "loading", workers_ready=ready)


@_others.get("/metrics", responses={**_answers(), 200: {"content": {"text/plain": {}}}}, response_class=Response)
def metrics(request: Request) -> Response:
    """Return what Prometheus collects."""
    told = prometheus_client.generate_latest(request.app.state.metrics)
    return Response(told, media_type=prometheus_client.CONTENT_TYPE_LATEST)


class _Collector:
    """Reads the numbers off the queue whenever they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        jobs = self._service.jobs
        counts = jobs.counts()
        states = GaugeMetricFamily("flashi2v_jobs", "Jobs by state", labels=["state"])
        for state in ("queued", "running", *ENDED):
            states.add_metric([state], counts.get(state, 0))
        yield states
        number, seconds = jobs.seconds_done()
        yield SummaryMetricFamily("flashi2v_video_seconds", "Seconds a video took", number, seconds)
        yield GaugeMetricFamily("flashi2v_workers_ready", "Workers with the model", self._service.num_ready())
        yield GaugeMetricFamily("flashi2v_data_bytes", "Bytes of files", jobs.num_bytes())
