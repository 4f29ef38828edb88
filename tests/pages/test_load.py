"""The page under load for minutes: nothing is lost, nothing grows."""

from collections.abc import Callable
from pathlib import Path

import pytest
from enumeration import new_lab
from load import drawings_of, put_under_load
from serving import served

SECONDS = 600
MOMENTS_MB = 2.5  # of a training, up to 512 MB of weights in all


@pytest.mark.exhaustive
@pytest.mark.timeout(4 * SECONDS)
def test_ten_minutes_of_load_lose_nothing_and_keep_no_memory(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Fifty drawings a second, slow and broken senders, and one training after the other."""
    lab = new_lab(tmp_path / "lab")
    with served("play", lab, "/form", tmp_path / "log", "data=sample") as page:
        found = put_under_load(f"http://127.0.0.1:{page.port}", drawings_of(lab), SECONDS)
    for name, value in found.items():
        record_property(name, value)
    assert [name for name in found["counts"] if name.startswith("lost")] == []
    assert "Traceback" not in (tmp_path / "log").read_text()
    # The page keeps the moments of each training: eight times its weights and logits here.
    memory = found["megabytes"][len(found["megabytes"]) // 10 :]
    kept = MOMENTS_MB * (len(memory) - 1)
    assert memory[-1] - kept <= 1.05 * memory[0], found["megabytes"]
