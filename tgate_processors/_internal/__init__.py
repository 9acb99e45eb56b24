"""
Internal modules, in folders by subject. The public names are in `tgate_processors`.

Imports go one way, which `lint-imports` holds:

    measure -> api -> install -> run, families -> attention, guidance -> caches, denoiser -> plan
"""
