"""Configuration of MedVerse: topology attention over a plan, each step of which sees those that it depends on."""

from huggingface_hub.dataclasses import strict

from hf_efficient.modeling.topology.configuration_topology import TopologyConfig


@strict
class MedVerseConfig(TopologyConfig):
    """`TopologyConfig` of the grammar `medverse`."""

    model_type = "hfe_medverse"
    topology_grammars = ("medverse",)


__all__ = ["MedVerseConfig"]
