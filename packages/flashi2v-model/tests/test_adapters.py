"""LoRA adapters: trained by peft, written in every spelling, loaded, fused, swapped, merged, and refused whole."""

import copy
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import WanLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from flashi2v_model import FlashI2VTransformer3DModel, InputError, cli
from flashi2v_model.adapter_choice import AdapterChoice, read_choices
from flashi2v_model.weights.adapter_spellings import CONFIG, SPELLINGS, read_adapter, spell, spelling_of
from flashi2v_model.weights.adapters import merge

peft = pytest.importorskip("peft")

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out", "time_proj", "linear_1"),
    *("patch_embedding", "fourier_embedding.0", "fourier_embedding.1", "learnable_proj.proj.0"),
)
SHAPES = ((1, 16, 2, 4, 6), (1, 8, 24), (1, 16, 1, 4, 6))  # latents, text, first frame
# One layer's A, as the field's programs write it.
KEYS = {
    "diffusers": "transformer.blocks.1.attn1.to_out.0.lora_A.weight",
    "bare": "blocks.1.attn1.to_out.0.lora_A.weight",
    "peft": "base_model.model.blocks.1.attn1.to_out.0.lora_A.weight",
    "comfyui": "diffusion_model.blocks.1.self_attn.o.lora_down.weight",
    "comfyui-ab": "diffusion_model.blocks.1.self_attn.o.lora_A.weight",
    "wan": "blocks.1.self_attn.o.lora_A.weight",
    "kohya": "lora_unet_blocks_1_self_attn_o.lora_down.weight",
}


@cache
def _model() -> FlashI2VTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 24, "ffn_dim": 40, "freq_dim": 16}
    model = FlashI2VTransformer3DModel(**sizes, num_layers=2, text_len=8)
    for parameter in model.parameters():
        if not parameter.any():  # or nothing behind it would matter
            nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def new_model() -> FlashI2VTransformer3DModel:
    return copy.deepcopy(_model())


def output(model, **more):
    random = torch.Generator().manual_seed(3)
    latents, text, condition = (
        torch.randn(s, generator=random) for s in ((1, 16, 2, 4, 6), (1, 8, 24), (1, 16, 1, 4, 6))
    )
    with torch.no_grad():
        return model(latents, torch.tensor([700.0]), text, condition, **more).sample


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def trained() -> SimpleNamespace:
    """An adapter after two steps of peft, whose layers differ in rank and alpha, and its output."""
    model = new_model()
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS), rank_pattern={"ffn.net.2": 2}, alpha_pattern={"to_k": 3}
    )
    model.add_adapter(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        random = torch.Generator().manual_seed(5)
        y, text, c = (torch.randn(shape, generator=random) for shape in SHAPES)
        model(y, torch.tensor([400.0]), text, c).sample.square().mean().backward()
        optimizer.step()
    state_dict = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(model).items()}
    header = {CONFIG: json.dumps(config.to_dict(), default=list)}
    return SimpleNamespace(adapter=read_adapter(state_dict, header), output=output(model), header=header)


@pytest.fixture
def distilled(trained) -> dict[str, torch.Tensor]:
    """An adapter as they are taken out of distilled models: biases, norms, tables and whole layers too."""
    random = torch.Generator().manual_seed(7)
    adapter = dict(trained.adapter)
    for path, module in new_model().named_modules():
        if path.endswith("modulation"):
            holder = new_model().get_submodule(path.removesuffix("modulation").removesuffix("."))
            adapter[f"{path}.lora_diff.weight"] = torch.randn(holder.scale_shift_table.shape, generator=random) / 9
        elif "norm" in path:
            for key, own in module.named_parameters():
                adapter[f"{path}.lora_diff.{key}"] = torch.randn(own.shape, generator=random) / 9
        elif isinstance(module, nn.Linear):
            adapter[f"{path}.lora_diff.bias"] = torch.randn(module.out_features, generator=random) / 9
    for path in ("proj_out", "patch_embedding"):
        for part in ("lora_A.weight", "lora_B.weight", "alpha"):
            del adapter[f"{path}.{part}"]
        shape = new_model().get_submodule(path).weight.shape
        adapter[f"{path}.lora_diff.weight"] = torch.randn(shape, generator=random) / 9
    return adapter


