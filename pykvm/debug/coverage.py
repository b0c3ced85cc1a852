"""Which blocks of the guest's code were reached: a stop at each, taken away when it was hit.

A block costs one stop, however often it runs; a guest that has been everywhere runs at full speed.
"""

from __future__ import annotations

from struct import Struct

from pykvm.debug.span import Span
from pykvm.errors import CapabilityError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from pykvm.cpu import Cpu
    from pykvm.debug.debugger import Debugger

_ENTRY = Struct("<IHH")  # offset from the module's start, size, module
_LARGEST = 0xFFFF


class Block:
    """A stretch of code that is entered at its start only.

    Attributes:
        address: linear.
        size: bytes; 0 if it is not known.
    """

    __slots__ = ("address", "size")

    def __init__(self, address: int, size: int = 0) -> None:
        self.address, self.size = address, size

    def __repr__(self) -> str:
        return f"<Block {self.address:#x}, {self.size} bytes>"


class Coverage(Span):
    """Blocks that were reached, from ``with`` to its end. Made by ``Machine.coverage()``.

    In notebooks it is a picture: blocks by address, in the order in which they were reached.

    Attributes:
        blocks: all of them, by address.
        hit: addresses of those that were reached, in the order in which they were.
    """

    def __init__(self, debugger: Debugger, blocks: Iterable[Block | tuple[int, int] | int]) -> None:
        self._debugger = debugger
        self.blocks: dict[int, Block] = {}
        for each in blocks:
            if isinstance(each, int):
                each = Block(each)
            elif isinstance(each, tuple):
                each = Block(*each)
            self.blocks[each.address] = each
        self.hit: dict[int, None] = {}
        self._planted: dict[int, tuple[int, Callable[[Cpu, int], None]]] = {}

    def begin(self) -> None:
        """Plant a stop at every block that was not reached yet.

        Raises:
            CapabilityError: a block is not mapped, or stops cannot be planted in this mode.
        """
        cpu = self._debugger.cpus[0]
        problem = self._debugger.obstacle("port", cpu)
        if problem:
            raise CapabilityError(f"no coverage: {problem}")
        wanted = [address for address in self.blocks if address not in self.hit]
        gpas = {address: self._debugger.gpa(cpu, address) for address in wanted}
        unmapped = [address for address, gpa in gpas.items() if gpa is None]
        if unmapped:
            raise CapabilityError(f"no coverage: nothing is mapped at {unmapped[0]:#x}")
        for address, gpa in gpas.items():
            if address not in self._planted and gpa is not None:
                self._plant(address, gpa)

    def _plant(self, address: int, gpa: int) -> None:
        def strike(cpu: Cpu, at: int) -> None:
            self.hit[address] = None
            self._remove(address)

        self._planted[address] = gpa, strike
        self._debugger.plant(gpa, strike)

    def _remove(self, address: int) -> None:
        gpa, strike = self._planted.pop(address)
        self._debugger.unplant(gpa, strike)

    def end(self) -> None:
        """Take away what is left of them. Idempotent."""
        for address in list(self._planted):
            self._remove(address)

    def forget(self) -> None:
        """Count from the beginning, all blocks."""
        self.hit.clear()

    @property
    def ratio(self) -> float:
        """The part of all blocks that was reached, 0 to 1."""
        return len(self.hit) / len(self.blocks) if self.blocks else 0.0

    def drcov(self, name: str = "guest", base: int | None = None, end: int | None = None) -> bytes:
        """What was reached in DynamoRIO's format, version 2, which Lighthouse and its like read.

        Args:
            name: the path of the one module in it.
            base, end: linear addresses that it spans; by default those of all blocks.
        """
        if base is None:
            base = min(self.blocks, default=0)
        if end is None:
            end = max((b.address + max(1, b.size) for b in self.blocks.values()), default=base)
        hit = [self.blocks[a] for a in self.hit if base <= a < end and a - base <= 0xFFFFFFFF]
        head = (
            "DRCOV VERSION: 2\nDRCOV FLAVOR: pykvm\nModule Table: version 2, count 1\n"
            "Columns: id, base, end, entry, checksum, timestamp, path\n"
            f" 0, {base:#018x}, {end:#018x}, {0:#018x}, {0:#010x}, {0:#010x}, {name}\n"
            f"BB Table: {len(hit)} bbs\n"
        )
        entries = (_ENTRY.pack(b.address - base, min(max(1, b.size), _LARGEST), 0) for b in hit)
        return head.encode() + b"".join(entries)

    def save(self, path: str | os.PathLike[str], name: str = "guest") -> None:
        """Write :meth:`drcov` to a file."""
        with open(path, "wb") as file:
            file.write(self.drcov(name))

    def _repr_svg_(self) -> str:
        from pykvm.debug.walk import of_coverage

        return of_coverage(self, self._debugger.symbols)

    def __repr__(self) -> str:
        return f"<Coverage {len(self.hit)} of {len(self.blocks)} blocks>"


def find_blocks(
    code: bytes, address: int, bits: int = 64, entries: Iterable[int] = ()
) -> list[Block]:
    """Basic blocks of code, by following it from its entries. Needs capstone.

    What only an indirect jump or call reaches is not found: give its address as an entry.

    Args:
        code: the bytes.
        address: linear address of the first.
        bits: 16, 32 or 64.
        entries: where it is entered; by default at its start.
    """
    import capstone

    from pykvm.debug.disassembly import branches, engine

    disassembler = engine(bits)
    end = address + len(code)
    leaders: set[int] = set()
    sizes: dict[int, int] = {}  # of instructions
    enders: set[int] = set()  # instructions that end a block
    waiting = [entry for entry in entries or (address,) if address <= entry < end]
    while waiting:
        at = waiting.pop()
        leaders.add(at)
        while address <= at < end and at not in sizes:
            found = next(iter(disassembler.disasm(code[at - address :], at, 1)), None)
            if found is None:
                break
            sizes[at] = found.size
            elsewhere = branches(found)
            ends = found.group(capstone.CS_GRP_RET) or found.group(capstone.CS_GRP_IRET)
            if elsewhere or ends or found.mnemonic in ("hlt", "ud2"):
                enders.add(at)
                operand = found.operands[0] if elsewhere and found.operands else None
                if operand is not None and operand.type == capstone.x86.X86_OP_IMM:
                    waiting.append(operand.imm)
                if not ends and found.mnemonic not in ("jmp", "hlt", "ud2"):
                    waiting.append(at + found.size)
                break
            at += found.size
    blocks = []
    for leader in sorted(leader for leader in leaders if leader in sizes):
        at = leader
        while at in sizes and at not in enders and at + sizes[at] not in leaders:
            at += sizes[at]
        size = at + sizes.get(at, 0) - leader
        blocks.append(Block(leader, size))
    return blocks
