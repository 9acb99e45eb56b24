"""No pipeline of diffusers is accepted without a test, or turned away without a reason."""

import re

import pytest

from tests.zoo.case import IS_OLD
from tests.zoo.inventory import AS_ANOTHER, exported, refused, shell, with_rows
from tgate_processors import apply_tgate, remove_tgate

pytestmark = pytest.mark.skipif(IS_OLD, reason="another diffusers has other pipelines")
GROUPS = {"tested": with_rows, "as another": lambda: set(AS_ANOTHER), "refused": lambda: set(refused())}
WAYS = ({}, {"cross_attention": False}, {"guidance": "predict"})


def test_every_pipeline_is_tested_or_as_another_or_refused():
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
        pipe, errors = shell(name), []
        for settings in WAYS:
            try:
                remove_tgate(apply_tgate(pipe, 10, **settings))
            except ValueError as error:
                errors.append(str(error))
        if group == "refused":
            assert len(errors) == len(WAYS), name
            assert re.search(re.escape(refused()[name]), " ".join(errors)), (name, errors)
            assert all(error.startswith((name, "cross_attention=False")) for error in errors)
        else:
            assert len(errors) < len(WAYS), (name, errors)
