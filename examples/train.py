"""Train a causal language model with Hugging Face's Trainer, gradients compressed as a
JSON file says.

    deepspeed --num_gpus 2 examples/train.py --deepspeed configs/ds_powersgd_plus.json
    torchrun --nproc_per_node 2 examples/train.py \
        --compression configs/powersgd_plus.json

trains a LLaMA of a million parameters from nothing on Shakespeare, on GPUs or, where
there are none, on the CPU. Every flag of `TrainingArguments` is taken beside the few
below; what the DeepSpeed JSON sets (optimizer, scheduler, clipping), it decides. A
model and a text of one's own:

    deepspeed --num_gpus 2 examples/train.py --deepspeed configs/ds_powersgd_plus.json \
        --model_name_or_path DIR --train_file my.txt --max_steps 1000 \
        --learning_rate 1e-4

The first command needs one line for compression, the import of
`lowrank_comm.integrations.deepspeed` (without it a script trains uncompressed and
DeepSpeed says nothing); the second one callback. With `accelerate launch`
and FSDP the second goes on as accelerate is told. `--fsdp_size` (and
`--dp_replicate_size`, for HSDP) shard the model when it is loaded, on a CPU too.

A run that was killed goes on with `--resume_from_checkpoint true`: from its newest
complete checkpoint, whatever the kill has left beside it. `auto` does the same, and
starts from the beginning where there is no checkpoint yet, so that one command starts a
job and goes on with it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


def asks_for_cpu(words: list[str]) -> bool:
    """Whether `--use_cpu`, `--use_cpu True` or `--use_cpu=True` is among the words of a
    command line.
    """
    for k, word in enumerate(words):
        if word.startswith("--use_cpu"):
            value = word.partition("=")[2] or (
                words[k + 1] if words[k + 1 :] and words[k + 1][:1] != "-" else "true"
            )
            return value.lower() in ("true", "yes", "1", "y", "t")
    return False


ON_CPU = asks_for_cpu(sys.argv) or not torch.accelerator.is_available()
if ON_CPU:
    # read when DeepSpeed is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # else each worker takes all cores
    if "OMP_NUM_THREADS" not in os.environ:
        # torchrun's, DeepSpeed's name
        workers_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, torch.get_num_threads() // workers_here))
        # accelerate would set its own number
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

from checkpoints import find_checkpoint  # noqa: E402
from recording import Bar, FinishedBefore, Recorder, StopWhereFinished  # noqa: E402
from report import SUMMARY, Summary, show  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback  # noqa: E402

# The one line: the section "lowrank_comm" of the JSON now means something.
import lowrank_comm.integrations.deepspeed  # noqa: E402
from lowrank_comm import ConfigError, LowRankCommError  # noqa: E402
from lowrank_comm.communication import leave  # noqa: E402
from lowrank_comm.config import SECTION  # noqa: E402
from lowrank_comm.integrations.transformers import CompressionCallback  # noqa: E402
from lowrank_comm.lab.data.corpora import load_corpus  # noqa: E402
from lowrank_comm.lab.data.models import LLAMAS, new_llama  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
UNCOMPRESSED_CONFIG = "ds_uncompressed"
STEPS = 300
# DeepSpeed's names of what its own all-reduce sends, and bytes of a number
WIRES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass
class ExampleArguments:
    """What to train on what; everything else is TrainingArguments."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start from this model and tokenizer (folder or hub name)."}
    )
    model_size: str = field(
        default="S",
        metadata={"help": "A LLaMA from nothing, if no model is given.", "choices": list(LLAMAS)},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "A text file (UTF-8). Default: Shakespeare's plays."}
    )
    sequence_length: int = field(default=128, metadata={"help": "Tokens in a training example."})
    held_out_tokens: int = field(
        default=40_000,
        metadata={
            "help": "Tokens at the text's end that judge the model only; fewer for a short text."
        },
    )
    cache_dir: str = field(
        default=str(ROOT / ".cache" / "examples"),
        metadata={"help": "Where tokenizers and token ids are kept."},
    )
    compression: str | None = field(
        default=None,
        metadata={"help": "Without --deepspeed: a JSON file with the settings of the compression."},
    )
    fsdp_size: int = field(
        default=0,
        metadata={"help": "Shard the model over so many ranks when it is loaded (FSDP2)."},
    )
    dp_replicate_size: int = field(
        default=1,
        metadata={"help": "With --fsdp_size: so many copies of the sharded model (HSDP)."},
    )
    compare_with: str | None = field(
        default=None,
        metadata={
            "help": (
                f"output_dir of a run to show beside this one. Default: {UNCOMPRESSED_CONFIG}"
                " there, if it fits."
            )
        },
    )


