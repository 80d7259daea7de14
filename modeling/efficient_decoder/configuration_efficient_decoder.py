"""Configuration of the decoder that takes any combination of patches, or none."""

from huggingface_hub.dataclasses import strict

from hf_efficient.modeling.bhyt.configuration_bhyt import BhytConfig
from hf_efficient.modeling.stem.configuration_stem import StemConfig
from hf_efficient.modeling.topology.configuration_topology import TopologyConfig


@strict
class EfficientDecoderConfig(StemConfig, BhytConfig, TopologyConfig):
    """Every patch's fields; a patch whose fields are left alone is absent."""

    model_type = "hfe_decoder"
    patch_is_optional = True


__all__ = ["EfficientDecoderConfig"]
