"""Keys and types of an image processor's settings, `preprocessor_config.json`, for `type_mismatches`."""

from __future__ import annotations

from typing import Literal, TypedDict

from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES


class ImageSize(TypedDict, total=False):
    """Size of an image in pixels."""

    height: int
    width: int
    shortest_edge: int
    longest_edge: int


Size = int | list[int] | ImageSize | None
PerChannel = float | list[float] | None


class ImageProcessorSettings(TypedDict, total=False):
    """`preprocessor_config.json`: keys that transformers' own image processors write. None names a file or code."""

    image_processor_type: str | None
    feature_extractor_type: str | None
    do_convert_rgb: bool | None
    do_resize: bool | None
    size: Size
    default_to_square: bool | None
    crop_size: Size
    resample: int | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: PerChannel
    image_std: PerChannel
    do_pad: bool | None
    pad_size: Size
    do_center_crop: bool | None
    data_format: Literal["channels_first", "channels_last"] | None
    input_data_format: Literal["channels_first", "channels_last"] | None
    disable_grouping: bool | None


def is_image_processor_class(name: str) -> bool:
    """True for the name of an image processor class of transformers."""
    known = {each for names in IMAGE_PROCESSOR_MAPPING_NAMES.values() for each in names.values()}
    return name in known or name.removesuffix("Fast") in known


def current_class(name: str | None) -> str | None:
    """The name of a processor class as transformers 5 has it: its feature extractors are now image processors."""
    return None if name is None else name.replace("FeatureExtractor", "ImageProcessor")
