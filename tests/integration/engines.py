"""What a person adds to the arguments of a Trainer to have it run inside an engine."""

from typing import Any

BATCH = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
ENGINES: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}, **BATCH}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}, **BATCH}},
}
