"""Serves the checkpoints of `make_checkpoints.py` with vLLM on the CPU and compares with transformers' `generate`.

    python tests/engines/serve_with_vllm.py FOLDER [NAME ...]

Runs in a separate environment with vLLM and without hf_efficient. Every checkpoint is served with one worker and with
two tensor-parallel ones: a batch of prompts of many lengths, some longer than a step of chunked prefill, the same with
cached prefixes, and seeded sampling. Then the OpenAI-compatible server, with and without streaming.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

NEW_TOKENS = 16
# A step of chunked prefill; vLLM caches prefixes in blocks of up to 128 tokens on a CPU.
STEP_TOKENS = 64
LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 130, 200)
# For seeded sampling: the prompt in one step, since vLLM 0.32 on a CPU cannot sample with a seed after chunked prefill.
SEEDED = 7
SERVED = ("stem", "composed")
PORT = 8765
ENGINE = {
    "model_impl": "transformers",
    "trust_remote_code": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": STEP_TOKENS,
    "max_num_seqs": 16,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}


def load_with_transformers(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def greedy(model: Any, prompt: list[int], **arguments: Any) -> list[int]:
    """The tokens that transformers generates after `prompt`."""
    import torch

    generated = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, **arguments)
    return generated[0, len(prompt) :].tolist()


def differences(name: str, found: list[list[int]], expected: list[list[int]]) -> list[str]:
    pairs = zip(LENGTHS, found, expected, strict=True)
    return [f"{name}: prompt of {n} tokens gave {a}, transformers gives {b}" for n, a, b in pairs if a != b]


def check_engine(folder: Path, workers: int) -> list[str]:
    """Descriptions of all differences between an engine of `workers` processes and transformers."""
    import torch
    from vllm import LLM, SamplingParams

    model = load_with_transformers(folder)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = [greedy(model, prompt, eos_token_id=None) for prompt in prompts]
    llm = LLM(str(folder), tensor_parallel_size=workers, enable_prefix_caching=True, **ENGINE)

    def run(prompts: list[list[int]], **sampling: Any) -> tuple[list[list[int]], int]:
        parameters = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **sampling)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs], sum(o.num_cached_tokens or 0 for o in outputs)

    found = differences("greedy", run(prompts, temperature=0)[0], expected)
    again, cached = run(prompts, temperature=0)
    found += differences("cached prefixes", again, expected)
    if not cached:
        found.append("prefix caching found nothing")
    sampled, repeated, other = (run(prompts[:SEEDED], temperature=1.0, seed=seed)[0] for seed in (1, 1, 2))
    if sampled != repeated:
        found.append("sampling with one seed gave two results")
    if sampled == other:
        found.append("sampling with two seeds gave one result")
    return found


def request(path: str, body: dict[str, Any]) -> str:
    """The text of a response of the server, streamed or not."""
    call = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode())
    call.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(call, timeout=300) as answer:
        if not body.get("stream"):
            return json.load(answer)["choices"][0]["message"]["content"]
        parts = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for part in parts for choice in json.loads(part)["choices"])


def wait_until_ready(server: subprocess.Popen) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if server.poll() is not None:
                raise SystemExit(f"the server ended with status {server.returncode}") from None
            time.sleep(1)
    raise SystemExit("the server was not ready within ten minutes")


def check_server(folder: Path) -> list[str]:
    """Descriptions of all differences between responses of the OpenAI-compatible server and transformers."""
    from transformers import AutoTokenizer

    model, tokenizer = load_with_transformers(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": "Name three rivers."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = tokenizer.decode(greedy(model, prompt), skip_special_tokens=True)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if value is not True]
    flags = [f"--{name.replace('_', '-')}" for name, value in ENGINE.items() if value is True]
    # `vllm serve` of the CPU wheel looks up the version of a package `vllm`, and that wheel has another name.
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    address = ["--host=127.0.0.1", f"--port={PORT}"]
    server = subprocess.Popen([*module, f"--model={folder}", *address, *options, *flags])
    try:
        wait_until_ready(server)
        body = {"model": str(folder), "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
        answers = {stream: request("/v1/chat/completions", {**body, "stream": stream}) for stream in (False, True)}
    finally:
        server.terminate()
        server.wait(60)
    named = {False: "chat completion", True: "streamed chat completion"}
    return [f"{named[s]} was {a!r}, transformers gives {expected!r}" for s, a in answers.items() if a != expected]


def run_check(check: str, folder: Path) -> None:
    if check == "2":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    found = check_server(folder) if check == "server" else check_engine(folder, int(check))
    for line in found:
        print(f"  {line}", flush=True)
    sys.exit(bool(found))


def run_apart(check: str, folder: Path) -> int | None:
    """Run one check in a forked process, since an engine does not free its memory; the parent has imported vLLM."""
    process = multiprocessing.get_context("fork").Process(target=run_check, args=(check, folder))
    process.start()
    process.join()
    return process.exitcode


def main(arguments: list[str]) -> int:
    os.environ.update(ENVIRONMENT)
    import vllm  # noqa: F401  (once for all checks)

    root, names = Path(arguments[0]), arguments[1:]
    failed = 0
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name in (names or [path.name])):
        for check in ("1", "2", *(("server",) if folder.name in SERVED else ())):
            began = time.monotonic()
            status = run_apart(check, folder)
            failed += bool(status)
            what = "server" if check == "server" else f"{check} worker{'s' * (check == '2')}"
            print(f"{'FAILED' if status else 'ok'} {folder.name}, {what}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
