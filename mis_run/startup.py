"""What makes a short-lived Python begin sooner: no collector while modules are imported, and what
is installed added only when something of it is needed (docs/decisions/start-up.md)."""

from __future__ import annotations

import gc
import sys
from pathlib import Path


def begin() -> None:
    """No collections from here to `settled`: importing makes much, and no garbage."""
    gc.disable()


def settled() -> None:
    """What is there now stays: the collector need not look at it again."""
    gc.freeze()
    gc.enable()


def reach_installed() -> None:
    """Make installed packages importable: our starters leave `site` out (``python -S``)."""
    if sys.flags.no_site and not any(one.endswith("site-packages") for one in sys.path):
        import site

        site.main()


def environment() -> Path:
    """The virtual environment that this Python belongs to, or its prefix: what ``sys.prefix`` is
    where `site` has set it."""
    home = Path(sys.executable).parent.parent
    return home if (home / "pyvenv.cfg").exists() else Path(sys.prefix)
