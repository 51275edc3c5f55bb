"""Installed scripts, which start cold as a user's do."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(sys.executable).parent


def command(directory: Path, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script in a directory; it must end with this code."""
    name, *arguments = map(str, words)
    done = subprocess.run([SCRIPTS / name, *arguments], cwd=directory, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done
