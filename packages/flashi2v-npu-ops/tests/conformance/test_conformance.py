"""The `ascend` backend against the real torch_npu wheel, on a machine without CANN or NPU: `nox -s conformance`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import world

from flashi2v_npu_ops.testing import stub_cann

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("torch_npu") is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs the torch_npu wheel: nox -s conformance")

KERNELS = {
    "attention": ["npu_fusion_attention", "npu_fusion_attention_grad"],
    "attention_part": ["npu_fusion_attention"] * 2 + ["npu_fusion_attention_grad"] * 2,
    "attention_part_grad": ["npu_fusion_attention"] * 2 + ["npu_fusion_attention_grad"] * 2,
    "rms_norm": ["npu_rms_norm", "npu_rms_norm_backward"],
    "apply_rope": ["npu_rotary_mul", "npu_rotary_mul_backward"],
    "gelu_tanh": ["npu_gelu", "npu_gelu_backward"],
    "conv3d": [],
    "layer_norm_modulate": [],
    "gated_residual": [],
    "split_frequencies": [],
}


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine on which torch_npu loads: over stubs of CANN."""
    library = tmp_path_factory.mktemp("cann")
    (library / "x86_64-linux").mkdir()
    (library / "x86_64-linux/ascend_toolkit_install.info").write_text("package_name=Ascend-cann\nversion=9.2.0\n")
    return stub_cann(library)


