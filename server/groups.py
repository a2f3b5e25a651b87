"""Micro-batch groups: which sequences decode together, and who should move for the groups to stay even.

A group is one batch on every rank. Placement and moves weigh two things: rows are padded to the group's longest, so
like lengths belong together and at most a third of a group may be padding by choice; and the stages are only kept busy
by groups of like size. Pure bookkeeping over lengths; the scheduler turns moves into frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from server.kv_budget import Shape, blocks
from server.sequence import Sequence


@dataclass(eq=False)
class Group:
    """Sequences that decode together. `rows` are in the caches' batch, the other members are not there yet."""

    group_id: int
    members: list[Sequence] = field(default_factory=list)
    rows: list[Sequence] = field(default_factory=list)
    is_in_flight: bool = False

    def shape(self, *, without: list[Sequence] | None = None, extra_tokens: list[int] | None = None) -> Shape:
        """The rectangle its caches grow to, less some members, and with further rows of so many tokens each."""
        lengths = [member.num_reserved_tokens for member in self.members if member not in (without or ())]
        lengths += extra_tokens or []
        return Shape(len(lengths), max(lengths, default=0))


class Move(NamedTuple):
    """`sequences` should go from one group to another, a new one where `target` is None."""

    source: Group
    target: Group | None
    sequences: list[Sequence]


class Groups:
    """All groups, by id.

    Args:
        can_share: False where caches cannot be batched: then every group has one row.
    """

    def __init__(self, *, can_share: bool) -> None:
        self._can_share = can_share
        self._groups: dict[int, Group] = {}
        self._ids = itertools.count()

    def __iter__(self):
        return iter(list(self._groups.values()))

    def __len__(self) -> int:
        return len(self._groups)

    def get(self, group_id: int) -> Group | None:
        return self._groups.get(group_id)

    def of(self, sequence: Sequence) -> Group:
        return self._groups[sequence.group_id]

    def members(self) -> list[Sequence]:
        return [member for group in self._groups.values() for member in group.members]

    def shapes(self, *changed: tuple[Group | None, Shape]) -> list[Shape]:
        """Every group's rectangle, some of them changed; None stands for a group yet to come."""
        replaced = {group.group_id: shape for group, shape in changed if group is not None}
        shapes = [replaced.get(group.group_id) or group.shape() for group in self._groups.values()]
        return shapes + [shape for group, shape in changed if group is None]

    def place(self, num_tokens: int, num_wanted: int, fits: Callable[[list[Shape]], bool]) -> Group | None:
        """The group for a newcomer of `num_tokens`, a new one where it is in none of them yet; None: no room.

        With fewer than `num_wanted` groups it opens one. Otherwise it joins one of the smallest, there the one whose
        padding it costs least; a group of its own where the padding would be too much everywhere.
        """
        candidates: list[Group | None] = []
        if self._can_share:
            fewest = min((len(group.members) for group in self._groups.values()), default=0)
            grown = {group: group.shape(extra_tokens=[num_tokens]) for group in self._groups.values()}
            willing = [group for group in grown if _is_dense(grown[group], area(group.shape()) + blocks(num_tokens))]
            candidates += sorted(
                willing,
                key=lambda group: (len(group.members) > fewest + 1, area(grown[group]) - area(group.shape())),
            )
        candidates.insert(0 if len(self._groups) < num_wanted else len(candidates), None)
        for group in candidates:
            shape = Shape(1, num_tokens) if group is None else group.shape(extra_tokens=[num_tokens])
            if fits(self.shapes((group, shape))):
                return self.open() if group is None else group
        return None

    def open(self) -> Group:
        group = Group(next(self._ids))
        self._groups[group.group_id] = group
        return group

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its group; a group without members is gone."""
        group = self.of(sequence)
        group.members.remove(sequence)
        if sequence in group.rows:
            group.rows.remove(sequence)
        if not group.members:
            del self._groups[group.group_id]

    def next_move(self, num_wanted: int, fits: Callable[[list[Shape]], bool]) -> Move | None:
        """What would bring the groups nearer to `num_wanted` of like size, or None. Only idle groups give rows away."""
        if not self._can_share or not self._groups:
            return None
        by_size = sorted(self._groups.values(), key=lambda group: (len(group.members), group.group_id))
        for move in self._moves(by_size, num_wanted):
            if not move.sequences or (move.source.is_in_flight and any(s in move.source.rows for s in move.sequences)):
                continue
            tokens = [sequence.num_reserved_tokens for sequence in move.sequences]
            if move.target is None:
                grown = Shape(len(tokens), max(tokens))
            else:
                grown = move.target.shape(extra_tokens=tokens)
                if not _is_dense(grown, area(move.target.shape()) + sum(map(blocks, tokens))):
                    continue
            if fits(self.shapes((move.source, move.source.shape(without=move.sequences)), (move.target, grown))):
                return move
        return None

    @staticmethod
    def _moves(by_size: list[Group], num_wanted: int) -> list[Move]:
        """In the order in which they should be tried; the youngest move, their contexts are the shortest to copy."""
        smallest, largest = by_size[0], by_size[-1]
        if len(by_size) < num_wanted:
            num_rows = sum(len(group.members) for group in by_size)
            num_moving = min(max(1, num_rows // num_wanted), len(largest.members) - 1)
            return [Move(largest, None, _youngest(largest, num_moving))]
        if len(by_size) > num_wanted:
            pairs = itertools.permutations(by_size, 2)
            return [Move(source, target, list(source.members)) for source, target in pairs]
        surplus = len(largest.members) - len(smallest.members)
        return [Move(largest, smallest, _youngest(largest, surplus // 2))] if surplus > 1 else []


def _is_dense(shape: Shape, num_tokens: int) -> bool:
    """True if a rectangle that holds rows of `num_tokens` in all, in whole blocks, is padding by a third at most."""
    return 2 * area(shape) <= 3 * num_tokens


def _youngest(group: Group, count: int) -> list[Sequence]:
    return sorted(group.members, key=lambda member: member.order)[-count:] if count > 0 else []


def area(shape: Shape) -> int:
    """Tokens of a group's rectangle."""
    return shape.rows * blocks(shape.longest)
