"""What does a decoding step of a 1B Llama cost with BHyT in place of RMSNorm, and what without any norm?

    PYTHONPATH=FOLDER_WITH_LIGER python -m benchmarks.bhyt_decode [--only TEXT ...]

One step at batch 1 on a static cache of 1024 slots, 512 of them filled, bfloat16, as a CUDA graph that is replayed
back to back. In transformers' decoder with other norms in it, "no norms" is the limit, and its residual additions stay.
Where additions are fused, the same is shown with RMSNorm: that part of the gain is open to it as well. In our decoder
it is the step that `generate` captures. All steps share one set of weights and are timed interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache

from benchmarks.generation import captured, fill
from benchmarks.harness import common_options, describe_machine, times, write
from benchmarks.llama_norms import (
    SHAPE,
    TINY,
    draw,
    has_liger,
    lines_of,
    llama,
    median_of,
    ours,
    with_norms,
)
from hf_efficient.modeling.bhyt.configuration_bhyt import BhytConfig
from hf_efficient.modeling.decoder.decode_cache import DecodeCache
from hf_efficient.modeling.decoder.decode_step import DecodeStep
from hf_efficient.modeling.decoder.graph_capture import step_signature
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig

FILLED, CAPACITY = 512, 1024
SHOWN = f"1B Llama, batch 1, {FILLED} of {CAPACITY} slots filled"
ROUNDS, REPLAYS = 12, 32
STOCK, LIMIT, OUR_LIMIT = "stock", "stock's decoder, no norms", "ours, no norms"
STOCK_PART, OUR_PART = "transformers' decoder", "our decoder"
APART, POST, BOTH = "additions apart", "addition after attention fused", "both additions fused"

Step = Callable[[], Any]
# Norm and fused additions in stock's decoder.
STOCK_VARIANTS: dict[str, tuple[str | None, str, str]] = {
    STOCK: ("stock", "", "transformers' Llama as it is"),
    "stock's decoder, F.rms_norm": ("F.rms_norm", "", f"RMSNorm, {APART}"),
    "stock's decoder, Liger": ("Liger", "", f"RMSNorm, {APART}"),
    "stock's decoder, BHyT": ("BHyT, exact", "", f"BHyT, exact, at all norms, {APART}"),
    "stock's decoder, BHyT, one addition": ("BHyT, exact", "post", f"BHyT, exact, at all norms, {POST}"),
    "stock's decoder, BHyT, both additions": ("BHyT, exact", "both", f"BHyT, exact, at all norms, {BOTH}"),
    "stock's decoder, RMSNorm, both additions": ("RMSNorm of ours", "both", f"RMSNorm, {BOTH}"),
    LIMIT: (None, "", f"no norms, {APART}"),
}


def fill_and_draw(model: Any, cache: Any) -> Tensor:
    """Fill the slots of `cache`, and draw a token [1, 1]; the same for all models."""
    torch.manual_seed(0)
    fill(cache, model.config, 1, FILLED, model.device)
    return torch.randint(3, model.config.vocab_size, (1, 1), device=model.device)


def stock_step(model: LlamaForCausalLM) -> tuple[Step, Step]:
    """A step of transformers' on a static cache, and what sets it back to the first position."""
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    ids = fill_and_draw(model, cache)
    position = torch.full((1, 1), FILLED, device=model.device)

    def step() -> Tensor:
        inputs = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, position_ids=position, use_cache=True, logits_to_keep=1
        )
        return model(**inputs).logits

    def set_back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(FILLED)

    replay = captured(step) if model.device.type == "cuda" else step
    return replay, set_back


def our_step(model: Any) -> tuple[Step, Step]:
    """The step that `generate` of our decoder replays, and what sets it back to the first position."""
    device = model.device
    cache = DecodeCache(model.config, 1, CAPACITY, torch.bfloat16, device)
    ids = fill_and_draw(model, cache)
    step = DecodeStep(cache, set(model.config.layer_types), padded=False)
    step.tokens.copy_(ids)

    def set_back() -> None:
        cache.lengths.fill_(FILLED)
        step.reset(FILLED, torch.full((1,), FILLED, device=device), None)

    set_back()
    if device.type != "cuda":
        return lambda: step.run(model, cache), set_back
    signature = step_signature(model)
    if signature is None:
        raise SystemExit("our decoder's step cannot be captured: step_signature finds a module that it does not know")
    step.capture(model, cache, signature)
    return lambda: (step.replay(), cache), set_back


