"""When a run begins."""

import time

import pytest

from visionlora.errors import ConfigError
from visionlora.report.environment import began


def test_a_run_begins_now_or_when_the_build_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for unset in ("", None):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", unset) if unset is not None else monkeypatch.delenv("SOURCE_DATE_EPOCH")
        assert began() == pytest.approx(time.time(), abs=60)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert began() == 1700000000


@pytest.mark.parametrize("said", ["nonsense", "-5", "inf", "9" * 20])
def test_a_time_that_is_none(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", said)
    with pytest.raises(
        ConfigError, match=f"SOURCE_DATE_EPOCH is '{said}' here; set it to seconds since 1970, or unset it"
    ):
        began()
