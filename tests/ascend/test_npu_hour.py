"""The first hour in short: the doctor tries an operator, nothing stops at a failure, one JSON holds it all."""

import json
import sys

import first_hour
import pytest
from npu_runs import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="it is what runs this")


def test_the_first_hour_goes_on_after_a_failure_and_leaves_one_report(tmp_path, capfd):
    failing = (sys.executable, "-c", "print('no'); exit(3)")
    passing = (sys.executable, "-c", "print('done')")
    steps = {"doctor": (*first_hour.DOCTOR, "conv3d", *first_hour.SIZE), "fails": failing, "goes on": passing}
    assert first_hour.main(tmp_path / "report.json", steps) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: part["passed"] for name, part in report.items()} == {"doctor": True, "fails": False, "goes on": True}
    doctor = report["doctor"]["output"]
    assert doctor["chosen"] == "npu:0"
    assert [(each["operator"], each["dtype"], each["backend"], each["verdict"]) for each in doctor["probes"]] == [
        ("conv3d", "fp32", "ascend", "right"),
        ("conv3d", "bf16", "ascend", "right"),
    ]
    assert doctor["route"] is None
    assert (report["fails"]["output"], report["fails"]["exit_code"]) == (["no"], 3)
    assert report["goes on"]["output"] == ["done"]
    assert "attach it" in capfd.readouterr().out
