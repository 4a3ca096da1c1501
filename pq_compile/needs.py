"""What graphs ask of their parameters: the groups, the linears, and the form each is read in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .plan import Groups, Linear

Rename = Callable[[Groups, Mapping[str, str]], Groups]
Merge = Callable[[Sequence[Groups]], Groups]


@dataclass(frozen=True)
class Needs:
    """What one graph, or all graphs of a unit, ask of their parameters, by name."""

    groups: Groups = field(default_factory=lambda: Groups({}, ()))
    linears: tuple[Linear, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()  # weights wanted packed
    dense: frozenset[str] = frozenset()  # parameters read as they are

    def renamed(self, names: Mapping[str, str], rename: Rename) -> Needs:
        """The same with other parameter names; a name that ``names`` lacks stays."""
        return Needs(
            rename(self.groups, names),
            tuple(linear.renamed(names) for linear in self.linears),
            {names.get(name, name): reason for name, reason in self.kept.items()},
            frozenset(names.get(name, name) for name in self.packed),
            frozenset(names.get(name, name) for name in self.dense),
        )

    def joined(self, other: Needs, merge: Merge) -> Needs:
        """What both ask; of a linear that both know, the first description stays."""
        known = {linear.weight for linear in self.linears}
        return Needs(
            groups=merge([self.groups, other.groups]),
            linears=self.linears
            + tuple(linear for linear in other.linears if linear.weight not in known),
            kept={**other.kept, **self.kept},
            packed=self.packed | other.packed,
            dense=self.dense | other.dense,
        )

    def read_otherwise(self, joint: Needs) -> frozenset[str]:
        """The parameters that ``joint`` reads in a form that this does not."""
        known = self.packed | self.dense
        return known & ((joint.packed - self.packed) | (joint.dense - self.dense))
