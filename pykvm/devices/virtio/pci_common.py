"""The common configuration of a virtio device over PCI (virtio 1.2, 4.1.4.3): its registers."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.devices.virtio.pci import VirtioPci

COMMON_LENGTH = 56
NO_VECTOR = 0xFFFF
"""No interrupt for this event."""

_FIELDS = {
    0: (4, "device_select"),
    4: (4, "device_feature"),
    8: (4, "driver_select"),
    12: (4, "driver_feature"),
    16: (2, "config_vector"),
    18: (2, "num_queues"),
    20: (1, "status"),
    21: (1, "generation"),
    22: (2, "queue_select"),
    24: (2, "queue_size"),
    26: (2, "queue_vector"),
    28: (2, "queue_enable"),
    30: (2, "queue_notify_off"),
    32: (4, "desc_low"),
    36: (4, "desc_high"),
    40: (4, "driver_low"),
    44: (4, "driver_high"),
    48: (4, "device_low"),
    52: (4, "device_high"),
}
"""The common configuration by offset: width and name. Other widths are no accesses."""


class CommonConfig:
    """What a driver reads and writes there.

    Args:
        function: the device on the bus.

    Attributes:
        selects: what the driver has selected, by the field's name.
    """

    def __init__(self, function: VirtioPci) -> None:
        self._function = function
        self.selects = {"device_select": 0, "driver_select": 0, "queue_select": 0}

    def read(self, offset: int, size: int) -> int:
        """Read a field; of another width, zeros."""
        width, name = _FIELDS.get(offset, (0, ""))
        if width != size:
            return 0
        if name in self.selects:
            return self.selects[name]
        function = self._function
        device, selected = function.device, self.selects["queue_select"]
        if name == "device_feature":
            return device.read_features(self.selects["device_select"])
        if name == "driver_feature":
            select = self.selects["driver_select"]
            return device.driver_features >> 32 * select & 0xFFFFFFFF if select < 4 else 0
        if name == "config_vector":
            return function.config_vector
        if name == "num_queues":
            return len(function.queue_vectors)
        if name == "status":
            return device.status
        if name == "generation":
            return device.config_generation & 0xFF
        if selected >= len(device.queues):
            return NO_VECTOR if name == "queue_vector" else 0
        if name == "queue_vector":
            return function.queue_vectors[selected]
        if name == "queue_enable":
            return int(device.queue_ready(selected))
        if name == "queue_notify_off":
            return selected
        queue = device.queues[selected]
        if name == "queue_size":
            return queue.size
        part, _, half = name.partition("_")
        return queue.address(part) >> (32 if half == "high" else 0) & 0xFFFFFFFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a field; of another width, that is ignored."""
        width, name = _FIELDS.get(offset, (0, ""))
        if width != size:
            return
        function = self._function
        device, selected = function.device, self.selects["queue_select"]
        if name in self.selects:
            self.selects[name] = value
        elif name == "driver_feature":
            device.write_features(self.selects["driver_select"], value)
        elif name == "status":
            device.write_status(value)
        elif name == "config_vector":
            function.config_vector = function.valid(value)
        elif name == "queue_vector":
            function.set_queue_vector(selected, value)
        elif name == "queue_enable":
            if value == 1:  # nothing else may be written
                device.queue_set(selected, "ready", 1)
        elif name == "queue_size" or "_low" in name or "_high" in name:
            device.queue_set(selected, "size" if name == "queue_size" else name, value)
