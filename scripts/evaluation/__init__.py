"""Fidelity, attention statistics, cost and ablation: the measures of this method."""
