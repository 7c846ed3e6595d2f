"""What is trained, on what, and inside which engine: the same for every mode of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, LlamaConfig

from slsam_ds.cli.data import Columns, Encoder
from slsam_ds.cli.demo import build_datasets, load_demo_model

ENGINES = ("local", "zero0", "zero1", "zero2", "zero3", "fsdp2")

QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
"""Environment of ranks: torch's profiler would tell of every start and stop, and of memory older than itself."""

Window = list[dict[str, Tensor]]
Data = Callable[[int], Window]
"""From the number of a step to this rank's micro-batches."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model, its data and its engine.

    Attributes:
        task: "tokens": a Llama of these sizes on made-up tokens; "docstrings": the demo's model and data.
        blocks: Layers of the model; of the demo's model, at most this many.
        hidden: Its width.
        intermediate: Width of its MLPs; None: 2.7 times `hidden`.
        heads: Of its attention; None: as many as are 64 wide, or 32 where the width asks for that.
        key_value_heads: Heads of keys and values; None: `heads`.
        vocabulary: Number of tokens it knows.
        checkpointed: Activations are computed again in backward.
        batch: Samples of a micro-batch, per rank.
        length: Tokens of a sample; of the demo's data, at most.
        accumulation: Micro-batches of a step.
        active: Share of layers that a step of SL-SAM trains.
        rho: Perturbation radius.
        engine: One of `ENGINES`. "local": no engine, one rank.
        world_size: Ranks.
        device: "cpu": ranks of one thread, over gloo; "cuda": one GPU each, over NCCL.
        dtype: Of the weights that forward reads. "mixed": FSDP2 casts float32 shards to bfloat16.
    """

    task: Literal["tokens", "docstrings"] = "tokens"
    blocks: int = 16
    hidden: int = 320
    intermediate: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None
    vocabulary: int = 8192
    checkpointed: bool = False
    batch: int = 4
    length: int = 128
    accumulation: int = 1
    active: float = 0.2
    rho: float = 0.02
    engine: str = "zero2"
    world_size: int = 2
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "mixed"] = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights as the optimizer's owner holds them."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def shard_policy(self) -> dict[str, Any]:
        """Further arguments of `fully_shard`."""
        if self.dtype != "mixed":
            return {}
        return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}

    def describe(self) -> str:
        """For the report."""
        model = f"{self.blocks} layers of width {self.hidden}"
        if self.task == "docstrings":
            model = "SmolLM2-135M-Instruct on docstrings of the standard library"
        tokens = f"{self.batch} x {self.length} tokens per rank and micro-batch"
        window = f", windows of {self.accumulation}" if self.accumulation > 1 else ""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''} on {self.device}"
        return f"{model}, {self.active:.0%} active, {self.engine}, {ranks}, {self.dtype}, {tokens}{window}"

    def build(self) -> tuple[nn.Module, Data]:
        """The model, the same on every rank, and the data."""
        return self._docstrings() if self.task == "docstrings" else (self._llama(), self._tokens)

    def deepspeed_config(self, num_weights: int) -> dict[str, Any]:
        """What a user would write into the JSON, after `ds_configs/zero2.json`.

        A bucket is no larger than the model: DeepSpeed takes the memory for it, whether it fills it or not.
        """
        bucket = min(50_000_000, num_weights)
        stage = int(self.engine.removeprefix("zero")) if self.engine.startswith("zero") else 0
        zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
        if stage == 3:
            # A model of a benchmark on the CPU would stay gathered whole: of a real one, the norms do.
            zero["stage3_param_persistence_threshold"] = 10 * self.hidden
        elif stage > 0:
            zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        return {
            "train_micro_batch_size_per_gpu": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "bf16": {"enabled": self.dtype == "bfloat16"},
            "zero_optimization": zero,
        }

    def llama_config(self) -> LlamaConfig:
        """Of the Llama of these sizes."""
        heads = self.heads or (max(1, self.hidden // 64) if self.hidden % 64 == 0 else self.hidden // 32)
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate or self.hidden * 27 // 10,
            num_hidden_layers=self.blocks,
            num_attention_heads=heads,
            num_key_value_heads=self.key_value_heads or heads,
            max_position_embeddings=max(2048, self.length),
            attn_implementation="sdpa",
            use_cache=False,
        )

    def _llama(self) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device):  # billions of random numbers take a GPU less than a second
            model = AutoModelForCausalLM.from_config(self.llama_config(), dtype=self.torch_dtype)
        if self.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # else backward runs through every block: docs/estimate.md
        return model.train()

    def _tokens(self, step: int) -> Window:
        """Tokens that can be learned: each is the one before plus a constant of the sample."""
        generator = torch.Generator().manual_seed(10_000 * step + dist.get_rank())
        window = []
        for _ in range(self.accumulation):
            start, stride = torch.randint(1, 97, (2, self.batch, 1), generator=generator)
            tokens = ((start + stride * torch.arange(self.length)) % self.vocabulary).to(self.device)
            window.append({"input_ids": tokens, "labels": tokens})
        return window

    def _docstrings(self) -> tuple[nn.Module, Data]:
        model, tokenizer = load_demo_model(self.torch_dtype)
        model.model.layers = model.model.layers[: self.blocks]
        model.config.num_hidden_layers = len(model.model.layers)
        model.config.use_cache = False
        rows, _ = build_datasets(num_validation=1)
        encoder = Encoder(tokenizer, Columns(kind="pair", names=("prompt", "response")), self.length, "docstrings")
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        per_step = self.batch * self.accumulation * self.world_size

        def sample(number: int) -> Mapping[str, Any]:
            encoded = encoder(rows[order[number % len(rows)]], "docstrings")
            return {name: encoded[name] for name in ("input_ids", "labels")}

        def window(step: int) -> Window:
            start = step * per_step + dist.get_rank() * self.batch * self.accumulation
            starts = range(start, start + self.batch * self.accumulation, self.batch)
            batches = [collate([dict(sample(first + offset)) for offset in range(self.batch)]) for first in starts]
            return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches]

        return model.train(), window
