"""`Finding` and `VerificationReport`, the result of `verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_efficient.errors import HFEError

Verdict = Literal["confirmed", "altered", "not confirmable"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a checkpoint: the file, what is wrong, and what to do about it.

    Characters that are not printable become escape sequences in all three.
    """

    file: str
    problem: str
    remedy: str = ""

    def __post_init__(self) -> None:
        # Names and values come from an untrusted checkpoint: they must not hold terminal escape sequences.
        for name in ("file", "problem", "remedy"):
            object.__setattr__(self, name, _printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class VerificationReport:
    """The result of `verify`.

    Attributes:
        source: folder or repository that was verified.
        commit: the repository's commit that was read; pin it as `revision` when you load. None for a folder.
        model_type: architecture that `config.json` names.
        release: release of this package that the checkpoint says its code is from; it is not trusted.
        installed: release of this package, from which the code was regenerated.
        code: `confirmed` if each code file equals the installed release's, `altered` if one does not,
            `not confirmable` if the code is that of another release, or of an unknown architecture.
        code_files: number of code files that the release writes for this architecture.
        tensors: number of tensors in the weights' headers.
        findings: every fault; empty if there is none.
        not_part: files that are not part of the model and are not loaded with it, such as optimizer states. `push`
            does not upload them. Resuming the training from the folder would load them, pickles included.
    """

    source: str
    commit: str | None
    model_type: str | None
    release: str | None
    installed: str
    code: Verdict
    code_files: int
    tensors: int
    findings: tuple[Finding, ...]
    not_part: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if the code is confirmed and there are no findings."""
        return self.code == "confirmed" and not self.findings

    def raise_if_not_ok(self) -> None:
        """Raise `HFEError` with the verdict and the first findings, unless `ok`."""
        if not self.ok:
            shown = " | ".join(str(finding) for finding in self.findings[:3])
            more = f" | and {len(self.findings) - 3} more" if len(self.findings) > 3 else ""
            raise HFEError(f"{self.source} did not pass verification, code {self.code}: {shown}{more}")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings], "ok": self.ok}

    def table(self) -> str:
        """The report as text for a terminal."""
        at = f" at {self.commit}" if self.commit else ""
        lines = [f"{self.source}{at}: {'verified' if self.ok else 'NOT verified'}"]
        model_type = "no model_type" if self.model_type is None else _printable(str(self.model_type))
        lines.append(f"  code     {self.code}: {model_type}, {self.code_files} files, hf-efficient {self.installed}")
        lines.append(f"  weights  {self.tensors} tensors")
        if self.not_part:
            more = f" and {len(self.not_part) - 5} more" if len(self.not_part) > 5 else ""
            lines.append(
                f"  beside   {', '.join(map(_printable, self.not_part[:5]))}{more}: not part of the model, not loaded "
                "with it, not uploaded by push; do not resume a training that you do not trust from them"
            )
        return "\n".join(lines + [f"  - {finding}" for finding in self.findings])


def _printable(text: str) -> str:
    """`text` with an escape sequence in place of each character that is not printable."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
