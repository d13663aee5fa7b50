"""What one agent may do, as the user side says it and as the kernel has it (struct mis_agent).

Out of scope: how it gets there, and what the kernel says back (`lsm`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mis_run import defcon
from mis_run.bundle import ROOT_CAPABILITIES
from mis_run.dataclass import dataclass, field
from mis_run.guards.lsm_abi import AGENT, AgentFlag, capability_mask
from mis_run.guards.lsm_policy import Compiled
from mis_run.model import Defcon


@dataclass(frozen=True, kw_only=True)
class LsmPolicy:
    """What one agent may do; ``rules`` from `lsm_policy.compile`."""

    rules: Compiled
    enforce: bool = True
    on_loss: str = "closed"  # closed | open
    deadline: float | None = None  # seconds without `renew`; None: no dead man
    no_wx: bool = False
    capabilities: Sequence[str] = ROOT_CAPABILITIES
    defcon: Defcon = field(default_factory=Defcon)
    processes: Path | None = None  # the cgroup that its processes are in; None: the guarded one
    cache: bool = True  # what a walk found is remembered; False: to compare
    canary: str = ""  # a file whose rule is marked CANARY, as the container's init names it


@dataclass
class Settings:
    """What changes of an agent while it is guarded."""

    id: int
    depth: int
    own: Sequence[int]  # mis_agent.own
    deadline: float | None
    generation: int = 0
    level: int = defcon.NORMAL
    quiet: bool = False  # no effects of a level
    trying: bool = False  # the canary, now

    def pack(self, policy: LsmPolicy) -> bytes:
        """struct mis_agent; the deadline counts from now."""
        effects = {**defcon.EFFECTS, **policy.defcon.effects}
        act = policy.defcon.act and not self.quiet
        if not act:
            effects = dict.fromkeys(effects, defcon.NEVER)
        flags = AgentFlag(0)
        if policy.enforce:
            flags |= AgentFlag.ENFORCE
        if policy.on_loss == "open":
            flags |= AgentFlag.LOSS_OPEN
        if policy.no_wx:
            flags |= AgentFlag.NO_WX
        if not policy.cache:
            flags |= AgentFlag.NO_CACHE
        if self.trying:
            flags |= AgentFlag.TRYING
        late = time.monotonic_ns() + int(self.deadline * 1e9) if self.deadline else 0
        return AGENT.pack(
            *(self.id, self.generation, late, int(policy.defcon.decay * 1e9)),
            *(capability_mask(policy.capabilities), flags, self.depth),
            *policy.defcon.thresholds,
            *(effects[name] for name in ("writes", "binaries", "wx_memory", "explicit")),
            *(effects["kill"], self.level, 0),
            *(defcon.spin(delay) if act else 0 for delay in policy.defcon.delays),
            0,
            *self.own,
        )
