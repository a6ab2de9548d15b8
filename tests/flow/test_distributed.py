"""An adapted model under DistributedDataParallel: two processes give the gradients of one."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import visionlora as vl


def built():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 8))
    handle = vl.inject(model, vl.AdapterConfig(method="METHOD", rank=2, targets=("0", "3")))
    for m in handle.methods.values():
        for p in m.parameters():
            p.data += 0.1
    return model, handle


dist.init_process_group("gloo")
torch.set_num_threads(1)
x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
alone, handle = built()
alone(x).square().mean().backward()
expected = [p.grad.clone() for p in handle.parameters()]
model, handle = built()
wrapped = DistributedDataParallel(model)
rank = dist.get_rank()
for _ in range(2):  # twice: buckets are rebuilt after the first pass
    for p in handle.parameters():
        p.grad = None
    wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
for a, p in zip(expected, handle.parameters(), strict=True):
    torch.testing.assert_close(p.grad, a, rtol=1e-4, atol=1e-6)
dist.destroy_process_group()
print("agreed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, method: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("METHOD", method))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("agreed") == 2, done.stdout + done.stderr
