"""Build hook: compile the BPF objects and the static C programs, and put them into the wheel.

Run by ``pip install .`` and ``pip wheel .``; needs clang, libbpf's headers and libc6-dev.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Compile(BuildHookInterface):  # type: ignore[type-arg]
    """Runs mis_run/build.py from the source tree."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile unless this is an editable install, whose starter compiles by itself."""
        if self.target_name != "wheel" or version == "editable":
            return
        root = Path(self.root)
        # Of the source tree nothing but the package: what lies beside it is nobody's module.
        code = f"import sys; sys.path.append({str(root)!r}); import mis_run; sys.path.pop(); "
        code += "from mis_run import build; "
        done = subprocess.run([sys.executable, "-c", code + "sys.exit(build.main())"], check=False)
        if done.returncode:
            raise RuntimeError("compiling failed: apt-get install clang libbpf-dev libc6-dev")
        # Machine code inside: this wheel is for this architecture only, but for any Python 3.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
