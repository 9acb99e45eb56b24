"""No pipeline of diffusers is accepted without a test, or turned away without a reason."""

import re

import pytest

from tests.support.settings import apply_settings
from tests.zoo.case import IS_OLD
from tests.zoo.inventory import AS_ANOTHER, exported, forecast_only, refused, shell, with_rows
from tgate_processors import remove_tgate

pytestmark = pytest.mark.skipif(IS_OLD, reason="another diffusers has other pipelines")
GROUPS = {
    "tested": with_rows,
    "as another": lambda: set(AS_ANOTHER),
    "forecast only": lambda: set(forecast_only()),
    "refused": lambda: set(refused()),
}
WAYS = (
    {},
    {"forecast": False},
    {"gate_step": 10},
    {"gate_step": 10, "cross_attention": False},
    {"gate_step": 10, "guidance": "predict"},
)


def test_every_pipeline_is_in_one_of_the_groups():
    known = {name: members() for name, members in GROUPS.items()}
    assert set(AS_ANOTHER.values()) <= known["tested"]
    for name in exported():
        assert [group for group, members in known.items() if name in members] != [], f"{name} is new: see inventory.py"
    assert sum(map(len, known.values())) == len(set.union(*known.values()))


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("group", GROUPS)
def test_what_is_accepted_and_why_others_are_not_is_what_the_inventory_says(group):
    for name in sorted(GROUPS[group]() & set(exported())):
        pipe, accepted, errors = shell(name), [], []
        for settings in WAYS:
            try:
                remove_tgate(apply_settings(pipe, **settings))
                accepted.append(settings)
            except ValueError as error:
                errors.append(str(error))
        if group == "refused":
            assert not accepted, name
            assert re.search(re.escape(refused()[name]), " ".join(errors)), (name, errors)
            assert all(error.startswith(name) for error in errors)
        elif group == "forecast only":
            assert accepted == [{}], name
            assert all(forecast_only()[name] in error and name in error for error in errors), (name, errors)
        else:
            # Not by forecast steps alone.
            assert any("gate_step" in settings for settings in accepted), (name, errors)
