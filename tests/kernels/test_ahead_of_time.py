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
    """Narrow accesses to half-precision rows cost a third of the bandwidth; one mask can cause them."""
    from hf_efficient.kernels.stem_gate.record import RECORD

    checked = 0
    for compilation in RECORD.compilations(90):
        if " bf16 gate bf16 table width 8192" in compilation.label:
            ptx = compile_ahead(compilation, 90).asm["ptx"]
            assert not re.findall(r"(?:ld|st)\.global[^;]*\.b16", ptx), compilation.label
            assert re.search(r"(?:ld|st)\.global[^;]*\.v4\.b32", ptx), compilation.label
            checked += 1
    assert checked >= 4


def test_rows_of_gather_rows_are_read_and_written_16_bytes_at_a_time() -> None:
    """Selecting between cache and table must not narrow the loads of either. Only ids and slots are loaded singly."""
    from hf_efficient.kernels.gather_rows.record import RECORD

    for compilation in RECORD.compilations(90):
        ptx = compile_ahead(compilation, 90).asm["ptx"]
        widths = re.findall(r"(ld|st)\.global[^;]*?\.(v4\.b32|v2\.b64|b\d+)", ptx)
        singles = [width for kind, width in widths if not width.startswith("v")]
        assert ("st", "v4.b32") in widths or ("st", "v2.b64") in widths, compilation.label
        assert singles == ["b64", "b32"][: 2 if "cached" in compilation.label else 1], compilation.label


def test_row_adamw_moves_float32_16_bytes_at_a_time_and_exchanges_nothing_through_shared_memory() -> None:
    """One barrier only, between all threads' read of a row's step count and one thread's write."""
    from hf_efficient.kernels.row_adamw.record import RECORD

    for compilation in RECORD.compilations(90):
        if "fp64" not in compilation.label:
            ptx = compile_ahead(compilation, 90).asm["ptx"]
            assert not re.search(r"(?:ld|st)\.shared", ptx), compilation.label
            row, barrier, tile = ptx.partition("bar.sync")
            assert barrier and "bar.sync" not in tile and "st.global" not in row, compilation.label
            moved = re.findall(r"(?:ld|st)\.global[^;]*?\.(v\d\.b32)", tile)
            # The parameter is read and written, the gradient read, and so are the moments, which are always float32.
            half = 2 * compilation.types["param"].endswith("16") + compilation.types["grad"].endswith("16")
            assert moved.count("v4.b32") == 7 - half and moved.count("v2.b32") == half, compilation.label


def test_cache_rows_of_decode_attention_are_read_16_bytes_at_a_time() -> None:
    """By asynchronous copies; the masks of the last block and of odd widths must not narrow them."""
    from hf_efficient.kernels.decode_attention.record import RECORD

    checked = 0
    for compilation in RECORD.compilations(90):
        if compilation.label.startswith("split bf16 head_dim 64") and "none on" in compilation.label:
            ptx = compile_ahead(compilation, 90).asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x\w+|\d+), ", ptx)
            assert copies and {int(size, 0) for size in copies} == {16}, compilation.label
            checked += 1
    assert checked


def test_weights_of_skinny_linear_are_read_16_bytes_at_a_time() -> None:
    """Selecting one of up to three matrices must not lose the alignment of the pointers."""
    from hf_efficient.kernels.skinny_linear.record import RECORD

    checked = set()
    for compilation in RECORD.compilations(90):
        kernel = compilation.kernel.fn.__name__
        if " bf16 " not in compilation.label or kernel == "reduce_splits_kernel":
            continue
        kind = (kernel, compilation.label.endswith("gated"), compilation.constants.get("K_PER_SPLIT"))
        if kind in checked and "576 deep" not in compilation.label:
            continue  # one of each kind is enough, and those whose K is no multiple of BLOCK_K
        ptx = compile_ahead(compilation, 90).asm["ptx"]
        if kernel == "gemv_kernel":
            # Weights are the loads with `evict_first`.
            weights = re.findall(r"ld\.global[^;]*evict_first[^;]*", ptx)
            assert weights and all(".v4.b32" in load for load in weights), compilation.label
        else:
            assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx), compilation.label
            assert "cp.async.ca" not in ptx, f"{compilation.label}: copies of less than 16 bytes"
        checked.add(kind)
    assert {kind[:2] for kind in checked} == {(k, g) for k in ("gemv_kernel", "gemm_kernel") for g in (False, True)}
    assert any("K_PER_SPLIT" in compilation.constants for compilation in RECORD.compilations(90))


def test_overlapped_launches_touch_no_memory_before_the_kernel_before_has_finished() -> None:
    """Before the wait, which no branch may skip, there are only prefetches."""
    records = {record.name: record for record in all_records()}
    hints = {}
    for name in ("add_rms_norm", "decode_attention", "rotary_cache", "skinny_linear"):
        for compilation in records[name].compilations(90):
            kernel = compilation.kernel.fn.__name__
            if compilation.constants.get("OVERLAP") and kernel not in hints:
                before, wait, after = compile_ahead(compilation, 90).asm["ptx"].partition("griddepcontrol.wait")
                body = before[before.index(".entry") :]
                assert wait and "bra" not in body and not re.search(r"@%p\d+\s+(?:bra|ret)", body), compilation.label
                assert not re.search(r"(?:ld|st|red|atom)\.(?:volatile\.)?global|cp\.async", body), compilation.label
                assert "st.global" in after, compilation.label
                hints[kernel] = body.count("prefetch.global.L2")
    # A tile of 16 KiB in sectors of 32 bytes for 128 threads, and a row of 4 KiB for as many.
    assert hints["gemv_kernel"] == 4 and hints["add_rms_norm_kernel"] >= 1
    assert {kernel for kernel, count in hints.items() if count} == {"gemv_kernel", "add_rms_norm_kernel"}
    assert len(hints) == 7, "of every kernel that takes the switch"
