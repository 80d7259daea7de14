"""Fits STEM rows that minimise the error of the feed-forward's output, not that of the input of `down_proj`.

With gates g_i and targets a_i (the source's g * u) of a token's occurrences i, the row U minimises

    sum_i |W_down (g_i * U - a_i)|^2 + k sum_j s_j M_jj (U_j - p_j)^2        M = W_down^T W_down

for prior p, shrinkage k and s_j the mean of g_j^2 over all tokens. If M were diagonal, this would be `gated_mean`. The
normal equations of each token,

    (M o sum_i g_i g_i^T) U + k s diag(M) U = sum_i g_i * (M a_i) + k s diag(M) p

are solved for all tokens in parallel by conjugate gradients, with a diagonal preconditioner, starting at the
`gated_mean` row. Neither M nor the matrix of a token is built: a step applies W_down and its transpose once to each
occurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_efficient.errors import HFEError

# Occurrences that are processed at a time.
_CHUNK = 4096
# Largest number of steps, and the fraction of the initial residual at which a token's row has converged.
STEPS = 8
_TOLERANCE = 1e-3
# A direction with less curvature, relative to the preconditioner's, is not determined by the occurrences.
_MIN_CURVATURE = 1e-5
_MAX_BYTES = 8 << 30


class OutputFit:
    """Collects the occurrences of one layer's tokens, and fits rows to them.

    Keeps the gates of all occurrences, ``occurrences * F`` numbers in fp32, and five tensors [R, F].

    Args:
        down_proj: the feed-forward's down-projection, F -> D.
        occurrences: upper bound of the number of occurrences that will be added, for the memory limit.
        rows: R, the number of distinct tokens.

    Raises:
        HFEError: this would take more than 8 GiB.
    """

    def __init__(self, down_proj: nn.Linear, occurrences: int, rows: int) -> None:
        self._down = down_proj.weight
        width = self._down.shape[1]
        needed = (occurrences + 5 * rows) * width * self._down.element_size()
        if needed > _MAX_BYTES:
            raise HFEError(
                f"stem init=output_ls keeps the gates of {occurrences} tokens of {width} channels, "
                f"{needed / 2**30:.1f} GiB in all; the limit is {_MAX_BYTES / 2**30:.0f} GiB",
                "calibrate on fewer tokens, or choose init=gated_mean",
            )
        self._ids: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._projected = torch.zeros(rows, width, device=self._down.device)

    def add(self, local_ids: Tensor, gate: Tensor, target: Tensor) -> None:
        """Add n occurrences: row indices of tokens [n], gates g of the converted model [n, F], targets a [n, F]."""
        self._ids.append(local_ids)
        self._gates.append(gate)
        self._projected.index_add_(0, local_ids, gate * (target @ self._down.T @ self._down))

    @torch.no_grad()
    def rows(self, start: Tensor, prior: Tensor, weight: Tensor, prior_weight: Tensor) -> Tensor:
        """The fitted rows [R, F], fp32.

        Args:
            start: initial rows [R, F].
            prior: p of each token [R, F].
            weight: ``sum g^2`` of each token [R, F].
            prior_weight: ``k s``, the weight of the prior in each channel [F].
        """
        diagonal = self._down.square().sum(0)
        penalty = prior_weight * diagonal
        tiny = torch.finfo(start.dtype).tiny
        scale = 1 / (diagonal * (weight + prior_weight)).clamp_min(tiny)

        rows = start.clone()
        residual = self._projected + penalty * prior - self._apply(rows, penalty)
        step = residual * scale
        # Each token is a separate linear system, so each row has its own step length.
        energy = (residual * step).sum(1, keepdim=True)
        threshold = _TOLERANCE**2 * energy
        active = torch.ones_like(energy, dtype=torch.bool)
        for _ in range(STEPS):
            image = self._apply(step, penalty)
            curvature = (step * image).sum(1, keepdim=True)
            # A row stops when it has converged, or when its occurrences do not determine the step: further steps would
            # only follow rounding errors.
            active &= (energy > threshold) & (curvature > _MIN_CURVATURE * (step.square() / scale).sum(1, keepdim=True))
            if not active.any():
                break
            length = torch.where(active, energy / curvature, 0.0)
            rows.addcmul_(step, length)
            residual.addcmul_(image, length, value=-1)
            scaled = residual * scale
            before, energy = energy, (residual * scaled).sum(1, keepdim=True)
            step = torch.addcmul(scaled, step, energy / before.clamp_min(tiny))
        return rows

    def _apply(self, rows: Tensor, penalty: Tensor) -> Tensor:
        """Each token's normal-equation matrix times its row of `rows` [R, F]; `penalty` = ``k s diag(M)`` [F]."""
        image = penalty * rows
        for all_ids, all_gates in zip(self._ids, self._gates, strict=True):
            for ids, gate in zip(all_ids.split(_CHUNK), all_gates.split(_CHUNK), strict=True):
                image.index_add_(0, ids, gate * (gate * rows[ids] @ self._down.T @ self._down))
        return image
