"""Measures fidelity to dense attention, attention statistics, cost, and the options of the mask."""
