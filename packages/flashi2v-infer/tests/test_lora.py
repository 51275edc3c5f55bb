"""LoRA adapters in sampling: from wherever they lie, weighed, swapped, fused, saved, and told in the record."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashi2v_data import read_frames
from flashi2v_infer import FlashI2VPipeline, cli, read_record
from flashi2v_model import InputError
from flashi2v_model.weights.adapter_spellings import read_adapter, spell

peft = pytest.importorskip("peft")


@pytest.fixture
def own(shared_pipe):
    """A pipeline whose transformer is this test's own."""
    kept = shared_pipe.transformer
    shared_pipe.register_modules(transformer=copy.deepcopy(kept))
    yield shared_pipe
    shared_pipe.register_modules(transformer=kept)


@pytest.fixture
def adapter(own, make_adapter, tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """In ComfyUI's spelling; it lies in style.safetensors here."""
    monkeypatch.chdir(tmp_path)
    adapter, _ = spell(make_adapter(own.transformer), "comfyui")
    save_file(adapter, "style.safetensors")
    return adapter


def test_an_adapter_is_found_wherever_it_lies(own, adapter, sampled, photograph):
    plain = sampled(image=photograph)
    own.load_lora_weights(adapter)
    styled = sampled(image=photograph)
    assert (styled - plain).norm() > 0.01 * plain.norm()
    repository = Path("hub/models--someone--style")
    places = {
        "a file": ("style.safetensors", {}),
        "a directory": ("only", {}),
        "one of several": ("several", {"weight_name": "style.safetensors"}),
        "a subfolder": ("several", {"subfolder": "deep"}),
        "a hub id": ("someone/style", {"cache_dir": "hub", "local_files_only": True}),
        "a file of the hub": ("someone/style/style.safetensors", {"cache_dir": "hub", "local_files_only": True}),
    }
    for name in ("only", "several", "several/deep", repository / "snapshots/123"):
        Path(name).mkdir(parents=True, exist_ok=True)
        shutil.copy("style.safetensors", name)
    shutil.copy("style.safetensors", "several/other.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("123")
    for where, arguments in places.values():
        own.unload_lora_weights()
        assert torch.equal(sampled(image=photograph), plain)
        own.load_lora_weights(where, **arguments)
        assert torch.equal(sampled(image=photograph), styled)
    for where, words in (
        ("nowhere.safetensors", "no LoRA adapter at nowhere.safetensors"),
        ("several", "name one of other.safetensors, style.safetensors"),
        ("several/none", r"neither here nor on the hub|no LoRA adapter"),
    ):
        with pytest.raises(InputError, match=words):
            own.load_lora_weights(where, local_files_only=True)
    assert torch.equal(sampled(image=photograph), styled)


def test_what_diffusers_does_with_adapters_works(own, adapter, make_adapter, sampled, photograph):
    plain, other = sampled(image=photograph), make_adapter(own.transformer, rank=5, seed=1)
    own.load_lora_weights("style.safetensors", adapter_name="style")
    own.load_lora_weights(other, adapter_name="other")
    assert own.get_list_adapters() == {"transformer": ["style", "other"]}
    own.set_adapters(["style", "other"], [0.5, 0.25])
    both = sampled(image=photograph)
    assert torch.equal(sampled(image=photograph, attention_kwargs={"scale": 0.0}), plain)
    half = sampled(image=photograph, attention_kwargs={"scale": 0.5})
    assert 0 < (half - plain).norm() < (both - plain).norm()
    assert torch.equal(sampled(image=photograph), both)
    own.fuse_lora()
    torch.testing.assert_close(sampled(image=photograph), both, atol=1e-4, rtol=0)
    own.unfuse_lora()
    torch.testing.assert_close(sampled(image=photograph), both, atol=1e-4, rtol=0)
    own.disable_lora()
    torch.testing.assert_close(sampled(image=photograph), plain, atol=1e-4, rtol=0)
    own.enable_lora()
    own.delete_adapters("other")
    own.set_adapters("style")
    style = sampled(image=photograph)
    assert (style - both).norm() > 0.01 * both.norm()
    own.load_lora_weights(other, adapter_name="style", hotswap=True)
    swapped = sampled(image=photograph)
    own.unload_lora_weights()
    own.load_lora_weights(other)
    torch.testing.assert_close(sampled(image=photograph), swapped, atol=1e-5, rtol=0)


def test_a_saved_adapter_is_the_same_adapter(own, adapter, sampled, photograph):
    own.load_lora_weights(adapter, adapter_name="style")
    style = sampled(image=photograph)
    own.save_lora_weights(
        "saved",
        peft.get_peft_model_state_dict(own.transformer, adapter_name="style"),
        transformer_lora_adapter_metadata=own.transformer.peft_config["style"].to_dict(),
    )
    own.transformer.save_lora_adapter("of_transformer", adapter_name="style")
    for where in ("saved", "of_transformer"):
        own.unload_lora_weights()
        own.load_lora_weights(where)
        torch.testing.assert_close(sampled(image=photograph), style, atol=1e-5, rtol=0)
    written = load_file("saved/pytorch_lora_weights.safetensors")
    assert torch.equal(
        written["transformer.blocks.0.norm2.lora_diff.weight"], adapter["diffusion_model.blocks.0.norm3.diff"]
    )
    state_dict, config = FlashI2VPipeline.lora_state_dict("saved", return_lora_metadata=True)
    assert state_dict.keys() == written.keys()
    assert config["transformer.lora_alpha"] == 1.5


def test_what_does_not_fit_leaves_the_pipeline_as_it_was(own, adapter, sampled, photograph):
    own.load_lora_weights(adapter, adapter_name="style")
    before, style = {key: t.clone() for key, t in own.transformer.state_dict().items()}, sampled(image=photograph)
    with pytest.raises(InputError, match=r"does not fit the transformer: unexpected blocks\.9\.attn1\.to_q"):
        own.load_lora_weights({key.replace("blocks.3", "blocks.9"): t for key, t in adapter.items()})
    with pytest.raises(InputError, match="one transformer"):
        own.load_lora_weights(adapter, load_into_transformer_2=True)
    after = own.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert torch.equal(sampled(image=photograph), style)


@pytest.mark.filterwarnings("ignore")  # of the compiler, about this machine
def test_compiled_blocks_swap_adapters_of_other_ranks_without_being_compiled_again(
    own, adapter, make_adapter, sampled, photograph
):
    other = make_adapter(own.transformer, rank=5, seed=1)
    eager, quick = [], {"image": photograph, "num_inference_steps": 1, "guidance_scale": 1.0}
    for state_dict in (adapter, other):
        own.load_lora_weights(state_dict)
        eager.append(sampled(**quick))
        own.unload_lora_weights()
    assert (eager[1] - eager[0]).norm() > 0.01 * eager[0].norm()
    torch._dynamo.reset()
    own.enable_lora_hotswap(target_rank=8)
    own.load_lora_weights(adapter, adapter_name="style")
    own.transformer.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(sampled(**quick), eager[0], atol=1e-4, rtol=0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for state_dict, expected in ((other, eager[1]), (adapter, eager[0])):
            own.load_lora_weights(state_dict, adapter_name="style", hotswap=True)
            torch.testing.assert_close(sampled(**quick), expected, atol=1e-4, rtol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_adapters_come_to_an_offloaded_transformer(kind, own, adapter, sampled, photograph):
    own.load_lora_weights(adapter)
    style, cpu = sampled(image=photograph), torch.device("cpu")
    own.unload_lora_weights()
    own.transformer.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    own.load_lora_weights(adapter)
    torch.testing.assert_close(sampled(image=photograph), style, atol=1e-5, rtol=0)


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["flashi2v-infer", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_commands_sample_with_adapters_and_say_so(own, adapter, job, model_directory, monkeypatch, capsys):
    """One video; a batch that names them in its file, and one whose file's are replaced; a plan that counts them."""
    model = ("--model", model_directory, "--image", "first.png", "--prompt", "a star", "--seed", "3")
    one = (
        *model,
        "--num-frames",
        "5",
        "--height",
        "32",
        "--width",
        "48",
        "--num-inference-steps",
        "2",
        "--device",
        "cpu",
    )
    assert command(monkeypatch, *one, "-o", "plain.mp4") == 0
    assert command(monkeypatch, *one, "-o", "half.mp4", "--lora", "style.safetensors:0.5") == 0
    two = ("--lora", "style.safetensors:0.75", "--lora", "style.safetensors:-0.25")
    assert command(monkeypatch, *one, "-o", "both.mp4", *two) == 0
    plain, half, both = (read_frames(f"{name}.mp4", range(5)).astype(int) for name in ("plain", "half", "both"))
    assert abs(half - plain).mean() > 1
    assert abs(half - both).max() <= 2
    record = read_record("both.mp4")
    assert record["lora"] == ["style.safetensors:0.75", "style.safetensors:-0.25"]
    assert [scale for _, scale in record["model_settings"]["lora"]] == [0.75, -0.25]
    assert "lora" not in read_record("plain.mp4")
    capsys.readouterr()
    plans = []
    for lora in ((), ("--lora", "style.safetensors")):
        assert command(monkeypatch, *one, *lora, "-o", "x.mp4", "--plan", "--dry-run") == 0
        plans.append(capsys.readouterr().out)
    sizes = [float(re.search(r"parameters: transformer ([\d.]+) million", plan)[1]) for plan in plans]
    numbers = sum(tensor.numel() for key, tensor in adapter.items() if not key.endswith("alpha"))
    assert sizes[1] - sizes[0] == pytest.approx(numbers / 1e6, abs=0.011)

    file = job(lora=["style.safetensors:0.5"])
    assert command(monkeypatch, "--mm-model", file) == 0
    assert read_record("samples/video_0.mp4")["lora"] == ["style.safetensors:0.5"]
    Path("style.safetensors").rename("renamed.safetensors")
    assert command(monkeypatch, "--mm-model", file, "--resume", "--lora", "renamed.safetensors:0.5") == 0
    capsys.readouterr()
    assert command(monkeypatch, "--mm-model", file, "--resume", "--lora", "renamed.safetensors") == 2
    assert "model_settings.lora was" in capsys.readouterr().err
    assert command(monkeypatch, "--mm-model", job(), "--resume") == 2
    assert "model_settings.lora was" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_is_one_line_before_a_weight_is_read(own, adapter, job, monkeypatch, capsys):
    (wider, _), file = spell({"blocks.9.ffn.net.2.lora_diff.bias": torch.zeros(3)}, "comfyui"), job()
    save_file(wider, "wider.safetensors")
    Path("damaged.safetensors").write_bytes(b"\0" * 40)
    for lora, words in (
        (
            "wider.safetensors",
            "--lora wider.safetensors: this adapter does not fit the transformer: unexpected blocks.9.",
        ),
        ("damaged.safetensors", "--lora damaged.safetensors: damaged.safetensors is damaged"),
        ("nowhere.safetensors:2", "--lora nowhere.safetensors: no LoRA adapter at nowhere.safetensors"),
        (":2", "':2' is to be FILE or FILE:SCALE"),
    ):
        for more in ((), ("--dry-run",)):
            assert command(monkeypatch, "--mm-model", file, "--lora", lora, *more) == 2
            assert words in capsys.readouterr().err
    assert not Path("samples").exists()


def test_a_hidden_alpha_is_read_from_the_file(own, adapter, tmp_path):
    """peft and diffusers keep it beside the tensors."""
    state_dict, header = spell(read_adapter(adapter), "diffusers")
    assert "transformer.lora_alpha" in json.loads(header["lora_adapter_metadata"])
    save_file(state_dict, "diffusers.safetensors", metadata=header)
    own.load_lora_weights("diffusers.safetensors")
    assert own.transformer.blocks[0].attn1.to_q.scaling["default_0"] == 0.5
