"""gdb's protocol: packets out of any bytes, addresses, the description of registers."""

from __future__ import annotations

import os
import socket
import stat
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.debug import gdb_packets
from pykvm.debug.gdb_address import listen
from pykvm.debug.gdb_packets import BROKEN, INTERRUPT, SIZE, Reader, number, numbers, packet, unhex
from pykvm.debug.gdb_registers import description, layout


def fed(data: bytes, pieces: list[int] | None = None) -> list[object]:
    """What a reader makes of bytes that come in pieces of these sizes, again and again."""
    reader, found, at, turn = Reader(), list[object](), 0, 0
    while at < len(data):
        size = pieces[turn % len(pieces)] if pieces else len(data)
        found += reader.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    return found


@given(st.lists(st.binary(max_size=50), max_size=10), st.lists(st.integers(1, 20), min_size=1))
def test_packets_come_out_as_they_went_in_whatever_the_pieces(
    payloads: list[bytes], pieces: list[int]
) -> None:
    wire = b"+".join(packet(payload) for payload in payloads)
    assert fed(wire, pieces) == payloads


@given(st.binary(max_size=300), st.lists(st.integers(1, 20), min_size=1))
def test_whatever_comes_a_reader_goes_on(data: bytes, pieces: list[int]) -> None:
    found = fed(data, pieces)
    assert all(item in (INTERRUPT, BROKEN) or isinstance(item, bytes) for item in found)
    assert found == fed(data)
    reader = Reader()
    list(reader.feed(data + b"$x#00"))  # ends a packet that was open
    assert list(reader.feed(packet(b"after")))[-1] == b"after"


@given(st.binary(min_size=1, max_size=40), st.data())
def test_a_packet_with_a_wrong_byte_is_broken_or_another(
    payload: bytes, data: st.DataObject
) -> None:
    wire = bytearray(packet(payload))
    at = data.draw(st.integers(1, len(wire) - 4))
    wire[at] ^= data.draw(st.integers(1, 255))
    assert fed(bytes(wire)) != [payload]


def test_ctrl_c_counts_between_packets_only() -> None:
    assert fed(b"\x03$a\x03b#%02x\x03" % ((97 + 98 + 3) & 255)) == [INTERRUPT, b"a\x03b", INTERRUPT]


def test_a_packet_without_an_end_takes_bounded_memory() -> None:
    reader = Reader()
    assert list(reader.feed(b"$" + b"a" * (4 * SIZE))) == []
    assert reader._payload is not None and len(reader._payload) <= SIZE + 1
    assert list(reader.feed(b"#00")) == [BROKEN]


@pytest.mark.parametrize(("raw", "plain"), [(b"}\x03", b"#"), (b"a}]b", b"a}b"), (b"}", b"\0")])
def test_escapes_are_taken_out(raw: bytes, plain: bytes) -> None:
    assert gdb_packets.unescape(raw) == plain


@pytest.mark.parametrize("text", [b"", b"-1", b"0x10", b"1 ", b"g", b"1_0", b"\xff"])
def test_what_is_no_number_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        number(text)


def test_numbers_are_counted() -> None:
    assert numbers(b"10,ff", 2) == [0x10, 0xFF]
    for text in (b"10", b"1,2,3", b"1,", b","):
        with pytest.raises(ValueError):
            numbers(text, 2)
    for text in (b"1", b"0g", b"0 "):
        with pytest.raises(ValueError):
            unhex(text)


# ---- where it listens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["0", ":0", "127.0.0.1:0", "localhost:0", "127.1.2.3:0", "[::1]:0"]
)
def test_it_listens_on_this_machine(text: str) -> None:
    try:
        listener, address = listen(text)
    except OSError as error:
        pytest.skip(f"bind({text}): {error}")
    with listener:
        port = int(address.rpartition(":")[2])
        assert port and address.startswith(("127.", "[::1]"))


@pytest.mark.parametrize("text", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
def test_where_others_can_reach_it_it_listens_only_if_told(text: str) -> None:
    with pytest.raises(ValueError, match="owns the guest"):
        listen(text)


def test_told_it_listens_anywhere() -> None:
    listener, address = listen("0.0.0.0:0", anywhere=True)
    with listener:
        assert listener.getsockname()[0] == "0.0.0.0"
        assert int(address.rpartition(":")[2]) == listener.getsockname()[1]


@pytest.mark.parametrize(
    "text", ["x", "1:2:3", "host.example:1", "127.0.0.1:65536", "127.0.0.1:-1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        listen(text)


def test_a_unix_socket_is_its_users_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "gdb")
    listener, address = listen(path)
    with listener:
        assert address == path and listener.family == socket.AF_UNIX
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


# ---- registers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_the_description_has_every_register_in_order(bits: int) -> None:
    root = ElementTree.fromstring(description(bits))
    told = [(reg.get("name"), reg.get("bitsize")) for reg in root.iter("reg")]
    assert told == [(r.name, str(8 * r.size)) for r in layout(bits)]
    assert root.findtext("architecture") == ("i386:x86-64" if bits == 64 else "i386")
    # gdb's own order of the first ones (amd64-linux: 16 general, rip, eflags, 6 segments, 8 st).
    names = [name for name, _ in told]
    assert names.index("eflags") == (17 if bits == 64 else 9)
    assert names.index("st0") == (24 if bits == 64 else 16)
