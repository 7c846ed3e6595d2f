"""The flags and the DeepSpeed JSON: defaults of the demo, and one sentence for everything that cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slsam_ds.cli.arguments import USUAL_TRAINING_FLAGS, ModelArguments, build_short_parser
from slsam_ds.cli.models import choose_max_length, load_model
from slsam_ds.cli.parser import build_parser
from slsam_ds.cli.refusal import UsageError, together
from slsam_ds.cli.settings import read_settings
from slsam_ds.state.files import write_state
from tests.models import tiny_llama
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).parents[2]
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # output folders are made where the program runs


def test_demo_needs_nothing_but_the_json() -> None:
    settings = read_settings(["--deepspeed", ZERO2, "--local_rank=0"])
    assert settings.data.is_demo
    assert settings.data.max_length == 192
    assert settings.training.max_steps == 40
    assert settings.training.output_dir == "outputs/demo"
    assert settings.training.bf16
    assert settings.training.report_to == []
    assert settings.slsam.active_layers == 0.2


def test_flags_win_over_the_demo_defaults() -> None:
    settings = read_settings(
        ["--deepspeed", ZERO2, "--max_steps", "7", "--learning-rate", "3e-6", "--bf16", "False", "--output_dir", "o"]
    )
    assert settings.training.max_steps == 7
    assert settings.training.learning_rate == 3e-6
    assert not settings.training.bf16
    assert Path("o").is_dir()


def test_epochs_asked_for_win_over_the_demo_steps() -> None:
    assert read_settings(["--deepspeed", ZERO2, "--num_train_epochs=2"]).training.max_steps == -1


def test_own_data_get_none_of_the_demo_defaults() -> None:
    settings = read_settings(["--deepspeed", ZERO2, "--train_file", "a.jsonl", "b.jsonl"])
    assert settings.data.train_file == ["a.jsonl", "b.jsonl"]
    assert settings.data.max_length is None
    assert settings.training.max_steps == -1
    assert settings.training.output_dir == "outputs/run"


def test_slsam_flags_lie_over_the_block() -> None:
    settings = read_settings(["--deepspeed", ZERO2, "--slsam", "rho=0.01", "seed=3", "--slsam", "active_layers=2"])
    assert (settings.slsam.rho, settings.slsam.seed, settings.slsam.active_layers) == (0.01, 3, 2)
    assert read_settings(["--deepspeed", ZERO2]).slsam.seed == 0


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "ds_configs").glob("zero*.json")))
def test_shipped_configurations_are_accepted(name: str) -> None:
    settings = read_settings(["--deepspeed", str(ROOT / "ds_configs" / name), "--gradient_accumulation_steps", "3"])
    assert settings.training.hf_deepspeed_config.config["gradient_accumulation_steps"] == 3
    assert str(settings.training.hf_deepspeed_config.config["zero_optimization"]["stage"]) in name


def _json(path: Path, **changes: object) -> str:
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}} | changes))
    return str(path)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--max_stpes", "3"], "--max_stpes: unknown flag; did you mean --max_steps?"),
        (["--max-stpes=3"], "--max-stpes: unknown flag; did you mean --max_steps?"),
        (["--trian_file", "x"], "--trian_file: unknown flag; did you mean --train_file?"),
        (["--qqqqq"], "--qqqqq: unknown flag; see --help"),
        (["data.jsonl"], "data.jsonl: belongs to no flag"),
        (["--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
        (["--peft", "lorra"], "--peft: invalid choice: 'lorra' (choose from 'none', 'lora')"),
        (["--train_file"], "--train_file: expected at least one argument"),
        (["--slsam", "active_layers=0"], "slsam.active_layers=0: choose a fraction in (0, 1] or a count"),
        (["--slsam", "rhoo=0.1"], "slsam.rhoo: unknown key; did you mean rho?"),
        (["--slsam", "rho"], "--slsam rho: expected KEY=VALUE"),
        (["--validation_file", "x.jsonl"], "--validation_file without training data"),
        (["--train_file", "x.jsonl", "--dataset_name", "y"], "--train_file and --dataset_name exclude each other"),
        (["--streaming", "--max_steps", "3"], "--streaming without data of your own: give --train_file"),
        (
            ["--streaming", "--train_file", "x.jsonl"],
            "--streaming: the number of samples is not known in advance: give --max_s",
        ),
        (["--shuffle_buffer", "-1"], "--shuffle_buffer -1: choose a number of rows, or 0"),
        (
            ["--streaming", "--train_file", "x", "y", "--max_steps", "3", "--dataloader_num_workers", "3"],
            "--dataloader_num_workers 3: with --streaming each file is read by one worker: choose from 0 to 2",
        ),
        (["--lora_alpha", "8"], "--lora_alpha: only for training adapters: add --peft lora, or leave the flag out"),
        (["--peft", "lora", "--lora_r", "0"], "--lora_r 0: choose a rank of at least 1"),
        (["--resume_from_checkpoint", "true"], "--resume_from_checkpoint true: there is no checkpoint in outputs/demo"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: not a checkpoint"),
        (["--report_to", "wandbb"], "--report_to wandbb: not installed"),
        (["--load_best_model_at_end", "--eval_strategy", "steps"], "--load_best_model_at_end requires"),
        (
            ["--metric_for_best_model", "accuracy"],
            "--metric_for_best_model accuracy: no such metric; evaluation gives eval_loss, eval_runtime",
        ),
        (
            ["--save_strategy", "best", "--metric_for_best_model", "loss"],
            "--save_strategy best: nothing would be saved",
        ),
        (["--max_steps", "0"], "max_steps=0 with num_train_epochs=3: no step would be taken"),
        (["--num_train_epochs", "0"], "max_steps=-1 with num_train_epochs=0: no step would be taken"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--load_best_model_at_end", "--eval_strategy", "steps", "--save_strategy", "epoch"], "Save strategy: "),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: choose a number of at least 1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: choose"),
        (["--learning_rate=-1"], "--learning_rate -1.0: choose a finite number of at least 0"),
        (["--seed", "-1"], "--seed -1: choose a number from 0 to 4294967295"),
        (["--learning_rate", "nan"], "--learning_rate nan: choose"),
        (["--optim", "lion_8bit"], "--optim lion_8bit: "),
        (["--output_dir", "/dev/null/run"], "--output_dir /dev/null/run: cannot be written to (Not a directory)"),
        (["--output_dir", "/proc/self"], "--output_dir /proc/self: cannot be written to ("),
    ],
)
def test_bad_flags_are_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_settings(["--deepspeed", ZERO2, *argv])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bad_configurations_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    cases = [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: choose 0, 1, 2 or 3"),
        ({"slsam": {"active_layers": 0}}, "slsam.active_layers=0: choose"),
        ({"slsam": {"rhoo": 0.1}}, "slsam.rhoo: unknown key; did you mean rho?"),
        ({"slsam": [1]}, "slsam"),
        (
            {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}},
            "fp16.enabled=true: needs zero_optimization.stage 1, 2 or 3",
        ),
        ({"gradient_accumulation_steps": 5}, "contradicts the flags: gradient_accumulation_steps=5 but --"),
        ({"zero_optimization": 2}, "zero_optimization=2: expected a section"),
        ({"optimizer": "AdamW"}, "optimizer='AdamW': expected a section"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            "zero_optimization.offload_optimizer='cpu': expected a section",
        ),
        ({"bf16": True}, "bf16=True: expected a section"),
        (
            {"zero_optimization": {"stage": 2, "reduce_buckt_size": 5}},
            "zero_optimization.reduce_buckt_size: unknown key; did you mean reduce_bucket_size?",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}},
            "zero_optimization.reduce_bucket_size='many': should be a valid integer",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
            "zero_optimization.reduce_bucket_size=-1: should be greater than ",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise: unknown key; did you mean device?",
        ),
        ({"zero_optimization": {"stage": 2, "qqqqq": 1}}, "zero_optimization.qqqqq: unknown key; remove it"),
        (
            {"zero_optimization": {"stage": 2, "slsam": {"rho": 0.1}}},
            "zero_optimization.slsam: unknown key; move it to the top level",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
            "zero_optimization.offload_optimizer.device=nvme: not supported yet; use cpu",
        ),
        ({"bf16": {"enabld": True}}, "bf16.enabld: unknown key; did you mean enabled?"),
        ({"slsm": {"rho": 0.1}}, "slsm: unknown key; did you mean slsam?"),
        ({"gradient_acumulation_steps": 2}, "gradient_acumulation_steps: unknown key; did you mean gradient_acc"),
    ]
    for changes, sentence in cases:
        with pytest.raises(UsageError) as refused:
            read_settings(["--deepspeed", _json(path, **changes)])
        assert sentence in str(refused.value)
        assert "\n" not in str(refused.value)
    for text, sentence in [("{", "not valid JSON"), ("[1]", "expected a JSON object")]:
        path.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            read_settings(["--deepspeed", str(path)])
    with pytest.raises(UsageError, match=r"nothing\.json: cannot be read"):
        read_settings(["--deepspeed", str(tmp_path / "nothing.json")])
    with pytest.raises(UsageError, match="--deepspeed and --fsdp exclude each other"):
        read_settings(["--deepspeed", ZERO2, "--fsdp", "full_shard"])


def test_checkpoint_is_resumed_only_where_steps_are_left(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    write_state(checkpoint, {}, {})
    flags = ["--deepspeed", ZERO2, "--output_dir", str(tmp_path), "--resume_from_checkpoint"]
    for text, sentence in [
        ("{", "Expecting"),
        ("{}", "'global_step'"),
        ("[]", "list"),
        ('{"global_step": "4"}', "'4'"),
    ]:
        (checkpoint / "trainer_state.json").write_text(text)
        with pytest.raises(UsageError, match=rf"no readable trainer_state\.json \(.*{sentence}"):
            read_settings([*flags, str(checkpoint)])
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')
    for asked in (str(checkpoint), "true"):
        assert read_settings([*flags, asked, "--max_steps", "5"]).checkpoint == str(checkpoint)
        with pytest.raises(UsageError, match=r"--max_steps 4: .*checkpoint-4 was saved at step 4, nothing is left"):
            read_settings([*flags, asked, "--max_steps", "4"])


def test_help_is_short_and_ours_comes_first() -> None:
    text = build_short_parser().format_help()
    assert len(text.splitlines()) < 100
    assert (
        text.index("--model_name_or_path") < text.index("--train_file") < text.index("--slsam") < text.index("--bf16")
    )
    assert "--hub_token" not in text
    assert "--hub_token" in build_parser().format_help()


def test_short_help_tells_the_flags_and_defaults_that_there_are() -> None:
    """It is written down apart from `TrainingArguments`, which would take seconds to import."""
    parser = build_parser()
    texts = {option: action.help for action in parser._actions for option in action.option_strings}
    for name, (_, text, default) in USUAL_TRAINING_FLAGS.items():
        assert f"--{name}" in texts
        actual = parser.get_default(name)
        if default is not None:
            assert actual == default, name
        else:  # nothing worth telling, or the text tells it
            assert not actual or "demo:" in text or "efault" in text, name


@pytest.mark.parametrize("command", ["launch/train.py", "slsam_ds.estimate", "slsam_ds.report"])
def test_help_comes_without_the_libraries_that_train(command: str) -> None:
    """They would take it from two seconds to ten."""
    heavy = ["deepspeed", "peft", "datasets", "transformers.modeling_utils", "transformers.training_args"]
    module = "run_path" if command.endswith(".py") else "run_module"
    script = f"""
