"""The namespace of every custom op and attention-interface name.

An exported checkpoint carries a copy of this file with another value, so that two versions of the code in one process
never replace each other's ops.
"""

NS = "hf_efficient"
