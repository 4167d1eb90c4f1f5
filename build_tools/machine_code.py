"""Reads what nvdisasm prints: a kernel's instructions, its loops, and a loop's way through.

A loop is what lies between a branch back and its target in the graph of branches, wherever the
compiler has put it. Its way is one turn of it: of all paths from its head round to its head, the
one with the most 16-byte accesses, then the fewest narrower ones of global memory outside the loops
within, then the most instructions. So it is the path over whole vectors, with all that can be asked
for on it, such as the sums that loops within store, and without what only edges take, element by
element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

VECTOR = 16  # bytes


@dataclass(frozen=True)
class Access:
    space: str  # "global", "shared", "local"; "copy" goes from global straight to shared memory
    load: bool
    width: int  # bytes


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # such as "@!P0", or nothing
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def target(self) -> str:
        """The label that it branches to, or nothing.

        BRA.DIV leaves for lanes that have not come; all lanes reach each shuffle here. A call of a
        label that is no function's is a jump.
        """
        root = self.opcode.partition(".")[0]
        if root not in ("BRA", "JMP", "CALL") or self.opcode == "BRA.DIV":
            return ""
        label = re.search(r"`\(([.$\w]+)\)", self.operands)
        return label[1] if label and (root != "CALL" or label[1].startswith(".L")) else ""

    @property
    def access(self) -> Access | None:
        """What it does to memory, other than constants."""
        return access_of(self.opcode)

    @property
    def falls_through(self) -> bool:
        # A branch may have its condition among its operands.
        leaves = self.target and "," not in self.operands
        ends = self.opcode.partition(".")[0] in ("EXIT", "RET", "BRX", "JMX", "JMXU")
        return bool(self.guard) or not (leaves or ends)

    def written(self) -> set[int]:
        """The vector registers that a load fills."""
        access = self.access
        first = re.match(r"R(\d+)", self.operands)
        if not access or not access.load or not first:
            return set()
        return set(range(int(first[1]), int(first[1]) + max(access.width // 4, 1)))

    def read(self) -> set[int]:
        """The vector registers among its sources, each by its first."""
        access = self.access
        sources = self.operands
        if not (access and not access.load) and re.match(r"U?[RP]\w+", sources):
            sources = sources.partition(",")[2]
        return {int(number) for number in re.findall(r"\bR(\d+)", sources)}


SPACES = {
    "LDG": ("global", True),
    "LD": ("global", True),  # generic: it may go anywhere
    "STG": ("global", False),
    "ST": ("global", False),
    "LDS": ("shared", True),
    "STS": ("shared", False),
    "LDL": ("local", True),
    "STL": ("local", False),
    "LDGSTS": ("copy", True),
}


def access_of(opcode: str) -> Access | None:
    root, *modifiers = opcode.split(".")
    if root not in SPACES:
        return None
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    width = next((widths[word] for word in modifiers if word in widths), 4)
    return Access(*SPACES[root], width)


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    following: list[int] = field(default_factory=list)  # blocks


@dataclass(frozen=True)
class Loop:
    body: tuple[Instruction, ...]  # all of it
    way: tuple[Instruction, ...]  # without the loops within
    within: tuple[Instruction, ...]  # of those on the way, a turn

    def vectors(self, space: str, load: bool) -> int:
        """16-byte accesses on the way."""
        return sum(is_vector(i, space, load) for i in self.way)

    def in_flight(self) -> int:
        """Vectors asked for from global memory before the first that has come is used."""
        asking = [n for n, i in enumerate(self.way) if is_vector(i, "global", True)]
        first = asking[0] if asking else len(self.way)
        pending: set[int] = set()
        count = 0
        for instruction in (*self.way[first:], *self.way[:first]):
            if pending & instruction.read():
                break
            if is_vector(instruction, "global", True):
                count += 1
                pending |= instruction.written()
        return count


def is_vector(instruction: Instruction, space: str, load: bool) -> bool:
    access = instruction.access
    return access is not None and access == Access(space, load, max(access.width, VECTOR))


def loads_vector(instruction: Instruction) -> bool:
    access = instruction.access
    return access is not None and access.load and access.width >= VECTOR


@dataclass(frozen=True)
class Function:
    name: str  # mangled
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]  # those that load vectors, and have no such loop within


LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def functions(listing: str) -> Iterator[Function]:
    """Every kernel in what `nvdisasm -c` prints of a cubin."""
    for section in re.split(r"^\t\.section\t", listing, flags=re.M)[1:]:
        name = re.match(r"\.text\.([\w$.]+)", section)
        if name:
            instructions, labels = parse(section)
            yield Function(name[1], tuple(instructions), tuple(loops(instructions, labels)))


def parse(section: str) -> tuple[list[Instruction], dict[str, int]]:
    """A section's instructions, and each label's place among them.

    NOPs are left out: they end kernels, and for 12.0 follow each instruction of float64, whose
    unit is busy for longer than they take.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if label := re.match(r"([.$\w]+):$", line.strip()):
            labels[label[1]] = len(found)
        elif code := LINE.search(line):
            address, guard, opcode, operands = code.groups()
            if opcode != "NOP":
                found.append(Instruction(int(address, 16), guard or "", opcode, operands))
    return found, labels


