"""Checkpoints that the BHyT authors' training code writes: imported, they give the logits of the model that wrote them.

The model below is written from the formulas of the method, in float64: a site gives ``gamma tanh(lambda / kappa x /
sqrt(s2 + 1e-6))``, where s2 is the row's own mean square at a first site, and at a second one an estimate from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.measuring.evaluation import checkpoint_logits
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError, UsageError

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD, INNER, LAYERS = 61, 32, 4, 2, 8, 48, 4
# rms_norm_eps is far from 1e-6 and seq_len small, so that a mix-up of either shows.
CONFIG: dict[str, Any] = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"},
    **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "rms_norm_eps": 0.05},
    **{"rope_theta": 500.0, "max_position_embeddings": 64, "tie_word_embeddings": False},
    **{"norm_type": "bhyt", "input_layer_lam": 2.0, "post_layer_lam": 1.0, "last_layer_lam": 0.0, "seq_len": 6},
    **{"learnable_lam": True, "use_shared_scale": False, "use_gamma_var": False, "bhyt_kappa": 10.0},
    **{"var_approx_exact_layers": 0, "inference_var_dtype": "float32"},
}
SCALARS = {"baseline": (), "beta": ("var_beta",), "eta": ("var_eta",)}
SCALARS["residual_aware"] = ("var_alpha", "var_cross_beta")
QUIET: dict[str, Any] = {"progress": False, "evaluate": False}


class Reference:
    """The network that a release's `config.json` describes, with random weights."""

    def __init__(self, **changes: Any) -> None:
        self.config = {**CONFIG, **changes}
        self.kappa = self.config["bhyt_kappa"]
        kind = self.config["norm_type"]
        low, high = self.config.get("bhyt_layer_range") or (0, LAYERS)
        fallback = self.config.get("fallback_norm_type", "rms")
        self.kinds = [kind if kind == "bhytstar" or low <= i <= high else fallback for i in range(LAYERS)]
        listed = self.config.get("var_approx_exact_layer_list", "").replace(" ", "").split(",")
        first = self.config["var_approx_exact_layers"]
        self.exact = [i for i in range(LAYERS) if i < first or str(i) in listed or self.kinds[i] == "bhytstar"]
        self.final = kind in ("bhyt", "bhytline") and self.config["last_layer_lam"] > 0

        def linear(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns) / columns**0.5

        self.p = {"model.embed_tokens.weight": 0.3 * torch.randn(VOCABULARY, WIDTH)}
        self.p["lm_head.weight"] = linear(VOCABULARY, WIDTH)
        self.p["model.norm.weight"] = 1 + 0.3 * torch.randn(WIDTH)
        for i in range(LAYERS):
            attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            self.p[f"{attention}.q_proj.weight"] = linear(HEADS * HEAD, WIDTH)
            self.p[f"{attention}.k_proj.weight"] = linear(KV_HEADS * HEAD, WIDTH)
            self.p[f"{attention}.v_proj.weight"] = 3 * linear(KV_HEADS * HEAD, WIDTH)
            self.p[f"{attention}.o_proj.weight"] = linear(WIDTH, HEADS * HEAD)
            self.p[f"{mlp}.gate_proj.weight"] = linear(INNER, WIDTH)
            self.p[f"{mlp}.up_proj.weight"] = linear(INNER, WIDTH)
            self.p[f"{mlp}.down_proj.weight"] = linear(WIDTH, INNER)
            for site in ("input_layernorm", "post_attention_layernorm"):
                self.p[f"model.layers.{i}.{site}.weight"] = 1 + 0.3 * torch.randn(WIDTH)
                if self.kinds[i] != "rms":
                    lam = 1 + 2 * torch.rand(1)
                    self.p[f"model.layers.{i}.{site}.lam"] = lam if self.config["learnable_lam"] else lam[0]
            if self.kinds[i] in ("bhyt", "bhytline"):
                for leaf in SCALARS.get(self.config.get("var_approx_method", "baseline"), ()):
                    self.p[f"model.layers.{i}.{leaf}"] = 0.5 + torch.rand(())
        if self.final:
            self.p["model.norm.lam"] = torch.tensor([1.7])

    def bounded(self, x: Tensor, site: str, mean_square: Tensor) -> Tensor:
        u = self.p[f"{site}.lam"].double() / self.kappa * x / torch.sqrt(mean_square + 1e-6)
        return self.p[f"{site}.weight"].double() * torch.tanh(u)

    def rms(self, x: Tensor, site: str) -> Tensor:
        square = x.square().mean(-1, keepdim=True)
        return self.p[f"{site}.weight"].double() * x / torch.sqrt(square + self.config["rms_norm_eps"])

    def estimate(self, i: int, v: Tensor) -> Tensor:
        """The second site's mean square from the first one's."""
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        heads = self.p[f"{attention}.v_proj.weight"].double().view(KV_HEADS, HEAD, WIDTH)
        product = self.p[f"{attention}.o_proj.weight"].double() @ heads.repeat_interleave(
            HEADS // KV_HEADS, dim=0
        ).reshape(-1, WIDTH)
        c = product.square().sum() / (self.config["seq_len"] * WIDTH)
        added = c * (self.p[f"{layer}.input_layernorm.lam"].double() / self.kappa) ** 2
        method = self.config.get("var_approx_method", "baseline")
        if method == "eta":
            return v * (1 + self.p[f"{layer}.var_eta"].double())
        if method == "beta":
            return v + self.p[f"{layer}.var_beta"].double() * added
        if method == "residual_aware":
            return v * (1 + self.p[f"{layer}.var_cross_beta"].double()) + self.p[f"{layer}.var_alpha"].double() * added
        return v + added

    def attend(self, x: Tensor, i: int) -> Tensor:
        weights = {n: self.p[f"model.layers.{i}.self_attn.{n}_proj.weight"].double() for n in "qkvo"}
        q, k, v = ((x @ weights[n].T).unflatten(-1, (-1, HEAD)).transpose(1, 2) for n in "qkv")
        angle = torch.arange(x.shape[1])[:, None] * CONFIG["rope_theta"] ** (-torch.arange(0, HEAD, 2).double() / HEAD)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

        def turn(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat((-b, a), -1) * sin

        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (turn(k), v))
        scores = (turn(q) @ k.mT / HEAD**0.5).masked_fill(
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -torch.inf
        )
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ weights["o"].T

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.p["model.embed_tokens.weight"].double()[ids]
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            first, second = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
            v = x.square().mean(-1, keepdim=True)
            rms = self.kinds[i] == "rms"
            x = x + self.attend(self.rms(x, first) if rms else self.bounded(x, first, v), i)
            square = x.square().mean(-1, keepdim=True) if i in self.exact or rms else self.estimate(i, v)
            y = self.rms(x, second) if rms else self.bounded(x, second, square)
            gate, up, down = (self.p[f"{layer}.mlp.{n}_proj.weight"].double() for n in ("gate", "up", "down"))
            x = x + (functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
        square = x.square().mean(-1, keepdim=True)
        x = self.bounded(x, "model.norm", square) if self.final else self.rms(x, "model.norm")
        return x @ self.p["lm_head.weight"].double().T

    def fold(self) -> None:
        """What `norm_fold` does to the tensors that are then saved: gammas in projections and norms."""
        for i in range(LAYERS):
            consumers = {
                "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
            }
            for site, projections in consumers.items():
                for projection in projections:
                    self.p[f"model.layers.{i}.{projection}.weight"] *= self.p[f"model.layers.{i}.{site}.weight"]

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.p, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def imported(source: Path, ids: Tensor, **options: Any) -> Tensor:
    """Logits of the checkpoint converted without a patch."""
    output = source.with_name("imported")
    report = convert(source, output, [], **QUIET, **options)
    assert report.model_type == "hfe_bhyt"
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(output).eval()(ids).logits.double()


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "line, final norm bounded": {"norm_type": "bhytline", "last_layer_lam": 1.5},
    "lambda not learnt": {"learnable_lam": False},
    "star": {"norm_type": "bhytstar", "seq_len": None, "last_layer_lam": 3.0},
    "kappa": {"bhyt_kappa": 4.0},
    "beta": {"var_approx_method": "beta"},
    "eta": {"var_approx_method": "eta", "var_approx_exact_layers": 1},
    "residual_aware": {"var_approx_method": "residual_aware", "var_approx_exact_layer_list": "0, 3"},
    "some layers": {"bhyt_layer_range": [1, 2], "fallback_norm_type": "rms"},
    "two kinds": {"bhyt_layer_range": [0, 1], "fallback_norm_type": "bhytstar", "var_approx_exact_layers": 1},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_imported_checkpoints_give_the_logits_of_the_formulas(name: str, tmp_path: Path) -> None:
    reference, ids = Reference(**CHECKPOINTS[name]), torch.randint(VOCABULARY, (2, 9))
    expected = reference(ids)
    found = imported(reference.save(tmp_path / "release"), ids)
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("method", ["baseline", "residual_aware"])
def test_a_release_can_be_measured_without_being_imported(method: str, tmp_path: Path) -> None:
    """Layer by layer, as `evaluate` and the fits of other patches do."""
    reference, ids = Reference(var_approx_method=method, last_layer_lam=1.5), torch.randint(VOCABULARY, (2, 9))
    source = open_source(str(reference.save(tmp_path / "release")))
    found = torch.cat(list(checkpoint_logits(source.config, source.reader)(ids))).double()
    expected = reference(ids).flatten(0, 1)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_each_fact_of_the_format_matters(tmp_path: Path) -> None:
    """The comparison above would notice another T, eps, kappa, estimate or final norm."""
    reference, ids = Reference(), torch.randint(VOCABULARY, (2, 9))
    expected = reference(ids)
    source = reference.save(tmp_path / "release")
    wrong: list[dict[str, Any]] = [{"seq_len": 7}, {"bhyt_kappa": 9.0}, {"var_approx_exact_layers": 1}]
    wrong += [{"rms_norm_eps": 0.04}]
    for position, change in enumerate(wrong):
        (source / "config.json").write_text(json.dumps({**reference.config, **change}))
        output = tmp_path / f"wrong-{position}"
        convert(source, output, [], **QUIET)
        found = AutoModelForCausalLM.from_pretrained(output)(ids).logits.double()
        assert (found - expected).norm() / expected.norm() > 1e-4, change


def test_a_bhyt_import_has_lambdas_of_one_element_and_computes_c(tmp_path: Path) -> None:
    reference = Reference(learnable_lam=False)
    convert(reference.save(tmp_path / "release"), tmp_path / "out", [], **QUIET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bhyt_eps"] == 1e-6
    assert config["bhyt_seq_len"] == 6
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensors[f"model.layers.{i}.input_layernorm.lam"].shape == (1,) for i in range(LAYERS))
    v = torch.rand(1, 1, 1).double()
    for i in range(LAYERS):
        c = tensors[f"model.layers.{i}.post_attention_layernorm.branch"][0].double()
        lam = reference.p[f"model.layers.{i}.input_layernorm.lam"].double()
        torch.testing.assert_close(v + c * (lam / 10) ** 2, reference.estimate(i, v), rtol=1e-6, atol=0)


def test_an_rms_checkpoint_of_the_release_is_a_plain_llama(tmp_path: Path) -> None:
    reference, ids = Reference(norm_type="rms"), torch.randint(VOCABULARY, (2, 9))
    report = convert(reference.save(tmp_path / "release"), tmp_path / "out", [], **QUIET)
    assert report.model_type == "hfe_decoder"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits.double()
    assert (found - reference(ids)).norm() / reference(ids).norm() < 1e-5


def mark_folded(source: Path, value: Any = True) -> None:
    """Add the field that says that `norm_fold` was applied, as a user does."""
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "bhyt_gamma_folded": value}))


