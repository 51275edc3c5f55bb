"""Trying operators one by one, each in a process of its own, and the setting that leads around what fails."""

import pytest

from flashi2v_npu_ops import registry
from flashi2v_npu_ops.doctor import examine
from flashi2v_npu_ops.probe import Probe, measure, probe, setting


def test_an_operator_is_right_crashed_or_slow():
    right = probe("gelu_tanh", "tiny", "bf16", "torch", "cpu", seconds=600)
    assert right.verdict == "right"
    assert right.error < 1e-2
    assert right.milliseconds > 0
    crashed = probe("gelu_tanh", "tiny", "fp32", "ascend", "cpu", seconds=600)
    assert (crashed.verdict, crashed.error) == ("crashed", None)
    assert "it runs on npu devices, the tensors are on cpu" in crashed.words
    assert probe("gelu_tanh", "tiny", "fp32", "torch", "cpu", seconds=0.01).verdict == "slow"


@pytest.mark.parametrize("operator", registry.operators())
def test_every_operator_can_be_tried(operator):
    assert measure(operator, "tiny", "fp32", "auto", "cpu")["error"] < 1e-5


def outcome(operator: str, backend: str, verdict: str = "right") -> Probe:
    return Probe(operator, "tiny", "fp32", backend, verdict)


def test_the_setting_names_what_is_right_where_the_first_choice_is_not():
    fine = [outcome("gelu_tanh", "ascend"), outcome("rms_norm", "ascend")]
    assert setting(fine) is None
    failed = [outcome("conv3d", "ascend", "crashed"), outcome("conv3d", "taps", "wrong"), outcome("conv3d", "unfold")]
    failed += [outcome("attention", "ascend", "slow"), outcome("attention", "torch")]
    assert setting(fine + failed) == "export FLASHI2V_OPS_BACKEND=conv3d=unfold,attention=torch"
    with pytest.raises(LookupError, match="rms_norm"):
        setting([outcome("rms_norm", "reference", "wrong")])


def test_the_doctor_reports_what_it_tried_and_leads_around_it():
    tried = [outcome("attention", "torch", "wrong"), outcome("attention", "reference")]
    report = examine("cpu", {}, lambda name: iter(tried))
    assert report.probes == tried
    assert report.route == "export FLASHI2V_OPS_BACKEND=attention=reference"
    assert report.is_at_fault
    assert [finding.fix for finding in report.findings if "attention by torch" in finding.what] == [report.route]
