"""The starters and the wheel: set up once, quiet afterwards, nothing of the current directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT

pytestmark = pytest.mark.root


def starter(*words: str, cwd: Path, program: str = "mis-run") -> subprocess.CompletedProcess[str]:
    argv = [str(ROOT / program), *words]
    return subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=600, check=False, input=""
    )


def test_second_start_is_quiet_and_fast(tmp_path: Path) -> None:
    """With nothing to do the starter says nothing and adds less than 50 ms."""
    starter("--version", cwd=tmp_path)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        done = starter("--version", cwd=tmp_path)
        times.append(time.perf_counter() - began)
        assert (done.returncode, done.stderr) == (0, "")
    direct = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-m", "mis_run", "--version"], capture_output=True)
        direct.append(time.perf_counter() - began)
    assert min(times) - min(direct) < 0.05


def test_works_through_a_link_from_anywhere(tmp_path: Path) -> None:
    """A symbolic link to the starter works in any directory."""
    link = tmp_path / "launcher"
    link.symlink_to(ROOT / "mis-run")
    done = subprocess.run([link, "--version"], cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout.startswith("mis-run ")


def test_the_current_directory_cannot_replace_our_modules(tmp_path: Path) -> None:
    """A mis_run package, a json.py and PYTHONPATH in the agent's workspace are not imported."""
    (tmp_path / "mis_run").mkdir()
    (tmp_path / "mis_run/__init__.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    done = subprocess.run(
        [ROOT / "mis-run", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.startswith("mis-run "), done.stderr


def test_not_root_and_not_set_up_is_clear(tmp_path: Path) -> None:
    """An unprivileged user with a fresh clone gets one line and a hint, exit code 120."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for folder in (clone, *clone.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    argv = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    done = subprocess.run(
        [*argv, clone / "mis-run", "true"], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 120
    assert "not set up yet" in done.stderr
    assert "hint: sudo" in done.stderr


@pytest.mark.slow
def test_two_first_starts_in_a_hostile_directory(tmp_path: Path) -> None:
    """Two starts set a fresh clone up once, importing nothing of the current directory; a moved
    checkout is set up again."""
    clone, hostile = tmp_path / "clone", tmp_path / "hostile"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    hostile.mkdir()
    for name in ("pip", "venv", "ensurepip", "compileall", "mis_run"):
        (hostile / f"{name}.py").write_text("raise SystemExit('hijacked')")
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([clone / "mis-run", "--version"], cwd=hostile, stdout=pipe, stderr=pipe)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert all(out.startswith(b"mis-run ") for out, _ in said)
    assert sum(err.count(b"making a virtual environment") for _, err in said) == 1
    moved = clone.rename(tmp_path / "moved")
    again = subprocess.run([moved / "mis-run", "--version"], capture_output=True, check=False)
    assert again.stdout.startswith(b"mis-run "), again.stderr
    assert b"making a virtual environment" in again.stderr


@pytest.mark.slow
def test_a_package_that_cannot_be_had(tmp_path: Path) -> None:
    """Without the mirror a missing package is one line, a hint and code 120; nothing is made."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    # In namespaces of its own: no network, empty package lists, libbpf's headers hidden.
    hide = "; ".join(
        f"mount -t tmpfs tmpfs {folder}"
        for folder in ("/usr/include/bpf", "/var/lib/apt", "/var/cache/apt")
    )
    # dpkg must believe that the package is not installed.
    status = tmp_path / "status"
    words = Path("/var/lib/dpkg/status").read_text().split("\n\n")
    status.write_text("\n\n".join(w for w in words if not w.startswith("Package: libbpf-dev\n")))
    script = f"{hide}; mount --bind {status} /var/lib/dpkg/status; exec {clone}/mis-run --version"
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", script],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 120, done.stderr
    assert "cannot install libbpf-dev: the package mirror cannot be reached" in done.stderr
    assert "hint: apt-get install libbpf-dev" in done.stderr
    assert not (clone / ".venv").exists()


@pytest.mark.slow
def test_wheel_has_the_compiled_objects(tmp_path: Path) -> None:
    """`pip install .` in a fresh environment gives both commands, which launch an agent."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run(["/usr/bin/python3", "-m", "venv", tmp_path / "venv"], check=True)
    bin_folder = tmp_path / "venv/bin"
    subprocess.run([bin_folder / "pip", "install", "-q", str(clone)], check=True, timeout=300)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    done = subprocess.run(
        [bin_folder / "mis-run", "-q", "--", "echo", "from the wheel"],
        cwd=workspace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "from the wheel\n"), done.stderr
    listed = subprocess.run(
        [bin_folder / "mis", "profile", "list"], capture_output=True, text=True, check=True
    )
    assert "coding-agent" in listed.stdout


PROGRAMS = ("nft", "ip", "setpriv", "runc", "crun", "cat", "sh", "readlink", "systemd-run")


def test_programs_in_the_callers_path_are_not_run(tmp_path: Path) -> None:
    """What an earlier agent left in an activated virtual environment is never run by us."""
    ran, folder = tmp_path / "ran", tmp_path / "venv/bin"
    folder.mkdir(parents=True)
    ran.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/bash\n/usr/bin/touch {ran}/{name}\n")
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}"}
    (tmp_path / "out").write_text("")
    for starter in ("mis-run", "mis"):
        words = ["--", "/bin/true"] if starter == "mis-run" else ["gc"]
        with (tmp_path / "out").open("w") as out:
            argv = [str(ROOT / starter), *words]
            done = subprocess.run(argv, cwd=tmp_path, env=env, stdout=out, timeout=60, check=False)
        assert done.returncode == 0
    assert sorted(path.name for path in ran.iterdir()) == []
    # The control: that PATH does lead there.
    subprocess.run(["/bin/bash", "-c", "; ".join(PROGRAMS)], env=env, check=True)
    assert sorted(path.name for path in ran.iterdir()) == sorted(PROGRAMS)
