"""Attention with fewer heads computes what attention with zero heads does, whatever the masks and layouts."""

import copy

import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils.filters.slicing import NarrowAttention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, "both", "float"])
def test_narrow_attention_is_attention_with_zero_heads(batch_first, need_weights, mask):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, batch_first=batch_first).double()
    nn.init.normal_(dense.in_proj_bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    options = dict(need_weights=need_weights, average_attn_weights=False)
    if mask == "both":
        options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
        options["key_padding_mask"] = torch.tensor([[False] * 5, [False, False, False, True, True]])
    elif mask:
        options["attn_mask"] = torch.randn(5, 5, dtype=torch.float64)
    kept = [0, 2]
    narrow = pu.filters.replay(nn.Sequential(copy.deepcopy(dense)), {"0": {"heads": {"of": 3, "kept": kept}}})[0]
    assert type(narrow) is NarrowAttention and narrow.in_proj_weight.shape == (24, 12)
    for tensor in (dense.in_proj_weight, dense.in_proj_bias):
        tensor.data.view(3, 3, 4, -1)[:, 1] = 0
    wanted, attention = dense(x, x, x, **options)
    found, narrow_attention = narrow(x, x, x, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(narrow_attention, attention[:, kept], rtol=1e-9, atol=1e-12)
    else:
        assert narrow_attention is None
    one = x[0] if batch_first else x[:, 0]
    if mask is None:
        torch.testing.assert_close(narrow(one, one, one)[0], wanted[0] if batch_first else wanted[:, 0])
        assert narrow(one, one, one)[1].shape == (5, 5)


def test_a_transformer_layer_without_a_head_takes_no_fast_path():
    torch.manual_seed(0)
    dense = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    narrow = pu.filters.replay(copy.deepcopy(dense), {"self_attn": {"heads": {"of": 3, "kept": [1, 2]}}})
    with torch.no_grad():
        dense.self_attn.in_proj_weight.view(3, 3, 4, -1)[:, 0] = 0
        dense.self_attn.in_proj_bias.view(3, 3, 4)[:, 0] = 0
        torch.testing.assert_close(narrow(x), dense(x), rtol=1e-9, atol=1e-12)
