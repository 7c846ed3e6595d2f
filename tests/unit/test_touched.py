"""What `make test-quick` runs."""

from tests.touched import imports, nearest_tests


def test_the_nearest_tests_are_found() -> None:
    imported = {
        "a/far.py": set(),
        "a/near.py": {"a/far.py"},
        "a/lonely.py": set(),
        "tests/models.py": {"a/near.py"},
        "tests/test_near.py": {"a/near.py"},
        "tests/test_models.py": {"tests/models.py"},
    }
    assert nearest_tests({"a/near.py"}, imported) == ["tests/test_near.py"]
    assert nearest_tests({"a/far.py"}, imported) == ["tests/test_near.py"]
    assert nearest_tests(
        {"models/lonely.py", "b/near.py"}, imported | {"models/lonely.py": set(), "b/near.py": set()}
    ) == [
        "tests/test_models.py",
        "tests/test_near.py",
    ]
    assert nearest_tests({"tests/models.py"}, imported) == ["tests/test_models.py"]
    assert nearest_tests({"tests/test_models.py", "a/near.py"}, imported) == [
        "tests/test_models.py",
        "tests/test_near.py",
    ]
    assert nearest_tests({"a/lonely.py", "README.md", "tests/test_that_was_deleted.py"}, imported) == []


def test_imports_are_those_of_this_repository() -> None:
    imported = imports()
    assert "tests/touched.py" in imported["tests/unit/test_touched.py"]
    assert "slsam_ds/bandit.py" in imported["tests/unit/test_bandit.py"]
    assert "slsam_ds/__init__.py" in imported["tests/distributed/training.py"]
