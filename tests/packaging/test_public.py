"""What a user's editor offers."""

import pkgutil

import tgate_processors


def test_the_package_has_public_names_and_nothing_else():
    assert [module.name for module in pkgutil.iter_modules(tgate_processors.__path__)] == ["_internal"]
    assert all(hasattr(tgate_processors, name) for name in tgate_processors.__all__)
    public = {name for name in vars(tgate_processors) if not name.startswith("_")}
    assert public == set(tgate_processors.__all__)