@pytest.fixture
def model() -> FlashI2VTransformer3DModel:
    return new_model()


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_told_loaded_and_written_back_without_a_changed_bit(name, trained, model, tmp_path):
    state_dict, header = spell(trained.adapter, name)
    assert KEYS[name] in state_dict
    assert spelling_of(state_dict)[0] == name
    assert equal(read_adapter(state_dict, header), trained.adapter)
    for other in SPELLINGS:  # through any other, and back
        between = read_adapter(*spell(trained.adapter, other))
        again, _ = spell(between, name)
        assert equal(again, state_dict)
    save_file(state_dict, tmp_path / "adapter.safetensors", metadata=header)
    model.load_lora_adapter(tmp_path / "adapter.safetensors")
    assert distance(output(model), trained.output) < 1e-6


@pytest.mark.parametrize("name", ["comfyui", "comfyui-ab", "kohya"])
def test_the_keys_are_those_that_diffusers_reads(name, trained, model, tmp_path):
    """Its reader knows the layers of Wan2.1's trunk, and weighs by alpha as we do."""
    known = ("blocks.",)
    state_dict, header = spell({key: t for key, t in trained.adapter.items() if key.startswith(known)}, name)
    save_file(state_dict, tmp_path / "adapter.safetensors", metadata=header)
    theirs = WanLoraLoaderMixin.lora_state_dict(tmp_path / "adapter.safetensors")
    model.load_lora_adapter(state_dict, adapter_name="ours")
    ours = output(model)
    model.unload_lora()
    model.load_lora_adapter(theirs, adapter_name="theirs")
    assert distance(output(model), ours) < 1e-6
    assert distance(ours, output(new_model())) > 1e-3


@pytest.mark.parametrize("name", ["comfyui", "diffusers", "kohya"])
def test_differences_of_biases_norms_tables_and_whole_layers_count(name, distilled, model):
    state_dict, header = spell(distilled, name)
    if name == "comfyui":
        assert {"diffusion_model.blocks.0.diff_m", "diffusion_model.head.diff_m"} <= state_dict.keys()
        assert {"diffusion_model.blocks.1.norm3.diff_b", "diffusion_model.head.head.diff"} <= state_dict.keys()
    read = read_adapter(state_dict, header)
    assert distance(output(_merged(read, 0.7)), output(_merged(distilled, 0.7))) == 0
    before, plain = {key: t.clone() for key, t in model.state_dict().items()}, output(model)
    model.load_lora_adapter(state_dict, adapter_name="distilled", metadata=json.loads(header.get(CONFIG, "{}")))
    model.set_adapters("distilled", 0.7)
    merged = output(_merged(distilled, 0.7))
    assert distance(output(model), merged) < 1e-6
    model.disable_adapters()
    assert torch.equal(output(model), plain)
    model.enable_adapters()
    assert torch.equal(output(model, attention_kwargs={"scale": 0.0}), plain)
    assert distance(output(model), merged) < 1e-6
    model.unload_lora()
    assert equal(model.state_dict(), before)
    model.load_lora_adapter(state_dict, adapter_name="distilled", metadata=json.loads(header.get(CONFIG, "{}")))
    model.fuse_lora(0.7)
    assert distance(output(model), merged) < 1e-6
    model.unload_lora()
    assert distance(output(model), merged) < 1e-6
    assert distance(merged, plain) > 1e-2


def _merged(adapter, scale):
    model = new_model()
    model.load_state_dict(merge(model.state_dict(), adapter, scale))
    return model


@pytest.mark.parametrize("part", ["norm2", "modulation", "attn1.to_q", "bias"])
def test_every_kind_of_part_has_its_effect(part, distilled):
    adapter = {key: t for key, t in distilled.items() if part in key}
    model = new_model()
    model.load_lora_adapter(adapter)
    assert distance(output(model), output(_merged(adapter, 1.0))) < 1e-6
    assert distance(output(model), output(_model())) > 5e-6


def test_several_adapters_add_up_and_are_deleted_one_by_one(trained, distilled, model):
    plain = output(model)
    model.load_lora_adapter(trained.adapter, adapter_name="a")
    model.load_lora_adapter(distilled, adapter_name="b")
    assert distance(output(model), output(_merged(distilled, 1.0))) < 1e-6, "the last to come is active"
    model.set_adapters(["a", "b"], [0.5, -0.25])
    both = new_model()
    both.load_state_dict(merge(merge(both.state_dict(), trained.adapter, 0.5), distilled, -0.25))
    assert distance(output(model), output(both)) < 1e-6
    whole = output(model)
    output(model, attention_kwargs={"scale": 0.0})
    assert torch.equal(output(model), whole), "weights of adapters are what they were"
    model.delete_adapters("b")
    model.set_adapters("a")
    assert distance(output(model), trained.output) < 1e-6
    model.delete_adapters("a")
    assert torch.equal(output(model), plain)


