"""A stack of our blocks over words instead of patches: Mamba as it was published, a language model.

Named as in the published weights, which `mamba.runs.published_mamba` reads. For comparing our blocks with other code,
and for whoever needs Mamba's own weights; nothing here trains or prunes it.
"""

from __future__ import annotations

from torch import Tensor, nn

from mamba.models.block import NORMS, MambaBlock
from mamba.models.ssm import BlockShape


class MambaLanguageModel(nn.Module):
    """Mamba (https://arxiv.org/abs/2312.00752): embedding, blocks without an MLP (RMS norm in front of each mixer, the
    low-rank time step with a learned bias), norm, logits. (batch, length) words as integers -> (batch, length, words).

    Args:
        words: size of the vocabulary, as the embedding has it.
        d_model: width of the residual stream.
        depth: number of blocks.
        shape: of each block.
        tied: the logits' weights are the embedding's.
    """

    def __init__(self, words: int, d_model: int, depth: int, shape: BlockShape, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, d_model)
        self.layers = nn.ModuleList(MambaBlock(d_model, shape, norm="rms", names="vim") for _ in range(depth))
        self.norm_f = NORMS["rms"](d_model)
        self.lm_head = nn.Linear(d_model, words, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for block in self.layers:
            x = block(x)
        return self.lm_head(self.norm_f(x))
