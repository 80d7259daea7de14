"""Configuration of MedVerse: topology attention over a plan, whose steps see those that they need."""

from huggingface_hub.dataclasses import strict

from hf_efficient.modeling.topology.configuration_topology import TopologyConfig


@strict
class MedVerseConfig(TopologyConfig):
    """`TopologyConfig` of the grammar `medverse`."""

    model_type = "hfe_medverse"
    topology_grammars = ("medverse",)


__all__ = ["MedVerseConfig"]