@pytest.mark.parametrize("norm_type", ["bhyt", "rms"])
def test_gammas_that_the_projections_hold_are_not_applied_twice(norm_type: str, tmp_path: Path) -> None:
    reference, ids = Reference(norm_type=norm_type), torch.randint(VOCABULARY, (2, 9))
    expected = reference(ids)
    reference.fold()
    source = reference.save(tmp_path / "release")
    # Without the field they are applied twice: nothing in such a checkpoint shows it.
    convert(source, tmp_path / "unmarked", [], **QUIET)
    doubled = AutoModelForCausalLM.from_pretrained(tmp_path / "unmarked")(ids).logits.double()
    assert (doubled - expected).norm() / expected.norm() > 0.01
    mark_folded(source)
    report = convert(source, tmp_path / "out", [], **QUIET)
    assert f"gammas of {2 * LAYERS} norms were divided out" in " ".join(report.warnings)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits.double()
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_folded_gammas_that_are_ones_or_zeros_change_nothing(tmp_path: Path) -> None:
    """Somebody may have set the gammas to 1 with the fold; and of a channel that is shut nothing can be divided out."""
    reference = Reference()
    for name, tensor in reference.p.items():
        if name.endswith("layernorm.weight"):
            tensor.copy_(torch.arange(WIDTH) % 3 > 0)
    reference.fold()
    source = reference.save(tmp_path / "release")
    mark_folded(source)
    convert(source, tmp_path / "out", [], **QUIET)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_backup_of_unfolded_weights_gives_a_folded_checkpoint_away(tmp_path: Path) -> None:
    reference = Reference()
    reference.fold()
    name = "model.layers.0.self_attn.q_proj._bhyt_norm_fold_backup_self_attn_q_proj"
    reference.p[name] = torch.zeros(HEADS * HEAD, WIDTH)
    source = reference.save(tmp_path / "release")
    with pytest.raises(
        HFEError, match=rf"{name}, which norm_fold makes.*add \"bhyt_gamma_folded\": true to config.json"
    ):
        convert(source, tmp_path / "out", [], **QUIET)
    mark_folded(source)
    convert(source, tmp_path / "out", [], **QUIET)
    assert name not in load_file(tmp_path / "out" / "model.safetensors")


