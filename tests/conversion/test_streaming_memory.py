"""A checkpoint of more than four times the memory limit of the process is converted, tensor by tensor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.conversion.families.family import expected_tensors
from hf_efficient.conversion.reading.checkpoint_files import open_folder_reader
from hf_efficient.conversion.writing.shard_writer import Shard, StoredTensor, split_into_shards

LIMIT = 480 * 2**20
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=15,
    num_attention_heads=16,
    num_key_value_heads=16,
    dtype="bfloat16",
)

# The limits are set after the imports, which need most of the memory. Mapped files would count towards the limit.
_SCRIPT = f"""
import re, resource, sys
import torch
torch.set_num_threads(1)
from hf_efficient.convert_checkpoint import convert
import hf_efficient.conversion.stem.patch, hf_efficient.hub.card
used = dict(re.findall(r"(VmSize|VmData):\\s+(\\d+)", open("/proc/self/status").read()))
spare = {LIMIT} - int(used["VmData"]) * 1024
assert spare > 0, f"the imports alone use {{used}}"
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}))
resource.setrlimit(resource.RLIMIT_AS, (int(used["VmSize"]) * 1024 + spare,) * 2)
try:
    torch.empty({LIMIT}, dtype=torch.uint8)
except RuntimeError:
    print("limited")
report = convert(sys.argv[1], sys.argv[2], evaluate=False, progress=False, max_shard_size=sys.argv[3])
print(report.after.bytes)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.fixture
def big_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose large files are removed as soon as the test ends."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_sparse(folder: Path, shards: list[Shard]) -> int:
    """Write a sparse checkpoint of tensors that are zero except for their ends. Returns its size in bytes."""
    folder.mkdir()
    CONFIG.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header())
            for tensor in shard.tensors:
                start = file.tell()
                for offset in (0, tensor.bytes - 64):
                    file.seek(start + offset)
                    file.write(torch.randn(32, generator=generator).bfloat16().view(torch.uint8).numpy())
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(shard.data_bytes for shard in shards)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux only")
@pytest.mark.parametrize("max_shard_bytes", [10**12, 500 * 10**6], ids=["one file", "shards"])
def test_memory_does_not_grow_with_the_checkpoint(max_shard_bytes: int, big_folder: Path) -> None:
    shapes = expected_tensors(decoder_config(CONFIG))
    tensors = [StoredTensor(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    stock, output = big_folder / "stock", big_folder / "out"
    size = write_sparse(stock, split_into_shards(tensors, max_shard_bytes))
    assert size >= 4 * LIMIT
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, stock, output, str(max_shard_bytes)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    limited, written, peak_kib = done.stdout.split()
    assert limited == "limited" and int(written) == size
    # Includes the pages of libraries.
    assert int(peak_kib) * 1024 < size / 3
    before, after = open_folder_reader(stock), open_folder_reader(output)
    assert set(after.names()) == set(shapes)
    assert all(torch.equal(before.read(name), after.read(name)) for name in shapes)
