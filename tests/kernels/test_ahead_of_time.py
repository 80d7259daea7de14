"""Every kernel in every configuration compiles for every supported kind of GPU. No GPU is needed for that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_efficient.kernels.contract import Compilation, KernelRecord, all_records

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

CAPABILITIES = (80, 86, 90, 100)
# What one block may use on a device of capability 8.6; 8.0, 9.0 and 10.0 have more.
SHARED_MEMORY_OF_86 = 99 * 1024


def compile_ahead(compilation: Compilation, capability: int):
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    signature = {name: compilation.types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in compilation.aligned}
    source = ASTSource(compilation.kernel, signature, compilation.constants, aligned)
    options = {"num_warps": compilation.num_warps}
    if compilation.num_stages is not None:
        options["num_stages"] = compilation.num_stages
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("record", all_records(), ids=lambda record: record.name)
def test_every_configuration_compiles_and_fits_the_shared_memory(record: KernelRecord, capability: int) -> None:
    compilations = list(record.compilations(capability))
    assert compilations
    for compilation in compilations:
        compiled = compile_ahead(compilation, capability)
        assert compiled.asm["cubin"], compilation.label
        if capability == 86:
            assert compiled.metadata.shared <= SHARED_MEMORY_OF_86, compilation.label


def test_rows_of_stem_gate_are_read_and_written_16_bytes_at_a_time() -> None:
    """Narrow accesses to half-precision rows cost a third of the bandwidth; a careless mask is enough to cause them."""
    from hf_efficient.kernels.stem_gate.record import RECORD

    checked = 0
    for compilation in RECORD.compilations(90):
        if " bf16 gate bf16 table width 8192" in compilation.label:
            ptx = compile_ahead(compilation, 90).asm["ptx"]
            assert not re.findall(r"(?:ld|st)\.global[^;]*\.b16", ptx), compilation.label
            assert re.search(r"(?:ld|st)\.global[^;]*\.v4\.b32", ptx), compilation.label
            checked += 1
    assert checked >= 4


def test_cache_rows_of_decode_attention_are_read_16_bytes_at_a_time() -> None:
    """By the asynchronous copies of the pipeline; the masks of the last block and of odd widths must not narrow them."""
    from hf_efficient.kernels.decode_attention.record import RECORD

    checked = 0
    for compilation in RECORD.compilations(90):
        if compilation.label.startswith("attend bf16 width 64") and "nothing on" in compilation.label:
            ptx = compile_ahead(compilation, 90).asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x\w+|\d+), ", ptx)
            assert copies and {int(size, 0) for size in copies} == {16}, compilation.label
            checked += 1
    assert checked
