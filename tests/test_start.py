"""The lines that the README gives to newcomers; CI runs them as they stand there."""

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


def test_the_lines_for_newcomers_are_those_that_ci_runs():
    lines = re.search(r"^```bash\n(git clone https://\S+/flashi2v\npython3 flashi2v/start.py demo)\n```$", README, re.M)
    assert lines is not None
    assert re.findall(r"^python3 (\S+) (\w+)$", README, re.M) == [("flashi2v/start.py", w) for w in ("demo", "tests")]
    assert "/^git clone /,/^```$/p" in (ROOT / ".ci/run").read_text()


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
