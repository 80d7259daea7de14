"""Recovery training of a converted STEM model with Accelerate: only the tables are trained.

    python examples/train_tables.py smollm-stem smollm-stem-trained --text corpus.txt --steps 200
    accelerate launch examples/train_tables.py smollm-stem smollm-stem-trained --text corpus.txt

Gradients are sparse: only the rows of tokens that occur in a batch have one, and the optimiser updates no others, so
the cost of a step does not depend on the size of the vocabulary. `--no-sparse` trains with dense gradients.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_efficient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="STEM checkpoint folder")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--text", required=True, help="a .txt file to train on")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--sparse", action=argparse.BooleanOptionalAction, default=True, help="sparse gradients")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=torch.float32, stem_sparse_grad=arguments.sparse
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("stem_embed" in name)
    tables = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = hf_efficient.RowSparseAdamW(tables, lr=arguments.learning_rate, weight_decay=0.0)

    with open(arguments.text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[0]
    sequences = ids[: len(ids) // arguments.sequence_length * arguments.sequence_length]
    batches = DataLoader(sequences.view(-1, arguments.sequence_length), arguments.batch_size, shuffle=True)
    optimizer, batches = accelerator.prepare(optimizer, batches)
    # The optimiser averages sparse gradients over the processes itself; dense ones need DistributedDataParallel.
    model = model.to(accelerator.device) if arguments.sparse else accelerator.prepare(model)

    model.train()
    step = 0
    while step < arguments.steps:
        for batch in batches:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == 1:
                accelerator.print(f"step {step}: loss {loss.item():.4f}")
            if step == arguments.steps:
                break

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
        hf_efficient.export(arguments.output)  # the folder's own code, as `convert` writes it


if __name__ == "__main__":
    main()
