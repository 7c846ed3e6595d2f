"""Layers: every family's arms in forward order, each trainable parameter in one place, clear refusals, exact groups."""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging import version
from torch import Tensor, nn

from slsam_ds.config import SLSAMConfig
from slsam_ds.model.layers import LayerMap, find_layers, map_layers, norm_layers
from slsam_ds.model.param_groups import split_param_groups
from slsam_ds.protocol import ALWAYS

NUM_BLOCKS = 3
COMMON = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": NUM_BLOCKS, "n_head": 2}
BLOOM = {"vocab_size": 32, "hidden_size": 16, "n_layer": NUM_BLOCKS, "n_head": 2}
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 8}
IMAGE = {"image_size": 8, "patch_size": 4}


def build(architecture: str, config_class: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, config_class)(**settings)
    return getattr(transformers, architecture)(config).train()


# name: (model, path of the blocks, prefixes before the blocks, prefixes after them), told from reading the forwards
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...], tuple[str, ...]]] = {
    "llama": (
        functools.partial(build, "LlamaForCausalLM", "LlamaConfig", **COMMON, tie_word_embeddings=False),
        "model.layers",
        ("model.embed_tokens",),
        ("model.norm", "lm_head"),
    ),
    "llama_tied": (
        functools.partial(build, "LlamaForCausalLM", "LlamaConfig", **COMMON, tie_word_embeddings=True),
        "model.layers",
        ("model.embed_tokens",),
        ("model.norm",),
    ),
    "llama_without_cache": (  # its attention mask then asks for values that the trace does not have
        functools.partial(build, "LlamaForCausalLM", "LlamaConfig", **COMMON, use_cache=False),
        "model.layers",
        ("model.embed_tokens",),
        ("model.norm", "lm_head"),
    ),
    "qwen2": (
        functools.partial(build, "Qwen2ForCausalLM", "Qwen2Config", **COMMON, num_key_value_heads=2),
        "model.layers",
        ("model.embed_tokens",),
        ("model.norm", "lm_head"),
    ),
    "qwen3": (
        functools.partial(build, "Qwen3ForCausalLM", "Qwen3Config", **COMMON, num_key_value_heads=2, head_dim=8),
        "model.layers",
        ("model.embed_tokens",),
        ("model.norm", "lm_head"),
    ),
    "mistral": (
        functools.partial(build, "MistralForCausalLM", "MistralConfig", **COMMON, num_key_value_heads=2),
        "model.layers",
        ("model.embed_tokens",),
        ("model.norm", "lm_head"),
    ),
    "gemma": (
        functools.partial(build, "GemmaForCausalLM", "GemmaConfig", **COMMON, num_key_value_heads=2, head_dim=8),
        "model.layers",
        ("model.embed_tokens",),
        ("model.norm",),
    ),
    "mixtral": (
        functools.partial(build, "MixtralForCausalLM", "MixtralConfig", **COMMON, num_key_value_heads=2),
        "model.layers",
        ("model.embed_tokens",),
        ("model.norm", "lm_head"),
    ),
    "gpt2": (
        functools.partial(build, "GPT2LMHeadModel", "GPT2Config", **GPT2),
        "transformer.h",
        ("transformer.wte", "transformer.wpe"),
        ("transformer.ln_f",),
    ),
    "gpt_neox": (
        functools.partial(build, "GPTNeoXForCausalLM", "GPTNeoXConfig", **COMMON),
        "gpt_neox.layers",
        ("gpt_neox.embed_in",),
        ("gpt_neox.final_layer_norm", "lm_head"),
    ),
    "opt": (  # registers final_layer_norm and project_out before the blocks
        functools.partial(build, "OPTForCausalLM", "OPTConfig", **COMMON, **OPT),
        "model.decoder.layers",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"),
        ("model.decoder.project_out", "model.decoder.final_layer_norm"),
    ),
    "bloom": (
        functools.partial(build, "BloomForCausalLM", "BloomConfig", **BLOOM),
        "transformer.h",
        ("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        ("transformer.ln_f",),
    ),
    "bert_classifier": (
        functools.partial(build, "BertForSequenceClassification", "BertConfig", **COMMON),
        "bert.encoder.layer",
        ("bert.embeddings",),
        ("bert.pooler", "classifier"),
    ),
    "bert_masked": (
        functools.partial(build, "BertForMaskedLM", "BertConfig", **COMMON),
        "bert.encoder.layer",
        ("bert.embeddings",),
        ("cls",),
    ),
    "roberta": (
        functools.partial(build, "RobertaForSequenceClassification", "RobertaConfig", **COMMON),
        "roberta.encoder.layer",
        ("roberta.embeddings",),
        ("classifier",),
    ),
    "deberta": (  # registers rel_embeddings after the blocks, and reads its weight without calling it
        functools.partial(
            build, "DebertaV2ForMaskedLM", "DebertaV2Config", **COMMON, relative_attention=True, position_buckets=4
        ),
        "deberta.encoder.layer",
        ("deberta.embeddings", "deberta.encoder.rel_embeddings"),
        ("cls",),
    ),
    "vit": (
        functools.partial(build, "ViTForImageClassification", "ViTConfig", **{**COMMON, **IMAGE}),
        "vit.layers",
        ("vit.embeddings",),
        ("vit.layernorm", "classifier"),
    ),
    "deit": (
        functools.partial(build, "DeiTForImageClassification", "DeiTConfig", **{**COMMON, **IMAGE}),
        "deit.layers",
        ("deit.embeddings",),
        ("deit.layernorm", "classifier"),
    ),
}

RENAMED = ("gpt_neox", "vit", "deit")


class Block(nn.Module):
    """A residual block whose experts are a nested list."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + sum(expert(hidden) for expert in self.experts)


class Shuffled(nn.Module):
    """Registers in an order that is not forward's, asks for values, draws random numbers, and keeps notes on itself."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.pooler = nn.Linear(8, 8)  # never called
        self.scale = nn.Linear(8, 1)  # its weight is read before the blocks; it is never called
        self.embed = nn.Embedding(16, 8)
        self.num_calls = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        self.num_calls += 1
        scale = self.scale.weight.to(self.blocks[0].experts[0].weight.dtype)  # a block's weight, read before the blocks
        if input_ids.any() and input_ids.max().item() > 15:
            raise ValueError("no such token")
        hidden = self.embed(input_ids) * scale + torch.rand(()) + bool(input_ids.max().item())
        for block in self.blocks:
            if not self.training:  # as a layer drop would
                hidden = block(hidden)
        return self.norm(hidden)


@pytest.fixture
def llama() -> nn.Module:
    return FAMILIES["llama"][0]()


def names(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    return [name for name, _ in parameters]


def beneath(model: nn.Module, *prefixes: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if any(name.startswith(f"{prefix}.") for prefix in prefixes)]


def assert_partition(model: nn.Module, layer_map: LayerMap) -> None:
    placed = [id(parameter) for layer in layer_map for _, parameter in layer.parameters]
    placed += [id(parameter) for _, parameter in layer_map.always + layer_map.frozen]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_arms_of_family(family: str) -> None:
    if family in RENAMED and version.parse(transformers.__version__) < version.parse("5.14"):
        pytest.skip("an older transformers has other names for its modules")
    make, path, before, after = FAMILIES[family]
    model = make()
    layer_map = find_layers(model)
    blocks = [f"{path}.{index}" for index in range(NUM_BLOCKS)]
    assert [layer.name for layer in layer_map] == [f"before {path}", *blocks, f"after {path}"]
    assert [layer.index for layer in layer_map] == list(range(NUM_BLOCKS + 2))
    for layer, prefixes in zip(layer_map, [before, *((block,) for block in blocks), after], strict=True):
        assert names(layer.parameters) == beneath(model, *prefixes)
    assert_partition(model, layer_map)
    assert sum(layer.numel for layer in layer_map) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "bert_classifier"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = FAMILIES[family][0]()
    expected = find_layers(model).describe()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert find_layers(model).describe() == expected


@pytest.mark.parametrize("other_parameters", ["always", "freeze"])
def test_without_arms_for_the_others_arm_i_is_block_i(llama: nn.Module, other_parameters: Any) -> None:
    layer_map = find_layers(llama, other_parameters=other_parameters)
    assert [layer.name for layer in layer_map] == [f"model.layers.{index}" for index in range(NUM_BLOCKS)]
    others = beneath(llama, "model.embed_tokens", "model.norm", "lm_head")
    assert names(layer_map.always) == (others if other_parameters == "always" else [])
    assert names(layer_map.frozen) == (others if other_parameters == "freeze" else [])
    assert_partition(llama, layer_map)


def test_lora_has_arms_for_the_blocks_only(llama: nn.Module) -> None:
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    layer_map = find_layers(model)
    blocks = [f"base_model.model.model.layers.{index}" for index in range(NUM_BLOCKS)]
    assert [layer.name for layer in layer_map] == blocks
    assert all("lora_" in name for layer in layer_map for name in names(layer.parameters))
    assert_partition(model, layer_map)


def test_lora_with_a_trained_head_on_a_model_registered_out_of_order() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["final_layer_norm"])
    model = peft.get_peft_model(FAMILIES["opt"][0](), lora)
    layer_map = find_layers(model)
    assert len(layer_map) == NUM_BLOCKS + 1
    assert layer_map[NUM_BLOCKS].name == "after base_model.model.model.decoder.layers"
    assert all("final_layer_norm" in name for name in names(layer_map[NUM_BLOCKS].parameters))
    assert_partition(model, layer_map)


def test_frozen_by_the_user_stays_frozen_and_numbers_stay_compact(llama: nn.Module) -> None:
    llama.get_submodule("model.layers.1").requires_grad_(False)
    llama.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    layer_map = find_layers(llama)
    assert [layer.index for layer in layer_map] == [0, 1, 2, 3]
    assert [layer.name for layer in layer_map][1:3] == ["model.layers.0", "model.layers.2"]
    assert "model.layers.0.mlp.up_proj.weight" not in names(layer_map[1].parameters)
    assert_partition(llama, layer_map)


def test_nothing_trainable_is_refused(llama: nn.Module) -> None:
    llama.requires_grad_(False)
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM has a trainable parameter"):
        find_layers(llama)


def test_forward_order_beats_registration_order() -> None:
    layer_map = find_layers(Shuffled())
    assert names(layer_map[0].parameters) == ["scale.weight", "embed.weight"]
    # What forward never touches (the pooler, the bias of scale) falls back on where it is registered.
    assert names(layer_map[3].parameters) == ["norm.weight", "norm.bias", "pooler.weight", "pooler.bias", "scale.bias"]


def test_finding_layers_leaves_the_model_and_the_random_state_alone() -> None:
    model = Shuffled().train()
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
    model.blocks[1].eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    assert names(find_layers(model)[0].parameters) == ["scale.weight", "embed.weight"]  # so forward was traced
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.num_calls == 0
    assert calls == []
    assert all(len(module._forward_pre_hooks) == 1 for module in model.modules())


def test_a_forward_that_fails_in_the_blocks_still_tells_what_came_before_them() -> None:
    class Kernel(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            raise NotImplementedError("no meta kernel")

    model = Shuffled()
    model.blocks = nn.ModuleList([Kernel(), Kernel()])
    layer_map = find_layers(model)
    assert names(layer_map[0].parameters) == ["scale.weight", "embed.weight"]
    assert names(layer_map[3].parameters) == ["norm.weight", "norm.bias", "pooler.weight", "pooler.bias", "scale.bias"]


def test_a_forward_that_fails_before_the_blocks_leaves_registration_order() -> None:
    class Picky(Shuffled):
        def forward(self, input_ids: Tensor) -> Tensor:
            raise ValueError(f"{self.embed(input_ids).tolist()} are values that a trace does not have")

    layer_map = find_layers(Picky())
    assert names(layer_map[0].parameters) == ["norm.weight", "norm.bias"]
    assert names(layer_map[3].parameters)[-1] == "embed.weight"


def test_a_forward_wrapped_on_the_instance_is_not_run() -> None:
    model = Shuffled()
    model.forward = functools.partial(pytest.fail, "the model's own forward was run")
    assert names(find_layers(model)[0].parameters) == ["scale.weight", "embed.weight"]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_neither_run_nor_taken_in_registration_order(in_place: bool) -> None:
    model = FAMILIES["opt"][0]()
    expected = [names(layer.parameters) for layer in find_layers(model)]
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model itself was run"))
    if in_place:
        model.compile(backend="eager")
        prefix = ""
    else:
        model = torch.compile(model, backend="eager")
        prefix = "_orig_mod."
    assert [names(layer.parameters) for layer in find_layers(model)] == [
        [prefix + name for name in arm] for arm in expected
    ]


def test_a_wrapper_that_tells_nothing_about_its_input_is_traced_within() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = FAMILIES["opt"][0]()
            self.head = nn.Linear(32, 2)  # outside what is traced: falls back on where it is registered

    model = Wrapper()
    *_, last = find_layers(model)
    assert names(last.parameters) == beneath(
        model, "module.model.decoder.project_out", "module.model.decoder.final_layer_norm", "head"
    )


def test_blocks_registered_under_two_names_are_traced() -> None:
    model = FAMILIES["opt"][0]()
    expected = find_layers(model).describe()
    model.get_submodule("model.decoder").alias = model.get_submodule("model.decoder.layers")
    assert find_layers(model).describe() == expected


@pytest.mark.parametrize("image_size", [8, (8, 4)])
def test_images_of_either_kind_of_size_are_traced(image_size: Any) -> None:
    class Vision(nn.Module):
        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(image_size=image_size, num_channels=3)
            self.norm = nn.LayerNorm(8)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            height, width = (8, 8) if image_size == 8 else image_size
            self.embed = nn.Linear(3 * height * width, 8)

        def forward(self, pixel_values: Tensor) -> Tensor:
            hidden = self.embed(pixel_values.flatten(1))
            for block in self.blocks:
                hidden = block(hidden)
            return self.norm(hidden)

    first, *_, last = find_layers(Vision())
    assert names(first.parameters) == ["embed.weight", "embed.bias"]
    assert names(last.parameters) == ["norm.weight", "norm.bias"]


def test_nested_lists_of_experts_are_part_of_their_block() -> None:
    model = nn.Module()
    model.embed = nn.Embedding(16, 8)
    model.blocks = nn.ModuleList(Block(num_experts=4) for _ in range(3))
    model.head = nn.Linear(8, 16)
    layer_map = find_layers(model)
    assert [layer.name for layer in layer_map] == ["before blocks", "blocks.0", "blocks.1", "blocks.2", "after blocks"]
    assert names(layer_map[2].parameters) == beneath(model, "blocks.1")
    assert len(layer_map[2].parameters) == 8


def test_plain_torch_model_with_sequential_blocks() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    model = nn.Sequential(nn.Embedding(16, 8), nn.Sequential(block(), block()), nn.Linear(8, 4))
    layer_map = find_layers(model)
    assert [layer.name for layer in layer_map] == ["before 1", "1.0", "1.1", "after 1"]
    assert [names(layer.parameters) for layer in layer_map] == [
        ["0.weight"],
        ["1.0.0.weight", "1.0.0.bias", "1.0.2.weight", "1.0.2.bias"],
        ["1.1.0.weight", "1.1.0.bias", "1.1.2.weight", "1.1.2.bias"],
        ["2.weight", "2.bias"],
    ]


def test_a_sequential_of_several_classes_is_no_stack() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 8))
    assert [layer.name for layer in find_layers(model)] == ["before 1", "1.0", "1.1", "after 1"]