def test_an_imported_checkpoint_is_a_source_for_other_patches_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="BHyT checkpoint already"):
        convert(Reference().save(tmp_path / "release"), tmp_path / "out", [Bhyt()], **QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "layernorm"}, "names the norm 'layernorm'.*bhytstar"),
        ({"norm_type": "peri"}, "names the norm 'peri'"),
        ({"bhyt_layer_range": [1, 2], "fallback_norm_type": "dyt"}, "names the norm 'dyt'"),
        ({"bhyt_layer_range": "1,2"}, "bhyt_layer_range='1,2'"),
        ({"use_shared_scale": True}, "use_shared_scale=True, which scales the embedding"),
        ({"use_gamma_var": True}, "use_gamma_var=True"),
        ({"bhyt_kappa_schedule": "decay"}, "bhyt_kappa_schedule='decay'"),
        ({"var_approx_calibration": [1.0, 0.9, 1.0, 1.0]}, "var_approx_calibration"),
        ({"var_approx_method": "oracle"}, "var_approx_method='oracle'.*baseline, beta, eta, residual_aware"),
        ({"var_approx_exact_layer_list": "0;1"}, "var_approx_exact_layer_list='0;1'"),
        ({"seq_len": None}, "seq_len=None.*first batch.*cutoff_len"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"seq_len": 12.5}, "seq_len=12.5"),
        ({"input_layer_lam": None}, "input_layer_lam=None, not a positive number"),
        ({"post_layer_lam": -1.0}, "post_layer_lam=-1.0"),
        ({"bhyt_kappa": 0}, "bhyt_kappa=0"),
        ({"last_layer_lam": "None"}, "last_layer_lam='None'"),
        ({"last_layer_lam": -0.5}, "last_layer_lam=-0.5"),
        ({"attention_bias": True}, "attention_bias beside an estimated second site"),
    ],
)
def test_what_a_conversion_does_not_take_is_one_clear_error(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = Reference().save(tmp_path / "release")
    (source / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(HFEError, match=message) as caught:
        convert(source, tmp_path / "out", [], **QUIET)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_seq_len_does_not_matter_where_nothing_is_estimated(tmp_path: Path) -> None:
    reference, ids = Reference(seq_len=None, var_approx_exact_layers=LAYERS), torch.randint(VOCABULARY, (1, 9))
    found = imported(reference.save(tmp_path / "release"), ids)
    assert (found - reference(ids)).norm() / reference(ids).norm() < 1e-5


def test_tensors_that_belong_to_another_configuration_are_named(tmp_path: Path) -> None:
    source = Reference(var_approx_method="beta").save(tmp_path / "release")
    for method, message in (("baseline", r"holds .*var_beta"), ("eta", r"lacks tensor .*var_eta")):
        (source / "config.json").write_text(json.dumps({**CONFIG, "var_approx_method": method}))
        with pytest.raises(HFEError, match=message):
            convert(source, tmp_path / "out", [], **QUIET)
    # The authors' script for fine-tuning says 3.0 for a checkpoint that was trained with 0.0.
    (source / "config.json").write_text(json.dumps({**CONFIG, "var_approx_method": "beta", "last_layer_lam": 3.0}))
    with pytest.raises(HFEError, match=r"lacks tensor model.norm.lam"):
        convert(source, tmp_path / "out", [], **QUIET)


def test_an_estimate_that_vanishes_is_refused(tmp_path: Path) -> None:
    reference = Reference(var_approx_method="eta")
    reference.p["model.layers.2.var_eta"] = torch.tensor(-1.5)
    with pytest.raises(HFEError, match=r"layer 2 estimates its second mean square as -0.5 times the first"):
        convert(reference.save(tmp_path / "release"), tmp_path / "out", [], **QUIET)


@pytest.mark.parametrize("value", ["false", 1])
def test_folded_gammas_are_true_or_false(value: Any, tmp_path: Path) -> None:
    source = Reference().save(tmp_path / "release")
    mark_folded(source, value)
    with pytest.raises(HFEError, match=f"bhyt_gamma_folded={value!r}; write true or false"):
        convert(source, tmp_path / "out", [], **QUIET)


def test_folded_gammas_are_a_field_of_such_checkpoints_only(tmp_path: Path) -> None:
    star = Reference(norm_type="bhytstar").save(tmp_path / "star")
    mark_folded(star)
    with pytest.raises(HFEError, match="never folds the gammas of norm_type bhytstar"):
        convert(star, tmp_path / "out", [], **QUIET)
    qwen = Reference().save(tmp_path / "qwen")
    (qwen / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen3"}))
    mark_folded(qwen)
    with pytest.raises(HFEError, match="bhyt_gamma_folded.*model_type is qwen3"):
        convert(qwen, tmp_path / "out", [], **QUIET)
