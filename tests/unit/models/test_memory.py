"""Memory that is no longer needed goes back to the system."""

import subprocess
import sys

import pytest

HELD = """
import sys, torch
from visionlora.models.memory import free_at_once

def resident():
    status = open("/proc/self/status").read()
    return int(status.partition("RssAnon:")[2].split()[0]) // 1024

if sys.argv[1] == "at once":
    free_at_once()
torch.ones(2**22)  # 16 MiB, up to which glibc keeps from here on what is freed
held, small = [], []
for _ in range(16):
    held.append(torch.ones(2**21))
    small.append(torch.ones(16))
before = resident()
held.clear()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's to keep and to give back")
@pytest.mark.parametrize("how", ["at once", "as usual"])
def test_large_blocks_go_back_though_small_ones_among_them_stay(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", HELD, how], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 120) == (how == "at once"), "of 128 MiB"
