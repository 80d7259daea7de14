"""Reads checkpoints of the BHyT authors' training code as checkpoints of our decoder.

Their `model_type` is `llama`. They differ from Llama by fields of `config.json`, such as `norm_type`, and by additional
tensors: `lam` of every BHyT norm, a scalar without dimensions if it was not trained, and for some estimates of the mean
square in `post_attention_layernorm` one or two scalars per layer. Three properties are in no file but fixed in their
code: the eps of a BHyT norm is 1e-6 whatever `rms_norm_eps` says, the final norm computes its own mean square, and
`bhytstar` always ends in RMSNorm.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.conversion.families.family import source_config
from hf_efficient.conversion.reading.checkpoint_files import read_config, weight_files
from hf_efficient.conversion.reading.config_fields import check_fields
from hf_efficient.conversion.reading.release import Release
from hf_efficient.conversion.reading.safetensors_reader import SafetensorsReader
from hf_efficient.conversion.reading.stock_names import with_stock_names
from hf_efficient.errors import HFEError
from hf_efficient.modeling.bhyt.branch_variance import branch_variance
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig

if TYPE_CHECKING:
    from hf_efficient.conversion.reading.tensor_reader import TensorReader

# A field that the user adds to config.json: the projections contain the gammas of the norms before them (`norm_fold`).
# The authors' code does not record it.
_GAMMA_FOLDED = "bhyt_gamma_folded"
_EPS = 1e-6
_ESTIMATED = ("bhyt", "bhytline")
_EXACT = "bhytstar"
# Method -> the scalar of a layer that is added to 1 for the slope, and the scalar that is the intercept.
_METHODS: dict[str, tuple[str | None, str | None]] = {
    "baseline": (None, None),
    "beta": (None, "var_beta"),
    "eta": ("var_eta", None),
    "residual_aware": ("var_cross_beta", "var_alpha"),
}
# Fields that change the network in ways that our decoder does not support, and what they do.
_UNSUPPORTED = {
    "use_shared_scale": "scales the embedding by a trained number",
    "use_gamma_var": "weights the estimate of the second mean square by the gammas of the first norm",
    "bhyt_kappa_schedule": "gives every layer another kappa",
    "var_approx_calibration": "corrects the estimates after training, which its own decoding ignores",
}
# An estimate's slope must exceed this: the kernel clamps the estimate to at least v / 1000, v the input norm's value.
_MIN_SLOPE = 1e-3
_BACKUP = "_bhyt_norm_fold_backup_"
# The projections that norm_fold multiplies by the gamma of each norm; it does not fold the final norm.
_FOLDED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def _has_bhyt_norms(fields: dict[str, Any]) -> bool:
    """True for the `config.json` of a model that the authors' code trained with a norm other than RMSNorm."""
    return fields.get("model_type") == "llama" and fields.get("norm_type") not in (None, "rms")


