"""A Trainer script like anybody's, which knows nothing of lowrank_comm: test_launch.py
runs it through the launcher.

Trains a few steps with checkpoints, then resumes from the middle with a fresh model,
and writes both curves.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


class Sentences(torch.utils.data.Dataset):
    """Counting in random steps: something a model can learn a little of."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        ids = (k + (1 + k % 3) * torch.arange(16)) % 50
        return {"input_ids": ids, "labels": ids}


def trainer(given: argparse.Namespace) -> Trainer:
    set_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, use_cache=False, tie_word_embeddings=True, **sizes)
    )
    arguments = TrainingArguments(
        given.output_dir, deepspeed=given.deepspeed, max_steps=6, save_steps=3, logging_steps=1,
        report_to=[], use_cpu=True, learning_rate=1e-2, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, disable_tqdm=True, seed=0,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Sentences())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed")
    parser.add_argument("--output_dir")
    parser.add_argument("--local_rank", type=int)
    given = parser.parse_args()
    curves = {}
    for name, checkpoint in (("whole", None), ("resumed", f"{given.output_dir}/checkpoint-3")):
        one = trainer(given)
        one.train(resume_from_checkpoint=checkpoint)
        logs = [log for log in one.state.log_history if "loss" in log]
        curves[name] = {log["step"]: [log["loss"], log["grad_norm"]] for log in logs}
    if one.is_world_process_zero():
        seen = {
            "curves": curves,
            "local_rank": given.local_rank,
            "argv": sys.argv,
            "name": __name__,
            "path": sys.path[0],
        }
        with Path(given.output_dir, "seen.json").open("w") as file:
            json.dump(seen, file)


if __name__ == "__main__":
    main()
