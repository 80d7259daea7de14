"""Monarch attention inside diffusers' own Wan transformer and pipeline, with small random weights."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient import disable_monarch_wan, enable_monarch_wan
from hf_efficient.conversion.wan.tensor_names import diffusers_name
from hf_efficient.diffusers_processor import MonarchWanAttnProcessor, TokenGrid
from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch.monarch_spec import MonarchGridSpec
from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanConfig, MonarchWanModel

diffusers = pytest.importorskip("diffusers", reason="diffusers, of the test dependencies, is not installed")

# A grid of 3 frames of 4 x 6 tokens, and two texts, as guidance passes them.
LATENTS = torch.randn(2, 4, 3, 8, 12, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 512, 32, generator=torch.Generator().manual_seed(2))
TIMESTEP = torch.tensor([700.0, 700.0])
SHAPE: dict[str, Any] = {"num_layers": 2, "ffn_dim": 64, "freq_dim": 16, "text_dim": 32}


@pytest.fixture
def transformer() -> Any:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, **SHAPE
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def flow(model: Any, latents: Tensor = LATENTS) -> Tensor:
    with torch.no_grad():
        return model(latents, TIMESTEP, TEXT.to(latents.dtype)).sample


def ours(transformer: Any, **spec: Any) -> MonarchWanModel:
    """Our model with the weights of diffusers' one."""
    model = MonarchWanModel(
        MonarchWanConfig(
            hidden_size=48,
            num_attention_heads=2,
            num_hidden_layers=2,
            intermediate_size=64,
            freq_dim=16,
            text_dim=32,
            in_channels=4,
            out_channels=4,
            monarch=MonarchGridSpec(**spec).to_dict(),
        )
    ).eval()
    stored = transformer.state_dict()
    model.load_state_dict({name: stored[diffusers_name(name)] for name in model.state_dict()})
    return model


def test_tiles_of_one_row_give_the_softmax_output(transformer: Any) -> None:
    softmax = flow(transformer)
    enable_monarch_wan(transformer, h_reduce=4)
    torch.testing.assert_close(flow(transformer), softmax, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        {"h_reduce": 2},
        {"h_reduce": 1, "f_tied": 3},
        {"w_reduce": 3, "num_iters": 2},
        {"row_axes": "w"},
        {"layers": [1]},
    ],
    ids=str,
)
def test_the_output_is_that_of_our_model_with_the_same_settings(spec: dict[str, Any], transformer: Any) -> None:
    softmax = flow(transformer)
    expected = flow(ours(transformer, **spec))
    enable_monarch_wan(transformer, **{"h_reduce": 1, **spec})
    found = flow(transformer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - softmax).abs().max() > 0.01


def test_only_self_attention_is_replaced_and_restored(transformer: Any) -> None:
    softmax = flow(transformer)
    before = transformer.attn_processors
    enable_monarch_wan(transformer)
    changed = {name for name, each in transformer.attn_processors.items() if each is not before[name]}
    assert changed == {"blocks.0.attn1.processor", "blocks.1.attn1.processor"}
    disable_monarch_wan(transformer)
    assert transformer.attn_processors == before
    assert torch.equal(flow(transformer), softmax)
    disable_monarch_wan(transformer)  # nothing left to restore
    assert not transformer._forward_pre_hooks


def test_a_second_call_replaces_the_settings_of_the_first(transformer: Any) -> None:
    softmax = flow(transformer)
    enable_monarch_wan(transformer, layers=[0])
    enable_monarch_wan(transformer, h_reduce=4, layers=[1])
    assert len(transformer._forward_pre_hooks) == 1
    torch.testing.assert_close(flow(transformer), softmax, rtol=0, atol=1e-4)
    disable_monarch_wan(transformer)
    assert torch.equal(flow(transformer), softmax)


def test_fused_projections_give_the_same_output(transformer: Any) -> None:
    enable_monarch_wan(transformer)
    expected = flow(transformer)
    transformer.fuse_qkv_projections()
    assert transformer.blocks[0].attn1.fused_projections
    torch.testing.assert_close(flow(transformer), expected, rtol=0, atol=1e-5)