def _release_config(fields: dict[str, Any], stock: EfficientDecoderConfig) -> EfficientDecoderConfig:
    """The decoder configuration of a checkpoint of the authors' code.

    Args:
        fields: its `config.json`.
        stock: the configuration that the same file gives if it is read as that of a plain Llama.

    Raises:
        HFEError: a field is missing or wrong, or needs a feature that our decoder does not have.
    """
    for name, effect in _UNSUPPORTED.items():
        if fields.get(name):
            raise HFEError(
                f"config.json sets {name}={fields[name]!r}, which {effect}; a conversion does not support that",
                f"choose a checkpoint trained without {name}",
            )
    norm_type, count = fields["norm_type"], stock.num_hidden_layers
    kinds = [_layer_kind(fields, index) for index in range(count)]
    estimated = [index for index in range(count) if kinds[index] in _ESTIMATED and not _is_exact(fields, index)]
    method = _method(fields)
    own_fields = {
        "bhyt_layers": [index for index in range(count) if kinds[index] != "rms"],
        "bhyt_second_site": "approx" if estimated else "exact",
        "bhyt_exact_layers": [i for i in range(count) if estimated and kinds[i] != "rms" and i not in estimated],
        "bhyt_lambda_input": _positive(fields, "input_layer_lam"),
        "bhyt_lambda_post": _positive(fields, "post_layer_lam"),
        "bhyt_learnable_lambda": bool(fields.get("learnable_lam", False)),
        "bhyt_kappa": _positive(fields, "bhyt_kappa", 10.0),
        "bhyt_eps": _EPS,
        "bhyt_learnable_estimate": bool(estimated) and method != "baseline",
    }
    # last_layer_lam=0 means RMSNorm.
    if norm_type in _ESTIMATED and fields.get("last_layer_lam"):
        own_fields |= {"bhyt_final": "bhyt", "bhyt_lambda_final": _positive(fields, "last_layer_lam")}
    if estimated:
        own_fields["bhyt_seq_len"] = _sequence_length(fields)
        if stock.attention_bias and method != "eta":
            raise HFEError(
                "config.json sets attention_bias beside an estimated second site; their estimate ignores the bias of "
                "v_proj, ours does not, so the model would not be the same",
                "choose a checkpoint trained without attention_bias",
            )
    config = copy.deepcopy(stock)
    try:
        for name, value in own_fields.items():
            setattr(config, name, value)
        return decoder_config(config)  # re-create the configuration, which validates the fields that were set
    # huggingface_hub raises its own error classes for a field of a wrong type or value.
    except Exception as error:
        raise HFEError(f"config.json is not valid ({' '.join(str(error).split())})", "correct config.json") from error


def _layer_kind(fields: dict[str, Any], index: int) -> str:
    """The norm of a layer: `rms`, `bhyt`, `bhytline` or `bhytstar`.

    Layers outside `bhyt_layer_range`, [first, last], have the norm `fallback_norm_type`; `bhytstar` ignores the range.

    Raises:
        HFEError: config.json names another norm, or `bhyt_layer_range` is malformed.
    """
    kind, bounds = fields.get("norm_type", "rms"), fields.get("bhyt_layer_range")
    if bounds is not None and kind in _ESTIMATED:
        if not (isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(bound, int) for bound in bounds)):
            raise HFEError(
                f"config.json has bhyt_layer_range={bounds!r}, not the first and the last layer", "correct config.json"
            )
        if not bounds[0] <= index <= bounds[1]:
            kind = fields.get("fallback_norm_type", "rms")
    known = ("rms", *_ESTIMATED, _EXACT)
    if kind not in known:
        raise HFEError(
            f"config.json names the norm {kind!r}; of the BHyT authors' norms a conversion supports {', '.join(known)}",
            "choose a checkpoint trained with one of these",
        )
    return kind


def _is_exact(fields: dict[str, Any], index: int) -> bool:
    """True if `post_attention_layernorm` of this layer computes its own mean square although others estimate it.

    Raises:
        HFEError: the fields that list these layers are malformed.
    """
    first, listed = fields.get("var_approx_exact_layers") or 0, fields.get("var_approx_exact_layer_list")
    try:
        named = {int(part) for part in str("" if listed is None else listed).split(",") if part.strip()}
        return index < int(first) or index in named
    except (TypeError, ValueError):
        raise HFEError(
            f"config.json has var_approx_exact_layers={first!r} and var_approx_exact_layer_list={listed!r}, not a "
            "number of layers and indices separated by commas",
            "correct config.json",
        ) from None


def _method(fields: dict[str, Any]) -> str:
    """The method of the estimate, a key of `_METHODS`; `HFEError` for any other in config.json."""
    method = fields.get("var_approx_method") or "baseline"
    if method not in _METHODS:
        raise HFEError(
            f"config.json has var_approx_method={method!r}; a conversion supports {', '.join(_METHODS)}",
            "choose a checkpoint trained with one of these",
        )
    return method