def blocks_of(instructions: list[Instruction], labels: dict[str, int]) -> list[Block]:
    """Runs of instructions without a branch in or out; the first is the entry."""
    ends = [n + 1 for n, i in enumerate(instructions) if i.target or not i.falls_through]
    starts = sorted({0, *ends, *labels.values()} - {len(instructions)})
    number = {start: block for block, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)]):
        block = Block(instructions[start:end])
        last = block.instructions[-1]
        if last.target:
            block.following.append(number[labels[last.target]])
        if last.falls_through and end in number:
            block.following.append(number[end])
        blocks.append(block)
    return blocks


def loops(instructions: list[Instruction], labels: dict[str, int]) -> Iterator[Loop]:
    if not instructions:
        return
    blocks = blocks_of(instructions, labels)
    order, back = walk(blocks)
    before: dict[int, list[int]] = {}
    for block in order:
        for following in blocks[block].following:
            before.setdefault(following, []).append(block)
    bodies: dict[int, set[int]] = {}  # by its head, the blocks of a loop
    for tail, head in back:
        body, rest = bodies.setdefault(head, {head}), [tail]
        while rest:
            block = rest.pop()
            if block not in body:
                body.add(block)
                rest += before.get(block, [])
    loading = {
        head: body
        for head, body in bodies.items()
        if any(loads_vector(i) for block in body for i in blocks[block].instructions)
    }
    for head, body in loading.items():
        if any(other < body for other in loading.values()):
            continue
        ordered = [block for block in order if block in body]
        inner = set().union(*(other for other in bodies.values() if other < body))
        path = way(blocks, ordered, head, inner, back)
        parts = ordered, [b for b in path if b not in inner], [b for b in path if b in inner]
        yield Loop(*(tuple(i for b in part for i in blocks[b].instructions) for part in parts))


def walk(blocks: list[Block]) -> tuple[list[int], set[tuple[int, int]]]:
    """The blocks that the entry reaches, each before those that follow it; the branches back."""
    order: list[int] = []
    back: set[tuple[int, int]] = set()
    seen, open_ = {0}, {0}
    stack = [(0, iter(blocks[0].following))]
    while stack:
        block, rest = stack[-1]
        for following in rest:
            if following in open_:
                back.add((block, following))
            elif following not in seen:
                seen.add(following)
                open_.add(following)
                stack.append((following, iter(blocks[following].following)))
                break
        else:
            stack.pop()
            open_.discard(block)
            order.append(block)
    return order[::-1], back


def way(
    blocks: list[Block], body: list[int], head: int, inner: set[int], back: set[tuple[int, int]]
) -> tuple[int, ...]:
    """The blocks of one turn of a loop; `body` is in the order of the graph, `inner` are those of
    the loops within."""
    best: dict[int, tuple[tuple[int, int, int], tuple[int, ...]]] = {head: ((0, 0, 0), ())}
    turns = []
    for block in body:
        if block not in best:
            continue
        score, path = best[block]
        instructions = blocks[block].instructions
        accesses = [i.access for i in instructions if i.access]
        vectors = sum(a.width >= VECTOR for a in accesses)
        edges = block not in inner
        narrow = sum(edges and a.width < VECTOR and a.space == "global" for a in accesses)
        score = (score[0] + vectors, score[1] - narrow, score[2] + len(instructions))
        path = (*path, block)
        for following in blocks[block].following:
            if (block, following) in back:
                if following == head:
                    turns.append((score, path))
            elif following in body and (following not in best or best[following][0] < score):
                best[following] = (score, path)
    return max(turns, default=((0, 0, 0), ()))[1]
