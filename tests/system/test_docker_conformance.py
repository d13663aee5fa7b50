"""The conformance table in containers of a real Docker engine: the verdicts of `mis-run` itself.

The same acts, rules, events and counts as test_conformance.py, with the profile written for an
image, and the files in the container: volumes and the folder that a container begins in are
allowed as a whole, as `--bind` is.
Left out is what is hidden in a container, and so found empty and not refused.  Each control is run
under plain runc, in the same engine and image.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import conformance
import engine as engines
import pytest
from conformance import GROUPS, Outcome, Row
from engine import Engine, events, traces
from harness import wait_for

from mis_run.bundle import ROOT_CAPABILITIES
from mis_run.dataclass import replace

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(engines.why_not() is not None, reason=str(engines.why_not())),
]
IMAGE = "python:1"
# In an image "@system" is all of it and "@secrets" nothing: here both are named.
SYSTEM = [f"/{name}/**" for name in ("usr", "bin", "lib", "lib64", "etc", "proc", "sys", "dev")]
SECRET = "/etc/shadow"
LEFT_OUT = shutil.ignore_patterns(
    *("test", "__pycache__", "idlelib", "tkinter", "ensurepip", "lib2to3", "config-*", "pydoc_data")
)
WORKSPACE = "/table"
EXPECTED = {
    row.name: replace(on := row.on("host"), rule=on.rule.replace("$WORKSPACE", WORKSPACE))
    for row in conformance.table()
}
ROWS = [row for row in conformance.table() if SECRET not in row.args]


def python_image(folder: Path) -> Path:
    """A tar with busybox, the machine's Python and real programs, and what they load."""
    root = engines.make_root(folder)
    for name in ("true", "cat"):
        (root / "bin" / name).unlink()  # busybox's would look at what they are called
        shutil.copy(f"/bin/{name}", root / "bin")
    (root / "usr/bin").mkdir(parents=True)
    (root / "var/tmp").mkdir(parents=True)
    (root / "var/tmp").chmod(0o1777)
    (root / SECRET[1:]).write_text("SECRET\n")
    real = Path(conformance.PYTHON).resolve()
    shutil.copy(real, root / "usr/bin/python3")
    shutil.copytree(f"/usr/lib/{real.name}", root / "usr/lib" / real.name, ignore=LEFT_OUT)
    modules = (root / "usr/lib" / real.name / "lib-dynload").glob("*.so")
    argv = ["ldd", str(real), "/bin/true", "/bin/cat", *map(str, modules)]
    for line in subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split():
        if line.startswith("/") and ".so" in line and not line.endswith(":"):
            target = root / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(line, target)
    subprocess.run(["tar", "-C", root, "-cf", folder / "python.tar", "."], check=True)
    return folder / "python.tar"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With the profile of the table, and the image that its acts need."""
    folder = tmp_path_factory.mktemp("operator")
    read = json.dumps([*SYSTEM, "/run/mis/**"])[1:-1]
    text = conformance.PROFILE.replace('deny = ["...", ', f'deny = ["{SECRET}", ')
    text = text.replace("$WORKSPACE", WORKSPACE)
    (folder / "table.toml").write_text(text.replace('"@system"', read))
    (folder / "oci.toml").write_text(f'profiles = "{folder}"\nallowed = ["table"]\n')
    words = ["--mis-config", str(folder / "oci.toml"), "--mis-profile", "table"]
    runtimes = {"mis": {"path": engines.RUNTIME, "runtimeArgs": words}}
    before = traces()
    with engines.running(tmp_path_factory.mktemp("engine"), runtimes) as running:
        image = python_image(tmp_path_factory.mktemp("image"))
        running.docker("import", str(image), IMAGE)
        image.unlink()
        yield running
    wait_for(lambda: not engines.left(before), 10)


def ran(engine: Engine, rows: list[Row], folder: Path, runtime: str) -> dict[str, Outcome]:
    """All of ``rows`` in one container; name → outcome."""
    argv = [
        f"{WORKSPACE}/{word}" if word.startswith(("open/", "results/")) else word
        for word in conformance.prepared(folder, rows, "/var/tmp", WORKSPACE)
    ]
    options = ["--name", "table", "--runtime", runtime, "--cap-drop", "ALL"]
    options += [word for one in ROOT_CAPABILITIES for word in ("--cap-add", one)]
    engine.docker("create", *options, IMAGE, *argv)
    try:
        engine.docker("cp", f"{folder}/.", f"table:{WORKSPACE}")
        done = engine.docker("start", "--attach", "table", check=False, timeout=240)
        assert done.returncode == 0, (done.stderr, done.stdout)
        engine.docker("cp", f"table:{WORKSPACE}/results/results.json", str(folder))
    finally:
        engine.docker("rm", "-f", "table")
    told = defaultdict(list)
    for event in events() if runtime == "mis" else ():
        if event.get("verdict") == "deny":
            told[event.get("comm", "")].append(event)
    met = json.loads((folder / "results.json").read_text())
    assert set(told) <= set(met), set(told) - set(met)
    return {row.name: Outcome(met[f"r{n}"], told[f"r{n}"]) for n, row in enumerate(rows)}


@pytest.mark.parametrize("group", GROUPS)
def test_the_same_verdicts(group: str, engine: Engine, tmp_path: Path) -> None:
    """Each act meets what it meets under `mis-run`, and the record shows the same violations."""
    rows = [row for row in ROWS if row.group == group]
    found = ran(engine, rows, tmp_path / "ws", "mis")
    different = {
        row.name: why
        for row in rows
        if (why := conformance.differences(EXPECTED[row.name], found[row.name]))
    }
    assert different == {}


@pytest.mark.parametrize("group", GROUPS)
def test_control(group: str, engine: Engine, tmp_path: Path) -> None:
    """Under plain runc the acts succeed: it is the guard that refuses them."""
    rows = [row for row in ROWS if row.group == group and row.control is not None]
    found = ran(engine, rows, tmp_path / "ws", "runc")
    assert found
    wanted = {row.name: row.control for row in rows}
    assert {name: one.met for name, one in found.items() if one.met != wanted[name]} == {}
