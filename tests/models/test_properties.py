"""Random models, calls and changes by users: fastgate gives what transformers gives, or a FastgateError.

`bench/robustness/properties.py` runs the same check on as many cases as one likes, and prints each failing
one minimised as JSON. Such a line goes into SEEN once it is mended.
"""

from __future__ import annotations

import pytest
from helpers.random_cases import Case, cases
from helpers.random_check import check
from hypothesis import HealthCheck, Phase, given, settings

pytestmark = pytest.mark.slow

# The same cases in every run: a failure here is of the change at hand, not of chance.
fixed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=120,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


@fixed
@given(cases(changed=False))
def test_a_plain_model_is_what_transformers_has(case: Case) -> None:
    check(case)


@fixed
@given(cases(changed=True))
def test_a_changed_model_is_what_transformers_has_or_is_refused(case: Case) -> None:
    check(case)


# Faults that were found this way.
SEEN = (
    '{"hidden_states": 0}',
    '{"layers": 2, "hidden_states": [0, -1], "changes": [{"kind": "last_layer_gone", "place": 20}]}',
    '{"pooler": false, "save": true}',
    '{"changes": [{"kind": "no_weight", "place": 0, "when": "before"}]}',
    '{"changes": [{"kind": "wrap", "place": 15, "when": "after"}]}',
    '{"changes": [{"kind": "tuned_norm", "place": 0, "when": "after"}]}',
    '{"changes": [{"kind": "rms", "place": 0, "when": "after"}]}',
    '{"changes": [{"kind": "dropout_identity", "place": 1, "when": "after"}]}',
    '{"family": "Roberta", "head": "ForMaskedLM", "changes": [{"kind": "keyword_hook", "place": 85}]}',
    '{"layers": 2, "changes": [{"kind": "subclass", "place": 90}]}',
    '{"changes": [{"kind": "frozen", "place": 0}], "freeze": true}',
    '{"changes": [{"kind": "forward", "place": 19, "when": "frozen"}], "freeze": true}',
    '{"changes": [{"kind": "scaling", "place": 0}], "save": true}',
    '{"changes": [{"kind": "activation_function", "place": 0}], "save": true}',
    '{"changes": [{"kind": "config_activation", "place": 0}], "save": true}',
    '{"changes": [{"kind": "eps", "place": 0}], "save": true}',
)


@pytest.mark.parametrize("case", SEEN)
def test_what_once_failed(case: str) -> None:
    check(Case.of(case))