def _positive(fields: dict[str, Any], name: str, default: float | None = None) -> float:
    """The number `name` of config.json; `HFEError` unless it is positive."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise HFEError(f"config.json has {name}={value!r}, not a positive number", "correct config.json")
    return float(value)


def _sequence_length(fields: dict[str, Any]) -> int:
    """`seq_len` of config.json; `HFEError` if it is missing or not a positive integer."""
    length = fields.get("seq_len")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise HFEError(
            f"config.json has seq_len={length!r}; without it their estimate of the second mean square depends on the "
            "length of the first batch that the model processes",
            "set seq_len to the length of the training sequences (their cutoff_len)",
        )
    return length


class BhytReleaseReader:
    """A `TensorReader` for a checkpoint of the authors' code, with the names and shapes of our decoder.

    Args:
        stored: the checkpoint's tensors by the names in its files.
        fields: its `config.json`.
        config: the same model as a configuration of our decoder.

    Raises:
        HFEError: the checkpoint has backups of `norm_fold` but config.json does not set `bhyt_gamma_folded`, or sets it
            for norms that `norm_fold` does not fold or for another `model_type` than llama; or a scalar is missing.

    `bhyt_gamma_folded: true` in config.json says that the projections contain the gammas of the norms before them. The
    reader then divides the gammas out of the projections: applied twice, they would ruin the model. Setting the gammas
    to 1 instead would change the estimate of the second mean square, which is made of the projections as trained.
    """

    def __init__(self, stored: TensorReader, fields: dict[str, Any], config: EfficientDecoderConfig) -> None:
        gamma_folded = bool(fields.get(_GAMMA_FOLDED))
        backups = [name for name in stored.names() if _BACKUP in name]
        if backups and not gamma_folded:
            raise HFEError(
                f"the checkpoint holds {backups[0]}, which norm_fold makes: its projections contain the gammas already",
                f'add "{_GAMMA_FOLDED}": true to config.json in a local copy of the checkpoint, so that the gammas are '
                "divided out, or save the model again after revert_norm_fold",
            )
        remedy = f"remove {_GAMMA_FOLDED} from config.json"
        if gamma_folded and fields.get("model_type") != "llama":
            raise HFEError(
                f"config.json sets {_GAMMA_FOLDED}, a field for Llama checkpoints of the BHyT authors' code, and the "
                f"model_type is {fields.get('model_type')}",
                remedy,
            )
        if gamma_folded and any(_layer_kind(fields, i) == _EXACT for i in range(config.num_hidden_layers)):
            raise HFEError(
                f"config.json sets {_GAMMA_FOLDED}, but norm_fold never folds the gammas of norm_type bhytstar", remedy
            )
        self._stored = stored
        self._config: Any = config  # typed with None, which no field of a configuration is once it is built
        layers = config.bhyt_layers or []
        leaves = self._slope, self._intercept = _METHODS[_method(fields)]
        # Layers with an exact second norm have them too, without effect.
        scalars = {f"model.layers.{index}.{leaf}": index for index in layers for leaf in leaves if leaf is not None}
        estimated = [index for index in layers if config.bhyt_estimate(index) == "approx"]
        absent = [name for name, index in scalars.items() if index in estimated and name not in stored.names()]
        if absent:
            raise HFEError(
                f"the checkpoint lacks tensor {absent[0]}, which config.json requires", "use the whole checkpoint"
            )
        self._names = [name for name in stored.names() if name not in scalars and name not in backups]
        self._gamma_of = {
            f"model.layers.{index}.{projection}.weight": f"model.layers.{index}.{norm}.weight"
            for index in range(config.num_hidden_layers if gamma_folded else 0)
            for norm, projections in _FOLDED.items()
            for projection in projections
        }
        kinds = ("branch", "affine") if config.bhyt_learnable_estimate else ("branch",)
        self._computed = {
            f"model.layers.{index}.post_attention_layernorm.{kind}": (index, kind)
            for index in estimated
            for kind in kinds
        }

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """True for a folder whose config.json has the fields of the authors' code, or says that gammas are folded."""
        try:
            fields = read_config(folder, folder.name)
        except HFEError:
            return False  # the reader of stock checkpoints raises this error again
        return "norm_type" in fields or bool(fields.get(_GAMMA_FOLDED))

    @classmethod
    def open(cls, folder: Path, name: str) -> Release:
        """Open the checkpoint in `folder`; error messages refer to it as `name`.

        Without BHyT norms or folded gammas it is read as a Llama checkpoint.

        Raises:
            HFEError: a file is missing or damaged, or the checkpoint needs a feature that our decoder does not have.
        """
        fields = read_config(folder, name)
        stock_config = source_config(fields)
        files = weight_files(folder, fields, name)
        folded = fields.get(_GAMMA_FOLDED, False)
        if not isinstance(folded, bool):
            raise HFEError(f"config.json sets {_GAMMA_FOLDED}={folded!r}", "write true or false without quotes")
        stored = SafetensorsReader(files)
        # The fields that only the authors' code has are checked below.
        warnings = check_fields(fields, stock_config, others=False)
        config = decoder_config(stock_config)
        if not _has_bhyt_norms(fields) and not fields.get(_GAMMA_FOLDED):
            return Release(with_stock_names(stored, config), stock_config, config, files, fields, warnings)
        if _has_bhyt_norms(fields):
            config = _release_config(fields, config)
        reader = cls(stored, fields, config)
        return Release(reader, stock_config, config, files, fields, warnings + reader.warnings())

    def names(self) -> list[str]:
        """Names of the tensors of our decoder: those that are stored, and those that are computed from others."""
        return [*self._names, *self._computed]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor; a stored scalar without dimensions has shape [1], a computed tensor [2]."""
        return (2,) if name in self._computed else self._stored.shape(name) or (1,)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the stored tensor; float32 for computed ones."""
        return torch.float32 if name in self._computed else self._stored.dtype(name)

    def read(self, name: str) -> Tensor:
        """A copy of the tensor `name`: computed from others, unfolded, or as stored.

        Raises:
            HFEError: it or one that it is computed from holds NaN or infinity or cannot be read, or an estimate's slope
                is too small (see `_affine`).
        """
        if name in self._computed:
            index, kind = self._computed[name]
            return self._branch(index) if kind == "branch" else self._affine(index)
        return self._unfolded(name, self._stored.read(name).view(self.shape(name)))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of ``read(name)[start:stop]``, with its errors; of stored tensors only these rows are read."""
        if name in self._computed or self._stored.shape(name) == ():
            return self.read(name)[start:stop]
        return self._unfolded(name, self._stored.read_rows(name, start, stop))

    def warnings(self) -> list[str]:
        """Texts for the user about how the tensors are read; empty unless gammas are divided out."""
        norms = len(set(self._gamma_of.values()))
        return [f"the gammas of {norms} norms were divided out of the projections after them"] if norms else []

    def _unfolded(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`; if it is a folded projection, a copy whose columns are divided by the gammas of the norm before it.

        Columns whose gamma is 0 stay as they are.
        """
        if name not in self._gamma_of:
            return tensor
        gamma = self._stored.read(self._gamma_of[name]).float()
        # A column that was multiplied by zero cannot be restored, and has no effect, because the norm's output is zero.
        return (tensor.float() / gamma.where(gamma != 0, 1.0)).to(tensor.dtype)

    def _branch(self, index: int) -> Tensor:
        """The layer's `branch_variance` [2], fp32: factor and constant of the mean square that attention adds."""
        attention = f"model.layers.{index}.self_attn"
        bias = f"{attention}.v_proj.bias"
        return branch_variance(
            self.read(f"{attention}.v_proj.weight"),
            self.read(f"{attention}.o_proj.weight"),
            self.read(bias) if bias in self._names else None,
            head_dim=self._config.head_dim,
            seq_len=self._config.bhyt_seq_len,
        )

    def _affine(self, index: int) -> Tensor:
        """Slope and intercept of the layer's estimate [2], fp32; `HFEError` if the slope is not above `_MIN_SLOPE`."""
        slope, intercept = 1 + self._scalar(index, self._slope), self._scalar(index, self._intercept)
        if not slope > _MIN_SLOPE:
            raise HFEError(
                f"layer {index} estimates its second mean square as {slope:.3g} times the first, and our decoder "
                f"supports no less than {_MIN_SLOPE} times",
                "train the estimate further, or choose another checkpoint",
            )
        return torch.tensor([slope, intercept], dtype=torch.float32)

    def _scalar(self, index: int, leaf: str | None) -> float:
        """The stored scalar `leaf` of the layer; 0 for None."""
        return 0.0 if leaf is None else self._stored.read(f"model.layers.{index}.{leaf}").item()