@dataclass
class ExampleTrainingArguments(TrainingArguments):
    """TrainingArguments with defaults for a short run of a small model. A CPU is chosen
    where there is nothing else.
    """

    use_cpu: bool = field(default=ON_CPU, metadata={"help": "Train on the CPU."})
    # Accelerate takes a backend for a promise that there is a group, which only a
    # launcher's processes have.
    ddp_backend: str | None = field(
        default="gloo" if ON_CPU and "RANK" in os.environ else None,
        metadata={"help": "Backend of the process group."},
    )
    max_steps: int = field(
        default=-1,
        metadata={"help": f"Optimizer steps. Default: {STEPS}, unless epochs are given."},
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the text, instead of --max_steps."}
    )  # type: ignore[assignment]
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Examples per worker and micro-step."}
    )
    per_device_eval_batch_size: int = field(
        default=12, metadata={"help": "Examples per worker in an evaluation."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "The highest learning rate."})
    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Steps of linear warm-up, or below 1 their share of all steps."},
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Only where the DeepSpeed JSON has no scheduler."}
    )
    logging_steps: float = field(
        default=1, metadata={"help": "A line of log.jsonl every so many steps."}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Evaluations compute the loss only."}
    )
    eval_on_start: bool = field(
        default=True, metadata={"help": "Evaluate before the first step too."}
    )

    def __post_init__(self) -> None:
        """A folder of its own for each config: runs/<name of the DeepSpeed JSON>."""
        if self.max_steps <= 0 and self.num_train_epochs is None:
            self.max_steps = STEPS
        # Trainer wants a number
        self.num_train_epochs = 3.0 if self.num_train_epochs is None else self.num_train_epochs
        if self.output_dir is None:
            name = Path(self.deepspeed).stem if isinstance(self.deepspeed, str) else "trainer"
            self.output_dir = str(Path("runs") / name)
        super().__post_init__()


def make_model(given: ExampleArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The user's model, or a new LLaMA with the tokenizer's vocabulary."""
    if given.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(given.model_name_or_path)
    return new_llama(
        given.model_size, len(tokenizer), given.sequence_length, tokenizer.eos_token_id
    )


def sharded(
    given: ExampleArguments, args: ExampleTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model sharded over the ranks by FSDP2 when it is loaded: from a folder, so
    that a new one is saved first.
    """
    from transformers.distributed import DistributedConfig

    folder = given.model_name_or_path or str(Path(args.output_dir) / "initial")
    if given.model_name_or_path is None:
        with args.main_process_first(local=False, desc="initial model"):
            if args.process_index == 0:
                make_model(given, tokenizer).save_pretrained(folder)
    replicas = {"dp_replicate_size": given.dp_replicate_size} if given.dp_replicate_size > 1 else {}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        distributed_config=DistributedConfig(fsdp_size=given.fsdp_size, **replicas),
        use_cache=False,
    )


