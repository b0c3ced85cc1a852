"""Hostile drivers: a search for what a guest could do to us through its virtio devices.

``python -m tests.hostile --operations N [--seed S]`` runs it as long as asked:

* ``ring`` (``rings.py``): the queue in C beside the reference model, over memory that also changes
  in the middle of a call; every access that the C code makes is watched (``watch.c``).
* ``device`` (``machines.py``): devices and their registers beside a model of both.
* ``guest`` (``guest.py``): a program under KVM that fires random accesses and ring traffic.
* ``pci`` (``pci_guest.py``): one that plays with a PCI bus and the devices on it.
* ``flood``: doorbells in a row, and how long a stop takes meanwhile.

``planted.py`` has bugs that each must be found: that the search can find is shown, not hoped.
"""