@pytest.mark.parametrize("rank", [1, 6])
def test_an_adapter_is_swapped_for_one_of_other_ranks_and_alphas(rank, trained, distilled, model):
    config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=list(TARGETS), init_lora_weights=False)
    torch.manual_seed(2)
    model.add_adapter(config, "style")
    model.load_lora_adapter(trained.adapter, adapter_name="style", hotswap=True)
    assert distance(output(model), trained.output) < 1e-6
    model.set_adapters("style", 1.0)
    assert distance(output(model), trained.output) < 1e-6
    model.unload_lora()
    model.load_lora_adapter(distilled, adapter_name="style")
    model.load_lora_adapter(trained.adapter, adapter_name="style", hotswap=True)
    assert distance(output(model), trained.output) < 1e-6, "what the new one leaves alone is as without any"
    assert model.peft_config["style"].lora_alpha == 8


@pytest.mark.filterwarnings("ignore")  # of the compiler, about this machine
def test_a_compiled_model_does_not_notice_a_swap(trained, distilled, model):
    whole = output(_merged(distilled, 1.0))
    torch._dynamo.reset()
    model.enable_lora_hotswap(target_rank=40)
    model.load_lora_adapter(distilled, adapter_name="style")
    model.compile(backend="eager")
    assert distance(output(model), whole) < 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        for adapter, expected in ((trained.adapter, trained.output), (distilled, whole)):
            model.load_lora_adapter(adapter, adapter_name="style", hotswap=True)
            assert distance(output(model), expected) < 1e-6
    torch._dynamo.reset()


