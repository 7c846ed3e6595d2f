"""Where the ranks of one machine meet, and what DeepSpeed names after that place."""

import glob
import os
import socket
from pathlib import Path

ANY = "*"


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_shared_memory(*, address: str = ANY, port: str, rank: str = ANY) -> None:
    """Give back what DeepSpeed's collectives on the CPU keep until the machine restarts, 66 MB for each rank.

    They never unlink it (csrc/cpu/comm/shm.cpp, 0.19.8: named by user, address, port and rank).

    Args:
        address: Of the run's first rank.
        port: Likewise.
        rank: Whose memory.
    """
    address, port, rank = (part if part == ANY else glob.escape(part) for part in (address, port, rank))
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"):
        path.unlink(missing_ok=True)