def our_models(shape: dict[str, Any]) -> dict[str, tuple[str, Callable[[LlamaForCausalLM], Any]]]:
    """By name: what is computed, and how the model is made of the shared weights."""
    plain = EfficientDecoderConfig(**shape)
    sites = {site: BhytConfig(**shape, bhyt_second_site=site, bhyt_seq_len=2048) for site in ("exact", "approx")}
    everywhere = BhytConfig(**shape, bhyt_second_site="exact", bhyt_final="bhyt")
    return {
        "ours, RMSNorm": (f"RMSNorm, {BOTH}", lambda base: ours(base, plain)),
        "ours, BHyT exact": ("BHyT, exact, final RMSNorm", lambda base: ours(base, sites["exact"])),
        "ours, BHyT approximate": ("BHyT, estimated, final RMSNorm", lambda base: ours(base, sites["approx"])),
        "ours, BHyT exact, final too": ("BHyT, exact, at all norms", lambda base: ours(base, everywhere)),
        OUR_LIMIT: ("no norms", lambda base: ours(base, plain, without_norms=True)),
    }


def steps_of(
    base: LlamaForCausalLM, shape: dict[str, Any], only: list[str] | None
) -> dict[str, tuple[str, Step, Step]]:
    """By provider: what is computed, the step, and what sets it back."""
    found: dict[str, tuple[str, Step, Step]] = {}
    liger = base.device.type == "cuda" and has_liger()
    for name, (norm, fused, computes) in STOCK_VARIANTS.items():
        if _is_wanted(name, only) and (liger or norm != "Liger"):
            found[name] = (computes, *stock_step(with_norms(base, norm, fused).eval()))
    for name, (computes, build) in our_models(shape).items():
        if _is_wanted(name, only):
            found[name] = (computes, *our_step(build(base).eval()))
    return found


def _is_wanted(name: str, only: list[str] | None) -> bool:
    return only is None or any(text in name for text in only)


def measure(steps: dict[str, tuple[str, Step, Step]], device: torch.device) -> list[dict[str, Any]]:
    """The lines: medians over rounds, in each of which every provider replays its step so many times."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    replays = {name: step for name, (_, step, _) in steps.items()}
    for turn in range(ROUNDS + 1):
        for _, _, set_back in steps.values():
            set_back()
        for name, found in times(replays, 1, REPLAYS, device, warm_up=0).items():
            samples[name] += found if turn else []
    stock_ms, lines = median_of(samples, STOCK), []
    for part, limit, is_in in (
        (STOCK_PART, LIMIT, lambda name: name in STOCK_VARIANTS),
        (OUR_PART, OUR_LIMIT, lambda name: name not in STOCK_VARIANTS),
    ):
        here = {name: found for name, found in samples.items() if is_in(name)}
        lines += lines_of(part, here, {name: steps[name][0] for name in here}, stock_ms, median_of(samples, limit))
    return lines


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    options = common_options(__doc__, "bhyt_decode.jsonl and bhyt_decode.png")
    options.add_argument("--only", nargs="+", help="only providers whose name holds one of these texts")
    options.add_argument("--tiny", action="store_true", help="a tiny model, to see that the benchmark runs")
    options.add_argument("--draw", action="store_true", help="only draw the picture of the results that are there")
    arguments = options.parse_args(argv)
    device = torch.device(arguments.device)
    shape = TINY if arguments.tiny else SHAPE
    environment = describe_machine(device, arguments.commit)
    environment |= {"shape": "tiny" if arguments.tiny else SHOWN}
    path = arguments.output / "bhyt_decode.jsonl"
    if not arguments.draw:
        steps = steps_of(llama(shape, device).eval(), shape, arguments.only)
        write(path, [{**line, **environment} for line in measure(steps, device)])
    limits = {STOCK_PART: LIMIT, OUR_PART: OUR_LIMIT}
    draw(path, limits, f"A decoding step of a {SHOWN}, bfloat16, CUDA graph (black: no norms)")


if __name__ == "__main__":
    main()
