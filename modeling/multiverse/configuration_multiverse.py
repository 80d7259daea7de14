"""Configuration of Multiverse: topology attention over blocks of parallel paths."""

from huggingface_hub.dataclasses import strict

from hf_efficient.modeling.topology.configuration_topology import TopologyConfig


@strict
class MultiverseConfig(TopologyConfig):
    """`TopologyConfig` of the grammar `multiverse`."""

    model_type = "hfe_multiverse"
    topology_grammars = ("multiverse",)


__all__ = ["MultiverseConfig"]
