"""`flashi2v-npu-ops doctor`, on this machine and on surveys of others."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashi2v_npu_ops import doctor, installation, registry, tested
from flashi2v_npu_ops.backends import cuda

SOUND = doctor.Survey(
    torch="2.13.0+cpu",
    torch_npu="2.13.0",
    torch_npu_fault=None,
    cann="9.2.0",
    cann_home=None,
    cann_sourced=True,
    driver="25.2.0",
    npu_nodes=8,
    nvidia_driver=None,
    cuda_fault="PyTorch sees no CUDA device",
    autoload=True,
)
UNLOADABLE = "torch_npu does not load (libhccl.so: cannot open shared object file)"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; from flashi2v_npu_ops.cli import main; sys.exit(main())", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def npu_faults(found: doctor.Survey) -> list[tuple[str, str]]:
    """What a person who wants an NPU is told, but for what this machine's own devices add."""
    findings = doctor.diagnose(found, "npu")
    return [
        (finding.what, finding.fix) for finding in findings if finding.is_fault and "device 'npu'" not in finding.what
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_on_a_plain_cpu_machine_it_lists_what_serves_every_operator():
    finished = run("doctor", "--device", "cpu")
    assert finished.returncode == 0, finished.stdout
    assert "device cpu        available" in finished.stdout
    rows = {line.split()[0]: line.split()[1] for line in finished.stdout.splitlines() if " of " in line}
    assert rows.items() >= dict.fromkeys(registry.operators(), "torch").items()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_device_or_backend_asked_for_that_cannot_work_exits_1():
    absent = run("doctor", "--device", "cuda")
    assert absent.returncode == 1
    assert "FAULT  device 'cuda': PyTorch sees no CUDA device" in absent.stdout
    named = run("doctor", "--device", "cpu", FLASHI2V_OPS_BACKEND="attention=ascend")
    assert named.returncode == 1
    assert "FAULT  attention: backend 'ascend' cannot serve this call" in named.stdout
    assert "FLASHI2V_OPS_BACKEND" in named.stdout
    assert absent.stderr == named.stderr == ""


def test_wrong_usage_exits_2_with_one_line_of_what_is_allowed():
    finished = run("doctor", "--device", "tpu")
    assert finished.returncode == 2
    assert "'auto', 'npu', 'cuda', 'cpu'" in finished.stderr.splitlines()[-1]
    assert run().returncode == 2


def test_a_sound_npu_machine_has_no_findings():
    assert doctor.diagnose(SOUND, "cpu") == []


@pytest.mark.parametrize(
    "home", ["usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/cann", "root/Ascend/cann"]
)
def test_cann_is_found_where_its_installer_puts_it(home, tmp_path):
    info = tmp_path / home / "aarch64-linux/ascend_toolkit_install.info"
    info.parent.mkdir(parents=True)
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\npath=/usr/local/Ascend\n")
    driver = tmp_path / "usr/local/Ascend/driver/version.info"
    driver.parent.mkdir(parents=True)
    driver.write_text("Version=25.2.0\n")
    (tmp_path / "dev").mkdir()
    for node in ("davinci0", "davinci11", "davinci_manager"):
        (tmp_path / "dev" / node).touch()
    found = doctor.survey(tmp_path, {"HOME": str(tmp_path / "root")})
    assert (found.cann, found.cann_home, found.cann_sourced) == ("8.5.0", tmp_path / home, False)
    assert (found.driver, found.npu_nodes) == ("25.2.0", 2)


def test_the_cann_that_was_sourced_goes_before_the_usual_places(tmp_path):
    for name, version in (("mine", "9.0.0"), ("usr/local/Ascend/cann", "8.5.0")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "ascend_nnae_install.info").write_text(f"version={version}\n")
    found = doctor.survey(tmp_path, {"ASCEND_HOME_PATH": str(tmp_path / "mine"), "HOME": "/nowhere"})
    assert (found.cann, found.cann_sourced) == ("9.0.0", True)


def test_set_env_that_was_not_sourced_is_fixed_by_its_own_path(tmp_path):
    home = tmp_path / "ascend-toolkit/latest"
    home.mkdir(parents=True)
    (home.parent / "set_env.sh").touch()
    found = replace(SOUND, torch_npu_fault=UNLOADABLE, cann_home=home, cann_sourced=False)
    assert npu_faults(found) == [
        (UNLOADABLE, f"source {home.parent}/set_env.sh"),
        (
            "`import torch` fails here, as torch loads torch_npu by itself",
            "export TORCH_DEVICE_BACKEND_AUTOLOAD=0, until the above is fixed",
        ),
    ]
    (home.parent / "set_env.sh").unlink()
    assert npu_faults(replace(found, autoload=False)) == [(UNLOADABLE, f"source {home}/set_env.sh")]


def test_a_container_without_the_devices_is_told_to_pass_them(tmp_path):
    found = replace(SOUND, torch_npu_fault="torch_npu sees no NPU", cann_home=tmp_path, npu_nodes=0)
    ((_, fix),) = npu_faults(found)
    assert "/dev/davinci*" in fix


def test_ascend_software_without_torch_npu_names_the_version_to_install(tmp_path):
    ((what, fix),) = npu_faults(replace(SOUND, torch_npu=None, cann_home=tmp_path))
    assert "torch_npu is not installed" in what
    assert fix.endswith("'torch_npu==2.13.*'")


@pytest.mark.parametrize(
    ("torch_npu", "cann", "is_fault", "words"),
    [
        ("2.13.0", "9.2.0", None, ""),
        ("2.13.0", "8.5.0", False, "compatible"),
        ("2.13.0", "8.1.RC1", True, "released with CANN 9.2, this is 8.1.RC1"),
        ("2.13.0.post9", "8.1.RC1", None, ""),  # a release that this version does not know
        ("2.13.0", None, None, ""),
        ("2.9.0", "9.2.0", True, "torch 2.13.0+cpu and torch_npu 2.9.0 do not match"),
    ],
)
def test_versions_that_do_not_match_are_named(torch_npu, cann, is_fault, words):
    findings = doctor.diagnose(replace(SOUND, torch_npu=torch_npu, cann=cann), "cpu")
    if is_fault is None:
        assert findings == []
    else:
        assert words in findings[0].what
        assert findings[0].is_fault is is_fault


def test_who_asks_for_the_cpu_is_told_of_an_unusable_npu_without_a_fault():
    findings = doctor.diagnose(replace(SOUND, torch_npu_fault=UNLOADABLE, cann_sourced=False), "cpu")
    assert [finding.is_fault for finding in findings] == [False, False]
    assert findings[0].what == UNLOADABLE


def test_the_page_for_ascend_machines_lists_the_versions_that_the_doctor_knows():
    page = (Path(__file__).parent.parent / "docs/ascend.md").read_text()
    rows = re.findall(r"^ *\| (\d+\.\d+)\.\w+ \| ([\d., a-z]+) \|$", page, flags=re.MULTILINE)
    assert {cann: tuple(releases.split(", ")) for cann, releases in rows} == installation.RELEASED_WITH


TESTED = [
    {"flashi2v-npu-ops": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "what": "tests"},
    {"flashi2v-npu-ops": "0.1.0", "torch": "2.13.0", "torch_npu": "2.13.0", "CANN": "stubs", "what": "conformance"},
]


@pytest.mark.parametrize(
    ("changes", "told", "fix"),
    [
        ({}, None, None),
        ({"torch": "2.13.1+cpu", "diffusers": "0.42.0"}, None, None),
        ({"diffusers": "0.43.0"}, "diffusers 0.43.0 (tested: 0.42.1)", "pip install 'diffusers==0.42.*'"),
        ({"diffusers": "0.42.1", "torch_npu": "2.13.0"}, "torch_npu 2.13.0 (tested: none)", "doctor --probe"),
        ({"torch_npu": "2.13.0", "CANN": "9.2.0"}, "CANN 9.2.0 (tested: stubs)", "doctor --probe"),
        (
            {"torch": "2.14.0", "transformers": "6.0"},
            "torch 2.14.0 (tested: 2.13.0), transformers 6.0",
            "'torch==2.13.*'",
        ),
    ],
)
def test_a_combination_that_was_never_tested_is_named(changes, told, fix):
    findings = [*doctor.combination({"flashi2v-npu-ops": "0.1.0", "torch": "2.13.0"} | changes, TESTED)]
    assert bool(findings) is bool(told)
    for finding in findings:
        assert told in finding.what
        assert fix in finding.fix
        assert not finding.is_fault


def test_sets_that_were_tested_come_with_every_package_that_is_installed(tmp_path, monkeypatch):
    (tmp_path / "flashi2v_train").mkdir()
    (tmp_path / "flashi2v_train/__init__.py").write_text("raise ImportError('it is looked for, not imported')")
    (tmp_path / "flashi2v_train/tested.json").write_text('[{"torch": "9.9"}]')
    monkeypatch.delitem(sys.modules, "flashi2v_train", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    sets = [*tested.tested_sets()]
    assert {"torch": "9.9"} in sets
    assert any("flashi2v-npu-ops" in each for each in sets)


def test_cuda_and_npu_together_are_a_note():
    (finding,) = doctor.diagnose(replace(SOUND, cuda_fault=None), "cpu")
    assert "auto picks the NPU" in finding.what
    assert not finding.is_fault


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_cpu_build_of_torch_beside_an_nvidia_driver_is_pointed_out():
    (finding,) = doctor.diagnose(replace(SOUND, nvidia_driver="NVIDIA UNIX x86_64 Kernel Module  550.54"), "cpu")
    assert "built without CUDA" in finding.what
    assert not finding.is_fault


def test_reasons_against_a_faster_backend_stand_beside_the_operator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(cuda, "flash_attn_fault", lambda: "flash-attn is not installed")
    served, findings = doctor.serve("attention", "cuda")
    assert findings == []
    row = doctor._row("attention", served)
    assert "torch" in row
    assert "not cuda: flash-attn and cuDNN take fp16 and bf16, got torch.float32 (fp32)" in row
    assert "not cuda: flash-attn is not installed" in row
