"""What is known of one name in a rule: its addresses, until when, and who waits for them."""

from __future__ import annotations

import time

from mis_run import asked
from mis_run.dataclass import dataclass, field
from mis_run.resolve import TTL_CEILING, TTL_FLOOR

GRACE = 60.0  # seconds an address stays allowed after it left the answer, at least
RETRY, RETRY_MOST = 5.0, 300.0  # seconds until a failed name is tried again, doubling
MOST_ADDRESSES = 64  # of one name, and as many that left; BPF's table has 4096 entries


@dataclass
class Name:
    """One name: what it resolves to and until when.

    It is resolved, and kept fresh, from the agent's first question on: a profile may name a dozen
    registries that a run never uses.
    """

    wanted: bool = False
    addresses: tuple[str, ...] = ()
    expires: float = 0.0
    known: bool = False  # resolved at least once
    failures: int = 0  # since the last answer
    leaving: dict[str, float] = field(default_factory=dict)  # address → allowed until
    waiting: list[tuple[float, asked.Question]] = field(default_factory=list)  # until when
    listed: bool = True  # in a rule

    def learn(self, found: tuple[str, ...], ttl: float) -> None:
        """Take an answer over; addresses that are not in it any more begin to leave."""
        found = found[:MOST_ADDRESSES]
        now = time.monotonic()
        for address in set(self.addresses) - set(found):
            self.leaving[address] = now + max(ttl, GRACE)
        latest = sorted(self.leaving.items(), key=lambda item: item[1])[-MOST_ADDRESSES:]
        self.leaving = {address: until for address, until in latest if address not in found}
        self.addresses, self.known, self.failures = found, True, 0
        self.expires = now + min(max(ttl, TTL_FLOOR), TTL_CEILING)

    def fail(self) -> None:
        """The last addresses stay: better than none while no server answers."""
        self.expires = time.monotonic() + min(RETRY * 2**self.failures, RETRY_MOST)
        self.failures = min(self.failures + 1, 16)

    def expire(self, now: float) -> bool:
        """Give up questions that waited too long; whether addresses have left for good."""
        late = [question for until, question in self.waiting if until <= now]
        self.waiting = [one for one in self.waiting if one[0] > now]
        for question in late:
            question.answer(rcode="SERVFAIL")
        stay = {address: until for address, until in self.leaving.items() if until > now}
        left, self.leaving = len(self.leaving) - len(stay), stay
        return left > 0

    def reply(self, question: asked.Question) -> None:
        """Answer with what is known, for as long as it is good."""
        question.answer(self.addresses, max(1, int(self.expires - time.monotonic())))

    def reply_waiting(self) -> None:
        """Answer all who waited for this."""
        waiting, self.waiting = self.waiting, []
        for _, question in waiting:
            self.reply(question)
