"""gather_rows: rows from the table and from the cache, bit for bit."""

from __future__ import annotations

import pytest
import torch

from hf_efficient.errors import HFEError
from hf_efficient.kernels.gather_rows.api import gather_rows
from hf_efficient.kernels.gather_rows.configs import DECODE_ROWS, launch_config
from hf_efficient.kernels.gather_rows.record import RECORD, draw

CPU = torch.device("cpu")


def test_each_row_comes_from_the_cache_where_it_is_held_and_from_the_table_elsewhere() -> None:
    arguments = draw(CPU, torch.float32, ids=50, cached=(4, 0, 12))
    held = {4: 0, 0: 1, 12: 2}
    out = gather_rows(**arguments)
    assert {int(i) for i in arguments["ids"]} > held.keys()
    for row, i in zip(out, arguments["ids"].tolist(), strict=True):
        assert torch.equal(row, arguments["cache"][held[i]] if i in held else arguments["table"][i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_are_copied_bit_for_bit_whatever_they_hold(dtype: torch.dtype) -> None:
    """All kinds of bit patterns: normal and subnormal numbers, both zeros, infinities, NaNs with a payload."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integers)
    bits = torch.randint(info.min, info.max, (20, 64), dtype=integers)
    bits[3, :3] = torch.tensor([info.min, info.max, 0], dtype=integers)
    ids = torch.tensor([3, 19, 3, 0, 7])
    slots = torch.full((20,), -1, dtype=torch.int32)
    slots[7] = 0
    out = gather_rows(bits.view(dtype), ids, cache=bits[11:12].view(dtype), cache_slots=slots)
    assert torch.equal(out.view(integers), bits[[3, 19, 3, 0, 11]])


def test_an_output_that_is_given_is_filled_and_returned() -> None:
    arguments = draw(CPU, torch.bfloat16, cached=(1, 2))
    whole = torch.full((9, 30), 5.0, dtype=torch.bfloat16)
    out = whole[1:8, 3:27]
    assert gather_rows(**{**arguments, "out": out}) is out
    assert torch.equal(out, gather_rows(**arguments))
    out.fill_(5.0)
    assert whole.eq(5.0).all(), "nothing around it was touched"


def test_a_table_that_is_trained_is_refused_while_gradients_are_on() -> None:
    table = torch.nn.Parameter(torch.randn(5, 4))
    ids = torch.tensor([1, 2])
    with pytest.raises(HFEError, match="inference only"):
        gather_rows(table, ids)
    with torch.no_grad():
        assert torch.equal(gather_rows(table, ids), table[1:3])


def test_only_the_output_is_traced_as_what_changes() -> None:
    from hf_efficient.kernels.gather_rows.op import gather_rows_into

    written = {argument.name for argument in gather_rows_into._schema.arguments if argument.alias_info is not None}
    assert written == {"out"} == set(RECORD.mutates)


def test_few_programs_read_host_memory_and_none_is_wider_than_a_row() -> None:
    host, device = (launch_config(DECODE_ROWS + 1, 16384, on_host) for on_host in (True, False))
    assert 0 < host.programs <= 64 and device.programs == 0
    assert launch_config(DECODE_ROWS, 16384, True).programs == 0, "decoding waits for no turn"
    for row_bytes in (2, 100, 128, 130, 5120):
        config = launch_config(1000, row_bytes, True)
        assert config.block_bytes & (config.block_bytes - 1) == 0 and config.block_bytes < 2 * max(row_bytes, 64) + 1


def test_the_byte_model_is_the_one_that_the_notes_state() -> None:
    arguments = draw(CPU, torch.bfloat16, width=32, cached=(1,)) | {"ids": torch.tensor([5, 5, 1, 5])}
    assert RECORD.forward_cost(arguments).bytes == (2 + 4) * 32 * 2 + 4 * 8 + 2 * 4
    assert RECORD.forward_cost({**arguments, "cache": None, "cache_slots": None}).bytes == (2 + 4) * 32 * 2 + 4 * 8
