"""Groups between sampling and training: admission, and the bound on staleness.

At policy version v, groups may be admitted while fewer than (max_staleness + v + 1)·groups_per_step have been, and they
are trained first-in-first-out by admission. The n-th admitted group (from 0, dropped ones not counted) is therefore
trained in step ⌊n / groups_per_step⌋ ≤ v + max_staleness: the bound is a theorem, whatever finishes first. A dropped
group gives its slot back, which only moves later groups forward. Left out on purpose: who samples (`rollout.py`) and
persistence (`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cispo.types import Group, RunError


@dataclass
class Buffer:
    """groups_per_step groups are taken at once; `admitted` counts all that hold or held a slot."""

    groups_per_step: int
    max_staleness: int
    admitted: int = 0
    next_number: int = 0
    _open: list[int] = field(default_factory=list)
    _done: dict[int, Group] = field(default_factory=dict)

    def admissible(self, version: int) -> int:
        """How many groups may be admitted now, by a policy that has been trained for `version` steps."""
        return (self.max_staleness + version + 1) * self.groups_per_step - self.admitted

    def admit(self, version: int) -> int:
        """Take a slot; returns the group's admission number. Raises RunError where the bound would break."""
        if self.admissible(version) < 1:
            raise RunError(
                f"buffer: admitting group {self.next_number} at version {version} would exceed the staleness bound "
                f"{self.max_staleness}"
            )
        number, self.next_number = self.next_number, self.next_number + 1
        self.admitted += 1
        self._open.append(number)
        return number

    def put(self, group: Group) -> None:
        if group.admission not in self._open or group.admission in self._done:
            raise RunError(f"buffer: group {group.admission} was not admitted, or has come twice")
        self._done[group.admission] = group

    def drop(self, number: int) -> None:
        """Give the slot of an admitted group back."""
        self._open.remove(number)
        self._done.pop(number, None)
        self.admitted -= 1

    @property
    def ready(self) -> bool:
        """Whether the oldest groups_per_step admitted groups are all finished."""
        head = self._open[: self.groups_per_step]
        return len(head) == self.groups_per_step and all(number in self._done for number in head)

    def take(self) -> list[Group]:
        """The oldest groups_per_step groups, in order of admission."""
        if not self.ready:
            raise RunError("buffer: take() before a step's groups are ready")
        head, self._open = self._open[: self.groups_per_step], self._open[self.groups_per_step :]
        return [self._done.pop(number) for number in head]

    @property
    def outstanding(self) -> list[int]:
        """Admitted and not yet finished."""
        return [number for number in self._open if number not in self._done]

    @property
    def finished(self) -> list[Group]:
        """Finished and not yet taken, by admission."""
        return [self._done[number] for number in self._open if number in self._done]

    def restore(
        self, *, admitted: int, next_number: int, outstanding: Sequence[int], finished: Sequence[Group]
    ) -> None:
        """The state that `admitted`, `next_number`, `outstanding` and `finished` described."""
        self.admitted, self.next_number = admitted, next_number
        self._done = {group.admission: group for group in finished}
        self._open = sorted([*outstanding, *self._done])
