"""Published packages that tests build, kept in ``.cache`` so that a test machine without network
finds them there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "packages"
BROTLI, MARKUPSAFE = "brotli==1.1.0", "markupsafe==2.1.5"


def fetch() -> str:
    """Have the sources and wheels in FOLDER; why not, where they cannot be had."""
    if (FOLDER / "complete").exists():
        return ""
    if os.environ.get("MIS_VM"):
        return "not fetched by the machine that started this one"
    shutil.rmtree(FOLDER, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    for words in (
        ["download", "-d", FOLDER, "--no-deps", "--no-binary", ":all:", BROTLI, MARKUPSAFE],
        ["download", "-d", FOLDER / "wheels", "pytest<9"],
        ["wheel", "-w", FOLDER / "wheels", "--no-deps", MARKUPSAFE],
    ):
        done = subprocess.run([*pip, *map(str, words)], capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip()[-300:]
    for archive in FOLDER.glob("*.tar.gz"):
        shutil.unpack_archive(archive, FOLDER)
    (FOLDER / "complete").touch()
    return ""
