"""The lines that the README gives to newcomers; CI runs the first of them as it stands there, in a fresh clone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "SSL_"))}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**known, "PIP_CONFIG_FILE": os.devnull, **environment},
        capture_output=True,
        text=True,
    )


def told(torch: str | None = None, **environment: str) -> dict[str, str]:
    """What uv is told where pip is set as given."""
    done = run("-c", f"import json, start; print(json.dumps(start.uv_environment({torch!r})))", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_lines_set_everything_up_in_both_shells():
    assert re.findall(r"^python3 (start\.py \w+)$", README, re.MULTILINE) == ["start.py demo", "start.py tests"]
    for what in ("demo", "tests"):
        assert f"`python start.py {what}`" in README  # PowerShell
        assert f"$(grep -m 1 '^python3 start.py {what}$' README.md)" in (ROOT / ".ci/run").read_text()


def test_help_and_wrong_words():
    assert "start.py tests" in run("start.py", "--help").stdout
    assert run("start.py", "nonsense").returncode == 2
    assert run("start.py", "demo", "packages").returncode == 2


def test_without_settings_of_pip_torch_is_the_build_that_fits_the_machine():
    assert told() == {"UV_TORCH_BACKEND": "auto"}
    assert told(UV_TORCH_BACKEND="cpu") == {"UV_TORCH_BACKEND": "cpu"}
    assert told("cu128") == {"UV_TORCH_BACKEND": "cu128"}


def test_packages_come_from_where_pip_is_set_to_find_them():
    expected = {"UV_DEFAULT_INDEX": "https://mirror.test/simple", "UV_INDEX_STRATEGY": "unsafe-best-match"}
    assert told(PIP_INDEX_URL="https://mirror.test/simple") == expected
    found = told("cpu", PIP_FIND_LINKS="/wheels /more", PIP_EXTRA_INDEX_URL="file:///a file:///b", PIP_CERT="/ca.pem")
    assert found == {
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INDEX": "file:///a file:///b",
        "SSL_CERT_FILE": "/ca.pem",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_TORCH_BACKEND": "cpu",
    }
