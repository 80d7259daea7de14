"""The namespace of every custom op and attention-interface name.

An exported checkpoint carries a copy of this file with another value, so that two versions of the code in one process
never replace each other's ops.
"""

import zlib

NS = "hf_efficient"
if not __name__.startswith("hf_efficient."):
    # Two checkpoints of one release carry the same code. An op that is registered twice is freed under the first
    # copy's feet, and the next call of it can crash the process, so each copy adds the name that it was loaded by.
    NS += f"_{zlib.crc32(__name__.encode()):08x}"
