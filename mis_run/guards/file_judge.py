"""The verdict on one open or exec: the plan's rules, the object's identity, DEFCON's effects.

Reads the object through the descriptor that the kernel gave (`guards.file` has it) and answers
nothing.  Remembers which programs were executed, and what it once refused by name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from mis_run.defcon import CALM
from mis_run.file_rules import Effect, Rule
from mis_run.guards.file_objects import Identity, Outlaw
from mis_run.guards.file_policy import Policy, digest
from mis_run.linux import elf, statx
from mis_run.linux.fanotify import Opened

UNSEEN = Rule("", Effect.DENY, "defcon: not executed before in this run")
UNNAMED = Rule("", Effect.DENY, "defcon: only what a rule names explicitly")
DEFAULT = Rule("", Effect.DENY, "default")
CANARY = Rule("", Effect.DENY, "deny the guard's own canary")
MOST_REFUSED = 1 << 16  # objects; an agent that makes more of them is long dead


class Judge:
    """Judges for one agent; ``effects`` are those of the present DEFCON level."""

    def __init__(self, policy: Policy, canary: Identity) -> None:
        self.effects = CALM
        self._policy = policy
        self._canary = canary
        self._taints = bool(policy.taints.patterns())
        self._executed: set[Identity] = set()
        self._refused: dict[Identity, Outlaw] = {}  # what came after the start, refused by its name

    def judge(self, opened: Opened, path: str, facts: os.stat_result) -> Rule | None:
        """The rule that forbids it, None to allow."""
        policy, identity = self._policy, (facts.st_dev, facts.st_ino)
        if identity == self._canary:
            return CANARY
        for known in (policy.objects, self._refused):
            if rule := _outlawed(known, identity, opened.fd):
                return rule
        verdict = policy.opens.judge(path)
        if verdict.rule is not None and not verdict.allowed:
            if len(self._refused) < MOST_REFUSED:
                self._refused[identity] = Outlaw(verdict.rule, statx.birth(opened.fd))
            return verdict.rule
        if opened.executes:
            return self._program(opened, path, facts)
        if not verdict.allowed:
            # What may be executed is opened for that, right after; nothing else is a program.
            is_program = stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o111
            if not is_program or not (verdict := policy.execs.judge(path)).allowed:
                return DEFAULT
        if self.effects.explicit and verdict.rule is not None and not verdict.rule.explicit:
            return UNNAMED
        return self._loaded(opened, path, facts)

    def taint(self, opened: Opened, path: str, facts: os.stat_result) -> Rule | None:
        """The rule by which opening it marks the agent, whatever it is called by now."""
        if not self._taints:
            return None
        known = _outlawed(self._policy.tainted, (facts.st_dev, facts.st_ino), opened.fd)
        return known or self._policy.taints.judge(path).rule

    def _program(self, opened: Opened, path: str, facts: os.stat_result) -> Rule | None:
        policy, identity = self._policy, (facts.st_dev, facts.st_ino)
        if rule := _outlawed(policy.programs, identity, opened.fd):
            return rule
        verdict = policy.execs.judge(path)
        if verdict.rule is None or not verdict.allowed:
            return verdict.rule or DEFAULT
        if not verdict.rule.explicit and (copied := policy.copy_of(opened.fd, facts.st_size)):
            return copied
        if verdict.rule.sha256 and (
            policy.is_writable(path) or digest(opened.fd) != verdict.rule.sha256
        ):
            return Rule(path, Effect.DENY, f"{verdict.rule.text} (it has another content)")
        if self.effects.binaries and identity not in self._executed:
            return UNSEEN
        if self.effects.explicit and not verdict.rule.explicit:
            return UNNAMED
        self._executed.add(identity)
        return None

    def _loaded(self, opened: Opened, path: str, facts: os.stat_result) -> Rule | None:
        """What may not be executed may not be opened: an interpreter or the loader could run it.

        That holds for what a denial names (scripts too; not for all of a folder, which may be
        read), and for every ELF program that may not be executed.
        """
        policy = self._policy
        if rule := _outlawed(policy.programs, (facts.st_dev, facts.st_ino), opened.fd):
            return rule
        verdict = policy.execs.judge(path)
        denial = None if verdict.allowed else verdict.rule
        if denial is not None and not denial.pattern.endswith("*"):
            return denial
        if not stat.S_ISREG(facts.st_mode) or os.pread(opened.fd, 4, 0) != elf.MAGIC:
            return None
        if verdict.allowed:
            known = verdict.rule is not None and verdict.rule.explicit
            return None if known else policy.copy_of(opened.fd, facts.st_size)
        # Libraries of the system are no programs; a library that the agent made could be one.
        library = ".so" in path.rpartition("/")[2] and not policy.is_writable(path)
        return None if library or not elf.is_program(opened.fd) else denial or DEFAULT


def _outlawed(known: Mapping[Identity, Outlaw], identity: Identity, fd: int) -> Rule | None:
    outlaw = known.get(identity)
    return outlaw.rule if outlaw and outlaw.is_at(fd) else None
