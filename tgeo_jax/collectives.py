"""What devices say to each other in a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_BYTES = {
    "pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
    "s64": 8, "u64": 8,
}  # fmt: skip
_COLLECTIVE = re.compile(
    r"= (?P<shape>[^=]*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\((?P<rest>.*)"
)
# {{0,1},{2,3}} lists the devices that talk to each other; [2,4]<=[8] is two groups of four.
_GROUPS = re.compile(r"replica_groups=(?:\{\{(?P<listed>[\d,]+)\}|\[\d+,(?P<size>\d+)\])")


class Collective(NamedTuple):
    """One operation that devices take part in together.

    Attributes:
        kind: as XLA names it.
        bytes: of its result on each device.
        devices: of each group; None where the program does not say, or all of them.
    """

    kind: str
    bytes: int
    devices: int | None = None

    def sent(self, devices: int) -> float:
        """Bytes that each device has to send at least, as around a ring.

        Args:
            devices: of the whole mesh.

        Examples:
            >>> Collective("all-reduce", 800, 4).sent(8), Collective("all-gather", 800).sent(8)
            (1200.0, 700.0)
        """
        count = self.devices or devices
        others = count - 1
        return {
            "all-reduce": 2 * others / count,
            "reduce-scatter": float(others),  # its result is one device's part
            "collective-permute": 1.0,
        }.get(self.kind, others / count) * self.bytes


def collectives(program: str) -> list[Collective]:
    """Every collective in a compiled program's text.

    Args:
        program: `compiled.as_text()`.

    Examples:
        >>> collectives("x = (f32[2,3], f32[4]) all-reduce(a, b), replica_groups={{0,1}}, to=add")
        [Collective(kind='all-reduce', bytes=40, devices=2)]
    """
    found = []
    for match in _COLLECTIVE.finditer(re.sub(r"/\*.*?\*/", "", program)):  # without /*index=5*/
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", match["shape"])
        sizes = [
            _BYTES[kind] * math.prod(int(n) for n in size.split(",") if n) for kind, size in shapes
        ]
        found.append(Collective(match["kind"], sum(sizes), _group_size(match["rest"])))
    return found


def kinds(found: list[Collective]) -> str:
    """How many there are of each kind.

    Examples:
        >>> kinds([Collective("all-reduce", 4), Collective("all-reduce", 8)]), kinds([])
        ('2 all-reduce', 'none')
    """
    names = [one.kind for one in found]
    return ", ".join(f"{names.count(kind)} {kind}" for kind in dict.fromkeys(names)) or "none"


def _group_size(rest: str) -> int | None:
    groups = _GROUPS.search(rest)
    if groups is None:
        return None
    return int(groups["size"]) if groups["size"] else groups["listed"].count(",") + 1
