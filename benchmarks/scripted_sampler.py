"""A sampler that replays a known transcript, for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hf_efficient.modeling.topology.generation.branches import Branch, BranchPath
from hf_efficient.modeling.topology.generation.sampling import Sampler


class ScriptedSampler(Sampler):
    """Replays given tokens in each branch, while the model still computes all its logits.

    Args:
        scripts: (batch row, path of the branch) -> the tokens that the branch samples, without forced tokens.
        after: the token sampled where a script has none left; None samples what the model does.
    """

    def __init__(self, scripts: Mapping[tuple[int, BranchPath], Iterable[int]], after: int | None = None) -> None:
        self.scripts = {key: list(tokens) for key, tokens in scripts.items()}
        self.after = after

    def finalize(self, branches: Sequence[Branch], tokens: list[int]) -> list[int]:
        return [self._scripted(branch, token) for branch, token in zip(branches, tokens, strict=True)]

    def propose(self, branches: Sequence[Branch]) -> list[int] | None:
        tokens = [self._scripted(branch, -1) for branch in branches]
        return None if -1 in tokens else tokens

    def _scripted(self, branch: Branch, token: int) -> int:
        script = self.scripts.get((branch.row, branch.path), ())
        if branch.num_sampled_tokens < len(script):
            return script[branch.num_sampled_tokens]
        return token if self.after is None else self.after
