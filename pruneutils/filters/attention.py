"""Attention with fewer heads than its width suggests: what is left of nn.MultiheadAttention after heads are removed."""

import torch
import torch.nn.functional as F
from torch import nn


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads together are narrower than the queries; names and arguments are the same."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; arguments and returns are those of `nn.MultiheadAttention`."""
        if query.dim() == 2:  # a single sequence
            inputs = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            padding = None if key_padding_mask is None else key_padding_mask[None]
            out, attention = self.forward(*inputs, padding, need_weights, attn_mask, average_attn_weights, is_causal)
            return out.squeeze(0 if self.batch_first else 1), None if attention is None else attention.squeeze(0)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x if self.batch_first else x.transpose(0, 1), weight, bias)
            .unflatten(-1, (self.num_heads, self.head_dim))
            .transpose(1, 2)
            for x, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases)
        )
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        masks = [_added(mask, q.dtype) for mask in (attn_mask, padding) if mask is not None]
        mask, dropout = sum(masks) if masks else None, self.dropout if self.training else 0.0
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            attention = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
            out = attention @ v
            attention = attention.mean(1) if average_attn_weights else attention
        else:
            attention, out = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return out if self.batch_first else out.transpose(0, 1), attention


def _added(mask, dtype) -> torch.Tensor:
    """A mask to be added to the logits: minus infinity where a bool mask is True."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf")) if mask.dtype == torch.bool else mask