def test_a_stack_that_is_the_whole_model() -> None:
    layer_map = find_layers(nn.Sequential(Block(), Block()))
    assert [layer.name for layer in layer_map] == ["0", "1"]


def test_a_small_second_stack_is_no_rival_and_a_large_one_is() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(4))  # 4 blocks of 4 experts of 72 parameters
    model.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])  # 72 parameters: a sixteenth
    assert [layer.name for layer in find_layers(model)][-1] == "after blocks"
    model.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])  # 144: an eighth
    with pytest.raises(ValueError, match=r"several comparable stacks of blocks, blocks .*heads .*slsam\.layers"):
        find_layers(model)


def test_blocks_of_two_classes_are_one_stack() -> None:
    class OtherBlock(Block):
        pass

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), OtherBlock(), Block(), OtherBlock()])
    assert len(find_layers(model)) == 4


def test_a_parameter_shared_by_blocks_belongs_to_the_first() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(2))
    model.blocks[1].experts[0].weight = model.blocks[0].experts[0].weight
    layer_map = find_layers(model)
    assert [len(layer.parameters) for layer in layer_map] == [8, 7]
    assert_partition(model, layer_map)


def test_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match=r"decoder\.block.*encoder\.block.*slsam\.layers"):
        find_layers(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no stack of repeated blocks.*slsam\.layers"):
        find_layers(nn.Linear(4, 4))


def test_patterns_make_one_arm_each_in_their_order(llama: nn.Module) -> None:
    patterns = ["model.layers.2", r".*\.(q|k)_proj\.weight", "lm_head.weight"]
    llama.get_submodule("model.layers.2.self_attn").requires_grad_(False)
    layer_map = find_layers(llama, patterns=patterns)
    assert [layer.name for layer in layer_map] == patterns
    assert names(layer_map[0].parameters) == [
        name for name in beneath(llama, "model.layers.2") if "self_attn" not in name
    ]
    assert names(layer_map[1].parameters) == [
        f"model.layers.{block}.self_attn.{kind}_proj.weight" for block in (0, 1) for kind in "qk"
    ]
    assert names(layer_map[2].parameters) == ["lm_head.weight"]
    assert layer_map.always == ()
    assert "model.norm.weight" in names(layer_map.frozen)
    assert_partition(llama, layer_map)


def test_what_patterns_leave_over_is_trained_always_on_request(llama: nn.Module) -> None:
    layer_map = find_layers(llama, other_parameters="always", patterns=["model.layers"])
    assert names(layer_map.always) == beneath(llama, "model.embed_tokens", "model.norm", "lm_head")
    assert layer_map.frozen == ()


def test_patterns_serve_a_model_that_is_ambiguous() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    assert len(find_layers(model, patterns=["encoder.block.0", "encoder.block.1", "decoder.block"])) == 3


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("model.layers.7", "did you mean model.layers."),
        ("layers", "did you mean model.layers?"),
        ("model.embed", "did you mean model.embed_tokens?"),
        (r"q_proj\.weight", "write regular expressions of parameters' whole names"),
        ("model.layers.0.mlp", "did you mean model.layers."),  # it is there, but frozen
    ],
)
def test_a_pattern_that_matches_nothing_trainable_is_refused(llama: nn.Module, pattern: str, hint: str) -> None:
    llama.get_submodule("model.layers.0.mlp").requires_grad_(False)
    with pytest.raises(ValueError, match="matches no trainable parameter") as refusal:
        find_layers(llama, patterns=["model.layers.1", pattern])
    assert repr(pattern) in str(refusal.value)
    assert hint in str(refusal.value)
    assert not str(refusal.value).endswith(f"did you mean {pattern}?")


