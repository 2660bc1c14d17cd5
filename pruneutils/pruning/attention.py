"""Attention with fewer heads than its width suggests: what is left of nn.MultiheadAttention after heads are removed."""

import torch
import torch.nn.functional as F
from torch import nn


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads together are narrower than the queries.

    torch derives the width of a head from `embed_dim / num_heads`, so its own class cannot lose a head. This one keeps
    the names of the parameters and the arguments of `forward`; only their shapes differ: `in_proj_weight` is
    (3 * heads * head_dim, embed_dim) and `out_proj.weight` (embed_dim, heads * head_dim). `prune_filters` makes it out
    of a layer in place.
    """

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
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weights, biases = self.in_proj_weight.chunk(3), (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases)
        )
        mask = self._mask(attn_mask, key_padding_mask, is_causal, q, k)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            attention = (logits if mask is None else logits + mask).softmax(-1)
            attention = F.dropout(attention, dropout)
            out = attention @ v
        else:
            attention, out = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if attention is not None and average_attn_weights:
            attention = attention.mean(1)
        if not self.batch_first:
            out = out.transpose(0, 1)
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            attention = None if attention is None else attention.squeeze(0)
        return out, attention

    def _mask(self, attn_mask, key_padding_mask, is_causal, q, k) -> torch.Tensor | None:
        """One mask to be added to the logits, that broadcasts to (N, heads, L, S), or None."""
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        total = None
        for mask in (attn_mask, key_padding_mask):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            total = mask if total is None else total + mask
        return total
