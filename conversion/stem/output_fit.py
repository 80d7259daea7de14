"""STEM rows that are closest in what the feed-forward gives out, not in what goes into its last projection.

With gates g_i and targets a_i (the source's g * u) of a token's occurrences i, the row minimises

    sum_i |W_down (g_i * U - a_i)|^2 + k sum_j s_j M_jj (U_j - p_j)^2        M = W_down^T W_down

for prior p, shrinkage k and s_j the mean of g_j^2 over all tokens. Were M diagonal, this would be `gated_mean`. The
normal equations of all tokens,

    (M o sum_i g_i g_i^T) U + k s diag(M) U = sum_i g_i * (M a_i) + k s diag(M) p

are solved side by side by conjugate gradients, preconditioned by their diagonal and begun at the `gated_mean` row.
Neither M nor a token's matrix is ever built: a step applies W_down and its transpose to every occurrence once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_efficient.errors import HFEError

# Occurrences handled at once.
_CHUNK = 4096
# Steps of conjugate gradients, at most, and the share of its first residual at which a token's row is good enough.
STEPS = 8
_TOLERANCE = 1e-3
# A direction whose curvature is so small a share of the preconditioner's is free.
_FLAT = 1e-5
_MOST_BYTES = 8 << 30


class OutputFit:
    """The occurrences of one layer's tokens, and the rows fitted to them.

    Keeps the gates of all occurrences, ``occurrences * F`` numbers in fp32, and five tensors of R rows.

    Args:
        down_proj: the feed-forward's last projection, F -> D.
        occurrences: how many there will be, at most.
        rows: R.

    Raises:
        HFEError: that would take more than 8 GiB.
    """

    def __init__(self, down_proj: nn.Linear, occurrences: int, rows: int) -> None:
        self._down = down_proj.weight
        width = self._down.shape[1]
        needed = (occurrences + 5 * rows) * width * self._down.element_size()
        if needed > _MOST_BYTES:
            raise HFEError(
                f"stem init=output_ls keeps the gates of {occurrences} tokens of {width} channels, "
                f"{needed / 2**30:.1f} GiB in all, and may take {_MOST_BYTES / 2**30:.0f} GiB",
                "calibrate on fewer tokens, or choose init=gated_mean",
            )
        self._slots: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._projected = torch.zeros(rows, width, device=self._down.device)

    def add(self, slots: Tensor, gate: Tensor, target: Tensor) -> None:
        """Add occurrences: slots [n], the gates that the table will meet and the products it should give [n, F]."""
        self._slots.append(slots)
        self._gates.append(gate)
        self._projected.index_add_(0, slots, gate * (target @ self._down.T @ self._down))

    @torch.no_grad()
    def rows(self, start: Tensor, prior: Tensor, weight: Tensor, prior_weight: Tensor) -> Tensor:
        """The fitted rows [R, F].

        Args:
            start: where the steps begin [R, F].
            prior: rows that the fit is drawn to [R, F].
            weight: ``sum g^2`` of each token [R, F].
            prior_weight: ``k s``, the weight of the prior in each channel [F].
        """
        diagonal = self._down.square().sum(0)
        pull = prior_weight * diagonal
        tiny = torch.finfo(start.dtype).tiny
        scale = 1 / (diagonal * (weight + prior_weight)).clamp_min(tiny)

        rows = start.clone()
        residual = self._projected + pull * prior - self._apply(rows, pull)
        step = residual * scale
        # Every token is a system of its own, so every row has its own step length.
        energy = (residual * step).sum(1, keepdim=True)
        enough = _TOLERANCE**2 * energy
        moves = torch.ones_like(energy, dtype=torch.bool)
        for _ in range(STEPS):
            image = self._apply(step, pull)
            curvature = (step * image).sum(1, keepdim=True)
            # A row rests once it is good enough, or where the occurrences do not bind it: further steps would follow
            # rounding errors alone.
            moves &= (energy > enough) & (curvature > _FLAT * (step.square() / scale).sum(1, keepdim=True))
            if not moves.any():
                break
            length = torch.where(moves, energy / curvature, 0.0)
            rows.addcmul_(step, length)
            residual.addcmul_(image, length, value=-1)
            scaled = residual * scale
            before, energy = energy, (residual * scaled).sum(1, keepdim=True)
            step = torch.addcmul(scaled, step, energy / before.clamp_min(tiny))
        return rows

    def _apply(self, rows: Tensor, pull: Tensor) -> Tensor:
        """The matrix of the normal equations times rows [R, F]."""
        image = pull * rows
        for slots, gates in zip(self._slots, self._gates, strict=True):
            for slot, gate in zip(slots.split(_CHUNK), gates.split(_CHUNK), strict=True):
                image.index_add_(0, slot, gate * (gate * rows[slot] @ self._down.T @ self._down))
        return image