def test_a_parameter_matched_twice_is_refused(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.self_attn\.q_proj\.weight' is matched by"):
        find_layers(llama, patterns=["model.layers.1", r".*\.q_proj\.weight"])


def test_a_tied_parameter_is_matched_under_either_name_but_once() -> None:
    model = FAMILIES["llama_tied"][0]()
    assert names(find_layers(model, patterns=["lm_head"])[0].parameters) == ["model.embed_tokens.weight"]
    assert names(find_layers(model, patterns=[r"lm_head\..*"])[0].parameters) == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is matched by"):
        find_layers(model, patterns=["model.embed_tokens", "lm_head"])


def test_records_and_fingerprint(llama: nn.Module) -> None:
    layer_map = find_layers(llama)
    assert layer_map.describe()[-1] == {
        "index": NUM_BLOCKS + 1,
        "name": "after model.layers",
        "numel": 16 + 32 * 16,
        "parameters": ["model.norm.weight", "lm_head.weight"],
    }
    assert layer_map.fingerprint() == find_layers(FAMILIES["llama"][0]()).fingerprint()
    llama.get_submodule("lm_head").requires_grad_(False)
    assert layer_map.fingerprint() != find_layers(llama).fingerprint()


def test_partitioned_parameters_count_whole_and_do_not_stop_the_trace() -> None:
    model = Shuffled()
    expected = find_layers(model).describe()
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
        parameter.data = torch.empty(0)
    assert find_layers(model).describe() == expected


def test_groups_are_split_by_arm_and_keep_their_settings(llama: nn.Module) -> None:
    layer_map = find_layers(llama)
    decayed = [parameter for parameter in llama.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in llama.parameters() if parameter.ndim == 1]
    groups = split_param_groups(
        [{"params": iter(decayed), "weight_decay": 0.1, "note": "x"}, {"params": plain, "weight_decay": 0.0}], layer_map
    )
    # The embedding has no vector: one group; each other arm has both kinds.
    assert [(group["arm"], group["weight_decay"]) for group in groups] == [(0, 0.1)] + [
        (arm, decay) for arm in range(1, NUM_BLOCKS + 2) for decay in (0.1, 0.0)
    ]
    arm_of = {id(parameter): layer.index for layer in layer_map for _, parameter in layer.parameters}
    kinds = {id(parameter): 0.1 if parameter.ndim > 1 else 0.0 for parameter in llama.parameters()}
    for group in groups:
        assert group["params"]
        assert {arm_of[id(parameter)] for parameter in group["params"]} == {group["arm"]}
        assert {kinds[id(parameter)] for parameter in group["params"]} == {group["weight_decay"]}
        assert group.get("note") == ("x" if group["weight_decay"] else None)
    assert sum(len(group["params"]) for group in groups) == len(arm_of)
    torch.optim.AdamW(groups)


def test_a_plain_list_is_one_group_always_comes_last_and_the_rest_is_dropped(llama: nn.Module) -> None:
    everything = list(llama.parameters())
    always = split_param_groups(everything, find_layers(llama, other_parameters="always"))
    assert [group["arm"] for group in always] == [0, 1, 2, ALWAYS]
    assert sum(len(group["params"]) for group in always) == len(everything)
    frozen = split_param_groups(everything, find_layers(llama, other_parameters="freeze"))
    assert [group["arm"] for group in frozen] == [0, 1, 2]
    assert sum(len(group["params"]) for group in frozen) == len(beneath(llama, "model.layers"))


def test_names_kept_by_torch_are_split_alongside(llama: nn.Module) -> None:
    optimizer = torch.optim.SGD(llama.named_parameters(), lr=0.1)
    groups = split_param_groups(optimizer.param_groups, find_layers(llama))
    for group, layer in zip(groups, find_layers(llama), strict=True):
        assert group["param_names"] == names(layer.parameters)


@pytest.mark.parametrize("other_parameters", ["arms", "always"])
def test_a_parameter_in_no_group_is_refused(llama: nn.Module, other_parameters: Any) -> None:
    held = [
        parameter for name, parameter in llama.named_parameters() if name not in ("model.norm.weight", "lm_head.weight")
    ]
    with pytest.raises(ValueError, match=r"2 trainable parameters .* 'model\.norm\.weight'"):
        split_param_groups(held, find_layers(llama, other_parameters=other_parameters))


def test_every_tensor_may_be_an_arm_with_the_depth_of_its_block(llama: nn.Module) -> None:
    blocks, tensors = find_layers(llama), find_layers(llama, granularity="tensor")
    assert sorted(layer.name for layer in tensors) == sorted(name for name, _ in llama.named_parameters())
    assert [layer.parameters[0][0] for layer in tensors] == [layer.name for layer in tensors]
    depth_of = {name: layer.depth for layer in blocks for name, _ in layer.parameters}
    assert [layer.depth for layer in tensors] == [depth_of[layer.name] for layer in tensors]
    assert [layer.depth for layer in tensors] == sorted(layer.depth for layer in tensors)
    norms = [tensors[arm].name for arm in norm_layers(llama, tensors)]
    assert norms == [name for name, _ in sorted(depth_of.items(), key=lambda item: item[1]) if "norm" in name]
    assert norm_layers(llama, blocks) == ()


def test_a_tied_tensor_is_one_arm() -> None:
    settings = {**COMMON, "tie_word_embeddings": True}
    layers = find_layers(build("LlamaForCausalLM", "LlamaConfig", **settings), granularity="tensor")
    assert [layer.name for layer in layers].count("model.embed_tokens.weight") == 1
    assert layers[0].name == "model.embed_tokens.weight"


@pytest.mark.parametrize(("others", "warns"), [("arms", True), ("freeze", False), ("always", False)])
def test_parameters_that_no_pattern_names_are_frozen_aloud(
    others: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    map_layers(model, SLSAMConfig(layers=("1",), other_parameters=others))
    assert model[0].weight.requires_grad == (others == "always")
    assert ("leaves out 2 parameters, which are now frozen: 0.weight, 0.bias. " in caplog.text) == warns


def test_a_stack_that_a_pattern_names_is_one_layer_aloud(llama: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    assert len(find_layers(llama, patterns=["model.layers", "lm_head"])) == 2
    assert f"'model.layers' is a stack of {NUM_BLOCKS} blocks, which become one layer" in caplog.text
