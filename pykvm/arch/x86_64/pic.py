"""The two 8259A interrupt controllers as a BIOS leaves them.

Guests that bring no code for it, made for boot loaders on a PC, expect them programmed: IRQ 0-7 at
vectors 0x08-0x0f, IRQ 8-15 at 0x70-0x77.
"""

from __future__ import annotations

MASTER_BASE = 0x08
SLAVE_BASE = 0x70

CASCADE = 2
"""The master's input on which the slave sits."""

EDGE_OR_LEVEL = {"master": 0xF8, "slave": 0xDE}
"""Which lines may be made level-triggered: all but timer, keyboard, cascade, clock and FPU."""


def bios_state(
    chip: str, open_irqs: tuple[int, ...] = (0, 1), level_irqs: tuple[int, ...] = (9,)
) -> dict[str, int]:
    """Give the members of ``struct kvm_pic_state`` for KVM_SET_IRQCHIP (api.rst 4.27).

    Args:
        chip: ``"master"`` or ``"slave"``.
        open_irqs: IRQs 0-15 that are not masked; the cascade is open if one of the slave's is.
        level_irqs: IRQs that are level-triggered.
    """
    if chip not in EDGE_OR_LEVEL:
        raise ValueError(f'a PIC is "master" or "slave", not {chip!r}')
    first = 0 if chip == "master" else 8
    opened = set(open_irqs)
    if any(irq >= 8 for irq in opened):
        opened.add(CASCADE)
    return {
        "irr": 0,
        "isr": 0,
        "imr": 0xFF & ~_bits(opened, first),
        "irq_base": MASTER_BASE if chip == "master" else SLAVE_BASE,
        "init4": 1,  # ICW4 was sent: 8086 mode, with normal end of interrupt
        "elcr": _bits(set(level_irqs), first) & EDGE_OR_LEVEL[chip],
        "elcr_mask": EDGE_OR_LEVEL[chip],
    }


def _bits(irqs: set[int], first: int) -> int:
    return sum(1 << irq - first for irq in irqs if first <= irq < first + 8)
