"""Configuration of the Wan 2.1 text-to-video transformer, with softmax or Monarch self-attention.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_efficient.modeling.base.registered_config import RegisteredConfig
from hf_efficient.modeling.monarch.monarch_spec import MonarchGridFields, MonarchGridSpec

VARIANTS = ("bidirectional", "causal")
_PROJECTIONS = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"]


@strict
class MonarchWanConfig(RegisteredConfig, PreTrainedConfig):
    """Fields of the Wan transformer; the defaults are Wan2.1-T2V-1.3B with softmax attention.

    | field | meaning (name in the original configuration, if another) |
    |---|---|
    | `variant` | `bidirectional`: all frames attend to each other; `causal`: chunks of frames, as in Self-Forcing |
    | `monarch` | settings of Monarch self-attention, see `MonarchGridSpec`; None is softmax attention |
    | `hidden_size` | channels of a token (`dim`) |
    | `intermediate_size` | channels inside the feed-forward (`ffn_dim`) |
    | `num_hidden_layers`, `num_attention_heads` | blocks (`num_layers`), heads (`num_heads`) |
    | `in_channels`, `out_channels` | channels of the latents and of the predicted flow (`in_dim`, `out_dim`) |
    | `patch_size` | frames, height and width of the latents that become one token |
    | `text_dim`, `text_len` | channels and number of the text tokens, padding with zeros included |
    | `freq_dim` | channels of the sinusoidal timestep embedding |
    | `eps` | of every norm |
    | `initializer_range` | standard deviation of the initial weights of text and timestep embedding |
    | `rope_theta`, `rope_max_seq_len` | base of the rotary frequencies; positions on each axis |
    | `num_frames_per_block` | causal: latent frames that are generated together, a chunk |
    | `local_attn_size` | causal: latent frames that a chunk attends to, its own included; -1 is all |
    | `sink_size` | causal, with `local_attn_size`: first frames of the video that stay among these |
    | `source_model_type` | what the weights were converted from; None when trained from scratch |
    | `hfe_format` | version of the checkpoint layout |
    """

    model_type = "hfe_monarch_wan"
    peft_targets = "wan"
    peft_targets_by_method = dict.fromkeys(
        ("LORA", "ADALORA", "RANDLORA", "VERA", "FOURIERFT", "VBLORA", "MISS"), _PROJECTIONS
    )
    # JSON types of fields whose annotation says only `dict`; verification checks config.json against them.
    field_types = {"monarch": MonarchGridFields | None}
    attribute_map = {
        "dim": "hidden_size",
        "ffn_dim": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
    }

    variant: str = "bidirectional"
    monarch: dict | None = None
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 30
    num_attention_heads: int = 12
    in_channels: int = 16
    out_channels: int = 16
    patch_size: list[int] | tuple[int, ...] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_max_seq_len: int = 1024
    num_frames_per_block: int = 3
    local_attn_size: int = -1
    sink_size: int = 0
    source_model_type: str | None = None
    hfe_format: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        """Make `patch_size` a list, as config.json stores it, and add to `monarch` the settings it leaves out."""
        self.patch_size = list(self.patch_size)
        if self.monarch is not None:
            self.monarch = MonarchGridSpec.from_dict(self.monarch).to_dict()
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def monarch_spec(self) -> MonarchGridSpec | None:
        """Settings of Monarch attention as an object; None for softmax attention.

        Raises:
            HFEError: a setting is wrong.
        """
        return None if self.monarch is None else MonarchGridSpec.from_dict(self.monarch)

    @property
    def active_patches(self) -> list[str]:
        """`["monarch"]`, or nothing with softmax attention."""
        return [] if self.monarch is None else ["monarch"]

    def validate_architecture(self) -> None:
        """Check the fields against each other.

        Called when a configuration is created, which then raises `StrictDataclassClassValidationError` of
        huggingface_hub, caused by this error.

        Raises:
            ValueError: a rule is broken; the message has the value and the rule.
        """
        for name in (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "in_channels"),
            *("out_channels", "text_dim", "text_len", "freq_dim", "rope_max_seq_len", "num_frames_per_block"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} must be one of {list(VARIANTS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"hidden_size / num_attention_heads = {self.head_dim} must be even and at least 6: the rotary "
                "embedding rotates pairs of channels for each of the three axes"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even: half are cosines, half are sines")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1 or self.patch_size[0] != 1:
            raise ValueError(
                f"patch_size={self.patch_size} must be [1, height, width]: a token covers one latent frame"
            )
        self._validate_window()
        spec = self.monarch_spec
        if spec is not None:
            spec.check_layers(self.num_hidden_layers)
            self._validate_tiles(spec)

    def _validate_window(self) -> None:
        """Raise ValueError unless `local_attn_size` and `sink_size` fit each other and the chunk."""
        local, sink = self.local_attn_size, self.sink_size
        if (local, sink) != (-1, 0) and self.variant != "causal":
            raise ValueError(f"local_attn_size={local} and sink_size={sink} need variant='causal'")
        if sink < 0 or (sink and local == -1):
            raise ValueError(f"sink_size={sink} must be at least 0, and 0 if local_attn_size is -1 (all frames)")
        if local != -1 and local < sink + self.num_frames_per_block:
            raise ValueError(
                f"local_attn_size={local} must be -1 or at least sink_size + num_frames_per_block = "
                f"{sink + self.num_frames_per_block}, so that a chunk attends to all of itself"
            )

    def _validate_tiles(self, spec: MonarchGridSpec) -> None:
        """Raise ValueError unless tiles fit into the chunks, the window and the sink of a causal model."""
        if self.variant != "causal":
            return
        for name in ("num_frames_per_block", "local_attn_size", "sink_size"):
            if getattr(self, name) != -1 and getattr(self, name) % spec.f_tied:
                raise ValueError(
                    f"monarch.f_tied={spec.f_tied} must divide {name}={getattr(self, name)}: frames of one tile are "
                    "attended to and leave the cache together"
                )


__all__ = ["MonarchWanConfig"]