# What is wrong, made from an adapter in ComfyUI's spelling, and what the error says.
FAULTS = {
    "another width": (
        lambda sd: {key: torch.cat((t, t), 1) if "lora_down" in key and t.ndim == 2 else t for key, t in sd.items()},
        r"does not fit .*blocks\.0-1\.attn1\.to_q\.lora_A\.weight is \(4, 48\), the model has \(4, 24\)",
    ),
    "more blocks": (
        lambda sd: sd | {key.replace("blocks.1", "blocks.30"): t for key, t in sd.items()},
        r"does not fit .*unexpected blocks\.30\.attn1\.to_q\.lora_A\.weight",
    ),
    "of image to video": (
        lambda sd: (
            sd
            | {
                f"diffusion_model.blocks.0.cross_attn.k_img.{p}.weight": torch.zeros(2, 2)
                for p in ("lora_down", "lora_up")
            }
        ),
        r"image-to-video.* unexpected diffusion_model\.blocks\.0\.cross_attn\.k_img\.lora_down\.weight",
    ),
    "another network": (
        lambda sd: {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2)},
        "no adapter of this transformer.* unexpected lora_unet_down_blocks_0",
    ),
    "another method": (
        lambda sd: sd | {"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.zeros(2, 2)},
        r"LoKr is not read.* unexpected diffusion_model\.blocks\.0\.ffn\.0\.lokr_w1",
    ),
    "of no prefix": (
        lambda sd: sd | {"blocks.0.self_attn.q.lora_up.weight": torch.zeros(2, 2)},
        r"unexpected blocks\.0\.self_attn\.q\.lora_up\.weight",
    ),
    "half a pair": (
        lambda sd: {k: t for k, t in sd.items() if k != "diffusion_model.blocks.0.ffn.0.lora_up.weight"},
        r"not whole: missing blocks\.0\.ffn\.net\.0\.proj\.lora_B\.weight",
    ),
    "ranks that differ": (
        lambda sd: sd | {"diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.zeros(40, 9)},
        r"not whole: .*lora_B\.weight is \(40, 9\)",
    ),
    "whole numbers": (
        lambda sd: {key: t.to(torch.int8) for key, t in sd.items()},
        "is int8: give floats of 16 or 32 bits",
    ),
    "nothing": (lambda sd: {}, "it is empty"),
    "weights of a model": (lambda sd: {"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, "no adapter"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named_and_changes_nothing(fault, trained, model):
    model.load_lora_adapter(trained.adapter, adapter_name="there")
    before, kinds = (
        {k: t.clone() for k, t in model.state_dict().items()},
        {n: type(m) for n, m in model.named_modules()},
    )
    change, words = FAULTS[fault]
    state_dict, _ = spell(trained.adapter, "comfyui")
    with pytest.raises(InputError, match=words):
        model.load_lora_adapter(change(state_dict))
    assert equal(model.state_dict(), before)
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    assert torch.equal(output(model), trained.output)


class Interrupted(Exception):
    pass


@contextmanager
def interrupted(count: int) -> Iterator[None]:
    """Fail where torch registers this one of all parameters."""
    left = itertools.count(count, -1)

    def fail(*_) -> None:
        if next(left) == 0:
            raise Interrupted

    handle = register_module_parameter_registration_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("count", [1, 40, 90])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_failure_in_the_middle_changes_nothing(count, wrapped, trained, distilled, model):
    if wrapped:
        model.load_lora_adapter(trained.adapter, adapter_name="there")
    before, kept = {key: t.clone() for key, t in model.state_dict().items()}, output(model)
    kinds = {path: type(module) for path, module in model.named_modules()}
    with interrupted(count), pytest.raises(Interrupted):
        model.load_lora_adapter(distilled, adapter_name="new")
    assert equal(model.state_dict(), before)
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    assert list(getattr(model, "peft_config", {})) == ["there"] * wrapped
    assert torch.equal(output(model), kept)
    model.load_lora_adapter(distilled, adapter_name="new")
    assert distance(output(model), output(_merged(distilled, 1.0))) < 1e-6


def test_names_and_swaps_that_make_no_sense_are_refused(trained, distilled, model):
    refused = (
        ({"adapter_name": "a", "hotswap": True}, InputError, "hotswap: there is no adapter 'a' to replace, only there"),
        ({"adapter_name": "there"}, InputError, "'there' is already in use"),
        ({"adapter_name": "a.b"}, InputError, "a word without dots"),
        ({"to_the_left": True}, TypeError, "to_the_left"),
        (
            {"adapter_name": "there", "hotswap": True},
            InputError,
            r"has no .*blocks\.0-1\.attn1\.norm_k\.lora_diff\.weight",
        ),
    )
    model.load_lora_adapter(trained.adapter, adapter_name="there")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for arguments, error, words in refused:
        with pytest.raises(error, match=words):
            model.load_lora_adapter(distilled, **arguments)
    assert equal(model.state_dict(), before)
    assert torch.equal(output(model), trained.output)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"foo": 1, "bar": 2}, "sets bar 2, foo 1: its weights alone do not say what it does"),
        ({"layer_replication": [[0, 4]]}, r"sets layer_replication \[\[0, 4\]\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "sets init_lora_weights 'pissa_niter_4'"),
        ({"peft_type": "LOKR"}, "sets peft_type 'LOKR'"),
        ({"use_dora": True}, "says use_dora, and it has no lora_magnitude_vector"),
        ({"r": 3}, "says rank 3 of .*, which has 4"),
    ],
)
def test_a_setting_that_nobody_reads_is_named(setting, words, trained, model, tmp_path):
    state_dict, header = spell(trained.adapter, "diffusers")
    config = json.loads(header[CONFIG]) | {"transformer.future": None, "transformer.lora_dropout": 0.1}
    model.load_lora_adapter(state_dict, adapter_name="fine", metadata=config)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    config |= {f"transformer.{key}": value for key, value in setting.items()}
    save_file(state_dict, tmp_path / "a.safetensors", metadata={CONFIG: json.dumps(config)})
    for given in ({"metadata": config}, {}):
        with pytest.raises(InputError, match=f"lora_adapter_metadata {words}"):
            model.load_lora_adapter(state_dict if given else tmp_path / "a.safetensors", **given)
    assert equal(model.state_dict(), before)


def test_alphas_that_differ_are_refused_and_one_that_nobody_reads_is_named(trained, caplog):
    layer = "blocks.0.attn1.to_q"
    with pytest.raises(InputError, match=f"says alpha 8 of {layer}, its tensor 9"):
        read_adapter(trained.adapter | {f"{layer}.alpha": torch.tensor(9.0)}, trained.header)
    pairs = {key: t for key, t in trained.adapter.items() if not key.endswith("alpha")}
    assert read_adapter(pairs, {"ss_network_alpha": "2"}).keys() == pairs.keys()
    assert "its header says {'ss_network_alpha': '2'}, which is not read" in caplog.text


def test_an_adapter_of_eight_bits_is_read(trained, model):
    small = {key: t.to(torch.float8_e4m3fn) for key, t in trained.adapter.items()}
    model.load_lora_adapter(small)
    assert distance(output(model), output(_merged(small, 1.0))) < 1e-6
    assert distance(output(model), trained.output) < 0.2


def test_adapters_are_weighed_by_attention_kwargs(trained, model):
    plain = output(model)
    model.load_lora_adapter(trained.adapter)
    whole, half, none = (output(model, attention_kwargs={"scale": scale}) for scale in (1.0, 0.5, 0.0))
    assert torch.equal(none, plain)
    assert torch.equal(whole, trained.output)
    assert distance(half, output(_merged(trained.adapter, 0.5))) < 1e-6
    with pytest.raises(InputError, match="only 'scale', not 'scales'"):
        output(model, attention_kwargs={"scales": 1.0})


def test_choices_are_files_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd:2").touch()
    texts = ("a.safetensors", "a.safetensors:0.8", "b:-1e-1", "odd:2", "12:30.safetensors", "owner/name:0.5")
    assert read_choices(texts) == (
        AdapterChoice("a.safetensors"),
        AdapterChoice("a.safetensors", 0.8),
        AdapterChoice("b", -0.1),
        AdapterChoice("odd:2"),
        AdapterChoice("12:30.safetensors"),
        AdapterChoice("owner/name", 0.5),
    )
    for text in ("", ":0.5", "a:nan", "a:inf"):
        with pytest.raises(InputError, match="FILE or FILE:SCALE"):
            read_choices([text])


def test_the_command_line_says_what_an_adapter_is_and_rewrites_it(distilled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state_dict, _ = spell(distilled, "comfyui")
    save_file(state_dict, "style.safetensors", metadata={"format": "pt", "ss_steps": "2"})
    cli.inspect(Path("style.safetensors"))
    told = capsys.readouterr().out
    for words in (
        r"kind +LoRA adapter of \d+ layers\n",
        r"spelling +comfyui \(diffusion_model\.\*\.lora_down\.weight, Wan2\.1's names of layers\)\n",
        r"rank +4 in \d+ layers, 2 in 2 layers\n",
        r"alpha +8 \(weight 2\) in \d+ layers, 3 \(weight 0\.75\) in 4 layers, 8 \(weight 4\) in 2 layers\n",
        r"width +24\n",
        r"parameters +[\d,]+ in float32\n",
        r"pairs +blocks\.0-1\.attn1\.to_k, .*learnable_proj\.proj\.0\n",
        r"differences +.*blocks\.0-1\.norm2 \(bias\), .*modulation \(weight\), patch_embedding \(weight\)",
        r"header +ss_steps 2\n",
    ):
        assert re.search(words, told), words
    for name in SPELLINGS:
        between, back = Path("peft" if name == "peft" else f"{name}.safetensors"), Path(f"{name}-back.safetensors")
        if name != "comfyui":
            cli.convert(Path("style.safetensors"), between, to=name)
            cli.convert(between, back, to="comfyui")
            assert equal(load_file(back), state_dict)
            with safe_open(back, "pt") as file:
                assert file.metadata() == {"format": "pt", "ss_steps": "2"}
    assert json.loads(Path("peft/adapter_config.json").read_text())["peft_type"] == "LORA"
    new_model().save_pretrained("model")
    cli.convert(Path("model"), Path("merged"), to="diffusers", lora=["style.safetensors:0.5", "style.safetensors:0.2"])
    assert (
        distance(output(FlashI2VTransformer3DModel.from_pretrained("merged")), output(_merged(distilled, 0.7))) < 1e-6
    )
    for arguments, words in (
        (("style.safetensors", "x", "npu"), "--to npu is a layout of models"),
        (("style.safetensors", "x", "kohya"), "x: kohya is written as a new file that ends in .safetensors"),
        (("style.safetensors", "x.safetensors", "peft"), "peft is written as a new directory"),
        (("model", "x.safetensors", "kohya"), "--to kohya is a spelling of LoRA adapters"),
    ):
        with pytest.raises(InputError, match=words):
            cli.convert(*map(Path, arguments[:2]), to=arguments[2])
    with pytest.raises(InputError, match="--dtype: of a model, and the source is a LoRA adapter"):
        cli.convert(Path("style.safetensors"), Path("x.safetensors"), to="kohya", dtype="bf16")
    with pytest.raises(InputError, match=r"--lora nothing\.safetensors: no LoRA adapter at"):
        cli.convert(Path("model"), Path("x"), to="diffusers", lora=["nothing.safetensors"])
    assert not list(Path().glob("x*"))
