"""The test bed itself: machines reach each other at the speed of their links, and can be lost."""

import socket
import subprocess
import threading
import time

import pytest

import machines

SENT = 4 << 20


def send(bed, count=SENT):
    """Send bytes from the first machine to the second; the seconds that it took."""
    with bed[1].entered():
        listener = socket.create_server((bed[1].address, 0))
    with bed[0].entered():
        line = socket.create_connection(listener.getsockname(), 5)
    arrived, _ = listener.accept()
    with listener, line, arrived:
        arrived.settimeout(20)
        line.settimeout(20)
        begin = time.monotonic()
        sender = threading.Thread(target=line.sendall, args=(bytes(count),))
        sender.start()
        left = count
        while left:
            left -= len(arrived.recv(1 << 16))
        took = time.monotonic() - begin
        sender.join()
    return took


def test_a_link_has_its_speed_and_counts_bytes(bed):
    before = bed[0].bytes_sent
    for machine in bed[:2]:
        machine.shape("100mbit")
    try:
        took = send(bed)
    finally:
        for machine in bed[:2]:
            machine.shape("1gbit")
    # The bucket of the link starts full.
    assert took > 0.9 * (SENT - 512 * 1024) / 12.5e6
    assert SENT < bed[0].bytes_sent - before < 1.2 * SENT


def test_machines_have_names_and_can_be_lost(bed):
    process = subprocess.Popen(bed[2].command("sh", "-c", "hostname; exec sleep 60"), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == bed[2].name
    assert process.pid in bed[2].pids
    bed[2].kill()
    assert process.wait(5) == -9
    bed[1].cut()
    with pytest.raises(OSError), bed[0].entered():  # noqa: PT011 - whichever the kernel says
        socket.create_connection((bed[1].address, 1), 0.3)
    bed[1].mend()
    with bed[0].entered(), pytest.raises(ConnectionRefusedError):
        socket.create_connection((bed[1].address, 1), 5)


def test_why_there_are_no_machines(monkeypatch):
    monkeypatch.setattr(machines.os, "geteuid", lambda: 1000)
    assert machines.why_not() == "network namespaces need root"
