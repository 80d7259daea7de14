"""The BHyT model against its equations written out in float64, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_efficient.errors import HFEError
from hf_efficient.modeling.bhyt.bhyt_norm import BhytNorm
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytConfig, BhytForCausalLM, BhytModel
from hf_efficient.modeling.decoder.rms_norm import DecoderRMSNorm
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import (
    EfficientDecoderConfig,
    EfficientDecoderForCausalLM,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"bhyt_second_site": "exact"},
    "approx": {"bhyt_second_site": "approx"},
    "approx-biased-values": {"bhyt_second_site": "approx", "attention_bias": True},
    "approx-trained-estimate": {"bhyt_second_site": "approx", "bhyt_learnable_estimate": True},
    "affine": {"bhyt_second_site": "affine"},
    "mixed": {"bhyt_second_site": "approx", "bhyt_exact_layers": [0], "bhyt_output_scale": True, "bhyt_eps": 1e-3},
}
TINY = {
    **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40},
    **{"num_hidden_layers": 3, "num_attention_heads": 6},
}
NAN, INF = float("nan"), float("inf")


def loss_and_gradients(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


class TestAgainstTheEquations:
    @staticmethod
    def plain(model: Any, ids: Tensor, plain_logits: Callable, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
        leaves = {name: tensors[name].requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
        cos, sin = model.model.rotary_emb(tensors["lm_head.weight"], torch.arange(ids.shape[1])[None])
        logits = plain_logits(tensors, model.config, ids, cos, sin, **options)
        gradients = torch.autograd.grad(logits.square().sum(), list(leaves.values()))
        return logits.detach(), dict(zip(leaves, gradients, strict=True))

    @pytest.mark.parametrize("carried", [False, True], ids=["", "carried"])
    def test_logits_and_every_gradient(
        self, variant: dict, carried: bool, bhyt_model: Callable, some_ids: Callable, plain_logits: Callable
    ) -> None:
        """Through the mean square of the first site too, which an estimated second one makes use of."""
        model = bhyt_model(**variant, bhyt_final="bhyt", carry_residual=carried).double()
        expected_logits, expected = self.plain(model, some_ids(), plain_logits)
        logits, gradients = loss_and_gradients(model, some_ids())
        torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=1e-10)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name].to(gradient.dtype), rtol=1e-6, atol=1e-8, msg=name)

    def test_lambda_of_the_first_site_gets_no_gradient_from_the_second(
        self, bhyt_model: Callable, some_ids: Callable, plain_logits: Callable
    ) -> None:
        model = bhyt_model(bhyt_final="bhyt").double()
        _, held = self.plain(model, some_ids(), plain_logits)
        _, flowing = self.plain(model, some_ids(), plain_logits, detached=False)
        _, gradients = loss_and_gradients(model, some_ids())
        name = "model.layers.0.input_layernorm.lam"
        torch.testing.assert_close(gradients[name], held[name], rtol=1e-8, atol=0)
        assert not torch.allclose(gradients[name], flowing[name], rtol=1e-4)

    def test_checkpointing_gives_the_same_gradients_to_the_bit(
        self, variant: dict, bhyt_model: Callable, some_ids: Callable
    ) -> None:
        model = bhyt_model(**variant).train()
        _, expected = loss_and_gradients(model, some_ids())
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
            _, gradients = loss_and_gradients(model, some_ids())
            assert gradients.keys() == expected.keys()
            assert [name for name in gradients if not torch.equal(gradients[name], expected[name])] == []

    def test_approximate_is_exact_where_the_estimate_is_right(self, bhyt_model: Callable, some_ids: Callable) -> None:
        """An intercept per layer that makes the estimate of the one row equal its mean square."""
        exact, approximate = bhyt_model(bhyt_second_site="exact"), bhyt_model(bhyt_second_site="affine")
        seen: list[Tensor] = []  # mean squares of all sites in order
        for layer in exact.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(lambda module, inputs, output: seen.append(output[2][0].detach()))
        ids = some_ids(1, 1)
        expected = exact(input_ids=ids).logits
        assert approximate.load_state_dict(exact.state_dict(), strict=False).unexpected_keys == []
        with torch.no_grad():
            for layer, first, second in zip(approximate.model.layers, seen[::2], seen[1::2], strict=True):
                layer.post_attention_layernorm.affine.copy_(torch.tensor([1.0, second - first]))
        torch.testing.assert_close(approximate(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


class TestComposition:
    def test_layers_left_out_keep_their_rms_norm(self, bhyt_model: Callable) -> None:
        model = bhyt_model(bhyt_layers=[1]).model
        kinds = [{type(layer.input_layernorm), type(layer.post_attention_layernorm)} for layer in model.layers]
        assert kinds == [{DecoderRMSNorm}, {BhytNorm}, {DecoderRMSNorm}]
        assert type(model.norm) is DecoderRMSNorm
        assert type(bhyt_model(bhyt_final="bhyt").model.norm) is BhytNorm

    def test_composes_with_stem(self, some_ids: Callable, tmp_path: Path) -> None:
        config = EfficientDecoderConfig(**TINY, stem_layers=[1], bhyt_layers=[0, 1], bhyt_seq_len=8)
        assert set(config.active_patches) == {"bhyt", "stem"}
        model = EfficientDecoderForCausalLM(config)
        names = set(model.state_dict())
        assert {"model.layers.1.mlp.stem_embed.weight", "model.layers.1.post_attention_layernorm.branch"} <= names
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = some_ids()
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)

    def test_absent_patch_is_the_plain_decoder(self) -> None:
        config = EfficientDecoderConfig(**TINY)
        assert config.active_patches == []
        model = EfficientDecoderForCausalLM(config)
        assert not any(isinstance(module, BhytNorm) for module in model.modules())

    def test_lambdas_by_layer(self, bhyt_model: Callable) -> None:
        config = BhytConfig(**TINY, bhyt_seq_len=4, bhyt_lambda_input=[3, 2.5, 1], bhyt_lambda_post=0.5)
        layers = BhytForCausalLM(config).model.layers
        assert [layer.input_layernorm.lam.item() for layer in layers] == [3, 2.5, 1]
        assert [layer.post_attention_layernorm.lam.item() for layer in layers] == [0.5] * 3

    def test_without_the_patch_the_same_weights_are_a_stock_model(
        self, bhyt_model: Callable, some_ids: Callable
    ) -> None:
        """`efficient` False: the teacher that costs no second copy."""
        model = bhyt_model(bhyt_final="bhyt", bhyt_eps=1e-2, rms_norm_eps=1e-5)
        stock = LlamaForCausalLM(
            LlamaConfig(**TINY, num_key_value_heads=2, head_dim=4, max_position_embeddings=64, rms_norm_eps=1e-5)
        ).eval()
        incompatible = stock.load_state_dict(model.state_dict(), strict=False)
        assert not incompatible.missing_keys
        expected = stock(input_ids=some_ids()).logits
        assert not torch.allclose(model(input_ids=some_ids()).logits, expected, atol=1e-2)
        for module in model.modules():
            if isinstance(module, BhytNorm):
                module.efficient = False
        torch.testing.assert_close(model(input_ids=some_ids()).logits, expected, rtol=1e-5, atol=1e-5)
        model.model.layers[0].post_attention_layernorm.efficient = True
        with pytest.raises(HFEError, match="norm of layer 0 .* was called without the mean square.*efficient"):
            model(input_ids=some_ids())

    def test_half_precision_keeps_what_is_stored_in_float32(self, bhyt_model: Callable, tmp_path: Path) -> None:
        model = bhyt_model(bhyt_learnable_estimate=True, bhyt_output_scale=True)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        wide = (".affine", ".branch", ".out_scale")
        for half in (loaded, bhyt_model(bhyt_learnable_estimate=True, bhyt_output_scale=True).to(torch.bfloat16)):
            for name, tensor in half.state_dict().items():
                assert tensor.dtype == (torch.float32 if name.endswith(wide) else torch.bfloat16), name
                if name.endswith((".affine", ".out_scale")):
                    assert torch.equal(tensor, model.state_dict()[name]), name

    def test_a_row_that_is_no_number_leaves_the_others_alone(
        self, variant: dict, bhyt_model: Callable, some_ids: Callable
    ) -> None:
        model = bhyt_model(**variant, bhyt_final="bhyt")
        embeds = model.model.embed_tokens(some_ids(3, 5)).detach()
        expected = model(inputs_embeds=embeds).logits
        for value in (NAN, INF):
            broken = embeds.clone()
            broken[1, :, 3] = value
            found = model(inputs_embeds=broken).logits
            assert torch.equal(found[[0, 2]], expected[[0, 2]]) and found[1].isnan().any()

    def test_float16_activations_beyond_the_square_root_of_its_range(self, bhyt_model: Callable) -> None:
        """Squared in half precision, 300 overflows, and a whole row would be zero."""
        norm = bhyt_model().half().model.layers[0].input_layernorm
        x = torch.randn(2, 24, dtype=torch.float16)
        x[0, 5] = 300
        normed = norm(x)[0]
        assert normed.isfinite().all() and normed[0].abs().max() > 0.1


class TestTraining:
    def test_from_scratch_the_loss_falls(self) -> None:
        torch.manual_seed(0)
        config = BhytConfig(**(TINY | {"num_hidden_layers": 2, "num_key_value_heads": 2}), bhyt_seq_len=16)
        model = BhytForCausalLM(config).train()
        ids = (torch.arange(16)[None] + torch.arange(8)[:, None] * 5) % 61
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(60):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] > 4 and losses[-1] < 0.5

    def test_trainer_decays_no_gamma_and_no_lambda(self, bhyt_model: Callable, tmp_path: Path) -> None:
        model = bhyt_model(bhyt_final="bhyt", bhyt_learnable_estimate=True)
        trainer = Trainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True))
        optimizer = trainer.create_optimizer()
        names = {id(p): name for name, p in model.named_parameters()}
        decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
        free = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
        own = {name for name in names.values() if "norm" in name}
        assert len(own) == 3 * 5 + 2 and free == own and not decayed & own

    def test_what_is_held_constant_has_no_gradient_before_and_after_loading(
        self, bhyt_model: Callable, some_ids: Callable, tmp_path: Path
    ) -> None:
        model = bhyt_model(bhyt_learnable_lambda=False, bhyt_final="bhyt", bhyt_second_site="affine")
        model.save_pretrained(tmp_path)
        for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
            fixed = {name: p for name, p in each.named_parameters() if name.endswith((".lam", ".affine"))}
            assert [p.shape for name, p in fixed.items() if name.endswith(".lam")] == [(1,)] * 7 and len(fixed) == 10
            assert not any(p.requires_grad for p in fixed.values())
            _, gradients = loss_and_gradients(each, some_ids())
            assert gradients.keys() == dict(each.named_parameters()).keys() - fixed.keys()

    def test_an_adapter_that_trains_whole_norms_leaves_constants_alone(
        self, bhyt_model: Callable, some_ids: Callable
    ) -> None:
        model = bhyt_model(bhyt_learnable_lambda=False, bhyt_second_site="affine")
        norms = ["input_layernorm", "post_attention_layernorm"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=norms)).train()
        _, gradients = loss_and_gradients(model, some_ids())
        trained = {name.rpartition(".")[2] for name in gradients if "layernorm" in name}
        assert trained == {"weight"} and len([name for name in gradients if "layernorm" in name]) == 6


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"bhyt_layers": []}, "bhyt_layers is empty"),
            ({"bhyt_layers": [2, 1]}, r"bhyt_layers=\[2, 1\] must be sorted"),
            ({"bhyt_layers": [0, 3]}, r"bhyt_layers holds \[3\]; the model has layers 0\.\.2"),
            ({"bhyt_exact_layers": [-1]}, r"bhyt_exact_layers holds \[-1\]"),
            ({"bhyt_layers": [0], "bhyt_exact_layers": [1]}, r"bhyt_exact_layers holds \[1\], which are not among"),
            ({"bhyt_second_site": "eta"}, "bhyt_second_site='eta' must be one of"),
            ({"bhyt_final": "layer"}, "bhyt_final='layer' must be one of"),
            ({"bhyt_lambda_input": 0}, "bhyt_lambda_input=0 must be positive"),
            ({"bhyt_lambda_post": -1.0}, "bhyt_lambda_post=-1.0 must be positive"),
            ({"bhyt_lambda_final": NAN}, "bhyt_lambda_final=nan must be positive"),
            ({"bhyt_lambda_input": [1.0, 2.0]}, "bhyt_lambda_input has 2 numbers; the model has 3 layers"),
            ({"bhyt_lambda_post": [1.0, 2.0, -3.0]}, "bhyt_lambda_post=.*-3.0.* must be positive"),
            ({"bhyt_kappa": 0.0}, "bhyt_kappa=0.0 must be positive"),
            ({"bhyt_kappa": NAN}, "bhyt_kappa=nan must be positive"),
            ({"bhyt_kappa": INF}, "bhyt_kappa=inf must be positive and finite"),
            ({"bhyt_eps": 0.0}, "bhyt_eps=0.0 must be positive"),
            ({"bhyt_seq_len": 0}, "bhyt_seq_len=0 must be at least 1"),
            ({"bhyt_second_site": "exact", "bhyt_learnable_estimate": True}, "bhyt_learnable_estimate=True goes with"),
        ],
    )
    def test_a_wrong_field_is_named_with_its_rule(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            BhytConfig(**(TINY | {"bhyt_seq_len": 4} | fields))

    def test_the_approximation_needs_the_training_length(self) -> None:
        config = BhytConfig(**TINY)  # transformers makes configurations from defaults, so it is no rule of theirs
        with pytest.raises(HFEError, match=r"layers \[0, 1, 2\] needs the length.*set bhyt_seq_len"):
            BhytForCausalLM(config)
        BhytForCausalLM(BhytConfig(**TINY, bhyt_exact_layers=[0, 1, 2]))
        BhytForCausalLM(BhytConfig(**TINY, bhyt_second_site="affine"))

    def test_a_checkpoint_of_another_architecture(self, tmp_path: Path) -> None:
        LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
        with pytest.raises(
            HFEError, match=r"is missing 6 lam tensors, e\.g\. model\.layers\.0\.input_layernorm\.lam,.*convert"
        ):
            BhytForCausalLM.from_pretrained(tmp_path, config=BhytConfig(**TINY, bhyt_seq_len=4))

    @pytest.mark.parametrize(
        ("leaf", "value"), [("lam", float("nan")), ("lam", float("inf")), ("out_scale", float("nan"))]
    )
    def test_a_checkpoint_with_what_is_no_number(
        self, leaf: str, value: float, bhyt_model: Callable, tmp_path: Path
    ) -> None:
        bhyt_model(bhyt_output_scale=True).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[f"model.layers.1.input_layernorm.{leaf}"][0] = value
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HFEError, match=rf"model\.layers\.1\.input_layernorm\.{leaf} .* NaN or infinity"):
            BhytForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("saved", "opened", "first"),
        [
            ({"bhyt_output_scale": True}, {"bhyt_output_scale": False}, "layers.0.input_layernorm.out_scale"),
            ({}, {"bhyt_output_scale": True}, "layers.0.input_layernorm.out_scale"),
            ({}, {"bhyt_second_site": "affine"}, "layers.0.post_attention_layernorm.affine"),
            (
                {"bhyt_learnable_estimate": True},
                {"bhyt_learnable_estimate": False},
                "layers.0.post_attention_layernorm.affine",
            ),
        ],
    )
    def test_constants_that_checkpoint_or_configuration_lacks(
        self, saved: dict[str, Any], opened: dict[str, Any], first: str, bhyt_model: Callable, tmp_path: Path
    ) -> None:
        bhyt_model(**saved).save_pretrained(tmp_path)
        for model_class in (BhytForCausalLM, BhytModel):
            with pytest.raises(HFEError, match=rf"disagree .* e\.g\. {re.escape(first)}.*leave bhyt_output_scale"):
                model_class.from_pretrained(tmp_path, **opened)

    def test_a_trained_checkpoint_may_be_opened_with_exact_sites_or_fewer(
        self, bhyt_model: Callable, some_ids: Callable, tmp_path: Path
    ) -> None:
        bhyt_model(bhyt_learnable_estimate=True, bhyt_output_scale=True).save_pretrained(tmp_path)
        for opened in ({"bhyt_second_site": "exact", "bhyt_learnable_estimate": False}, {"bhyt_layers": [1]}):
            model = BhytForCausalLM.from_pretrained(tmp_path, **opened)
            assert model(some_ids()).logits.isfinite().all()

    def test_a_lambda_of_zero_is_warned_about(
        self, bhyt_model: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = bhyt_model()
        torch.nn.init.zeros_(model.model.layers[2].input_layernorm.lam)
        model.save_pretrained(tmp_path)
        with caplog.at_level("WARNING", logger="hf_efficient"):
            BhytForCausalLM.from_pretrained(tmp_path)
        assert "model.layers.2.input_layernorm.lam is 0" in caplog.text
