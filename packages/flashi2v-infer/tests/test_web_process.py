"""The command flashi2v-web: real servers and workers, killed, starved and asked to end."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest

pytest.importorskip("fastapi", reason="nox -s web runs these tests")
pytest.importorskip("openai", reason="nox -s web runs these tests")
import httpx
import openai
import torch
from safetensors.torch import save_file
from web_world import until

from flashi2v_infer import demo, read_record
from flashi2v_infer.web.jobs import Jobs

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
LONG = {"num_inference_steps": 100, "num_frames": 81}


class Server:
    """A running flashi2v-web with the demo model."""

    def __init__(self, data: Path, *words: object) -> None:
        options = ("--data", data, "--port", "0", "--device", "cpu", *words)
        self.command = forked.Command("flashi2v-web", *options, cwd=data.parent)
        until(lambda: self.command.poll() is not None or "http" in self.command._output.read_text())
        assert self.command.poll() is None, self.command.errors()
        self.address = re.search(r"http://\S+", self.command._output.read_text())[0]
        self.http = httpx.Client(base_url=self.address, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="any", max_retries=0)
        until(lambda: self.http.get("/health").status_code == 200)

    def create(self, **options: object) -> str:
        return self.client.videos.create(prompt=demo.PROMPT, input_reference=demo.IMAGE, extra_body=options).id

    def job(self, id: str) -> dict:
        return self.http.get(f"/v1/videos/{id}").json()

    def ended(self, id: str) -> dict:
        until(lambda: self.job(id)["status"] in ("completed", "failed"))
        return self.job(id)

    def workers(self) -> list[int]:
        """Return the processes that sample: children of the process that they are forked from."""
        found = []
        for children in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = children.read_text()
                words = children.with_name("cmdline").read_bytes()
            except OSError:
                continue
            name, rest = text.rpartition(")")[::2]
            parent = int(rest.split()[1])
            if b"forkserver" in words and self._is_forkserver(parent):
                found.append(int(name.split()[0]))
        return found

    def _is_forkserver(self, pid: int) -> bool:
        try:
            parent = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        return parent == self.command.pid


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("web") / "data"


def test_a_server_in_its_life(data, tmp_path):
    """One story, as every start takes seconds: a video, cancelling, full disks, kills and restarts."""
    server = Server(data)
    done = server.ended(server.create(num_inference_steps=2, seed=4))
    assert (done["status"], done["error"]) == ("completed", None)
    contents = server.client.videos.download_content(done["id"]).read()
    (tmp_path / "x.mp4").write_bytes(contents)
    assert read_record(tmp_path / "x.mp4")["seed"] == 4

    # Nobody else works on the same directory.
    second = forked.run("flashi2v-web", "--data", data, "--port", "0", "--device", "cpu")
    assert second.returncode == 2
    assert "is in use by another process" in second.stderr.splitlines()[-1]

    # A client that goes away cancels what it asked for.
    id = server.create(**LONG)
    with server.http.stream("GET", f"/v1/videos/{id}/events", params={"cancel_on_disconnect": True}) as stream:
        next(line for line in stream.iter_lines() if "preview" in line)
    assert server.ended(id)["error"]["code"] == "cancelled"

    # A worker with nothing to do takes under 1 % of a core.
    (worker,) = server.workers()
    before, began = cpu_seconds(worker), time.monotonic()
    time.sleep(3)
    assert cpu_seconds(worker) - before < 0.01 * (time.monotonic() - began)

    # A full disk fails one video with one line, as soon as this can be written down.
    resource = pytest.importorskip("resource")
    id = server.create(num_inference_steps=60)
    until(lambda: server.job(id)["step"] > 2)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (1000, 10**12))
    until(lambda: "cannot write the queue" in server.command.errors())
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (10**12, 10**12))
    full = server.ended(id)["error"]
    assert full["code"] == "failed"
    assert "cannot write videos/" in full["message"]
    assert not list((data / "videos").glob(f"{id}*"))

    # A worker that is killed costs its video.
    cut, waits = server.create(**LONG), server.create(num_inference_steps=1)
    until(lambda: server.job(cut)["step"])
    os.kill(worker, signal.SIGKILL)
    assert server.ended(waits)["status"] == "completed"
    assert server.job(cut)["error"]["code"] == "interrupted"

    # So does a server that is killed, and its workers end with it.
    cut, waits = server.create(**LONG), server.create(num_inference_steps=1)
    until(lambda: server.job(cut)["step"])
    (worker,) = server.workers()
    server.command.kill()
    server.command.wait()
    until(lambda: not Path(f"/proc/{worker}").exists())
    server = Server(data)
    assert server.ended(waits)["status"] == "completed"
    error = server.job(cut)["error"]
    assert error["code"] == "interrupted"
    assert re.match(r"interrupted at step \d+ of 100: the server ended; queue it again$", error["message"])
    assert server.client.videos.download_content(done["id"]).read() == contents

    # One that is asked to end puts its work back.
    goes_on = server.create(**LONG)
    until(lambda: server.job(goes_on)["step"])
    server.command.send_signal(signal.SIGTERM)
    assert server.command.wait() == 0, server.command.errors()
    job = Jobs(data).get(goes_on, "")
    assert (job.state, job.step) == ("queued", 0)
    assert "Traceback" not in server.command.errors()


def cpu_seconds(pid: int) -> float:
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line(data, tmp_path, model_directory):
    broken = tmp_path / "broken"
    shutil.copytree(model_directory, broken)
    save_file({"x": torch.zeros(1)}, broken / "vae/diffusion_pytorch_model.safetensors", {"format": "pt"})
    done = forked.run("flashi2v-web", "--model", broken, "--data", tmp_path / "data", "--port", "0", "--device", "cpu")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "flashi2v-web: no worker could load the model: see above"
    assert "vae" in next(line for line in done.stderr.splitlines() if line.startswith("ERROR worker"))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: others reach the server there: give --api-key, or --open"),
        (("--api-key", "short"), "--api-key: a key has fewer than 16 characters"),
        (("--api-key", "@absent"), "absent"),
        (("--api-key", "long-enough-0123456789", "--open"), "--open is for a server without keys"),
        (("--port", "99999"), "cannot listen at 127.0.0.1 port 99999"),
        (("--keep-days", "0"), "--keep-days must be positive"),
        (("--max-frames", "0"), "max_frames must be at least 1"),
        (("--lora", "a/x.safetensors", "--lora", "b/x.safetensors"), "--lora: two adapters go by the name x"),
        (("--lora", "absent.safetensors"), "--lora"),
    ],
)
def test_options_that_cannot_be_are_refused(words, line, tmp_path):
    done = forked.run("flashi2v-web", "--data", tmp_path / "data", "--device", "cpu", *words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert line in done.stderr.splitlines()[-1]
    assert not (tmp_path / "data").exists()