def test_the_grid_follows_the_size_of_each_video(transformer: Any) -> None:
    enable_monarch_wan(transformer)
    for frames, height, width in ((1, 4, 4), (3, 8, 12), (2, 12, 8)):
        latents = torch.randn(2, 4, frames, height, width, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(
            flow(transformer, latents), flow(ours(transformer, h_reduce=2), latents), rtol=0, atol=1e-4
        )


def test_latents_may_be_a_keyword(transformer: Any) -> None:
    enable_monarch_wan(transformer)
    with torch.no_grad():
        found = transformer(hidden_states=LATENTS, timestep=TIMESTEP, encoder_hidden_states=TEXT).sample
    assert torch.equal(found, flow(transformer))


def test_bfloat16_stays_near_float32(transformer: Any) -> None:
    enable_monarch_wan(transformer)
    expected = flow(transformer)
    half = copy.deepcopy(transformer).to(torch.bfloat16)
    assert (flow(half, LATENTS.bfloat16()).float() - expected).norm() < 0.05 * expected.norm()


def test_gradients_reach_the_projections_also_with_checkpointing(transformer: Any) -> None:
    enable_monarch_wan(transformer)
    gradients = []
    for checkpointing in (False, True):
        transformer.zero_grad()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer(LATENTS, TIMESTEP, TEXT).sample.square().mean().backward()
        gradients.append(transformer.blocks[0].attn1.to_q.weight.grad.clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_compiled_transformer_is_one_graph(transformer: Any) -> None:
    enable_monarch_wan(transformer)
    expected = flow(transformer)
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    torch.testing.assert_close(flow(compiled), expected, rtol=0, atol=1e-5)
    disable_monarch_wan(compiled)
    assert not transformer._forward_pre_hooks


class Pipeline:
    """What `enable_monarch_wan` reads of a pipeline; Wan 2.2 has two transformers."""

    def __init__(self, first: Any, second: Any = None) -> None:
        self.transformer, self.transformer_2 = first, second


def test_both_transformers_of_a_pipeline_are_changed(transformer: Any) -> None:
    pipeline = Pipeline(transformer, copy.deepcopy(transformer))
    enable_monarch_wan(pipeline)
    for each in (pipeline.transformer, pipeline.transformer_2):
        assert isinstance(each.blocks[0].attn1.processor, MonarchWanAttnProcessor)
    disable_monarch_wan(pipeline)
    assert not pipeline.transformer_2._forward_pre_hooks


def test_a_wan_pipeline_generates_latents_with_guidance(transformer: Any) -> None:
    """The loop of diffusers' pipeline, without text encoder and autoencoder: embeddings in, latents out."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)

    def generate() -> Tensor:
        return pipeline(
            prompt_embeds=TEXT[:1],
            negative_prompt_embeds=TEXT[1:],
            height=64,
            width=96,
            num_frames=9,
            num_inference_steps=2,
            latents=LATENTS[:1],
            output_type="latent",
        ).frames

    softmax = generate()
    enable_monarch_wan(pipeline, h_reduce=4)
    torch.testing.assert_close(generate(), softmax, rtol=0, atol=1e-3)
    enable_monarch_wan(pipeline, h_reduce=1)
    assert (generate() - softmax).abs().max() > 0.01
    disable_monarch_wan(pipeline)
    assert torch.equal(generate(), softmax)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"h_reduce": 3}, "h_reduce=3 must divide the height of the token grid, 4"),
        ({"f_tied": 2}, "f_tied=2 must divide the frames of the token grid, 3"),
        ({"w_reduce": 4}, "w_reduce=4 must divide the width of the token grid, 6"),
        ({"h_reduce": 0}, "h_reduce=0 must be an integer of at least 1"),
        ({"row_axes": "hf"}, "row_axes='hf' must be one of"),
        ({"layers": [2]}, r"contains \[2\]; the model has layers 0..1"),
        ({"layers": []}, "must be a sorted list"),
    ],
)
def test_settings_that_do_not_fit_name_value_and_rule(settings: dict[str, Any], words: str, transformer: Any) -> None:
    with pytest.raises(HFEError, match=words):
        enable_monarch_wan(transformer, **settings)
        flow(transformer)


def test_a_refused_setting_leaves_the_earlier_one(transformer: Any) -> None:
    enable_monarch_wan(transformer)
    expected = flow(transformer)
    with pytest.raises(HFEError):
        enable_monarch_wan(transformer, layers=[7])
    assert torch.equal(flow(transformer), expected)


def test_other_objects_are_refused(transformer: Any) -> None:
    with pytest.raises(HFEError, match="MonarchWanModel is no WanTransformer3DModel of diffusers"):
        enable_monarch_wan(ours(transformer))
    with pytest.raises(HFEError, match="Pipeline is no WanTransformer3DModel"):
        disable_monarch_wan(Pipeline(None))


def test_a_text_a_mask_and_an_unknown_grid_are_refused(transformer: Any) -> None:
    processor = MonarchWanAttnProcessor(MonarchGridSpec(), TokenGrid())
    attn, tokens = transformer.blocks[0].attn1, torch.zeros(1, 72, 48)
    with pytest.raises(HFEError, match="has no text, mask"):
        processor(attn, tokens, encoder_hidden_states=TEXT)
    with pytest.raises(HFEError, match="has no text, mask"):
        processor(attn, tokens, attention_mask=torch.ones(72))
    with pytest.raises(HFEError, match="does not know the grid"):
        processor(attn, tokens)


def test_diffusers_is_imported_only_when_it_is_needed_and_its_absence_names_the_extra() -> None:
    script = (
        "import sys\n"
        "from hf_efficient import HFEError, enable_monarch_wan\n"
        "print('diffusers' in sys.modules)\n"
        "sys.modules['diffusers'] = None\n"
        "try: enable_monarch_wan(None)\n"
        "except HFEError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.stdout.startswith("False\n") and "pip install 'hf-efficient[diffusers]'" in done.stdout, done.stderr
