"""Everything that is no public name: `tgate_processors` itself has those."""
