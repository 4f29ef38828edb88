"""The page under load for minutes: nothing is lost, nothing grows."""

from collections.abc import Callable
from pathlib import Path

import pytest
from enumeration import new_lab
from load import drawings_of, put_under_load
from serving import served

SECONDS = 600


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
    # What is kept for a page is kept after a tenth of the time: later runs replace earlier ones.
    early, late = found["megabytes"][len(found["megabytes"]) // 10], found["megabytes"][-1]
    assert late <= 1.05 * early, found["megabytes"]
