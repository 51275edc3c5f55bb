"""The parts of the page that show jobs, as HTML. All that clients wrote is escaped."""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from flashi2v_data.loading.transforms import center_crop_resize
from flashi2v_infer.files.pictures import read_image
from flashi2v_infer.web.jobs import Job, Jobs
from flashi2v_infer.web.schema import request_of

_LARGEST, _SMALL = 832, 256  # pixels of the longer side


@lru_cache(256)
def cropped(path: Path, height: int, width: int) -> str:
    """Return a picture as a video of this size will start, as a data: URL.

    Raises:
        InputError: it cannot be read.
    """
    picture = Image.fromarray(center_crop_resize(read_image(path, "image")[None], height, width)[0])
    picture.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def crop(path: str, height: int, width: int) -> str:
    """Return the picture that a video will start with."""
    source = cropped(Path(path), height, width)
    return f'<div class="f2v"><img src="{source}" alt="the first frame, cropped to {width} x {height}"></div>'


def job_view(jobs: Jobs, job: Job | None) -> str:
    """Return what is known of a job: what is seen of it so far, or its video, and what can be done with it."""
    if job is None:
        return '<div class="f2v"><p class="empty">Give an image, say what happens, and make a video.</p></div>'
    settings = request_of(job).settings
    small = ' class="small"' if max(settings.height, settings.width) <= _SMALL else ""
    first = cropped(jobs.directory / job.request["image"], settings.height, settings.width)
    size = f'width="{settings.width}" height="{settings.height}"'
    image = f'<figure{small}><img src="{first}" {size} alt="the image"><figcaption>image</figcaption></figure>'
    if job.state == "done":
        return _done(job, image, small, size)
    if job.has_ended:
        error = escape(job.error or "cancelled")
        below = f'<p class="fault" role="status">{error}</p>{_tools(job)}{_facts(job)}'
        return f'<div class="f2v"><div class="f2v-pair">{image}</div>{below}</div>'
    return (
        f'<div class="f2v" data-follow="/v1/videos/{job.id}/events"><div class="f2v-pair">{image}'
        '<figure><img class="preview" alt="what is seen of it so far" hidden><figcaption>preview</figcaption></figure>'
        '</div><progress max="100" value="0" aria-label="progress"></progress>'
        f'<p class="state" role="status">waiting</p>{_facts(job)}</div>'
    )


def _done(job: Job, image: str, small: str, size: str) -> str:
    url = f"/v1/videos/{job.id}/content"
    links = "".join(
        f'<a href="{url}?format={kind}" download="{job.id}.{kind}">{name}</a>'
        for kind, name in (("mp4", "MP4"), ("gif", "GIF"), ("webp", "WebP"))
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in job.notes)
    return (
        f'<div class="f2v"><div class="f2v-pair">{image}<figure{small}><video src="{url}" {size} autoplay loop muted '
        "playsinline controls></video><figcaption>video</figcaption></figure></div>"
        f'<img class="strip" src="{url}?variant=spritesheet" alt="frames of the video in a row">'
        f"{_tools(job, links)}{notes}{_facts(job)}</div>"
    )


def _tools(job: Job, links: str = "") -> str:
    actions = {"again": "Its settings", "delete": "Delete"}
    if job.state == "done":
        pin = {"unpin": "Unpin"} if job.pinned else {"pin": "Pin"}
        actions = {"last": "Last frame as image", "compare": "Compare", **pin, **actions}
    return f'<div class="tools">{links}{_buttons(job, actions)}</div>'


def _buttons(job: Job, actions: dict[str, str]) -> str:
    return "".join(
        f'<button data-action="{name}" data-id="{job.id}">{label}</button>' for name, label in actions.items()
    )


def _facts(job: Job) -> str:
    request, settings = job.request, job.request["settings"]
    facts = [
        f"{settings['width']} x {settings['height']}, {settings['num_frames']} frames at {request['fps']:g} fps",
        f"{settings['num_inference_steps']} steps",
        f"guidance {settings['guidance_scale']:g}",
        f"detail {settings['low_freq_energy_ratio']:g}",
        *([f"speed {settings['speed']}"] if settings.get("speed", "exact") != "exact" else []),
        f"seed {request['seed']}",
        *(escape(name) for name in request["lora"]),
    ]
    seconds = f", made in {job.ended - job.started:.1f} s" if job.state == "done" and job.ended and job.started else ""
    return f'<p class="facts"><b>{escape(request["prompt"])}</b><br>{"; ".join(facts)}{seconds}</p>'


def history_view(found: Sequence[Job], shown: str) -> str:
    """Return jobs as cards."""
    if not found:
        return '<div class="f2v"><p class="empty">Nothing yet.</p></div>'
    return f'<div class="f2v"><ul class="f2v-cards">{"".join(_card(job, job.id == shown) for job in found)}</ul></div>'


def _card(job: Job, is_shown: bool) -> str:
    prompt = escape(job.request["prompt"])
    picture = f'<span class="none">{job.state}</span>'
    if job.state == "done":
        source = f"/v1/videos/{job.id}/content?variant=thumbnail"
        picture = f'<img src="{source}" loading="lazy" alt="{escape(job.request["prompt"], quote=True)}">'
    shown, pin = ' class="shown"' if is_shown else "", "&#128204; " if job.pinned else ""
    opens = f'<button class="open" data-action="open" data-id="{job.id}">{picture}'
    actions = {"compare": "Compare", "delete": "Delete"} if job.state == "done" else {"delete": "Delete"}
    tools = f'<div class="tools">{_buttons(job, actions)}</div>'
    return f'<li{shown}>{opens}<p class="words">{pin}{prompt}</p></button>{tools}</li>'


def pair_view(pair: Sequence[Job]) -> str:
    """Return two videos that play in step; one waits for the other."""
    if not pair:
        return ""
    if len(pair) == 1:
        first = escape(pair[0].request["prompt"])
        return f'<div class="f2v"><p class="note">Choose another video to compare with: {first}</p></div>'
    videos = "".join(
        f'<figure><video src="/v1/videos/{job.id}/content" {"controls" if first else ""} autoplay muted playsinline>'
        f"</video><figcaption>{_facts(job)}</figcaption></figure>"
        for job, first in zip(pair, (True, False))
    )
    close = '<div class="tools"><button data-action="apart" data-id="">Close the comparison</button></div>'
    return f'<div class="f2v"><div class="f2v-pair" data-in-step>{videos}</div>{close}</div>'
