"""No machine changes by itself what is computed."""

import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils import _torch


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


# oneDNN issue 6035: the weight gradient of a strided 1x1 convolution of few channels corrupts memory with channels last


@pytest.mark.parametrize("channels, stride, last", [(4, 1, True), (4, 2, False), (15, 2, False), (16, 2, True)])
def test_channels_last_where_it_is_safe(channels, stride, last):
    model = nn.Sequential(nn.Conv2d(2, channels, 3), nn.Conv2d(channels, 5, 1, stride), nn.Flatten(2))
    data, seen = (torch.randn(8, 2, 6, 6), torch.randint(5, (8, (4 // stride) ** 2))), set()

    def look(model, step, steps):
        seen.add(model[0].weight.is_contiguous(memory_format=torch.channels_last))

    pu.fit(model, data, epochs=1, lr=0.01, on_step=look)
    assert seen == {last} and model[0].weight.is_contiguous()


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
    }
    for call, run in calls.items():
        seen = []
        run()
        assert seen and all(state == [full] * len(places) for state in seen), call
        assert now() == before, call
    with pytest.raises(RuntimeError):
        pu.accuracy(model, (torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)))
    assert now() == before
