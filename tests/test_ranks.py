"""Masks of two real processes: sent from one, compared, and held while both train."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import pruneutils as pu

SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch import nn
import pruneutils as pu

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

def net(width=16):
    torch.manual_seed(rank)  # each process begins with weights of its own
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, width), nn.ReLU(), nn.Linear(width, 3))

def raises(message, call, *args):
    try:
        call(*args)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no error: {message}")

model = net()
assert pu.disagreeing_masks(model) == []
data = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
masks = pu.prune(model, "snip", 0.9, data=data, exclude="4" if rank == 0 else ())
assert pu.disagreeing_masks(model) == ["0.weight", "2.weight", "4.weight"]
before = [weight.detach().clone() for weight in pu.prunable_weights(model).values()]
found = pu.broadcast_masks(model)
assert pu.disagreeing_masks(model) == [] and list(found) == ["0.weight", "2.weight"]
assert rank or all(torch.equal(found[name], masks[name]) for name in found)  # those of rank 0
for name, weight in pu.prunable_weights(model).items():
    assert name not in found or not weight[~found[name]].any()
    assert torch.equal(weight, before.pop(0) * found.get(name, True))

model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
for _ in range(5):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
both = [torch.zeros_like(weights) for _ in range(2)]
dist.all_gather(both, weights)
assert torch.equal(*both)
count = pu.count(model)
assert count.pruned == round(0.9 * (36 + 144 * 16)) and pu.disagreeing_masks(model) == []

if rank == 1:
    pu.prune(model, "magnitude", {"module.0": 0.99})
assert pu.disagreeing_masks(model) == ["module.0.weight"]
pu.broadcast_masks(model, 1)
assert pu.disagreeing_masks(model) == [] and pu.get_masks(model)["module.0.weight"].sum() == 0
if rank == 0:
    pu.make_permanent(model)
assert len(pu.disagreeing_masks(model)) == 2
assert pu.broadcast_masks(model, 0) == {}

raises("source must be a rank below 2, not 2", pu.broadcast_masks, model, 2)
raises("different networks: 3, 3 prunable weights", pu.broadcast_masks, net(8 + rank))
raises("different networks: 0, 3 prunable weights", pu.disagreeing_masks, net() if rank else nn.ReLU())
raises("ReLU has no convolution or linear layer", pu.disagreeing_masks, nn.ReLU())
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_agree_after_one_has_pruned(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(rank), str(tmp_path)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize("call", [pu.broadcast_masks, pu.disagreeing_masks])
def test_a_process_alone_is_told(call):
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        call(nn.Linear(2, 2))
