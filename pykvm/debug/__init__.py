"""Watching guests: traces of their exits, breakpoints and single steps, coverage, gdb.

What is here works on vCPUs, memory and buses that it is handed; ``Machine`` offers it as
``m.trace()``, ``m.step()``, ``m.breakpoint()`` and the like (``pykvm/debugging.py``).
"""