import runpy, sys
sys.argv = [{command!r}, "--help"]
try:
    runpy.{module}({command!r}, run_name="__main__")
except SystemExit as left:
    assert not left.code
assert not set({heavy}) & set(sys.modules), set({heavy}) & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


# What accelerate launch brings


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As `accelerate launch` with DeepSpeed sets the environment."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    return monkeypatch


def test_knobs_of_the_launchers_json_are_taken(launcher: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", _json(tmp_path / "ds.json", slsam={"rho": 0.02, "seed": 5}))
    settings = read_settings(["--slsam", "seed=3"])
    assert (settings.slsam.rho, settings.slsam.seed) == (0.02, 3)
    assert settings.training.deepspeed_plugin.zero_stage == 2


def test_the_launchers_precision_is_followed(launcher: pytest.MonkeyPatch) -> None:
    assert read_settings([]).training.bf16
    launcher.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    settings = read_settings([])
    assert settings.training.fp16
    assert not settings.training.bf16


def test_a_bad_launchers_section_is_one_sentence(launcher: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "4")
    with pytest.raises(UsageError, match=r"^accelerate launch: its DeepSpeed section: zero_optimization\.stage=4: ch"):
        read_settings([])
    launcher.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "nothing.json"))
    with pytest.raises(UsageError, match=r"^accelerate launch: its DeepSpeed section: .*nothing\.json"):
        read_settings([])
    launcher.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file")
    with pytest.raises(UsageError, match=r"accelerate launch has a DeepSpeed section already: give one"):
        read_settings(["--deepspeed", ZERO2])


