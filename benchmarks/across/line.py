"""Line - slow lines between network namespaces: every packet waits its turn and then its delay.

Each line is a pair of TUN devices, one in the namespace of this process and one in that of a site; a process carries
the packets from one to the other. Nothing shows outside of the namespaces, and all is gone with its processes.
(The kernel's own way, `tc netem`, is a module that many machines do not have.)
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import multiprocessing
import os
import select
import struct
import subprocess
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from fedllm.engine.nvflare.forecast import Line

HUB = "10.77.0.1"
"""The address at which every site reaches the server."""
MTU = 1500
BACKLOG = 1000
"""Packets that may wait in one direction of a line, as in netem; more are dropped."""
TUNSETIFF, TUN, PLAIN = 0x400454CA, 0x0001, 0x1000
"""From the kernel's linux/if_tun.h: make a device; one of IP packets; without a header of its own."""
NEWNET = 0x40000000


def command(*words: str) -> None:
    """Run a command that has nothing to say."""
    subprocess.run(words, check=True, capture_output=True)


class Namespace:
    """A network namespace of its own, as long as a process in it lives."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"],
            stdout=subprocess.PIPE,
        )
        if self.process.stdout is None or self.process.stdout.readline() != b"up\n":
            raise OSError("A network namespace cannot be made.")

    @property
    def pid(self) -> int:
        """Of the process in it."""
        return self.process.pid

    @contextlib.contextmanager
    def entered(self) -> Generator[None]:
        """Processes that this thread starts meanwhile are in it."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            _move(there)
            yield
        finally:
            _move(home)
            os.close(home)
            os.close(there)

    def run(self, *words: str) -> None:
        """Run a command in it."""
        command("nsenter", f"--net=/proc/{self.pid}/ns/net", *words)


def received(pid: int | str) -> dict[str, int]:
    """Device -> bytes that came in so far, in the namespace of a process."""
    lines = Path(f"/proc/{pid}/net/dev").read_text(encoding="utf-8").splitlines()[2:]
    return {name.strip(): int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}


def _move(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, NEWNET):
        raise OSError(ctypes.get_errno(), "A network namespace cannot be entered")


def device(name: str) -> int:
    """A TUN device in the namespace of this process; gives its file descriptor."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), TUN | PLAIN))
    return end


@contextlib.contextmanager
def lines(line: Line, sites: Sequence[str]) -> Generator[dict[str, Namespace]]:
    """A namespace for each site with a line to this process's own namespace; site -> its namespace.

    At this end the device of site number n is called `site<n>`, at the other `hub`.
    """
    command("ip", "link", "set", "lo", "up")
    command("ip", "address", "replace", f"{HUB}/32", "dev", "lo")
    places, ends = dict[str, Namespace](), list[tuple[int, int]]()
    carrier: Any = None
    try:
        for number, site in enumerate(sites, 1):
            place = places[site] = Namespace()
            near, far, address = f"site{number}", f"far{number}", f"10.77.{number}.2"
            ends.append((device(near), device(far)))
            command("ip", "link", "set", far, "netns", str(place.pid), "name", "hub")
            command("ip", "link", "set", near, "mtu", str(MTU), "up")
            command("ip", "route", "add", f"{address}/32", "dev", near, "src", HUB)
            place.run("ip", "address", "add", f"{address}/32", "dev", "hub")
            place.run("ip", "link", "set", "hub", "mtu", str(MTU), "up")
            place.run("ip", "route", "add", "default", "dev", "hub", "src", address)
        carrier = multiprocessing.get_context("fork").Process(target=carry, args=(line, ends), daemon=True)
        carrier.start()
        yield places
    finally:
        if carrier is not None:
            carrier.kill()
            carrier.join()
        for end in itertools.chain(*ends):
            os.close(end)
        for place in places.values():
            place.process.kill()
            place.process.wait()


def carry(line: Line, pairs: Sequence[tuple[int, int]]) -> None:
    """Carry packets between the ends of lines, for ever."""
    other = {a: b for one, two in pairs for a, b in ((one, two), (two, one))}
    free, waiting = dict.fromkeys(other, 0.0), dict.fromkeys(other, 0)
    due: list[tuple[float, int, int, bytes]] = []
    order, poll = itertools.count(), select.poll()
    for end in other:
        poll.register(end, select.POLLIN)
    while True:
        rest = None if not due else max(0.0, (due[0][0] - time.monotonic()) * 1000)
        for end, _ in poll.poll(rest):
            with contextlib.suppress(BlockingIOError):
                packet = os.read(end, 65536)
                if waiting[end] < BACKLOG:
                    free[end] = max(free[end], time.monotonic()) + 8 * len(packet) / line.rate
                    heapq.heappush(due, (free[end] + line.delay, next(order), end, packet))
                    waiting[end] += 1
        while due and due[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(due)
            waiting[end] -= 1
            with contextlib.suppress(OSError):  # the other device is down, or full
                os.write(other[end], packet)
