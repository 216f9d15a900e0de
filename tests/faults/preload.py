"""What every worker imports, once: the fork server loads this module, and each worker
is a fork of it that starts in a moment. No process group and no thread exists yet.
"""

import gc

import accelerate  # noqa: F401
import deepspeed  # noqa: F401
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers  # noqa: F401
from transformers import Trainer, TrainingArguments  # noqa: F401

import lowrank_comm.integrations.deepspeed
import lowrank_comm.integrations.transformers  # noqa: F401
from tests.faults import worker  # noqa: F401

torch.set_num_threads(1)
# else every fork copies what the collector touches
gc.collect()
gc.freeze()
