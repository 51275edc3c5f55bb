import subprocess
import sys

import flashi2v_infer


def test_public_names_exist():
    for name in flashi2v_infer.__all__:
        assert getattr(flashi2v_infer, name).__name__ == name


def test_importing_the_package_and_its_command_line_does_not_import_torch():
    code = "import sys, flashi2v_infer.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
