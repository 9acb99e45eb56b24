"""What runs beside T-GATE on the same layers: told where the batch changes, or refused."""
