"""The page: a form that orders videos, what is seen of them while they are sampled, and a history.

Gradio draws the form and carries its events; what is sampled is followed over the same `/v1/videos` that programs use.
"""

import os
import random
import shutil
import tempfile
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils
from PIL import EpsImagePlugin, Image
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from flashi2v_data import read_frames
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.schema_faults import fault_lines
from flashi2v_infer import demo
from flashi2v_infer.defaults import settings_of
from flashi2v_infer.files.export import read_record
from flashi2v_infer.settings import SamplingSettings
from flashi2v_infer.web.gate import Keys
from flashi2v_infer.web.jobs import Job
from flashi2v_infer.web.planner import Planner
from flashi2v_infer.web.schema import Order
from flashi2v_infer.web.service import Service
from flashi2v_infer.web.views import crop, history_view, job_view, pair_view
from flashi2v_model.speed.plan import PRESETS

_HERE = Path(__file__).parent
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MADE_HERE = (".mp4", ".gif", ".webp", ".png", ".json")
_NUM_SHOWN = 60
_CACHE_SECONDS = 86400
# Of the fields, in their order.
_NAMES = (
    *("image", "prompt", "negative_prompt", "size", "num_frames", "num_inference_steps", "guidance_scale"),
    *("low_freq_energy_ratio", "flow_shift", "fps", "seed", "lora", "speed"),
)
# Buttons in the HTML of `views` say what they do.
_ACT = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (button) trigger("click", {action: button.dataset.action, id: button.dataset.id});
});"""


def mount_page(app: FastAPI, service: Service, keys: Keys, planner: Planner) -> FastAPI:
    """Add the page to the HTTP interface.

    Args:
        app: the interface.
        service: what it stands on.
        keys: whose videos a browser sees.
        planner: tells what a video will take.
    """

    async def refused(url: str) -> Any:
        raise ValueError(f"nothing is fetched: {url}")

    processing_utils.async_ssrf_protected_get = refused  # which Gradio calls for an address in the place of a file
    Path(os.environ["GRADIO_TEMP_DIR"]).mkdir(parents=True, exist_ok=True)
    EpsImagePlugin.gs_binary = False  # Pillow starts no program, whatever the picture is
    page = _Page(service, keys, planner)
    return gr.mount_gradio_app(
        app,
        page.blocks(),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=service.served.limits.max_upload_mib * 2**20,
        theme=gr.themes.Base(primary_hue="indigo", font=_FONTS, font_mono=("ui-monospace", "monospace")),
        css_paths=_HERE / "page.css",
        head=f"<script>{(_HERE / 'page.js').read_text()}</script>",
    )


def _refusal(message: str) -> gr.Error:
    """Return what is shown above the page, and is no fault of the server."""
    return gr.Error(message, print_exception=False)


class _Page:
    def __init__(self, service: Service, keys: Keys, planner: Planner) -> None:
        self._service, self._jobs, self._keys, self._planner = service, service.jobs, keys, planner
        self._served, self._is_demo = service.served, service.served.source == demo.NAME

    def blocks(self) -> gr.Blocks:
        """Lay out the page, and say what happens on it."""
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        latest: dict[str, Any] = {**private, "trigger_mode": "always_last"}
        with gr.Blocks(
            title="FlashI2V", fill_width=True, analytics_enabled=False, delete_cache=(3600, _CACHE_SECONDS)
        ) as blocks:
            gr.HTML(f'<div id="head"><h1>FlashI2V</h1><span>{escape(self._served.model)}</span></div>')
            shown, pair = gr.State(""), gr.State([])
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=320):
                    fields, extras = self._form()
                with gr.Column(scale=3, min_width=320):
                    result = gr.HTML(elem_id="result", js_on_load=_ACT, padding=False)
            both = gr.HTML(elem_id="pair", js_on_load=_ACT, padding=False)
            search = gr.Textbox(label="History", placeholder="words of a prompt", elem_id="search")
            history = gr.HTML(elem_id="history", js_on_load=_ACT, padding=False)
            refresh = gr.Button(visible="hidden", elem_id="refresh")

            image, prompt, _, *sized = fields[:7]
            size, seed, planned = sized[0], fields[10], [*sized, fields[12]]
            views = [result, history]
            gr.on([extras["make"].click, prompt.submit], self.make, [*fields, search], [shown, *views], **private)
            extras["stop"].click(self.stop, [shown, search], views, **private)
            for news in (refresh.click, search.change):
                news(self.show, [shown, search], views, **latest)
            blocks.load(self.load, None, [shown, *views], **private)
            for part in (result, both, history):
                part.click(self.act, [shown, pair, search, *fields], [shown, pair, both, *views, *fields], **private)
            gr.on([image.change, size.change], self.crop, [image, size], extras["crop"], **latest)
            changes = [blocks.load, refresh.click, *(field.change for field in planned)]
            gr.on(changes, self.plan, planned, extras["plan"], **latest)
            extras["restore"].upload(self.restore, extras["restore"], [extras["restore"], *fields], **private)
            extras["dice"].click(lambda: str(random.randrange(2**31)), None, seed, **private)
            if self._is_demo:
                prompt.change(self.hint, prompt, extras["hint"], **latest)
                extras["hint"].click(lambda words: words, extras["hint"], prompt, **private)
                example = extras["examples"]
                example.click(lambda sample: [str(demo.IMAGE), sample[0]], example, [image, prompt], **private)
        return blocks

    def _form(self) -> tuple[list[Any], dict[str, Any]]:
        defaults, limits = settings_of(self._served.defaults), self._served.limits
        image = gr.Image(
            label="First frame: drop, paste or choose a picture",
            sources=["upload", "clipboard"],
            type="filepath",
            image_mode=None,  # the file itself: it is read as everywhere
            height=260,
            elem_id="image",
        )
        extras: dict[str, Any] = {"crop": gr.HTML(elem_id="crop", padding=False)}
        prompt = gr.Textbox(label="What happens", lines=2, max_length=10_000, elem_id="prompt")
        extras["hint"] = gr.Button(visible=False, size="sm", elem_id="hint")
        if self._is_demo:
            samples = [[sentence] for sentence in demo.SENTENCES[:3]]
            words = gr.Textbox(visible=False)
            extras["examples"] = gr.Dataset(components=[words], samples=samples, label="Examples", elem_id="examples")
        with gr.Row():
            extras["make"] = gr.Button("Make the video", variant="primary", elem_id="make")
            extras["stop"] = gr.Button("Stop", variant="stop", elem_id="stop")
        extras["plan"] = gr.HTML(elem_id="plan", padding=False)
        with gr.Accordion("Settings", open=False):
            width, height = defaults.width, defaults.height
            sizes = list(dict.fromkeys((f"{width}x{height}", f"{height}x{width}", f"{height}x{height}")))
            size = gr.Dropdown(
                sizes, value=sizes[0], label="Size", info="width x height, multiples of 16", allow_custom_value=True,
                elem_id="size",
            )  # fmt: skip
            frames = gr.Slider(1, limits.max_frames, defaults.num_frames, step=4, label="Frames", elem_id="frames")
            steps = gr.Slider(1, limits.max_steps, defaults.num_inference_steps, step=1, label="Steps", elem_id="steps")
            guidance = gr.Slider(
                1, 15, defaults.guidance_scale, step=0.1, label="Guidance",
                info="weight of the prompt; at 1 there is no negative prompt, and half the work",
            )  # fmt: skip
            detail = gr.Slider(
                0, 1, defaults.low_freq_energy_ratio, step=0.01, label="Detail",
                info="where the frequencies of the image that guide the video start",
            )  # fmt: skip
            negative = gr.Textbox(label="What should not happen", info="with a guidance above 1", max_length=10_000)
            with gr.Row():
                seed = gr.Textbox(label="Seed", info="drawn, if empty", elem_id="seed")
                extras["dice"] = gr.Button("Roll the dice", elem_id="dice")
            shift = gr.Textbox(label="Shift of the noise levels", info="the model's own, if empty")
            fps = gr.Number(self._served.defaults.fps or 16, label="Frames per second", minimum=1, maximum=240)
            lora = gr.Dropdown(
                list(self._served.adapters), multiselect=True, allow_custom_value=True, label="Adapters",
                info="name, or name:0.8 for a weight", visible=bool(self._served.adapters),
            )  # fmt: skip
            speed = gr.Dropdown(
                [*PRESETS], value="exact", allow_custom_value=True, label="Speed", visible=self._served.is_calibrated,
                info="balanced and fast leave calls of the network out; a number: so many times fewer", elem_id="speed",
            )  # fmt: skip
        extras["restore"] = gr.File(
            label="Drop a video or picture that was made here: its settings come back",
            file_types=list(_MADE_HERE),
            height=140,
            elem_id="restore",
        )
        return [image, prompt, negative, size, frames, steps, guidance, detail, shift, fps, seed, lora, speed], extras

    # What happens. Each knows whose browser it is by the request, which Gradio hands on.

    def _owner(self, request: gr.Request) -> str:
        owner = self._keys.owner(request.headers.get("authorization", ""))
        if owner is None:  # the gate let nobody in without
            raise _refusal("a key is needed")
        return owner

    def show(self, id: str, words: str, request: gr.Request) -> tuple[str, str]:
        """Show a job, and the history."""
        owner = self._owner(request)
        job = self._jobs.get(id, owner)
        return job_view(self._jobs, job), history_view(self._jobs.find(owner, limit=_NUM_SHOWN, words=words), id)

    def load(self, request: gr.Request) -> tuple[str, str, str]:
        """Show what is newest."""
        newest = self._jobs.find(self._owner(request), limit=1)
        id = newest[0].id if newest else ""
        return id, *self.show(id, "", request)

    def make(self, request: gr.Request, image: str | None, *rest: Any) -> tuple[str, str, str]:
        """Queue what the form says."""
        *values, words = rest
        if not image:
            raise _refusal("give an image first")
        given = {name: value for name, value in zip(_NAMES[1:], values) if value not in (None, "", [])}
        try:
            order = Order.model_validate(given)
            job = self._service.add(self._owner(request), order, Path(image).read_bytes())
        except ValidationError as error:
            name, reason = fault_lines(error, Order)[0]
            raise _refusal(f"{name}: {reason}") from None
        except InputError as error:
            raise _refusal(str(error)) from None
        except HTTPException as error:
            raise _refusal(error.detail) from None
        return job.id, *self.show(job.id, words, request)

    def stop(self, id: str, words: str, request: gr.Request) -> tuple[str, str]:
        """Cancel the job that is shown."""
        self._jobs.cancel(id, self._owner(request))
        return self.show(id, words, request)

    def act(
        self, request: gr.Request, event: gr.EventData, shown: str, pair: list[str], words: str, *fields: Any
    ) -> list[Any]:
        """Do what a button in the HTML says, with the job that it names."""
        owner, action, id = self._owner(request), str(event.action), str(event.id)
        job = self._jobs.get(id, owner)
        filled: list[Any] = [gr.skip()] * len(fields)
        if action == "apart":
            pair = []
        elif job is None:
            pass
        elif action == "open":
            shown = id
        elif action == "delete":
            self._jobs.delete(id, owner)
            pair = [other for other in pair if other != id]
        elif action in ("pin", "unpin"):
            self._jobs.pin(id, owner, action == "pin")
        elif action == "compare":
            pair = [*(other for other in pair if other != id), id][-2:]
        elif action == "again":
            filled = self._filled(job.request, self._copy(self._jobs.directory / job.request["image"]))
        elif action == "last":
            filled[0] = self._last_frame(job)
        pairs = [found for other in pair if (found := self._jobs.get(other, owner))]
        return [shown, pair, pair_view(pairs), *self.show(shown, words, request), *filled]

    def restore(self, request: gr.Request, path: str) -> list[Any]:
        """Fill the form in from the record of a file."""
        try:
            record = read_record(path)
            image = self._image_of(record, path, self._owner(request))
            return [None, *self._filled(record, image)]
        except (InputError, DecodeError) as error:
            raise _refusal(str(error).replace(str(Path(path)), Path(path).name)) from None
        except (KeyError, TypeError, AttributeError):
            raise _refusal(f"{Path(path).name}: its record is of another version") from None

    def _image_of(self, record: dict[str, Any], path: str, owner: str) -> str:
        """Return the image that a video was made from, where it is here, else its first frame."""
        name = str(record.get("image_contents", "")).removeprefix("sha256:")
        if stored := self._jobs.image_of(owner, name):
            return self._copy(self._jobs.directory / stored)
        if path.endswith(".mp4"):
            return self._picture(Image.fromarray(read_frames(path, [0])[0]))
        return path

    def _filled(self, record: dict[str, Any], image: str) -> list[Any]:
        """Return the values of all fields that a record, or what a job was asked for, stands for."""
        settings = record["settings"]
        shift = record.get("flow_shift") or record.get("model_settings", {}).get("scheduler", {}).get("shift")
        known = {path: name for name, path in self._served.adapters.items()}
        lora = []
        for text in record.get("lora", []):
            source, _, scale = text.rpartition(":")
            lora.append(f"{known[source]}:{scale}" if source in known else text)
        names = ("num_frames", "num_inference_steps", "guidance_scale", "low_freq_energy_ratio")
        speed = str(settings.get("speed", "exact"))
        size = f"{settings['width']}x{settings['height']}"
        numbers = [settings[name] for name in names]
        words = (record["prompt"], record.get("negative_prompt", ""))
        return [
            image,
            *words,
            size,
            *numbers,
            f"{shift:g}" if shift else "",
            record["fps"],
            str(record["seed"]),
            lora,
            speed,
        ]

    def _last_frame(self, job: Job) -> str:
        last = job.request["settings"]["num_frames"] - 1
        return self._picture(Image.fromarray(read_frames(self._jobs.video(job), [last])[0]))

    def _picture(self, picture: Image.Image) -> str:
        path = self._new_file(".png")
        picture.save(path)
        return path

    def _copy(self, path: Path) -> str:
        """Copy a stored picture to where Gradio may show it."""
        with Image.open(path) as image:
            suffix = f".{str(image.format).lower()}"
        return str(shutil.copy(path, self._new_file(suffix)))

    @staticmethod
    def _new_file(suffix: str) -> str:
        handle, path = tempfile.mkstemp(suffix, dir=os.environ["GRADIO_TEMP_DIR"])
        os.close(handle)
        return path

    def crop(self, image: str | None, size: str) -> str:
        """Show the image as it will be cropped."""
        if not image:
            return ""
        try:
            settings = self._settings(size)
            return crop(image, settings.height, settings.width)
        except InputError as error:
            return f'<p class="f2v fault">{str(error).replace(image, Path(image).name)}</p>'

    def plan(self, size: str, frames: float, steps: float, guidance: float, speed: str) -> str:
        """Say what a video of these settings will take."""
        try:
            settings = self._settings(size, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance)
            settings = replace(settings, speed=speed)
            self._served.limits.check(settings)
            return self._planner.tell(settings)
        except InputError as error:
            return f'<span class="fault">{error}</span>'

    def _settings(self, size: str, **numbers: float) -> SamplingSettings:
        try:
            width, height = map(int, str(size).lower().split("x"))
        except ValueError:
            raise InputError("size: write width x height, as in 832x480") from None
        whole = {name: int(value) if name.startswith("num") else float(value) for name, value in numbers.items()}
        return settings_of(self._served.defaults, width=width, height=height, **whole)

    def hint(self, prompt: str) -> Any:
        """Offer the nearest sentence that the demo model knows."""
        return gr.update(value=demo.nearest_sentence(prompt), visible=demo.prompt_note(prompt) is not None)
