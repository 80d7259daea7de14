"""The namespace of every custom op and attention-interface name.

An exported checkpoint carries a copy of this file with another value, so that two versions of the code in one process
never replace each other's ops.
"""

import zlib

NS = "hf_efficient"
if not __name__.startswith("hf_efficient."):
    # Two checkpoints of one release carry the same code. Registering an op twice frees the first registration while the
    # first copy still uses it, which can crash the process, so each copy adds its module name.
    NS += f"_{zlib.crc32(__name__.encode()):08x}"
