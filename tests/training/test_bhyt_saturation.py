"""The saturation monitor counts correctly, keeps no activations, and logs."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_efficient import SaturationCallback, SaturationMonitor, UsageError, bhyt_depth_bound
from hf_efficient.modeling.bhyt.modeling_bhyt import BhytConfig, BhytForCausalLM

TINY: dict[str, Any] = {
    **{"vocab_size": 23, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bhyt_seq_len": 8, "initializer_range": 0.2},
    **{"bhyt_lambda_input": 9.0, "bhyt_lambda_post": 7.0, "bhyt_lambda_final": 8.0, "bhyt_final": "bhyt"},
}
IDS = torch.arange(24).view(3, 8) % 23
NAMES = ["layer_0/input", "layer_0/post", "layer_1/input", "layer_1/post", "final"]
DATA = [{"input_ids": row, "labels": row} for row in IDS.tolist()]


def make(**fields: Any) -> BhytForCausalLM:
    """With gammas of 1, so that a site's output is its tanh."""
    return BhytForCausalLM(BhytConfig(**(TINY | fields)))


def sites(model: nn.Module) -> dict[str, Any]:
    inner = model.model
    found = {}
    for index, layer in enumerate(inner.layers):
        found[f"layer_{index}/input"] = layer.input_layernorm
        found[f"layer_{index}/post"] = layer.post_attention_layernorm
    return found | {"final": inner.norm}


def counted(model: nn.Module, threshold: float = 0.9) -> dict[str, float]:
    """Counted from the outputs."""
    found: dict[str, float] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = (output[0].abs() > threshold).double().mean().item()

        return hook

    handles = [site.register_forward_hook(look(name)) for name, site in sites(model).items()]
    model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("second", ["exact", "approx", "affine", "trained estimate"])
@pytest.mark.parametrize("threshold", [0.9, 0.5])
def test_shares_equal_a_direct_count(second: str, threshold: float) -> None:
    learnable = {"bhyt_second_site": "approx", "bhyt_learnable_estimate": True}
    model = make(**(learnable if second == "trained estimate" else {"bhyt_second_site": second}), attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.v_proj.bias)
            if layer.post_attention_layernorm.affine is not None:
                layer.post_attention_layernorm.affine.mul_(0.7).add_(0.1)
    model.eval()
    expected = counted(model, threshold)
    with SaturationMonitor(model, threshold) as monitor:
        model(input_ids=IDS)
    found = monitor.read()
    assert found == {
        **{f"bhyt/saturation/{name}": pytest.approx(expected[name], abs=1e-12) for name in NAMES},
        "bhyt/saturation/mean": pytest.approx(sum(expected.values()) / 5),
        "bhyt/saturation/max": max(expected.values()),
    }
    assert len({*expected.values()}) >= 4 and 0 < min(expected.values()) < max(expected.values()) < 0.99


def test_output_scale_and_gamma_have_no_part_in_it() -> None:
    model = make(bhyt_output_scale=True).eval()
    expected = counted(model)
    with torch.no_grad():
        for site in sites(model).values():
            site.out_scale.fill_(4.0)
            site.weight.fill_(0.25)
    with SaturationMonitor(model) as monitor:
        model(input_ids=IDS)
    assert {k: v for k, v in monitor.read().items() if k[16:] in NAMES} == {
        f"bhyt/saturation/{name}": share for name, share in expected.items()
    }


def test_several_calls_are_averaged_and_reading_begins_anew() -> None:
    model = make().eval()
    monitor = SaturationMonitor(model).attach()
    shares = []
    for ids in (IDS[:1], IDS[1:]):
        model(input_ids=ids)
        shares.append(monitor.read())
    model(input_ids=IDS[:1])
    model(input_ids=IDS[1:])
    both = monitor.read()
    for name, share in both.items():
        if name[16:] in NAMES:
            assert share == pytest.approx((shares[0][name] + 2 * shares[1][name]) / 3)
    assert monitor.read() == {}
    monitor.detach()
    model(input_ids=IDS)
    assert monitor.read() == {}
    assert not any(site._forward_hooks for site in sites(model).values())


