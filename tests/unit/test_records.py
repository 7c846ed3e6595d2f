"""The files a run leaves behind."""

import json
from pathlib import Path

from slsam_ds.records.files import LAYERS_FILE, STEPS_FILE, StepWriter, read_steps, write_layers


def write(folder: Path, steps: range) -> None:
    writer = StepWriter(folder, first_step=steps.start)
    for step in steps:
        writer.write({"step": step, "loss": float(step)})
    writer.close()


def numbers(folder: Path) -> list[int]:
    return [record["step"] for record in read_steps(folder)]


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    writer = StepWriter(tmp_path, first_step=1)
    writer.write({"step": 1})
    assert numbers(tmp_path) == [1]
    writer.close()


def test_a_resumed_run_leaves_no_gap_and_no_repeat(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))  # went on to 7, but the checkpoint is of step 4
    write(tmp_path, range(5, 9))
    assert numbers(tmp_path) == list(range(1, 9))


def test_a_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(1, 3))
    assert numbers(tmp_path) == [1, 2]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    with (tmp_path / STEPS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    assert numbers(tmp_path) == [1, 2, 3]
    write(tmp_path, range(4, 6))
    assert numbers(tmp_path) == [1, 2, 3, 4, 5]


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    writer = StepWriter(tmp_path, first_step=1)
    writer.write({"step": 1, "loss": float("nan"), "ascent_loss": float("inf"), "rho": 0.5})
    writer.close()
    assert read_steps(tmp_path) == [{"step": 1, "loss": None, "ascent_loss": None, "rho": 0.5}]
    json.loads((tmp_path / STEPS_FILE).read_text(), parse_constant=lambda name: 1 / 0)


def test_layers_are_one_json_list_in_a_folder_made_for_it(tmp_path: Path) -> None:
    layers = [{"index": 0, "name": "model.layers.0", "numel": 3, "parameters": ["a", "b"]}]
    write_layers(tmp_path / "new", layers)
    assert json.loads((tmp_path / "new" / LAYERS_FILE).read_text()) == layers
