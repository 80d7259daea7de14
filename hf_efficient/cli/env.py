"""`hf-efficient env`."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import platform
from typing import Any

import torch
import typer

from hf_efficient.cli.options import Json, print_json
from hf_efficient.environment import TESTED_PYTHON, TESTED_TORCH, TESTED_TRANSFORMERS

_PACKAGES = ("hf-efficient", "torch", "transformers", "triton", "safetensors", "huggingface_hub", "peft", "accelerate")


def _version(package: str) -> str:
    """Installed version of a package, or `not installed`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_environment() -> dict[str, Any]:
    """Versions, those that were tested, the GPU, and for each kernel the backend it would use here and why."""
    from hf_efficient import kernels
    from hf_efficient.kernels.dispatch import explain

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    device = "cuda" if gpu else "cpu"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "tested": {
            name: {"oldest": oldest, "newest": newest}
            for name, (oldest, newest) in {
                "transformers": TESTED_TRANSFORMERS,
                "torch": TESTED_TORCH,
                "python": TESTED_PYTHON,
            }.items()
        },
        "gpu": gpu,
        "kernels": {
            operation.name: explain(operation.name, device)
            for operation in pkgutil.iter_modules(kernels.__path__)
            if operation.ispkg
        },
    }


def command(json: Json = False) -> None:
    """Show versions, those that were tested, the GPU, and the backend each kernel would use and why.

    Example: hf-efficient env --json
    """
    found = describe_environment()
    if json:
        print_json(found)
        return
    typer.echo(f"Python {found['python']} on {found['platform']}")
    for name, version in found["packages"].items():
        typer.echo(f"  {name:<16} {version}")
    newest = " / ".join(f"{name} {ends['newest']}" for name, ends in found["tested"].items())
    oldest = " / ".join(ends["oldest"] for ends in found["tested"].values())
    typer.echo(f"Tested up to {newest} (from {oldest} on)")
    gpu = found["gpu"]
    summary = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB" if gpu else "none"
    typer.echo(f"GPU: {summary}")
    typer.echo("Kernels:")
    width = max(map(len, found["kernels"]))
    for name, reason in found["kernels"].items():
        typer.echo(f"  {name:<{width}} {reason}")
