"""DeepSpeed's configuration as other people write it: known, resolved as documented, or refused in one sentence."""

import copy
import inspect
from typing import Any, ClassVar

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

import slsam_ds
from slsam_ds.engines.deepspeed.build import _resolve_auto
from slsam_ds.engines.deepspeed.config import check_config, offload_device
from slsam_ds.engines.deepspeed.settings import REFUSED, SECTIONS, VALUES

BATCH = {"train_micro_batch_size_per_gpu": 1}


class Watched(dict[str, Any]):
    """Notes which keys it is asked for."""

    asked: ClassVar[set[str]] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Watched":
        return Watched(self.items())


def test_every_key_that_deepspeed_reads_is_known_or_refused() -> None:
    DeepSpeedConfig(Watched(BATCH))
    assert "zero_optimization" in Watched.asked  # it does note them
    assert len(Watched.asked) > 40
    legacy = {"allgather_size"}  # beside `"zero_optimization": true`, which is refused
    assert Watched.asked - legacy <= {*SECTIONS, *VALUES, *REFUSED}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"amp": {"enabled": True}}, "amp={'enabled': True}: not supported; leave it out: use bf16"),
        ({"sparse_gradients": True}, "sparse_gradients=true: not supported; leave it out"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning="),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency.enabled=true: not supported"),
        ({"autotuning": {"enabled": True}}, "autotuning.enabled=true: not supported"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile=true: not supported"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size=2: not supported"),
        ({"zero_optimization": True}, "zero_optimization=True: expected a section"),
        ({"optimizer": {"type": "AdamWW"}}, "optimizer.type='AdamWW': not supported; did you mean AdamW?"),
        ({"optimizer": {"type": "sgd"}}, "optimizer.type='sgd': not supported; did you mean SGD?"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type='OneBitAdam': not supported"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type="),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "optimizer.type=null: expected a name, like"),
        ({"scheduler": {"type": "WarmupLr"}}, "scheduler.type='WarmupLr': not supported; did you mean WarmupLR?"),
        ({"scheduler": {"params": {}}}, "scheduler.type=null: expected a name"),
        ({"data_types": {"grad_accum_dtype": "fp23"}}, "data_types.grad_accum_dtype='fp23': choose"),
        ({"communication_data_type": "int4"}, "communication_data_type='int4': choose"),
        ({"communication_data_type": 16}, "communication_data_type=16: choose"),
        ({"torch_autocast": {"enabled": True, "dtype": "tf32"}}, "torch_autocast.dtype='tf32': choose"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op='sum': not supported"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor=0: choose a number above 0"),
        (
            {"gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 2}},
            "gradient_predivide_factor=2.0: needs zero_optimization.reduce_scatter=false",
        ),
        (
            {"prescale_gradients": True, "zero_optimization": {"stage": 1}},
            "prescale_gradients=true: needs zero_optimization.reduce_scatter=false",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one of them"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        check_config(config)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"type": "adamw", "params": {"lr": "auto"}}, "scheduler": {"type": "LinearLR", "params": {}}},
        {"optimizer": {"type": "SGD"}, "scheduler": {"type": "WarmupDecayLR"}, "compile": {"deepcompile": False}},
        {"autotuning": {"enabled": False}, "data_efficiency": {"enabled": False}, "log_level": "info"},
        {"gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 2, "reduce_scatter": False}},
        {"gradient_predivide_factor": "auto", "bf16": {"enabled": "auto"}, "communication_data_type": "fp32"},
        {"zero_optimization": {"stage": 2, "cpu_offload": True}, "data_types": {"grad_accum_dtype": "bf16"}},
    ],
)
def test_what_can_be_is_not(config: dict[str, Any]) -> None:
    check_config(config)


def test_what_deepspeed_does_not_read_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check_config({"comment": "ours"})
    assert "comment: DeepSpeed has no such configuration key" in caplog.text


def test_old_spellings_of_offloading_are_seen() -> None:
    assert offload_device({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer") == "cpu"
    assert offload_device({"zero_optimization": {"stage": 2}}, "offload_optimizer") == "none"


def test_nested_auto_is_resolved() -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"pin_memory": "auto"}},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        },
    }
    given, model = copy.deepcopy(config), torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    resolved = _resolve_auto(config, model, total_steps=30)
    assert config == given
    assert resolved == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {}},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "weight_decay": 0.0}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 5e-5, "warmup_num_steps": 1, "total_num_steps": 30},
        },
    }
    config["optimizer"]["params"]["lr"] = 2e-3
    assert _resolve_auto(config, model, total_steps=30)["scheduler"]["params"]["warmup_max_lr"] == 2e-3
    given_optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    resolved = _resolve_auto(config, model, given_optimizer, total_steps=30)
    assert resolved["scheduler"]["params"]["warmup_max_lr"] == 3e-3
    with pytest.raises(ValueError, match=r'scheduler\.params\.total_num_steps="auto": give a number, or total_steps'):
        _resolve_auto(config, model)


def test_initialize_takes_what_deepspeed_takes_in_its_order() -> None:
    theirs = inspect.signature(deepspeed.initialize).parameters
    ours = inspect.signature(slsam_ds.initialize).parameters
    positional = [each for each in ours.values() if each.kind is not each.KEYWORD_ONLY]
    assert [each.name for each in positional] == list(theirs)
    assert [each.default for each in positional] == [each.default for each in theirs.values()]
