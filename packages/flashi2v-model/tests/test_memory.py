"""Reading, converting and loading hold about one copy of the weights.

Run as a script, this file prints the table: `MALLOC_MMAP_THRESHOLD_=1000000 python test_memory.py [WIDTH]`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

_PEAK = Path("/proc/self/clear_refs")  # writing 5 to it forgets the peak so far


def _memory(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", status)[1])


def _growth(action: Callable[[], object]) -> int:
    _PEAK.write_text("5")
    before = _memory("VmRSS")
    kept = action()  # held until the peak has been read
    peak = _memory("VmHWM")
    del kept
    return peak - before


def measure(width: int) -> dict[str, float]:
    """Peak growth of every direction, in copies of the weights."""
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

    from flashi2v_model import FlashI2VTransformer3DModel, convert_state_dict, load_weights
    from flashi2v_model.cli import convert

    def use(model: FlashI2VTransformer3DModel) -> None:
        for parameter in model.parameters():
            parameter.sum()

    sizes = {
        "num_attention_heads": width // 128,
        "ffn_dim": 4 * width,
        "text_dim": 512,
        "num_layers": 4,
    }
    model = FlashI2VTransformer3DModel(**sizes)
    one_copy = sum(parameter.nbytes for parameter in model.parameters())
    grown = {}
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        model.save_pretrained(here / "sharded", max_shard_size=one_copy // 5)
        released = convert_state_dict(model.state_dict(), target="npu")
        torch.save(released, here / "npu.pt")
        torch.save(released, here / "legacy.pt", _use_new_zipfile_serialization=False)
        checkpoint = here / "iter_0000001"
        state = {"model": model.state_dict(), "ema": model.state_dict()}
        save_checkpoint(state, checkpoint_id=checkpoint)
        model.save_config(checkpoint)
        del released, state
        convert(here / "npu.pt", here / "main.safetensors", to="main")
        sources = ("npu.pt", "legacy.pt", "main.safetensors", "sharded", "iter_0000001")
        for source in sources:
            for target, place in (("diffusers", "new"), ("npu", "new.pt"), ("main", "new.safetensors")):
                with tempfile.TemporaryDirectory(dir=here) as out:
                    done = _growth(lambda: convert(here / source, Path(out) / place, to=target))  # noqa: B023
                grown[f"convert {source} to {target} {Path(place).suffix or 'directory'}"] = done / one_copy
        for source in sources:
            for name, device in (("a model on meta, and use it", "meta"), ("an allocated model", "cpu")):
                with torch.device(device):
                    model = FlashI2VTransformer3DModel(**sizes)
                done = _growth(lambda: (load_weights(model, here / source), use(model)))  # noqa: B023
                grown[f"load {source} into {name}"] = done / one_copy
        done = _growth(lambda: use(FlashI2VTransformer3DModel.from_pretrained(here / "sharded")))
        grown["from_pretrained sharded, and use it"] = done / one_copy
    return grown


@pytest.mark.skipif(not _PEAK.exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_every_direction_holds_about_one_copy_of_the_weights():
    # Every tensor of a megabyte goes back to the system when it is freed, so that the next growth is not hidden.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, __file__, "512"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout.splitlines()[-1])
    assert len(growth) > 20
    assert {what: copies for what, copies in growth.items() if copies > 1.3} == {}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)))
