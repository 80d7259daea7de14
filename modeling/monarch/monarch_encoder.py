"""What the registered encoders add to the stock classes: the attention that their configuration chooses."""

from __future__ import annotations

from typing import Any

from hf_efficient.errors import HFEError
from hf_efficient.logging import warn_once
from hf_efficient.modeling.base.registered_model import RegisteredModel
from hf_efficient.modeling.monarch.monarch_interface import MONARCH
from hf_efficient.modeling.monarch.monarch_layers import attach_spec
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec


class MonarchEncoder(RegisteredModel):
    """Mixin to list before a `PreTrainedModel`: Monarch attention is the default if `config.monarch` is set.

    Another `attn_implementation`, such as ``"sdpa"``, computes softmax attention with the same weights, as the source
    model does; a warning says so once. The attribute `efficient` of an attention module does the same for one layer.
    With ``config.monarch=None`` everything is as in the stock class.
    """

    # Attribute of the model that this is mixed into.
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config.validate()  # again: keyword arguments of `from_pretrained` set fields without the cross-field checks
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # of the `PreTrainedModel` after it

    def post_init(self) -> None:
        """As in transformers; also gives each attention module its settings."""
        super().post_init()
        if self.config.monarch is not None:
            attach_spec(self, MonarchSpec.from_dict(self.config.monarch))

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """As in transformers; None is Monarch attention if the configuration has settings for it.

        Raises:
            HFEError: Monarch attention was asked for, and the configuration has no settings.
        """
        chosen = self.config.monarch is not None
        if requested_attention == "monarch" or (requested_attention is None and chosen):
            requested_attention = MONARCH  # in the code of a checkpoint it has a name of its own
        found = super().get_correct_attn_implementation(requested_attention, *args, **kwargs)
        if found == MONARCH and not chosen:
            raise HFEError(
                f"attn_implementation='monarch' was asked for, and {type(self.config).__name__} has monarch=None",
                "call enable_monarch(model), or set the configuration's field monarch",
            )
        if found != MONARCH and chosen:
            warn_once(
                f"{type(self).__name__} runs softmax attention (attn_implementation={found!r}), not the Monarch "
                "attention of its configuration"
            )
        return found


__all__ = ["MonarchEncoder"]
