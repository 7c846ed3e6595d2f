"""Versions: what is installed against what this package asks for, and against what its tests were run with.

Reads what installers have written down and imports none of the packages, so that it has an answer where one is missing.
"""

import importlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import slsam_ds
from slsam_ds.cli.doctor.finding import Finding

OURS = "slsam-ds"
NEEDED = ("torch", "numpy", "safetensors", "accelerate", "transformers", "datasets", "peft", "deepspeed")
"""Of `pyproject.toml`, in an order in which each is imported after what it imports itself."""

_TRIED = Path(__file__).with_name("versions.json")  # a link to docs/versions.json; a wheel holds the file itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """Versions by name; python is one of the names.

    Attributes:
        installed: What there is.
        needed: What has to be there, and the ranges that are supported.
        optional: The ranges of what only some uses need.
        tried: What tests were run with.
    """

    installed: Mapping[str, str]
    needed: Mapping[str, SpecifierSet]
    optional: Mapping[str, SpecifierSet]
    tried: Mapping[str, Sequence[str]]


def read_packages() -> Packages:
    """Those of this Python."""
    needed = dict.fromkeys(NEEDED, SpecifierSet())
    optional: dict[str, SpecifierSet] = {}
    ours = _version_of(OURS)
    if ours is not None:
        needed = {"python": SpecifierSet(metadata.metadata(OURS)["Requires-Python"] or ""), **needed}
        for requirement in map(Requirement, metadata.requires(OURS) or ()):
            extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
            (optional if extra else needed)[canonicalize_name(requirement.name)] = requirement.specifier
    rows = [row["versions"] for row in json.loads(_TRIED.read_text(encoding="utf-8")).values()]
    names = {"python", *needed, *optional}
    found = {name: _version_of(name) for name in (OURS, *needed, *optional)} | {"python": platform.python_version()}
    return Packages(
        installed={name: version for name, version in found.items() if version is not None},
        needed=needed,
        optional=optional,
        tried={name: [row[name] for row in rows if name in row] for name in names},
    )


def package_findings(packages: Packages) -> list[Finding]:
    """What there is to say about versions."""
    findings = list(_of_ourselves(packages.installed.get(OURS)))
    as_tried = []
    for name, allowed in packages.needed.items():
        found = packages.installed.get(name)
        wanted = f"use Python {allowed}" if name == "python" else f'pip install "{name}{allowed}"'
        if found is None:
            findings.append(Finding("problem", f"{name}: not installed", wanted))
        elif not allowed.contains(found, prereleases=True):
            findings.append(Finding("problem", f"{name} {found}: {OURS} supports {allowed}", wanted))
        elif tried := _untried(name, found, packages.tried.get(name, ())):
            findings.append(Finding("note", f"{name} {found}: not tested", f"tests passed with {tried}"))
        else:
            as_tried.append(f"{name} {found}")
    for name, allowed in packages.optional.items():
        found = packages.installed.get(name)
        if found is not None and not allowed.contains(found, prereleases=True):
            findings.append(Finding("note", f"{name} {found}: {OURS} supports {allowed}", "or do without it"))
    fine = [Finding("ok", f"tested versions: {', '.join(as_tried)}")] if as_tried else []
    return fine + findings


def import_findings(names: Sequence[str] = NEEDED) -> list[Finding]:
    """The first package that cannot be imported, as after an update of another; those behind it may import it."""
    logging.disable(logging.WARNING)  # DeepSpeed tells which accelerator it has found
    try:
        for name in names:
            importlib.import_module(name)
    except Exception as error:  # of any kind: packages load compiled code when they are imported
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return [
            Finding("problem", f"{name}: cannot be imported ({said})", "reinstall it in a version that fits the others")
        ]
    finally:
        logging.disable(logging.NOTSET)
    return []


def _of_ourselves(installed: str | None) -> Iterator[Finding]:
    if installed is None:
        yield Finding(
            "note",
            f"{OURS}: not installed but run from its folder, so the supported versions are unknown",
            "pip install it",
        )
    elif Version(installed) != Version(slsam_ds.__version__):
        what = (
            f"{OURS}: {slsam_ds.__version__} runs, but {installed} is installed; its supported versions are used here"
        )
        yield Finding("note", what, "reinstall it")


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _untried(name: str, found: str, tried: Sequence[str]) -> str:
    """Versions between which tests were run, where this one is not between them; else nothing."""
    versions = sorted({_compared(name, each) for each in tried})
    if not versions or versions[0] <= _compared(name, found) <= versions[-1]:
        return ""
    return " to ".join(dict.fromkeys(str(each) for each in (versions[0], versions[-1])))


def _compared(name: str, version: str) -> Version:
    """Of Python the first two numbers; builds of a version count as one."""
    parsed = Version(version)
    return Version(f"{parsed.major}.{parsed.minor}") if name == "python" else Version(parsed.public)
