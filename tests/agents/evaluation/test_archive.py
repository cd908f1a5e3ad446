"""What a tournament keeps on disk."""

from __future__ import annotations

import pytest

from offramp.agents.evaluation.archive import plain_scores, scores_of
from offramp.agents.evaluation.scores import require_finite
from offramp.controller.errors import ConfigError
from support.measured import FULL


def test_scores_survive_json_and_nan_is_refused() -> None:
    plain = plain_scores(FULL.scores)
    again = scores_of(plain)
    assert plain_scores(again) == plain
    assert again.depths == {6: 30, 12: 10}
    plain["surprisal"][0] = float("nan")
    with pytest.raises(ConfigError, match="model: gives surprisal that is not finite under p"):
        require_finite(scores_of(plain), "p")
