"""How a short-lived Python begins, and where what it runs lies.

No collector while modules are imported, and what is installed added only when something of it is
needed: docs/decisions/start-up.md.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from mis_run.build import PACKAGE, ROOT

CHECKOUT = (
    *("mis-run", "mis", "mis-oci-runtime", "mis-oci-hook", "run-tests", "hatch_build.py"),
    *("pyproject.toml", "scripts", "bpf", "shim", "ci", "images"),
)
"""What starters of the checkout are, run, source or compile as root; no links, which cannot be
mounted over."""


def begin() -> None:
    """No collections from here to `settled`: importing makes much, and no garbage.

    Threads that wait for the kernel hand over at once, not after the default 5 ms.
    """
    gc.disable()
    sys.setswitchinterval(0.0005)


def settled() -> None:
    """What is there now stays: the collector need not look at it again."""
    gc.freeze()
    gc.enable()


def reach_installed() -> None:
    """Make installed packages importable: our starters leave `site` out (``python -S``).

    Without what `site` would run beside (``.pth`` files), which none of ours needs.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = str(environment() / "lib" / version / "site-packages")
    if sys.flags.no_site and packages not in sys.path:
        sys.path.append(packages)


def environment() -> Path:
    """The virtual environment that this Python belongs to, or its prefix: what ``sys.prefix`` is
    where `site` has set it."""
    home = Path(sys.executable).parent.parent
    return home if (home / "pyvenv.cfg").exists() else Path(sys.prefix)


def ours() -> tuple[Path, ...]:
    """What root's next start is made of: the package, its virtual environment, and in a checkout
    the starters and what they build."""
    found = [PACKAGE]
    if (environment() / "pyvenv.cfg").exists():
        found.append(environment())
    if (ROOT / "mis-run").exists():
        found += [ROOT / name for name in CHECKOUT if (ROOT / name).exists()]
    return tuple(found)
