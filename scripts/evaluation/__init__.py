"""Fidelity, attention statistics, cost and ablation: what a run of this method is judged by."""
