"""No machine changes by itself what is computed."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from tiny import net, samples
from torch import nn

import pruneutils as pu
from pruneutils import _torch


def test_what_the_cpu_can_changes_nothing_unless_asked_for(monkeypatch):
    def never(device_type):
        raise AssertionError("asked for although precision is float32")

    monkeypatch.setattr(_torch, "bfloat16_pays", never)
    pu.fit(net(), samples(), samples(), epochs=1)
    pu.gradual(net(), samples(), samples(), sparsities=[0.5])
    pu.lottery_ticket(net(), samples(), samples(), rounds=1, epochs=1)


@pytest.mark.parametrize(
    ("flags", "allowed", "pays"),
    [
        ({}, None, False),
        ({"_is_avx512_bf16_supported"}, None, True),
        ({"_is_amx_tile_supported"}, "DEFAULT", True),
        ({"_is_avx512_bf16_supported"}, "avx512_core_bf16", True),
        ({"_is_avx512_bf16_supported", "_is_amx_tile_supported"}, "AVX2", False),
        ({"_is_avx512_bf16_supported"}, "AVX512_CORE_VNNI", False),
    ],
)
def test_bfloat16_is_looked_up_and_not_measured(monkeypatch, flags, allowed, pays):
    for flag in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, flag, lambda flag=flag: flag in flags, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if allowed:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert _torch.bfloat16_pays("cpu") is pays and _torch.bfloat16_pays("cuda")


TRAINING = """
import sys, torch, pruneutils as pu
sys.path.insert(0, {folder!r})
from tiny import net, samples
for precision in ("float32", "auto"):
    model = net(dropout=0.3)
    ramp = pu.gradual_sparsity(0.8, every=2)
    table = pu.fit(model, samples(), samples(), epochs=3, batch_size=8, on_step=ramp, precision=precision)
    assert (table.precision == "float32").all() or precision == "auto"
    pu.save(model, {path!r} + precision)
print(torch.backends.cpu.get_cpu_capability())
"""


def test_an_older_cpu_trains_to_the_same_network_up_to_rounding(tmp_path):
    older = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    code = TRAINING.format(folder=os.path.dirname(__file__), path=f"{tmp_path}/")
    states = []
    for variables in ({}, older):
        ended = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        assert not variables or ended.stdout.strip() in ("AVX2", "DEFAULT")  # the second where there is no AVX2
        states.append([pu.load(tmp_path / name, net()) for name in ("float32", "auto")])
    for first, second in zip(*states):
        assert pu.count(first) == pu.count(second)
    first, second = states[0][0], states[1][0]  # float32
    assert all(torch.equal(mask, pu.get_masks(second)[name]) for name, mask in pu.get_masks(first).items())
    for p, q in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


# oneDNN issue 6035: the weight gradient of a strided 1x1 convolution of few channels corrupts memory with channels last


@pytest.mark.parametrize("channels, stride, last", [(4, 1, True), (4, 2, False), (15, 2, False), (16, 2, True)])
def test_channels_last_where_it_is_safe(channels, stride, last):
    model = nn.Sequential(nn.Conv2d(2, channels, 3), nn.Conv2d(channels, 5, 1, stride), nn.Flatten(2))
    data, seen = (torch.randn(8, 2, 6, 6), torch.randint(5, (8, (4 // stride) ** 2))), set()

    def look(model, step, steps):
        seen.add(model[0].weight.is_contiguous(memory_format=torch.channels_last))

    pu.fit(model, data, epochs=1, lr=0.01, on_step=look)
    assert seen == {last} and model[0].weight.is_contiguous()


def test_strided_1x1_convolutions_of_few_channels_train_as_in_plain_torch():
    code = """
import torch, pruneutils as pu
from torch import nn
x, y = torch.randn(96, 3, 32, 32), torch.randint(16, (96,))
for channels in (2, 3, 4, 6):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 16, 1, 2)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    weight = model[2].weight.detach().clone()
    loss = nn.functional.cross_entropy(model(x), y)
    gradient, = torch.autograd.grad(loss, model[2].weight)
    for _ in range(3):
        model[2].weight.data.copy_(weight)
        pu.fit(model, (x, y), batch_size=96, epochs=1, optimizer=lambda p: torch.optim.SGD([list(p)[2]], lr=1))
        torch.testing.assert_close(weight - model[2].weight, gradient, rtol=1e-3, atol=1e-5)
print("alive")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "alive\n", f"exit code {ended.returncode}: {ended.stderr}"


def test_float32_is_never_rounded_to_tf32_by_what_we_compute():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    places = (cudnn.conv, cudnn.rnn, matmul) if hasattr(cudnn, "conv") else (cudnn, matmul)
    name, full = ("fp32_precision", "ieee") if hasattr(cudnn, "conv") else ("allow_tf32", False)

    def now():
        return [getattr(place, name) for place in places]

    class Watched(nn.Conv2d):
        def forward(self, inputs):
            seen.append(now())
            return super().forward(inputs)

    torch.manual_seed(0)
    model = nn.Sequential(
        Watched(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Watched(8, 4, 3), nn.Flatten(), nn.Linear(64, 4)
    )
    data, before = (torch.randn(12, 1, 8, 8), torch.arange(12) % 4), now()
    assert before != [full] * len(places)
    calls = {
        "fit": lambda: pu.fit(model, data, data, epochs=1),
        "accuracy": lambda: pu.accuracy(model, data),
        "scores": lambda: pu.scores(model, "grasp", data=data),
        "prune_filters": lambda: pu.prune_filters(model, "loss_based", 0.3, data=[data]),
        "recalibrate": lambda: pu.recalibrate(model, data),
        "reconstruct": lambda: pu.reconstruct(model, copy.deepcopy(model), data),
    }
    for call, run in calls.items():
        seen = []
        run()
        if call in ("prune_filters", "reconstruct"):  # they run the model first to see what is called, not to compute
            del seen[:2]
        assert seen and all(state == [full] * len(places) for state in seen), call
        assert now() == before, call
    with pytest.raises(RuntimeError):
        pu.accuracy(model, (torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)))
    assert now() == before
