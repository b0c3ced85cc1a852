"""Snapshots: what there is to know of a machine, how it is put back, and how it is kept in a file.

Nothing here knows ``Machine``; :mod:`pykvm.snapshots` does.
"""
