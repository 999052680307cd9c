"""A small mixture of experts in a list, for tests of the inspector.

Shapes: N tokens, M read by an expert, K slots per token, D width, E experts.
"""

import torch
from torch import nn

from moe_lib.inspect import watch

D, E = 16, 4


def tokens(n=200, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def top(logits_NE, num_chosen):
    """Dense weights: those of the best experts, the others 0."""
    weight_NK, index_NK = logits_NE.softmax(-1).topk(num_chosen, -1)
    return torch.zeros_like(logits_NE).scatter(-1, index_NK, weight_NK)


class Block(nn.Module):
    """Top two of a list of experts; `chosen` are those of the last call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(self.expert() for _ in range(E))

    def expert(self):
        return nn.Linear(D, D)

    def answer(self, e, x_MD):
        return self.experts[e](x_MD)

    def forward(self, x_ND):
        weight_NK, self.chosen = self.gate(x_ND).softmax(-1).topk(2, -1)
        out_ND = torch.zeros_like(x_ND)
        for e in range(E):
            row, slot = torch.where(self.chosen == e)
            if len(row):
                out_ND = out_ND.index_add(0, row, self.answer(e, x_ND[row]) * weight_NK[row, slot, None])
        return out_ND


def looked(model, *batches):
    """The panel of the last batch, watched in training; and the output there."""
    with watch(model.train(), every=1) as w:
        for batch in batches:
            output = model(batch)
    return w.panel(), output


def counts(block):
    return block.chosen.flatten().bincount(minlength=E).tolist()
