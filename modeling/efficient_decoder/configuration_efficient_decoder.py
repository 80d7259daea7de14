"""Configuration of the decoder with any combination of patches, or none."""

from huggingface_hub.dataclasses import strict

from hf_efficient.modeling.bhyt.configuration_bhyt import BhytConfig
from hf_efficient.modeling.stem.configuration_stem import StemConfig
from hf_efficient.modeling.topology.configuration_topology import TopologyConfig


@strict
class EfficientDecoderConfig(StemConfig, BhytConfig, TopologyConfig):
    """The fields of every patch; a patch whose fields have their defaults is absent."""

    model_type = "hfe_decoder"
    patch_is_optional = True


__all__ = ["EfficientDecoderConfig"]
