"""Ordinary work under the built-in profiles: no denial, and the same output as without a guard.

The sources are those of published packages, fetched as `./run-tests` fetches its own; where no
package index can be reached the tests say so (in CI they fail).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import packages
import pytest
from harness import ROOT, run

pytestmark = pytest.mark.root

ENV = {
    **{
        f"GIT_{who}_{what}": "agent@example.org"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    },
    **{f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}


@pytest.fixture(scope="session")
def sources() -> Path:
    """Source archives and wheels of real packages."""
    if reason := packages.fetch():
        why = f"no package index: {reason}"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    return packages.FOLDER


def both(script: str, folder: Path, *, profile: str, fill: Path | None = None) -> tuple[str, str]:
    """The output of a shell script, bare and guarded, each in a workspace of its own of the same
    name; the guarded run must end well and without a single denial."""
    outputs = []
    for kind in ("bare", "guarded"):
        place = folder / kind / "project"
        place.mkdir(parents=True)
        if fill:
            shutil.copytree(fill, place, dirs_exist_ok=True, symlinks=True)
        if kind == "bare":
            env = {"PATH": os.environ["PATH"], "HOME": str(folder), **ENV}
            outputs.append(
                subprocess.run(
                    ["sh", "-ec", script],
                    cwd=place,
                    env=env,
                    text=True,
                    check=True,
                    stdout=subprocess.PIPE,
                ).stdout
            )
            continue
        options = ["--profile", profile, "--net", "none"]
        for name, value in ENV.items():
            options += ["--env", f"{name}={value}"]
        done = run("sh", "-ec", script, cwd=place, options=tuple(options), timeout=300)
        assert done.code == 0, (done.out, done.err)
        assert done.denied() == []
        outputs.append(done.out)
    return outputs[0], outputs[1]


def test_git(tmp_path: Path) -> None:
    """Clone, change, commit, branch, merge, log, gc: the same hashes as bare."""
    origin = tmp_path / "origin"
    subprocess.run(
        ["git", "clone", "-q", "--bare", str(ROOT), str(origin / "origin.git")], check=True
    )
    bare, guarded = both(
        "git clone -q origin.git copy; cd copy; git checkout -qb work; echo x >> README.md; "
        "git add -A; git commit -qm change; git checkout -q -; git merge -q --no-ff -m merge work; "
        "git push -q origin HEAD; git gc -q; git fsck --no-progress; git log --format=%H -3; "
        "git status --short",
        tmp_path,
        profile="coding-agent",
        fill=origin,
    )
    assert bare == guarded and len(guarded.split()) >= 3


def test_c_build(tmp_path: Path, sources: Path) -> None:
    """A real C project is compiled, archived, linked and run: the same bytes come out."""
    (project,) = sources.glob("[Bb]rotli-*/")
    bare, guarded = both(
        "mkdir o; for f in c/common/*.c c/dec/*.c c/enc/*.c; do gcc -O1 -Ic/include -c $f "
        "-o o/$(echo $f | tr / _).o; done; "
        "ar rcs libbrotli.a o/*.o; gcc -O1 -Ic/include c/tools/brotli.c libbrotli.a -lm -o brotli; "
        "./brotli -k LICENSE -o packed; sha256sum < packed; ./brotli -d packed -o back; "
        "cmp LICENSE back",
        tmp_path,
        profile="coding-agent",
        fill=project,
    )
    assert bare == guarded and len(guarded) > 60


def test_pip_and_pytest(tmp_path: Path, sources: Path) -> None:
    """A virtual environment, wheels installed into it, and a package's own test suite."""
    filled = tmp_path / "filled"
    (project,) = sources.glob("MarkupSafe-*/")
    shutil.copytree(project / "tests", filled / "tests")
    shutil.copytree(sources / "wheels", filled / "wheels")
    bare, guarded = both(
        "/usr/bin/python3 -m venv env; "
        "env/bin/pip install -q --no-index --find-links wheels markupsafe pytest; "
        "env/bin/pytest -q tests | sed 's/ in .*//'; env/bin/pip list --format=freeze",
        tmp_path,
        profile="python-agent",
        fill=filled,
    )
    assert bare == guarded and " passed" in guarded


def test_npm(tmp_path: Path) -> None:
    """`npm test` of a small package with a script of its own and node's test runner."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    package = tmp_path / "package"
    package.mkdir()
    (package / "package.json").write_text(
        '{"name": "sum", "version": "1.0.0", "scripts": '
        '{"test": "node --test --test-reporter=tap test.mjs | grep ^#.pass"}}'
    )
    (package / "sum.mjs").write_text("export const sum = (a, b) => a + b;\n")
    (package / "test.mjs").write_text(
        'import { test } from "node:test"; import assert from "node:assert";\n'
        'import { sum } from "./sum.mjs";\n'
        'test("adds", () => assert.equal(sum(2, 3), 5));\n'
    )
    bare, guarded = both("npm test --silent", tmp_path, profile="coding-agent", fill=package)
    assert bare == guarded == "# pass 1\n"
