"""Names of parameters: given, found, and without the wrappers' prefixes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lowrank_comm import CompressedOptimizer, PowerSGD
from tests.support.networks import compressed, loss_of, network


def test_parameters_without_names() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(
            [{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1
        ),
        PowerSGD(2),
        min_compression_rate=0,
    )
    loss_of(model, 0).backward()
    with pytest.warns(UserWarning, match=r"named_parameters"):
        optimizer.step()
    assert set(optimizer.error_memory()) == {"0.0", "1.0"}


def test_names_given_beside_the_base() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        PowerSGD(2),
        min_compression_rate=0,
        named_parameters=model.named_parameters(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(optimizer.error_memory()) == {"0.weight", "2.weight"}


@pytest.mark.filterwarnings("ignore:the names of all parameters start with")
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_wrappers_are_stripped_from_names(prefix: str) -> None:
    model = network()
    named = [(prefix + name, p) for name, p in model.named_parameters()]
    optimizer = CompressedOptimizer(
        torch.optim.SGD(named, lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    assert set(optimizer.error_memory()) == {"0.weight", "2.weight"}


def test_a_compiled_models_names_are_the_models_own() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(torch.compile(model, backend="eager").named_parameters(), lr=0.1),
        PowerSGD(2),
        min_compression_rate=0,
    )
    assert set(optimizer.error_memory()) == {"0.weight", "2.weight"}


def test_parameters_that_are_added_later_rename_no_others() -> None:
    model = nn.ModuleDict({"module": nn.Linear(6, 5), "head": nn.Linear(5, 4)}).double()
    first = [(f"module.{name}", p) for name, p in model["module"].named_parameters()]
    optimizer = CompressedOptimizer(
        torch.optim.SGD(first, lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    model["module"](torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    with pytest.warns(UserWarning, match="DistributedDataParallel"):
        optimizer.step()
    kept = optimizer.error_memory()["weight"].clone()
    optimizer.add_param_group(
        {"params": [(f"head.{name}", p) for name, p in model["head"].named_parameters()]}
    )
    assert set(optimizer.error_memory()) == {"weight", "head.weight"}
    assert torch.equal(optimizer.error_memory()["weight"], kept)


@pytest.mark.filterwarnings("ignore:the names of all parameters start with")
def test_a_part_of_the_model_that_is_called_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(6, 5, bias=False)
            self.weight = nn.Parameter(torch.ones(5, 6))

    model = Outer()
    assert set(compressed(model).error_memory()) == {"weight", "module.weight"}
    named = [(f"module.{name}", p) for name, p in model.named_parameters()]
    wrapped = CompressedOptimizer(
        torch.optim.SGD(named, lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    assert set(wrapped.error_memory()) == {"weight", "module.weight"}


def test_names_that_look_wrapped_are_told() -> None:
    """Without attach(), a model wrapped by DDP would be averaged twice
    without a word.
    """
    named = [(f"module.{name}", p) for name, p in network().named_parameters()]
    optimizer = CompressedOptimizer(
        torch.optim.SGD(named, lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    with pytest.warns(UserWarning, match="DistributedDataParallel") as caught:
        optimizer.error_memory()
    # whose line it is
    assert caught[0].filename == __file__
    # and what to do, as the error at the first step says
    assert "optimizer.attach(model)" in str(caught[0].message)