def section_of(given: ExampleArguments, args: ExampleTrainingArguments) -> dict[str, Any] | None:
    """The settings of the compression, from the DeepSpeed JSON or from --compression;
    None: there is none.
    """
    if args.deepspeed:
        if given.compression is not None:
            raise ConfigError(
                f'--compression goes without --deepspeed, whose JSON has a section "{SECTION}"'
                " instead"
            )
        return args.hf_deepspeed_config.config.get(SECTION)
    if given.compression is None:
        return None
    try:
        found = json.loads(Path(given.compression).read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        raise ConfigError(f"--compression {given.compression} is not JSON: {problem}") from None
    return found.get(SECTION, found) if isinstance(found, dict) else found


def wire_of(args: ExampleTrainingArguments) -> str | None:
    """What DeepSpeed sends instead of the gradients' own dtype, where its JSON says so
    and nothing is compressed.
    """
    config: dict[str, Any] = args.hf_deepspeed_config.config if args.deepspeed else {}
    return None if SECTION in config else config.get("communication_data_type")


def find_comparison(given: ExampleArguments, output_dir: Path, own: Summary) -> Path | None:
    """The run to show beside this one: the one asked for, else the uncompressed one, if
    it equals this in all else.
    """
    if given.compare_with is not None:
        return Path(given.compare_with)
    neighbour = output_dir.parent / UNCOMPRESSED_CONFIG
    if (
        own.compressor is None
        or not (neighbour / SUMMARY).is_file()
        or own.differences(Summary.load(neighbour))
    ):
        return None
    return neighbour


def agreed_checkpoint(args: ExampleTrainingArguments, output_dir: Path) -> str | None:
    """Return the checkpoint to resume from, as rank 0 sees the folder: the file systems
    of several nodes may show a new checkpoint at different times.
    """
    found: list[Any] = [None]
    if args.process_index == 0:
        try:
            found = [find_checkpoint(args.resume_from_checkpoint, output_dir)]
        except OSError as problem:
            # the others wait to be told
            found = [problem]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def comparable(
    given: ExampleArguments, args: ExampleTrainingArguments, model: PreTrainedModel, steps: int
) -> dict[str, Any]:
    """What two runs must share so that their difference is that of compression. Where
    DeepSpeed's JSON decides, its word.
    """
    config: dict[str, Any] = args.hf_deepspeed_config.config if args.deepspeed else {}
    size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return {
        "model": f"{type(model).__name__} of {size / 1e6:.2f}M parameters",
        "text": given.train_file or "Shakespeare",
        "sequence length": given.sequence_length,
        "held-out tokens": given.held_out_tokens,
        "tokens per step": (
            args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size
            * given.sequence_length
        ),
        "workers": args.world_size,
        "steps": steps,
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "optimizer": config.get("optimizer", {}).get("type", str(args.optim)),
        "learning rate": args.learning_rate,
        "schedule": config.get("scheduler", {}).get("type", str(args.lr_scheduler_type)),
        "warm-up": args.warmup_steps,
        "weight decay": args.weight_decay,
        "clipping": config.get("gradient_clipping", args.max_grad_norm),
        "seed": args.seed,
    }


def main() -> None:
    """Parse, train, report."""
    parser = HfArgumentParser((ExampleArguments, ExampleTrainingArguments))  # type: ignore[arg-type]
    if ON_CPU:
        # a compilation of minutes, for inference only
        lowrank_comm.integrations.deepspeed.skip_shm_extension()
    given, args = parser.parse_args_into_dataclasses()
    output_dir, section, wire = Path(args.output_dir), section_of(given, args), wire_of(args)
    checkpoint = agreed_checkpoint(args, output_dir)
    if given.fsdp_size and checkpoint is not None:
        raise ConfigError(
            "--fsdp_size shards the model when it is loaded, and transformers cannot resume such"
            " a run"
        )
    if given.compare_with is not None:
        # a wrong folder is noticed before training, not after
        Summary.load(Path(given.compare_with))

    with args.main_process_first(local=True, desc="text and tokenizer"):
        tokenizer = (
            AutoTokenizer.from_pretrained(given.model_name_or_path)
            if given.model_name_or_path is not None
            else None
        )
        corpus = load_corpus(
            Path(given.cache_dir),
            given.train_file,
            LLAMAS[given.model_size]["vocab_size"],
            tokenizer,
        )
    training, held_out = corpus.split(given.held_out_tokens, given.sequence_length)
    if args.process_index == 0:
        kept = len(corpus.ids) - given.held_out_tokens
        print(
            f"text: {kept:,} tokens to train on, {given.held_out_tokens:,} held out"
            f" ({given.train_file or 'Shakespeare'})"
        )
        if args.resume_from_checkpoint:
            print(f"going on from {checkpoint}" if checkpoint else "starting from the beginning")
        if section is None and not args.deepspeed:
            print(
                "neither --deepspeed nor --compression is given: an ordinary run, in which nothing"
                " is compressed"
            )
        if given.fsdp_size:
            print(
                "a model that is sharded when it is loaded: transformers saves no optimizer state,"
                " no run can be resumed"
            )

    set_seed(args.seed)
    if given.fsdp_size:
        args.save_only_model = True
    model = (
        sharded(given, args, corpus.tokenizer)
        if given.fsdp_size
        else make_model(given, corpus.tokenizer)
    )
    # With DeepSpeed the section is in its JSON, and the callback adds the figures to
    # the logs.
    compression = (
        None if section is None else CompressionCallback(None if args.deepspeed else section)
    )
    trainer = Trainer(
        model=model, args=args, processing_class=corpus.tokenizer,
        train_dataset=training, eval_dataset=held_out, data_collator=default_data_collator,
        callbacks=[compression] if compression is not None else None,
    )  # fmt: skip
    recorder = Recorder(
        trainer, output_dir, lambda: compression.compressing if compression is not None else None,
        Path(checkpoint) if checkpoint else None, None if wire is None else WIRES[wire.lower()],
    )  # fmt: skip
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Bar)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(recorder)
    trainer.add_callback(StopWhereFinished())
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FinishedBefore:
        if trainer.is_world_process_zero():
            print(f"{checkpoint} is that of the last step: nothing is left to train")
    trainer.evaluate()

    if trainer.is_world_process_zero():
        setup = comparable(given, args, model, trainer.state.max_steps) | {
            "counted from step": recorder.first_step
        }
        own = recorder.summary(describe(section, output_dir, wire), setup, section)
        own.save(output_dir)
        show(output_dir, find_comparison(given, output_dir, own))
    leave()


def describe(section: dict[str, Any] | None, output_dir: Path, wire: str | None) -> str:
    """A column's heading: the compressor and its rank."""
    if section is None:
        return "uncompressed" if wire is None else f"uncompressed, {wire} on the wire"
    rank = f" rank {section['rank']}" if "rank" in section else ""
    return f"{section.get('compressor', output_dir.name)}{rank}"


if __name__ == "__main__":
    try:
        main()
    except (LowRankCommError, FileNotFoundError) as problem:
        # what the user can mend needs no traceback
        leave()
        sys.exit(f"\n{type(problem).__name__} on rank {os.environ.get('RANK', '0')}: {problem}")
