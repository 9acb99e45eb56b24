"""Pictures that others drew: two vendors' emoji, with their names as captions."""
