from pathlib import Path

from tests.presets.fuzz import attack


def test_a_changed_preset_is_a_task_or_a_typed_error(tiny_bart_dir: Path) -> None:
    """A few of what `python -m tests.presets.fuzz` tries."""
    outcomes, wrong = attack(tiny_bart_dir, 30, seed=1)
    assert wrong == []
    assert outcomes["loaded"] and outcomes["PresetError"] and outcomes["PresetIntegrityError"]
