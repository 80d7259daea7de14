"""Configuration of topology attention: grammar, control tokens, and which steps of a plan a step may attend to.

A grammar (Multiverse or MedVerse) defines how control tokens, tags such as `<Path>` that are one token each, divide a
text into parallel paths or steps.
"""

from typing import Any, TypedDict

from huggingface_hub.dataclasses import strict

from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig, length_dependent_rope
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS, GRAMMARS, MODES

_DEFAULTS: dict[str, Any] = {
    "grammar": None,
    "mode": "dag",
    "token_ids": {},
    "trained": False,
    "separator": "\n",
    "version": 1,
}
# Control tokens of both grammars -> id.
TokenIds = TypedDict("TokenIds", {tag: int for tags in CONTROL_TOKENS.values() for tag in tags}, total=False)


class TopologySettings(TypedDict, total=False):
    """Types of the values of the field `topology` in config.json; see `TopologyConfig` for their meaning."""

    grammar: str
    mode: str
    token_ids: TokenIds
    trained: bool
    separator: str
    version: int


@strict
class TopologyConfig(DecoderConfig):
    """`DecoderConfig` plus the field `topology`, a dictionary whose missing keys take their defaults.

    | key | meaning |
    |---|---|
    | `grammar` | `multiverse` or `medverse` |
    | `mode` | steps that a MedVerse step may attend to: `dag`, its ancestors; `layers`, all earlier layers; `flat`,
    none |
    | `token_ids` | control token -> id; empty: the model cannot generate in parallel |
    | `trained` | the model was trained to generate control tokens, so `generate` decodes in parallel by default |
    | `separator` | white space between two control tokens, which parallel generation appends without sampling |
    | `version` | version of this format, 1 |

    With ``topology=None`` the model is a plain decoder. Creating a configuration with an invalid topology raises
    `StrictDataclassClassValidationError` of huggingface_hub, caused by the `ValueError` of `validate_topology`.
    """

    model_type = "hfe_topology_base"
    # Allowed grammars; a single one is the default. Not annotated, because annotated attributes are fields.
    topology_grammars = GRAMMARS

    # JSON types of fields whose annotation says only `dict`; verification checks config.json against them.
    field_types = {"topology": TopologySettings | None}

    topology: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.topology is None and not self.patch_is_optional:
            self.topology = {}
        if self.topology is not None:
            grammar = self.topology_grammars[0] if len(self.topology_grammars) == 1 else None
            self.topology = {**_DEFAULTS, "grammar": grammar, **self.topology}
            self.topology["token_ids"] = dict(self.topology["token_ids"] or {})
        super().__post_init__(**kwargs)

    @property
    def active_patches(self) -> list[str]:
        """Names of the patches in use: those of `DecoderConfig`, and the grammar if there is a topology."""
        return [*super().active_patches, *([self.topology["grammar"]] if self.topology is not None else [])]

    def fields_of_absent_patches(self) -> set[str]:
        """Names of the fields to leave out of config.json; `topology` is one if it is None."""
        absent = super().fields_of_absent_patches()
        return absent if self.topology is not None else absent | {"topology"}

    def validate_topology(self) -> None:
        """Check the field `topology`, and that the model has full attention and rotary embeddings that fit it.

        Raises:
            ValueError: a key is unknown, a value is invalid, a layer has sliding-window attention, or the rotary
                frequencies depend on the sequence length.
        """
        if self.topology is None:
            return
        unknown = sorted(set(self.topology) - set(_DEFAULTS))
        if unknown:
            raise ValueError(f"topology has the unknown keys {unknown}; its keys are {list(_DEFAULTS)}")
        known = {
            "grammar": self.topology_grammars,
            "mode": MODES,
            "version": (1,),
            "trained": (False, True),
        }
        for key, values in known.items():
            if self.topology[key] not in values:
                raise ValueError(f"topology[{key!r}]={self.topology[key]!r} must be one of {list(values)}")
        separator = self.topology["separator"]
        if not isinstance(separator, str) or separator.strip():
            raise ValueError(f"topology['separator']={separator!r} must be white space or an empty string")
        self._validate_token_ids()
        if "sliding_attention" in self.layer_types:
            raise ValueError(
                f"layer_types names sliding_attention (sliding_window={self.sliding_window}), and a window counts "
                "tokens of the row, not positions of a topology; use full_attention in every layer"
            )
        rope_type = length_dependent_rope(self.rope_parameters)
        if rope_type is not None:
            raise ValueError(
                f"rope_type={rope_type!r} changes its frequencies with the length, so keys of different branches would "
                "disagree; use 'default', 'linear', 'yarn' or 'llama3'"
            )

    def _validate_token_ids(self) -> None:
        """Raise `ValueError` unless `token_ids` is empty or gives each control token its own id below `vocab_size`."""
        ids, tags = self.topology["token_ids"], CONTROL_TOKENS[self.topology["grammar"]]
        if ids and set(ids) != set(tags):
            wrong = sorted(set(ids) ^ set(tags))
            raise ValueError(f"topology['token_ids'] must name the {len(tags)} control tokens; it differs in {wrong}")
        for tag, token_id in ids.items():
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"topology['token_ids'][{tag!r}]={token_id!r} must be an id below vocab_size={self.vocab_size}"
                )
        if len(set(ids.values())) != len(ids):
            raise ValueError(f"topology['token_ids'] gives two tags one id: {ids}")


__all__ = ["TopologyConfig"]
