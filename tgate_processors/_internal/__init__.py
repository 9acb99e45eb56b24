"""Internal modules. The public names are in `tgate_processors`."""
