"""Configuration of STEM: in chosen layers, a table row of the token replaces the feed-forward's up-projection."""

from typing import Any

from huggingface_hub.dataclasses import strict

from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig


def stem_layer_preset(num_hidden_layers: int, preset: str) -> list[int]:
    """Return the indices of the layers that the STEM paper replaces when it trains from scratch, sorted, without 0.

    Args:
        num_hidden_layers: number of layers of the model.
        preset: ``third`` (every third from layer 2, or layer 1 of two), ``half`` (the odd ones) or ``full`` (all but
            layer 0).

    Raises:
        ValueError: another preset.

    Source: arXiv:2601.10639, section 4. A conversion should choose by measured sensitivity instead.
    """
    presets = {
        "third": range(2 if num_hidden_layers > 2 else 1, num_hidden_layers, 3),
        "half": range(1, num_hidden_layers, 2),
        "full": range(1, num_hidden_layers),
    }
    if preset not in presets:
        raise ValueError(f"unknown STEM layer preset {preset!r}; choose one of {sorted(presets)}")
    return list(presets[preset])


@strict
class StemConfig(DecoderConfig):
    """`DecoderConfig` plus the STEM fields.

    | field | meaning |
    |---|---|
    | `stem_layers` | indices of the STEM layers, sorted and unique; by default every third (the paper's choice), or |
    | | none where the patch is optional (`hfe_decoder`) |
    | `stem_embedding_dim` | width of a table row; must equal `intermediate_size` |
    | `stem_init_std` | standard deviation of a fresh table; None: Xavier, `sqrt(2 / (vocab_size + width of a row))` |
    | `stem_keep_up_proj` | keep the stock up-projection beside the table: `mlp.efficient = False` runs the stock path |
    | `stem_sparse_grad` | the tables get sparse gradients, only of the rows of a batch's tokens |
    | `stem_offload` | `none`; `cpu`: the tables stay in host memory; `disk`: mapped from the checkpoint's files |
    | `stem_cache_rows` | rows of each offloaded table to cache on the device, those of the most frequent tokens; |
    | | no effect where the tables cannot be pinned, as with `disk` |
    | `stem_prefetch_layers` | offloaded tables whose rows may be in transfer at the same time; 0: all |
    | `stem_inputs_embeds` | for `inputs_embeds` without ids: `error`, or `match` to find the ids in the embedding |
    """

    model_type = "hfe_stem"

    stem_layers: list[int] | None = None
    stem_embedding_dim: int | None = None
    stem_init_std: int | float | None = None
    stem_keep_up_proj: bool = False
    stem_sparse_grad: bool = False
    stem_offload: str = "none"
    stem_cache_rows: int = 0
    stem_prefetch_layers: int = 0
    stem_inputs_embeds: str = "error"

    def __post_init__(self, **kwargs: Any) -> None:
        """Replace the defaults None of `stem_layers` and `stem_embedding_dim` as the table describes."""
        if self.stem_layers is None:
            self.stem_layers = [] if self.patch_is_optional else stem_layer_preset(self.num_hidden_layers, "third")
        if self.stem_embedding_dim is None:
            self.stem_embedding_dim = self.intermediate_size
        super().__post_init__(**kwargs)

    def tensor_parallel_plan(self) -> dict[str, str]:
        """As in `DecoderConfig`; with STEM layers, tables are split by rows, and gates are gathered."""
        plan = super().tensor_parallel_plan()
        if not self.stem_layers:
            return plan
        # transformers splits an embedding by rows and returns whole rows on every rank, so the gate must be whole too:
        # its output is gathered. Dense layers match the same patterns. Serving engines support only the older names of
        # these styles.
        plan["layers.*.mlp.gate_proj"] = plan["layers.*.mlp.up_proj"] = "colwise_rep"
        plan["layers.*.mlp.down_proj"] = "rowwise_rep"
        plan["layers.*.mlp.stem_embed"] = "embedding_rowwise"
        if len(self.stem_layers) == self.num_hidden_layers and not self.stem_keep_up_proj:
            del plan["layers.*.mlp.up_proj"]
        return plan

    @property
    def active_patches(self) -> list[str]:
        """Names of the patches that this configuration has, `stem` if there are STEM layers."""
        return [*super().active_patches, *(["stem"] if self.stem_layers else [])]

    def fields_of_absent_patches(self) -> set[str]:
        """As in `DecoderConfig`; all STEM fields if there are no STEM layers."""
        absent = super().fields_of_absent_patches()
        return absent if "stem" in self.active_patches else absent | set(StemConfig.__annotations__)

    def validate_stem(self) -> None:
        """Check the STEM fields; transformers calls it when a configuration is created.

        Raises:
            ValueError: a rule is broken; the message has the value and the rule.
        """
        layers, count = self.stem_layers, self.num_hidden_layers
        if not layers and not self.patch_is_optional:
            raise ValueError("stem_layers is empty; name at least one layer, or use the unpatched decoder")
        outside = [i for i in layers if not 0 <= i < count]
        if outside:
            raise ValueError(f"stem_layers contains {outside}; the model has layers 0..{count - 1}")
        if layers != sorted(set(layers)):
            raise ValueError(f"stem_layers={layers} must be sorted and free of duplicates")
        if self.stem_embedding_dim != self.intermediate_size:
            raise ValueError(
                f"stem_embedding_dim={self.stem_embedding_dim} must equal intermediate_size={self.intermediate_size}: "
                "a table row replaces the up-projection's output"
            )
        if self.stem_init_std is not None and self.stem_init_std <= 0:
            raise ValueError(f"stem_init_std={self.stem_init_std} must be positive, or None for Xavier")
        if self.stem_offload not in ("none", "cpu", "disk"):
            raise ValueError(f"stem_offload={self.stem_offload!r} must be 'none', 'cpu' or 'disk'")
        for name in ("stem_cache_rows", "stem_prefetch_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.stem_inputs_embeds not in ("error", "match"):
            raise ValueError(f"stem_inputs_embeds={self.stem_inputs_embeds!r} must be 'error' or 'match'")


__all__ = ["StemConfig", "stem_layer_preset"]
