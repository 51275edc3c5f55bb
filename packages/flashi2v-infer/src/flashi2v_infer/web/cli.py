"""The command line `flashi2v-web`."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, Group, Parameter

from flashi2v_data.atomic import check_directory
from flashi2v_data.console import importing, run
from flashi2v_data.errors import InputError
from flashi2v_data.textfile import read_text
from flashi2v_infer import __version__, demo
from flashi2v_infer.defaults import directory_of, read_defaults
from flashi2v_infer.execution import Execution
from flashi2v_infer.web.schema import Limits, Served
from flashi2v_model.adapter_choice import read_choices
from flashi2v_model.config import SchedulerName
from flashi2v_model.speed.calibration import FILE as CALIBRATION
from flashi2v_npu_ops.installation import loading_told

app = App(name="flashi2v-web", version=__version__, help_format="plaintext")

_Flag = Annotated[bool, Parameter(negative=())]
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LONGEST_KEYS, _SHORTEST_KEY = 2**16, 16
_LIMITS = Limits()


@dataclass(frozen=True)
class ModelOptions:
    """What is served.

    Attributes:
        model: A pipeline directory in diffusers' layout, a hub id, or demo: the small model that comes with the package
            (default).
        lora: A LoRA adapter that clients may ask for by its file's name without suffix. Again for another.
        scheduler: The sampler: euler, heun, unipc or dpm++ (default: the model's own).
        data: Directory of the queue and of all videos (default: flashi2v in $XDG_DATA_HOME or ~/.local/share).
        keep_days: Remove videos that are older, unless they are pinned (default: never).
        keep_gib: Remove the oldest videos, unless they are pinned, while there are more GiB (default: never).
        workers: Processes that sample at once, each on its own device (default: as many as there are accelerators, one
            on the CPU).
    """

    model: str = demo.NAME
    lora: list[str] | None = None
    scheduler: SchedulerName | None = None
    data: Path | None = None
    keep_days: float | None = None
    keep_gib: float | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_days", "keep_gib", "workers"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")


@dataclass(frozen=True)
class AccessOptions:
    """Who may ask.

    Attributes:
        host: Address to listen at; 0.0.0.0 are all of this machine, and then --api-key or --open is needed.
        port: To listen at; 0 takes a free one.
        api_key: A key that opens the server, or @FILE with one a line. Again for another; nobody sees the videos of
            another key. The variable FLASHI2V_API_KEY does as well. Browsers ask for a name, any, and the key.
        open: Whoever reaches the server may use it, without a key.
        allow_host: A name by which browsers may call a server without keys, besides this machine's own.
        allow_url_hosts: A host from which pictures may be fetched; from no other any is.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Parameter(negative=())] = 7860
    api_key: Annotated[list[str] | None, Parameter(env_var="FLASHI2V_API_KEY")] = None
    open: _Flag = False
    allow_host: list[str] | None = None
    allow_url_hosts: list[str] | None = None

    def keys(self) -> list[str]:
        """Return all keys.

        Raises:
            InputError: one is short, a file cannot be read, or there is none where one is needed.
        """
        found: list[str] = []
        for text in self.api_key or ():
            lines = read_text(text[1:], _LONGEST_KEYS).split() if text.startswith("@") else [text]
            found += lines
            if not lines or min(map(len, lines)) < _SHORTEST_KEY:
                where = f" in {text[1:]}" if text.startswith("@") else ""
                raise InputError(f"--api-key: a key{where} has fewer than {_SHORTEST_KEY} characters")
        if found and self.open:
            raise InputError("--open is for a server without keys: leave it out, or --api-key")
        if self.host not in _LOOPBACK and not found and not self.open:
            raise InputError(
                f"--host {self.host}: others reach the server there: give --api-key, or --open to let all in"
            )
        return found

    def names(self, keys: Sequence[str]) -> set[str] | None:
        """Return the names that the server goes by; None are all."""
        return None if keys or self.open else {*_LOOPBACK, *map(str.lower, self.allow_host or ())}

    def listen(self) -> socket.socket:
        """Take the port.

        Raises:
            InputError: it cannot be had.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"cannot listen at {self.host} port {self.port}: {reason}: choose another --port"
            ) from None


@dataclass(frozen=True)
class ExecutionOptions(Execution):
    # Prompts come one by one, for ever: the text encoder stays.
    vae_slicing: Annotated[bool | None, Parameter(parse=False)] = None
    low_memory: Annotated[bool, Parameter(parse=False)] = False
    compile: _Flag = False
    cfg_batch: _Flag = False
    keep_text_encoder: Annotated[bool, Parameter(parse=False)] = True

    __doc__ = Execution.__doc__


def main() -> NoReturn:
    """Run the command line."""
    run(app)


@app.default
@loading_told()
def web(
    *,
    model: Annotated[ModelOptions, Parameter(name="*", group=Group("What is served", sort_key=1))] = ModelOptions(),
    access: Annotated[AccessOptions, Parameter(name="*", group=Group("Who may ask", sort_key=2))] = AccessOptions(),
    limits: Annotated[Limits, Parameter(name="*", group=Group("How much at most", sort_key=3))] = _LIMITS,
    execution: Annotated[
        ExecutionOptions, Parameter(name="*", group=Group("How to compute", sort_key=4))
    ] = ExecutionOptions(),
) -> None:
    """Sample videos from a browser, or by OpenAI's interface `/v1/videos`.

    Videos wait in a queue on disk and are kept with all that made them; they are those of flashi2v-infer.

    For example:

    flashi2v-web

    flashi2v-web --model FlashI2V-1.3B --lora style.safetensors --host 0.0.0.0 --api-key @keys.txt --keep-gib 100
    """
    keys = access.keys()
    served = _served(model, limits)
    data = (model.data or _usual_data()).absolute()
    check_directory(data, "--data")
    os.environ["GRADIO_TEMP_DIR"] = str(data / "uploads")  # which it reads when it is imported
    with access.listen() as listener:
        try:
            with importing():
                from flashi2v_infer.web.running import serve
                from flashi2v_infer.web.worker import Setup
        except ModuleNotFoundError as error:
            raise InputError(f"{error.name} is not installed: pip install 'flashi2v-infer[web]'") from None
        serve(Setup(data, served, execution, model.scheduler), model, access, keys, listener)


def _served(options: ModelOptions, limits: Limits) -> Served:
    """Return what is served: files by absolute names, as workers live elsewhere.

    Raises:
        InputError: two adapters go by one name.
    """
    adapters: dict[str, str] = {}
    for choice in read_choices(options.lora or ()):
        path = Path(choice.source)
        if path.stem in adapters:
            raise InputError(f"--lora: two adapters go by the name {path.stem}: rename one of the files")
        adapters[path.stem] = str(path.absolute()) if path.exists() else choice.source
    path = Path(options.model)
    is_directory = options.model != demo.NAME and path.is_dir()
    source, name = (str(path.absolute()), path.absolute().name) if is_directory else (options.model, options.model)
    calibration = directory_of(source) / "transformer" / CALIBRATION
    return Served(name, source, read_defaults(source, fetch=True), limits, adapters, calibration.is_file())


def _usual_data() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "flashi2v"
