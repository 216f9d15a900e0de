"""What the optimizer asks of the program around it."""

from __future__ import annotations

import sys
import weakref
from types import SimpleNamespace

import pytest

from lowrank_comm.optimizer.environment import transformers_uses_deepspeed


class Settings:
    """Stands for transformers' DeepSpeed settings, of which it keeps a weak
    reference.
    """


def test_deepspeed_is_in_use_while_its_settings_live(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.integrations.deepspeed"
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert not transformers_uses_deepspeed()
    settings = Settings()
    module = SimpleNamespace(_hf_deepspeed_config_weak_ref=weakref.ref(settings))
    monkeypatch.setitem(sys.modules, name, module)
    assert transformers_uses_deepspeed()
    del settings
    assert not transformers_uses_deepspeed()