def test_no_activation_outlives_the_call() -> None:
    """Only one counter for each site is kept; compared with a run without the monitor."""
    model = make().eval()
    alive: list[weakref.ref] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        alive.extend(weakref.ref(x) for x in (inputs[0], output[0], output[1], output[2][0]))

    monitor = SaturationMonitor(model).attach()
    handles = [site.register_forward_hook(note) for site in sites(model).values()]
    with torch.no_grad():
        model(input_ids=IDS)
    gc.collect()
    assert len(alive) == 20 and not [ref for ref in alive if ref() is not None]
    assert sum(tensor.numel() for tensor in monitor._hits.values()) == 5
    for handle in handles:
        handle.remove()


def test_training_keeps_no_more_for_the_backward_pass() -> None:
    def saved(model: nn.Module) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=IDS, labels=IDS)
        return total

    model = make().train()
    alone = saved(model)
    with SaturationMonitor(model):
        assert saved(model) == alone


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_share_and_no_gradient(reentrant: bool) -> None:
    model = make().train()
    with SaturationMonitor(model) as monitor:
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected, gradients = monitor.read(), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with SaturationMonitor(model) as monitor:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert monitor.read() == expected
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_adapters_around_norms() -> None:
    """The copy that is trained is counted, not the frozen one."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=norms)).eval()
    with SaturationMonitor(model) as monitor:
        model(input_ids=IDS)
        before = monitor.read()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("modules_to_save.default.lam"):
                    parameter.mul_(3)
        model(input_ids=IDS)
        after = monitor.read()
        with model.disable_adapter():
            model(input_ids=IDS)
        rest = monitor.read()
    assert before == rest and before.keys() == {f"bhyt/saturation/{name}" for name in [*NAMES, "mean", "max"]}
    assert after["bhyt/saturation/layer_0/post"] > before["bhyt/saturation/layer_0/post"] + 0.1


def test_sites_switched_off_and_compiled_calls_are_not_counted() -> None:
    model = make().eval()
    monitor = SaturationMonitor(model).attach()
    for site in sites(model).values():
        site.efficient = False
    model(input_ids=IDS)
    assert monitor.read() == {}
    for site in sites(model).values():
        site.efficient = True
    torch._dynamo.reset()  # compilations of other tests count towards the limit
    torch.compile(model, fullgraph=True, backend="eager")(input_ids=IDS, use_cache=False)
    assert monitor.read() == {}


def test_the_depth_bound_is_that_of_the_largest_lambda() -> None:
    model = make(bhyt_lambda_input=[3.0, 2.0], bhyt_lambda_post=1.0, bhyt_kappa=8.0)
    assert bhyt_depth_bound(model) == pytest.approx(3 / 8 * math.sqrt(2))
    nn.init.constant_(model.model.layers[1].post_attention_layernorm.lam, -6.0)
    assert bhyt_depth_bound(model) == pytest.approx(6 / 8 * math.sqrt(2))
    assert bhyt_depth_bound(make(bhyt_layers=[])) == 0


def test_a_trainer_logs_it_beside_its_own_figures(tmp_path: Path) -> None:
    model = make()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, logging_steps=2, report_to=[], use_cpu=True, save_strategy="no", learning_rate=0.0
    )
    trainer = Trainer(model, arguments, train_dataset=DATA)
    trainer.add_callback(SaturationCallback(trainer.log, every=2))
    trainer.train()
    history = trainer.state.log_history
    own = [entry for entry in history if "bhyt/depth_bound" in entry]
    assert [entry["step"] for entry in own] == [2, 4, 6]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]
    expected = counted(model)  # of the whole data set, which is one batch
    for entry in own:
        assert entry["bhyt/depth_bound"] == pytest.approx(0.9 * math.sqrt(2))
        assert {name: entry[f"bhyt/saturation/{name}"] for name in NAMES} == expected
    assert not any(site._forward_hooks for site in sites(model).values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SaturationMonitor(make(), 1.0), "threshold=1.0 must lie between 0 and 1"),
        (lambda: SaturationMonitor(nn.Linear(2, 2)), "Linear has no BHyT site"),
        (lambda: SaturationCallback(print, every=0), "every=0 must be at least 1"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
