"""What every ``rejects`` test asserts."""

from collections.abc import Callable
from typing import Any

import pytest


def assert_rejected(
    message: str,
    operator: Callable[..., Any],
    composite: Callable[..., Any],
    *args: Any,
    **named: Any,
) -> None:
    """The operator raises ``message`` (a pattern), and its composite the very same text."""
    with pytest.raises(RuntimeError, match=message) as compiled:
        operator(*args, **named)
    with pytest.raises(RuntimeError) as eager:
        composite(*args, **named)
    assert str(eager.value) == str(compiled.value)