def python(*arguments: str, environment: dict[str, str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, **more)


@pytest.fixture(scope="module")
def results(stubbed):
    finished = python(str(HERE / "check_calls.py"), environment=stubbed)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def calls(results):
    return {name: result for name, result in results.items() if isinstance(result, dict) and "operator" in result}


def test_schemas_are_those_that_the_emulations_are_held_to(results):
    assert results["schema faults"] == []
    other, absent = results["faults of wrong schemas"]
    assert other.startswith("npu_gelu is npu_gelu(Tensor input")
    assert absent == "npu_nothing is missing"


def test_every_operator_reaches_its_kernels_and_no_others(results):
    assert {result["operator"] for result in calls(results).values()} == KERNELS.keys()
    for name, result in calls(results).items():
        assert [call[0] for call in result["calls"]] == KERNELS[result["operator"]], name


def test_outputs_and_gradients_have_the_shapes_and_dtypes_of_the_contract(results):
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for name, result in calls(results).items():
        assert result["out"]["dtype"] == dtypes[name.split(", ")[-1]], name
        assert result["out"]["on"] == "npu"
        first = result["inputs"][0]["shape"]
        if name.startswith("split"):  # high and low, one after the other
            first = [2 * first[0], *first[1:]]
        if result["operator"] != "conv3d":  # which has a shape of its own
            assert result["out"]["shape"] == first, name
        assert result["gradients"] == result["inputs"], name


def test_attention_passes_layout_scale_and_an_inverted_mask_of_an_allowed_shape(results):
    shapes = {
        "masked attention": [2, 1, 7, 5],
        "2-d mask": [1, 1, 7, 5],
        "1-d mask": [1, 1, 7, 5],
        "key mask per head": [2, 3, 7, 5],
    }
    for name, result in calls(results).items():
        if result["operator"] == "attention":
            ((_, given), _) = result["calls"]
            assert given["input_layout"] == "BSND"
            assert given["head_num"] == 3
            assert given["scale"] == (0.3 if name.startswith("cross") else 8**-0.5)
            shape = shapes.get(name.split(",")[0])
            mask = given.get("atten_mask")
            assert mask == (None if shape is None else {"shape": shape, "dtype": "bool", "on": "npu"}), name


def test_attention_without_gradients_passes_an_inverted_mask_to_the_kernel_for_inference(results):
    assert results["inference"] == {"shape": [2, 7, 3, 16], "dtype": "bfloat16", "on": "npu"}
    ((name, given),) = results["calls of inference"]
    assert name == "npu_fused_infer_attention_score"
    assert given["atten_mask"] == {"shape": [2, 1, 7, 7], "dtype": "bool", "on": "npu"}
    assert (given["num_heads"], given["input_layout"], given["scale"]) == (3, "BSND", 0.25)


def test_parts_of_attention_pass_the_log_sum_exp_of_all_on_to_their_gradients(results):
    rows = {"shape": [2, 3, 7, 8], "dtype": "float32", "on": "npu"}
    for label in ("fp32", "bf16", "fp16"):
        *_, (_, first), (_, second) = results[f"attention in parts, {label}"]["calls"]
        for given in (first, second):
            assert (given["head_num"], given["input_layout"], given["scale_value"]) == (3, "BSND", 8**-0.5)
            assert given["softmax_max"] == given["softmax_sum"] == rows
            assert given["attention_in"]["shape"] == [2, 7, 3, 8]


def test_a_part_of_attention_asks_the_kernel_for_inference_for_its_log_sum_exp(results):
    assert results["part"] == [
        {"shape": [2, 7, 3, 16], "dtype": "bfloat16", "on": "npu"},
        {"shape": [2, 3, 7], "dtype": "float32", "on": "npu"},
    ]
    ((name, given),) = results["calls of the part"]
    assert name == "npu_fused_infer_attention_score"
    assert given["softmax_lse_flag"] is True


def test_rope_passes_fp32_tables_in_the_shape_of_the_layout(results):
    for label in ("fp32", "bf16", "fp16"):
        ((_, given), _) = results[f"apply_rope, {label}"]["calls"]
        assert given["rotary_mode"] == "interleave"
        assert given["input"] == {"shape": [2, 7, 3, 8], "dtype": "float32", "on": "npu"}
        assert given["r1"] == given["r2"] == {"shape": [1, 7, 1, 8], "dtype": "float32", "on": "npu"}


def test_the_inside_of_the_split_stays_on_the_npu_in_fp32(results):
    low, keep, cutoff = results["inside of the split"]
    assert low == {"shape": [2, 16, 60, 104], "dtype": "float32", "on": "npu"}
    assert keep == {"shape": [2, 1, 60, 53], "dtype": "bool", "on": "npu"}
    assert cutoff == {"shape": [2], "dtype": "float32", "on": "npu"}


def test_the_optimizer_is_the_fused_one_and_auto_picks_ascend(results):
    assert results["optimizer"] == {
        "calls": ["_fused_adamw_"],
        "state": {"shape": [4, 3], "dtype": "float32", "on": "npu"},
    }
    assert results["auto"] == "ascend"


def test_what_the_real_schema_refuses_is_refused(results):
    assert "eps" in results["failures"]["unknown argument"]
    assert set(results["failures"]) == {"unknown argument", "mixed devices"}


def autoloading(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which torch loads torch_npu by itself, as it does unless told otherwise."""
    return {name: value for name, value in environment.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}


def without_cann() -> dict[str, str]:
    return {name: value for name, value in autoloading(dict(os.environ)).items() if "ASCEND" not in name}


def test_torch_loads_torch_npu_also_where_it_is_imported_after_the_operators(stubbed):
    code = "import flashi2v_npu_ops, torch, sys; flashi2v_npu_ops.attention; sys.exit('torch_npu' not in sys.modules)"
    finished = python("-c", code, environment=autoloading(stubbed))
    assert finished.returncode == 0, finished.stderr


def test_what_cann_fails_with_is_told_in_one_line_from_torch_npus_own_words(results):
    said = results["what CANN fails with"]
    assert said.startswith("OnesLike failed on the NPU (the stub of CANN has no kernel OnesLike): ")
    assert "flashi2v-npu-ops doctor --device npu --probe" in said


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("flashi2v_infer.cli", ["--model", "demo", "--device", "cpu"]),
        ("flashi2v_train.launcher", ["--mm-model", "model.json", "--mm-data", "data.json", "--save", "run"]),
    ],
)
def test_without_cann_a_command_ends_with_one_line_that_says_what_to_do(module, words, tmp_path):
    for name, settings in (("model", world.model_settings(tmp_path)), ("data", world.data_settings(tmp_path))):
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / "model" / name).mkdir(parents=True)
    (tmp_path / "store").mkdir()
    code = f"import sys; from {module} import main; sys.exit(main())"
    finished = python("-c", code, *words, environment=without_cann(), cwd=tmp_path)
    assert finished.returncode == 2, finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert "torch_npu does not load (libhccl.so: cannot open shared object file" in last
    assert "install CANN (toolkit and kernels), then source its set_env.sh; without an NPU: pip uninstall" in last
    assert "Traceback" not in finished.stderr


def test_without_cann_the_operators_run_once_torch_is_told_to_go_without():
    code = "import flashi2v_npu_ops as f; import torch; print(f.split_frequencies(torch.ones(1, 1, 4, 4), 0.1)[2])"
    finished = python("-c", code, environment=without_cann() | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "tensor([0.])"


DOCTOR = """import sys
from pathlib import Path
from flashi2v_npu_ops.cli import main

note = sys.argv.pop()
sys.argv = ["flashi2v-npu-ops", "doctor", *sys.argv[1:]]
code = main()
if note:
    print("and with an older CANN", code)
    Path(note).write_text("version=8.1.RC1")
    code = main()
sys.exit(code)
"""


def test_doctor_on_a_machine_with_torch_npu_and_no_cann():
    finished = python("-c", DOCTOR, "", environment=without_cann())
    assert finished.returncode == 1
    assert finished.stderr == ""
    assert "FAULT  torch_npu does not load" in finished.stdout
    assert "-> install CANN" in finished.stdout
    assert "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in finished.stdout
    assert "auto is cpu" in finished.stdout
    assert "WARNING" not in finished.stdout


def test_doctor_on_a_machine_with_npu_and_cann_and_with_one_that_does_not_fit(stubbed):
    note = Path(stubbed["ASCEND_HOME_PATH"]) / "x86_64-linux/ascend_toolkit_install.info"
    finished = python("-c", DOCTOR, "--device", "npu", str(note), environment=stubbed)
    fitting, _, older = finished.stdout.partition("and with an older CANN ")
    assert "CANN              9.2.0 in" in fitting
    assert "1 x Ascend910B2" in fitting
    assert "npu is npu:0 (collectives: cpu:gloo,npu:hccl)" in fitting
    lines = [line for line in fitting.splitlines() if " of ascend" in line]
    assert len(lines) == 10
    assert all(line.split()[1] == "ascend" for line in lines)
    assert older.startswith("0")
    assert finished.returncode == 1
    assert "torch_npu 2.13.0 was released with CANN 9.2, this is 8.1.RC1" in older
    assert "-> install CANN 9.2" in older
