"""The folder `custom_generate/` of a checkpoint: its `generate`, for models of other classes too.

transformers loads it with ``from_pretrained(checkpoint, trust_remote_code=True)``, and for any model with
``model.generate(..., custom_generate=checkpoint, trust_remote_code=True)``. It imports
the installed package; if there is none, it imports the copies of the checkpoint's code files in this folder.
"""

from __future__ import annotations

from hf_efficient import __version__
from hf_efficient.hub.flatten import FlatCode, file_header, flat_name
from hf_efficient.modeling.base.saved_code import GENERATE
from hf_efficient.registry import ArchitectureSpec

# `model` must be a keyword: transformers binds it before the prompt comes by position.
_TEMPLATE = '''"""Parallel generation of the grammar `{grammar}`: the options are those of `parallel_generate`."""

from __future__ import annotations

from typing import Any


def generate(inputs: Any = None, generation_config: Any = None, *args: Any, model: Any, **kwargs: Any) -> Any:
    """`generate` with parallel paths; `parallel=False` gives the `generate` of the model's class.

    A stock model needs `tokenizer=`, and rows of its embedding for the control tokens.
    """
    if getattr(model, "generates_in_parallel", False):
        return type(model).generate(model, inputs, generation_config, *args, **kwargs)
    if not kwargs.pop("parallel", True):
        return type(model).generate(model, inputs, generation_config, *args, **kwargs)
    try:
        from {module} import parallel_generate
    except ImportError:
        from .{flat} import parallel_generate
    return parallel_generate(model, inputs, generation_config, **{{"grammar": "{grammar}", **kwargs}})
'''


def render_generate(architecture: ArchitectureSpec, code: FlatCode) -> tuple[str | None, str | None]:
    """Text of `custom_generate/generate.py`, and the code file that it imports.

    Both are None for an architecture without a `generate` of its own.
    """
    module = architecture.generation
    if module is None:
        return None, None
    text = _TEMPLATE.format(grammar=architecture.patch, module=module, flat=flat_name(module))
    return file_header(GENERATE, __version__, code.source_hash) + text, f"{flat_name(module)}.py"