# Models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _load(folder: Path, **flags: object) -> object:
    return load_model(ModelArguments(model_name_or_path=str(folder), **flags), torch.float32)[0]  # type: ignore[arg-type]


def test_folder_is_loaded(folder: Path) -> None:
    model = _load(folder)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny_llama().parameters())


def test_lora_trains_adapters_only(folder: Path) -> None:
    model = _load(folder, peft="lora", lora_r=2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_models_that_cannot_be_used_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    def refusal(path: Path, **flags: object) -> str:
        with pytest.raises(UsageError) as refused:
            _load(path, **flags)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "not a file" in refusal(folder / "config.json")
    assert refusal(folder, peft="lora", lora_target_modules=["nothing"]).startswith("--peft lora: ")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folder / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    assert "the folder holds no tokenizer" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    tiny_tokenizer().save_pretrained(folder)
    assert "cannot be loaded: " in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "the folder holds no weights" in refusal(folder)
    (folder / "config.json").unlink()
    assert "the folder holds no config.json" in refusal(folder)


def test_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match="do not belong together"):
        _load(folder)


def test_max_length_stays_within_the_model() -> None:
    model = tiny_llama()  # 64 positions
    assert choose_max_length(None, model) == 64
    assert choose_max_length(32, model) == 32
    for bad in (0, 1, 65):
        with pytest.raises(UsageError, match="choose from 2 to the model's 64"):
            choose_max_length(bad, model)


# What becomes of a refusal


def test_refusal_is_printed_once_and_ends_with_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise UsageError("this cannot be")

    with pytest.raises(SystemExit) as left:
        together(refuse)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: this cannot be\n"


def test_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyError("ours")

    with pytest.raises(SystemExit) as left:
        together(fail)
    assert left.value.code == 1
    assert "Traceback" in capsys.readouterr().err


def test_result_is_returned() -> None:
    assert together(lambda: 7) == 7
